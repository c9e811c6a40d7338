"""Builds ``fastst_patch._native``: cffi glue generated from ``native/fst.h`` plus the C engine.

setuptools calls the two command classes below (see pyproject.toml); there is no setup.py.
Needs a C compiler and Python headers, and neither CUDA nor any other SDK. The wheel is
tagged abi3: one build serves CPython 3.10 and later.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.extension import Extension

try:
    from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel as _bdist_wheel

NATIVE = Path("native")  # build commands run in the project's root; setuptools wants it relative
MODULE = "fastst_patch._native"
ABI3 = "cp310"
CALLBACKS = """
extern "Python" int64_t fst_feed_by_python(void *context, uint64_t offset, uint64_t bytes,
                                           void *into);
"""
"""What C calls in Python: of the type ``fst_feed`` in fst.h, and defined in engine/feeds.py."""
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow"]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
"""By the values of ``FASTST_SANITIZE``; fuzz/sanitized.sh builds and runs with them."""


def cdef() -> str:
    """The cffi cdef: the declarations between the markers of ``fst.h``, and the callbacks."""
    header = (NATIVE / "fst.h").read_text(encoding="utf-8")
    begin, end = "/* cdef-begin */", "/* cdef-end */"
    if header.count(begin) != 1 or header.count(end) != 1:
        raise RuntimeError("native/fst.h: expected one cdef-begin and one cdef-end marker")
    return header.split(begin)[1].split(end)[0] + CALLBACKS


def emit_glue(target: Path) -> None:
    """Write the C source of the extension module's Python side."""
    import cffi  # only at build time

    ffi = cffi.FFI()
    ffi.cdef(cdef())
    ffi.set_source(MODULE, '#include "fst.h"', py_limited_api=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    ffi.emit_c_code(str(target))


def sanitizer_flags() -> list[str]:
    """Of the compiler and of the linker."""
    wanted = os.environ.get("FASTST_SANITIZE")
    if not wanted:
        return []
    if wanted not in SANITIZERS:
        raise RuntimeError(f"FASTST_SANITIZE={wanted}: allowed are {', '.join(SANITIZERS)}")
    return [f"-fsanitize={SANITIZERS[wanted]}", "-fno-omit-frame-pointer", "-O1", "-g"]


class build_ext(_build_ext):
    """Adds the glue and the engine's sources, which the pyproject cannot compute."""

    def build_extension(self, ext: Extension) -> None:
        if not sys.platform.startswith("linux"):
            self.announce("fastst-patch: no native engine on this platform; stock is used", 3)
            return
        glue = Path(self.build_temp) / "fst_glue.c"
        emit_glue(glue)
        ext.sources = [str(glue), *sorted(str(path) for path in NATIVE.rglob("fst_*.c"))]
        ext.depends = [str(path) for kind in ("h", "def") for path in NATIVE.rglob(f"fst*.{kind}")]
        ext.include_dirs = [str(NATIVE)]
        ext.py_limited_api = True
        ext.define_macros = [
            ("Py_LIMITED_API", "0x030a0000"),
            ("_FILE_OFFSET_BITS", "64"),
            ("_GNU_SOURCE", ""),
        ]
        ext.extra_compile_args = [
            "-std=c11",
            "-O3",
            "-fvisibility=hidden",
            "-pthread",
            *WARNINGS,
            *(["-Werror"] if os.environ.get("FASTST_WERROR") else []),
            *sanitizer_flags(),
        ]
        ext.extra_link_args = ["-pthread", "-ldl", *sanitizer_flags()]
        super().build_extension(ext)


class bdist_wheel(_bdist_wheel):
    """Tags the wheel for the stable ABI."""

    def finalize_options(self) -> None:
        self.py_limited_api = ABI3
        super().finalize_options()
