"""Builds ``fastst_patch._native``: cffi glue generated from ``native/fst.h`` plus the C engine.

setuptools calls the two command classes below (see pyproject.toml); there is no setup.py.
Needs a C compiler and Python headers, and neither CUDA nor any other SDK. The wheel is
tagged abi3: one build serves CPython 3.10 and later. It holds a list of what was compiled in
(PEP 770). ``tools/wheels.py`` builds the wheels that are published.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

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


def no_engine() -> str | None:
    """Why the engine is not built for this Python; the package then uses stock."""
    if not sys.platform.startswith("linux"):
        return "no native engine on this platform"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # fst_python.c relies on the lock
        return "no native engine for free-threaded Python"
    return None


def bill_of_materials(version: str) -> dict[str, Any]:
    """What the extension is compiled from, as CycloneDX; run-time dependencies are not inside."""
    from importlib import metadata

    def component(name: str, version: str, license_id: str) -> dict[str, Any]:
        return {
            "type": "library",
            "bom-ref": name,
            "name": name,
            "version": version,
            "licenses": [{"license": {"id": license_id}}],
            "purl": f"pkg:pypi/{name}@{version}",
        }

    parts = [component("cffi", metadata.version("cffi"), "MIT-0")]  # the glue, generated
    if "ziglang" in os.environ.get("CC", ""):  # its compiler-rt, and glibc's start files
        parts.append(component("ziglang", metadata.version("ziglang"), "MIT"))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component("fastst-patch", version, "Apache-2.0")},
        "components": parts,
        "dependencies": [
            {"ref": "fastst-patch", "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


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
        reason = no_engine()
        if reason is not None:
            ext.optional = True  # else an editable installation looks for its file
            self.announce(f"fastst-patch: {reason}; stock is used", 3)
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
    """Tags the wheel for the stable ABI, and adds the bill of materials."""

    def finalize_options(self) -> None:
        if no_engine() is None:
            self.py_limited_api = ABI3
        super().finalize_options()

    def write_wheelfile(self, wheelfile_base: str, *args: Any, **kwargs: Any) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        if no_engine() is not None:
            return
        place = Path(wheelfile_base) / "sboms" / "fastst-patch.cdx.json"
        place.parent.mkdir(exist_ok=True)
        bom = bill_of_materials(self.distribution.get_version())
        place.write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")
