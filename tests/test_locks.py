"""Locks: a signal handler that loads, and a fork, at every place where one is held."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loader_files import of_all_dtypes
from lock_strikes import LIMIT_S, NOT_RUN, SECTIONS
from places import SUPPORT

import fastst_patch
from fastst_patch import engine

PACKAGE = Path(fastst_patch.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "bench" not in path.parts]
MAKERS = {
    "Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier",
    "allocate_lock", "cached_property", "Queue", "SimpleQueue", "LifoQueue", "PriorityQueue",
    "_at_fork_reinit",
}  # fmt: skip


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_lock_is_made_in_one_module(path: Path) -> None:
    if path.name == "locks.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        assert not (isinstance(name, str) and name in MAKERS), f"{name}: see locks.py"


def _takes_lock(item: ast.withitem) -> bool:
    held = item.context_expr
    if isinstance(held, ast.Call):
        return isinstance(held.func, ast.Attribute) and held.func.attr == "lock"
    return isinstance(held, ast.Name) and held.id in {"shared", "_lock"}


def test_every_lock_is_struck() -> None:
    """The lists in lock_strikes.py are those of the source."""
    found = set()
    for path in FILES:
        functions = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        ]
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.With) and any(map(_takes_lock, node.items)):
                    inner = [f for f in functions if f is not function and node in ast.walk(f)]
                    if not any(f in ast.walk(function) for f in inner):
                        found.add(f"{_name(path)} {function.name}")
    assert found == set().union(*SECTIONS.values(), NOT_RUN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of every dtype."""
    folder = tmp_path_factory.mktemp("struck")
    of_all_dtypes(folder, 6)
    return folder


@pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error()))
@pytest.mark.parametrize("mode", ["signal", "fork"])
@pytest.mark.parametrize("scenario", SECTIONS)
def test_struck_under_every_lock(scenario, mode, folder, fake_driver, tmp_path) -> None:
    program = SUPPORT / "lock_strikes.py"
    done = subprocess.run(
        [sys.executable, program, mode, scenario, folder, fake_driver.path],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=LIMIT_S + 60,
        env={**os.environ, "FASTST_CHUNK_BYTES": "65536"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(SECTIONS[scenario])).replace("'", '"')
