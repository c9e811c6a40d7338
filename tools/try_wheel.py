"""Installs a wheel into a new environment of this Python without a compiler, runs it, removes it.

    python3.12 tools/try_wheel.py dist/fastst_patch-….whl [--without-torch]

--without-torch leaves torch out, for Pythons and machines that have no build of it; NumPy's side
is tried all the same.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

WITHOUT_TORCH = ("cffi", "numpy", "safetensors", "tqdm", "wrapt")  # the other dependencies

CHECK = """
import importlib.util, pathlib, sys
import numpy, safetensors, safetensors.numpy
import fastst_patch
from fastst_patch import engine

assert engine.native_error() is None, engine.native_error()
assert pathlib.Path(engine.native_file()).is_relative_to(sys.prefix), engine.native_file()
values = {"a": numpy.arange(1 << 20, dtype="f4").reshape(1024, 1024), "b": numpy.ones(3, "i8")}
safetensors.numpy.save_file(values, "x.safetensors")

def same(expected, module, framework):
    found = module.load_file("x.safetensors")
    with safetensors.safe_open("x.safetensors", framework) as file:
        row = file.get_slice("a")[7:9]
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert (row == expected["a"][7:9]).all()
    assert "stock" not in fastst_patch.stats()["paths"], fastst_patch.stats()

plain = safetensors.numpy.load_file("x.safetensors")
fastst_patch.patch()
same(plain, safetensors.numpy, "np")
if importlib.util.find_spec("torch"):
    import safetensors.torch, torch
    same({name: torch.from_numpy(plain[name]) for name in plain}, safetensors.torch, "pt")
fastst_patch.unpatch()
"""


def main(arguments: list[str]) -> int:
    """Try one wheel; return the exit status."""
    wheel = Path(arguments[0]).resolve()
    torch = "--without-torch" not in arguments
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"
        pip = [str(programs / "pip"), "--disable-pip-version-check", "-q"]
        # Whatever would be compiled fails: CC=false.
        environment = {**os.environ, "CC": "false", "TMPDIR": name, "FASTST_ENABLED": "0"}

        def run(*command: str) -> str:
            return subprocess.run(
                command, check=True, cwd=name, env=environment, stdout=subprocess.PIPE, text=True
            ).stdout

        if torch:
            run(*pip, "install", str(wheel))
        else:
            run(*pip, "install", "--no-deps", "--no-index", str(wheel))
            run(*pip, "install", "--only-binary", ":all:", *WITHOUT_TORCH)
        run(str(programs / "python"), "-c", CHECK)
        print(run(str(programs / "fastst-patch"), "--version"), end="")
        run(str(programs / "fastst-patch"), "enable")
        run(*pip, "uninstall", "-y", "fastst-patch")
        left = sorted(str(path) for path in (folder / "venv").rglob("*fastst*"))
        if left:
            print("left behind:", *left, sep="\n  ")
            return 1
    print(f"Python {platform.python_version()} on {platform.machine()}: {wheel.name} was installed,"
          f" ran {'with' if torch else 'without'} torch, and was removed")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
