"""``doctor`` tells the truth about this machine, and changes nothing."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine, errors
from fastst_patch.cli import doctor
from fastst_patch.cli.main import main
from fastst_patch.patching import others


@pytest.fixture(scope="module")
def accelerators() -> dict[str, Any]:
    """What doctor's child process tells, which imports torch for it; asked once."""
    return doctor._accelerators()


@pytest.fixture(autouse=True)
def _asked_once(accelerators: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_accelerators", lambda: copy.deepcopy(accelerators))


def test_the_child_process_answers(accelerators: dict[str, Any]) -> None:
    assert set(accelerators["libraries"]) == set(doctor._LIBRARIES)
    assert bool(accelerators["gpus"]) == torch.cuda.is_available()
    assert "fail" not in str(accelerators["gpu_reason"])


def test_text_and_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "-v", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("safetensors", "native engine: loaded from", "O_DIRECT", "patch() would replace",
                 "safetensors.torch.load_file: yes", "left to stock", "libcuda.so.1"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("columns", ["80", "50"])
@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_the_verdict_comes_first_and_it_fits(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
    verbose: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    folder = tmp_path / ("a long name " * 8) / ("x" * 120)
    folder.mkdir(parents=True)
    assert main(["doctor", *verbose, str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("The fast path works here.")
    # A path that no line can hold stays whole, on a line of its own.
    assert all(len(line) <= int(columns) or len(line.split()) == 1 for line in lines)
    assert any("x" * 120 in line for line in lines)
    assert verbose or len(lines) < 30


def test_json_is_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    original = safetensors.safe_open
    assert main(["doctor", "--json", str(tmp_path), str(tmp_path / "absent" / "x")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == doctor.SCHEMA
    assert found["verdict"].startswith("The fast path works here, but not")
    assert found["problems"] == [f"{tmp_path}/absent/x: there is no such file or folder"]
    assert found["native"]["loaded"] == engine.native_file()
    assert found["versions"]["safetensors"] == safetensors.__version__
    assert found["frameworks"]["torch"]["version"] == importlib.metadata.version("torch")
    assert found["frameworks"]["numpy"]["loads"] == "accelerated"
    assert found["paths"][0]["residency_probe"] in ("cachestat", "preadv2", "mincore", "none")
    assert "error" in found["paths"][1]
    assert {t["name"] for t in found["patch"]["targets"]} == set(fastst_patch.patch_map())
    assert safetensors.safe_open is original


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Others:  # as where torch is not installed
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "transformers", "accelerate", "diffusers")
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [one for one in sys.meta_path if one is not PathFinder] + [Others()]
from fastst_patch.cli.main import main
sys.exit(main(["doctor", sys.argv[1]]))
"""


def test_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0, done
    assert "The fast path works here; see the remarks below." in text
    assert "torch: not installed; other frameworks are loaded without it" in text
    assert "patch() would replace safetensors.safe_open" in text


def test_what_is_in_files_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for name, rows in (("a", 3), ("b", 5)):
        save_file({name: torch.zeros(rows, 1000)}, tmp_path / f"{name}.safetensors")
    assert main(["doctor", str(tmp_path), str(tmp_path / "a.safetensors")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}: 2 files, 2 tensors, 0.000 GB" in text
    assert f"{tmp_path}/a.safetensors: 1 tensors, " in text


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_a_file_that_cannot_be_loaded_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "b.safetensors"
    save_file({"b": torch.zeros(3, 1000)}, path)
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    for named in (tmp_path, path):
        assert main(["doctor", str(named)]) == 1
        assert "b.safetensors: cannot be loaded" in capsys.readouterr().out


def test_what_stock_alone_reads_is_no_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.safetensors"
    save_file({"b": torch.zeros(3, 1000)}, path)

    def doubtful(_: object) -> None:
        raise errors.Fallback("a dtype of tomorrow")

    monkeypatch.setattr(engine, "read_layout", doubtful)
    assert main(["doctor", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not accelerated, stock reads it: a dtype of tomorrow" in text


def test_what_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTST_TREADS", "3")
    assert main(["doctor", str(tmp_path / "nope")]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/nope: there is no such file or folder" in text
    assert (
        "FASTST_TREADS has no effect: there is no such option; did you mean FASTST_THREADS?" in text
    )


def test_absent_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name)
    )
    reasons = {one["name"]: one["reason"] for one in doctor.examine()["patch"]["targets"]}
    assert reasons["diffusers.from_pretrained"] == "diffusers is not installed"


def test_without_the_native_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine._lib, "_native_error", "no compiler was there")
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "NOT LOADED" in text
    assert "no compiler was there" in text
    with pytest.warns(fastst_patch.FallbackWarning, match="no compiler was there"):
        report = fastst_patch.patch()
    assert report.reason == "no compiler was there"
    assert not fastst_patch.is_patched()


def test_bad_environment_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTST_IO", "warp")
    assert doctor.main() == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "FASTST_IO='warp'" in text
    assert "patch() would raise OptionError" in text


def test_code_that_wraps_safetensors_is_told(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """By what stands in safetensors' place, and by what is installed."""
    original = safetensors.torch.load_file

    def counting(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "load_file", counting)
    monkeypatch.setattr(others, "WRAPPERS", {"pytest": "is here", "absent_package": "is not"})
    found = doctor.examine()
    assert safetensors.torch.load_file is counting
    (target,) = (t for t in found["patch"]["targets"] if t["name"] == "safetensors.torch.load_file")
    assert target["patched"]
    assert target["wraps"] == f"{__name__}.counting"
    assert found["verdict"] == "The fast path works here; see the remarks below."
    assert found["wrappers"] == {"pytest": "is here"}
    assert not [one for one in recwarn if issubclass(one.category, errors.FallbackWarning)]
