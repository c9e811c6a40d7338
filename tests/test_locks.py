"""Locks: a signal handler that loads, and a fork, at every place where one is held."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loader_files import of_all_dtypes
from lock_sections import NOT_RUN, SECTIONS
from lock_strikes import LIMIT_S
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
    return isinstance(held, ast.Name) and held.id == "shared"


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
def test_struck_under_every_lock(
    scenario, mode, folder, fake_driver, tmp_path, warm_python
) -> None:
    program, arguments = SUPPORT / "lock_strikes.py", (mode, scenario, folder, fake_driver.path)
    environment = os.environ | {"FASTST_CHUNK_BYTES": "65536"}
    done = warm_python.run(
        program,
        *arguments,
        folder=tmp_path,
        environment=environment,
        limit_s=20 * LIMIT_S,  # a deadlock ends it long before
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(SECTIONS[scenario])).replace("'", '"')


_CROSSED = """
import faulthandler, os, signal, sys, threading
import safetensors
import fastst_patch
from fastst_patch import locks
from fastst_patch.patching import patcher

faulthandler.dump_traceback_later(30, exit=True)
stock = [safetensors.safe_open]
inside, done = threading.Event(), []

def push(options, original=patcher.push):
    inside.set()  # the other thread holds the patcher's lock, and will wait for `shared`
    return original(options)

def fork():
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        fastst_patch.patched().__enter__()
        os._exit(not fastst_patch.is_patched())
    assert os.waitpid(pid, 0)[1] == 0

def block():
    with fastst_patch.patched():
        assert fastst_patch.is_patched()

calls = {"patch": fastst_patch.patch, "patched": block, "unpatch": fastst_patch.unpatch,
         "patch_map": fastst_patch.patch_map, "fork": fork}
signal.signal(signal.SIGUSR1, lambda *_: done.append(calls[sys.argv[1]]()))
block_of_thread = fastst_patch.patched()
thread = threading.Thread(target=block_of_thread.__enter__)
patcher.push = push
with locks.shared:
    thread.start()
    inside.wait()
    patcher.push = push.__defaults__[0]
    signal.raise_signal(signal.SIGUSR1)
    assert done and locks.shared._is_owned()
assert not locks.shared._is_owned()
thread.join()
assert fastst_patch.is_patched()
block_of_thread.__exit__(None, None, None)
fastst_patch.unpatch()
assert safetensors.safe_open is stock[0]
print("fine")
"""


@pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error()))
@pytest.mark.parametrize("call", ["patch", "patched", "unpatch", "patch_map", "fork"])
def test_nested_code_under_shared_patches_while_another_thread_does(call, tmp_path) -> None:
    """Each of them would wait for the other one's lock."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CROSSED, call],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr
