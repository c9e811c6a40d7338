"""Packages that put functions of their own in safetensors' place, and stand-ins of their shape.

A stand-in is written as a package, so that it is found as the real one is: by where its functions
were written. ``read`` lists the files that it read ahead by itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# As cattensors: a class and a function, everywhere that safetensors keeps its own; the names come
# in another order.
_WARMING = """
import sys
import safetensors, safetensors.torch

read = []
_original_safe_open = _original_load_file = None

def read_ahead(filename):
    with open(filename, "rb") as file:
        while file.read(1 << 20):
            pass
        read.append(file.name)

class Warming:
    def __init__(self, filename, framework="pt", device="cpu", **options):
        read_ahead(filename)
        self._inner = _original_safe_open(filename, framework, device, **options)
    def __enter__(self):
        return self._inner.__enter__()
    def __exit__(self, *args):
        return self._inner.__exit__(*args)
    def keys(self):
        return self._inner.keys()[::-1]
    def __getattr__(self, name):
        return getattr(self._inner, name)

def warming_load_file(filename, device="cpu"):
    read_ahead(filename)
    return _original_load_file(filename, device=device)

def patch():
    global _original_safe_open, _original_load_file
    _original_safe_open = safetensors.safe_open
    _original_load_file = safetensors.torch.load_file
    for module in (safetensors, safetensors.torch, sys.modules["safetensors._safetensors_rust"]):
        module.safe_open = Warming
    safetensors.torch.load_file = warming_load_file

def unpatch():
    global _original_safe_open, _original_load_file
    for module in (safetensors, safetensors.torch, sys.modules["safetensors._safetensors_rust"]):
        module.safe_open = _original_safe_open
    safetensors.torch.load_file = _original_load_file
    _original_safe_open = _original_load_file = None
"""

# As safetensors-streaming: a function that does not call the original, and one that does where the
# name is no URL; the originals are in a dict and in a closure.
_STREAMING = """
import safetensors, safetensors.torch

read = []
_originals = {}

def open_anything(path, framework="pt", device="cpu"):
    if path.startswith("http://"):
        return "streamed " + path
    raise RuntimeError("this one knows URLs only")

def patch():
    _originals.update(safe_open=safetensors.safe_open, load_file=safetensors.torch.load_file)
    native = safetensors.torch.load_file
    def load_file(path, *, device="cpu"):
        return {"url": path} if path.startswith("http://") else native(path, device=device)
    safetensors.safe_open = open_anything
    safetensors.torch.load_file = load_file

def unpatch():
    safetensors.safe_open = _originals.pop("safe_open")
    safetensors.torch.load_file = _originals.pop("load_file")
"""

# As unsloth: around a library's alias, the original in a closure, by functools.wraps.
_ALIAS = """
import functools, sys

def patch():
    library = sys.modules["a_library"]
    real = library.safe_open
    @functools.wraps(real)
    def _cloning(*args, **kwargs):
        library.calls.append(args)
        return real(*args, **kwargs)
    _cloning.marked = True
    library.safe_open = _cloning

def unpatch():
    library = sys.modules["a_library"]
    library.safe_open = library.safe_open.__wrapped__
"""

STANDINS = {"warming": _WARMING, "streaming": _STREAMING, "around_alias": _ALIAS}
REAL = ("cattensors", "safetensors_streaming")


def _real(name: str) -> ModuleType:
    pytest.importorskip(name, reason=f"{name} is not installed: .ci/run has an environment with it")
    return importlib.import_module(name)


@contextmanager
def package(name: str, folder: Path) -> Iterator[Any]:
    """A package with ``patch`` and ``unpatch``: a stand-in of `STANDINS`, or a real one."""
    if name in REAL:
        yield _real(name)
        return
    (folder / f"{name}.py").write_text(STANDINS[name], encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)
