"""The version ranges that are promised: who is warned, how often, and who is left alone."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from twice import Same, weights_in

import fastst_patch
from fastst_patch.integrations import INTEGRATIONS
from fastst_patch.patching import targets

RANGES = {(package, *tested) for package, tested in targets.TESTED.items()}
RANGES |= {integration.tested for integration in INTEGRATIONS}


def _moved(version: str, by: int) -> str:
    """The last number of a version that can be moved, moved."""
    numbers = [int(number) for number in version.split(".")]
    last = max(i for i, number in enumerate(numbers) if number + by >= 0)
    return ".".join(map(str, [*numbers[:last], numbers[last] + by, *[99] * (2 - last)]))


@pytest.fixture
def installed(monkeypatch) -> Any:
    """Say which version of a package is installed."""

    def say(version: str | None) -> None:
        def found(name: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", found)
        targets.warn_of_untested.cache_clear()

    yield say
    targets.warn_of_untested.cache_clear()


@pytest.mark.parametrize("tested", sorted(RANGES), ids=" ".join)
def test_ranges(installed, tested) -> None:
    _, oldest, newest = tested
    for version in (oldest, newest, oldest + "+cpu", newest + "rc1"):
        installed(version)
        assert targets.untested_version(*tested) is None, version
    for version in (_moved(oldest, -1), _moved(newest, 1), "99.0", "0.0.1"):
        installed(version)
        assert targets.untested_version(*tested) == version
    installed(None)
    assert targets.untested_version(*tested) is None


def _patch_three_times() -> None:
    for _ in range(3):
        with fastst_patch.patched():
            pass


def test_an_untested_version_warns_once(installed) -> None:
    installed("0.0.7")
    with pytest.warns(fastst_patch.UntestedVersionWarning) as told:
        _patch_three_times()
    texts = [str(warning.message) for warning in told]
    said = [text for text in texts if "tested with safetensors 0.4.3" in text]
    assert len(said) == 1
    assert "0.0.7 is installed" in said[0]
    assert len(texts) == len(set(texts))


def test_transformers_before_5(assert_same, tmp_path) -> None:
    """The target waits for a module that never comes, and nobody is told; files load fast."""
    transformers = pytest.importorskip("transformers")
    if not re.match(r"4\.", transformers.__version__):
        pytest.skip(f"transformers {transformers.__version__} is not before 5")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2
    )
    folder = tmp_path / "model"
    transformers.BertModel(config).save_pretrained(folder)

    def load(_: Path) -> Any:
        return transformers.BertModel.from_pretrained(folder)

    ours, theirs = Same(assert_same, tmp_path)(load)
    assert theirs.error is None
    ours.assert_fast(weights_in(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastst_patch.patched():
            load(folder)
            status = fastst_patch.patch_map()["transformers.from_pretrained"]
    assert not status.patched
    assert "not imported yet" in str(status.reason)
