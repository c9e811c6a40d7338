"""``doctor`` tells the truth about this machine, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors

import fastst_patch
from fastst_patch import cli, doctor, engine


def test_text_and_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("safetensors", "native engine: loaded from", "O_DIRECT", "patch() would replace",
                 "safetensors.torch.load_file: yes", "left to stock", "libcuda.so.1"):  # fmt: skip
        assert part in text


def test_json_is_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    original = safetensors.safe_open
    assert cli.main(["doctor", "--json", str(tmp_path), str(tmp_path / "absent" / "x")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native"]["loaded"] == engine.native_file()
    assert found["versions"]["safetensors"] == safetensors.__version__
    assert found["paths"][0]["residency_probe"] in ("cachestat", "preadv2", "mincore", "none")
    assert "error" in found["paths"][1]
    assert {t["name"] for t in found["patch"]["targets"]} == set(fastst_patch.patch_map())
    assert safetensors.safe_open is original


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
    assert "FASTST_IO='warp'" in capsys.readouterr().out
