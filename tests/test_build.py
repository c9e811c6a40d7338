"""build_native.py: the list of parts in a wheel, and Pythons for which there is no engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
from importlib import metadata
from types import ModuleType

import pytest
from places import ROOT

setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")


@pytest.fixture
def build_native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(build_native, name):
    extension = setuptools.Extension(build_native.MODULE, [])
    facts = {"name": "x", "version": "1.2", "ext_modules": [extension]}
    made = getattr(build_native, name)(setuptools.Distribution(facts))
    made.ensure_finalized()
    return made


def test_wheel_lists_what_is_compiled_in(build_native, tmp_path, monkeypatch) -> None:
    pytest.importorskip("cffi")
    monkeypatch.setenv("CC", "cc")
    command(build_native, "bdist_wheel").write_wheelfile(str(tmp_path))
    (made,) = (tmp_path / "sboms").iterdir()
    bom = json.loads(made.read_text())
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    assert bom["metadata"]["component"]["purl"] == "pkg:pypi/fastst-patch@1.2"
    found = {part["name"]: part["version"] for part in bom["components"]}
    assert found == {"cffi": metadata.version("cffi")}
    assert "Tag: cp310-abi3-" in (tmp_path / "WHEEL").read_text()


def test_free_threaded_python_gets_no_engine(build_native, tmp_path, monkeypatch, capsys) -> None:
    known = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED" or known(name)
    )
    wheel = command(build_native, "bdist_wheel")
    wheel.write_wheelfile(str(tmp_path))
    assert "abi3" not in (tmp_path / "WHEEL").read_text()
    assert not (tmp_path / "sboms").exists()
    builder = command(build_native, "build_ext")
    monkeypatch.setattr(builder, "announce", lambda text, level: print(text))
    (extension,) = builder.extensions
    builder.build_extension(extension)
    assert capsys.readouterr().out == (
        "fastst-patch: no native engine for free-threaded Python; stock is used\n"
    )
    assert extension.optional


FREE_THREADED = """
import sys, sysconfig
sys.modules["fastst_patch._native"] = None  # importing it raises ImportError
sysconfig.get_config_var = lambda name: name == "Py_GIL_DISABLED"
import fastst_patch
print(fastst_patch.patch())
print(fastst_patch.engine.native_error())
"""


def test_free_threaded_python_is_told_why(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREE_THREADED], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "no native engine for free-threaded Python" in done.stdout.splitlines()[-1]
