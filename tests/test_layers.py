"""Dependencies point one way: a module imports only from layers below its own."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("fastst_patch").origin).parent

# From the top down; modules of one row may import each other.
LAYERS = [
    {"__main__", "_site", "cli"},
    {"bench"},
    {"__init__"},
    {"patching"},
    {"integrations"},
    {"loader"},
    {"sharding"},
    {"dropin"},
    {"files"},
    {"arrays", "device", "dtypes", "tensors"},
    {"engine", "sources"},
    {
        *("config", "errors", "interrupts", "layout", "locks", "machine", "option_values"),
        *("report", "report_table", "runs", "stock", "stock_objects", "terminal"),
    },
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Names of our own top-level modules that a file imports, wherever in it."""
    found: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth + 1 or module.split(".")[0] == "fastst_patch":
                inner = module.removeprefix("fastst_patch").strip(".")
                names = [inner] if inner else [alias.name for alias in node.names]
                found.update(name.split(".")[0] for name in names)
        elif isinstance(node, ast.Import):
            parts = [a.name.split(".") for a in node.names if a.name.startswith("fastst_patch.")]
            found.update(part[1] for part in parts)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = _layer(path)
    assert own in RANK, f"{path.name}: give it a place in LAYERS"
    for name in _imports(path) - {"_native", own}:
        target = name if name in RANK else "__init__"
        assert RANK[target] >= RANK[own], f"{own} imports {name}, which lies above it"


def test_only_config_reads_the_environment() -> None:
    readers = {p.name for p in FILES if re.search(r"os\.environ|getenv", p.read_text())}
    # sitecustomize.py says why; enable.py holds the line of a .pth file, which runs before us.
    assert readers - {"config.py", "sitecustomize.py", "enable.py"} == set()


def test_only_engine_imports_the_native_module() -> None:
    importers = [str(p.relative_to(PACKAGE)) for p in FILES if "_native" in _imports(p)]
    assert set(importers) <= {"engine/_lib.py"}


def test_import_is_cheap_and_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, fastst_patch; fastst_patch.patch(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"
