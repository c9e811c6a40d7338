"""`AutoLoader`: where its arguments come from, and that each has its effect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from loader_files import bits

from fastst_patch import AutoLoader, LoaderConfig, OptionError, SingleGroup, load_config

pytestmark = pytest.mark.usefixtures("nothing_left", "elsewhere")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The current folder, without a configuration."""
    monkeypatch.delenv("FASTSAFETENSORS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MEMORY = {
    "max_batch_bytes": None,
    "use_chunk_budget_as_allocation_size": False,
    "device_memory_budget": None,
}


def configured(folder: Path, **data: Any) -> None:
    (folder / "fastsafetensors.json").write_text(json.dumps(data))


# ---------------------------------------------------------------- the configuration


def test_defaults() -> None:
    config = load_config()
    assert config == LoaderConfig() == LoaderConfig.from_dict({})
    assert dataclasses.asdict(config) == {
        "loader": "base", "framework": "pytorch", "debug_log": False, "set_numa": True,
        "disable_cache": True, "use_pipeline": False, "max_concurrent_producers": 1,
        "queue_size": 0, "use_tqdm_on_load": True, **MEMORY, "_extensions": {},
    }  # fmt: skip
    assert config.create_parallel_kwargs() == {"queue_size": -1, **MEMORY}


def test_from_a_dict(caplog) -> None:
    data = {
        "loader": "3fs", "framework": "paddle", "nothing": 3, "queue_size": 1,
        "parallel": {"use_pipeline": True, "queue_size": 4, "never": 0},
        "debug": {"debug_log": True},
        "base": {"max_threads": 3, "framework": "tf", "set_numa": False},
        "oss": {"bucket": "b"},
    }  # fmt: skip
    config = LoaderConfig.from_dict(data)
    assert (config.loader, config.framework, config.debug_log) == ("3fs", "paddle", True)
    assert config.create_parallel_kwargs() == {
        "max_concurrent_producers": 1, "queue_size": 4, "use_tqdm_on_load": True, **MEMORY,
    }  # fmt: skip
    extension = config.get_extension_config("base")
    assert extension == {"max_threads": 3}
    extension["max_threads"] = 7
    assert config.get_extension_config("base") == {"max_threads": 3}
    assert config.get_extension_config("oss") == {"bucket": "b"}
    assert config.get_extension_config("nothing") == {}
    assert "'nothing' is not known" in caplog.text
    assert "'never' is not known" in caplog.text
    for wrong in ({"max_concurrent_producers": 2}, {"parallel": {"max_concurrent_producers": 0}}):
        with pytest.raises(ValueError, match="max_concurrent_producers must be 1"):
            LoaderConfig.from_dict(wrong)


def test_where_it_is_found(elsewhere, monkeypatch) -> None:
    configured(elsewhere, queue_size=5)
    assert load_config().queue_size == 5
    named = elsewhere / "named.json"
    named.write_text('{"queue_size": 6}')
    monkeypatch.setenv("FASTSAFETENSORS_CONFIG", str(named))
    assert load_config().queue_size == LoaderConfig.from_file(str(named)).queue_size == 6
    monkeypatch.setenv("FASTSAFETENSORS_CONFIG", "gone.json")
    for call in (load_config, lambda: AutoLoader(None, [])):
        with pytest.raises(FileNotFoundError, match=r"gone\.json"):
            call()
    with pytest.raises(FileNotFoundError):
        LoaderConfig.from_file("gone.json")
    for text, said in (("{", "Expecting"), ("[1]", r"object .* not \[1\]"), ("3", "not 3")):
        named.write_text(text)
        with pytest.raises(ValueError, match=f"{named}: .*{said}"):
            LoaderConfig.from_file(str(named))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("pg", [None, SingleGroup()], ids=["none", "single"])
def test_every_tensor(paths, expected, watch, pg, capsys) -> None:
    with watch() as seen:
        loader = AutoLoader(pg, paths)
        assert {name: bits(tensor) for name, tensor in loader.iterate_weights()} == expected
        loader.close()
    for path in paths:
        seen.assert_fast(path)
    assert {report.call for report in seen.reports} == {"AutoLoader"}
    assert loader.config == LoaderConfig()
    assert "100%" in capsys.readouterr().err
    with pytest.raises(ValueError, match="closed"):
        loader.iterate_weights()


def test_arguments_reach_the_loader(elsewhere, paths, capsys) -> None:
    configured(
        elsewhere,
        parallel={"use_pipeline": True, "queue_size": 3, "use_tqdm_on_load": False},
        disable_cache=False,
        device_memory_budget=1 << 20,
        base={"copier_type": "nogds", "max_threads": 3, "bbuf_size_kb": 128, "io": "direct"},
    )
    loader = AutoLoader(None, paths)
    settings = loader._loader.loader._settings
    assert (settings.config.threads, settings.config.chunk_bytes) == (3, 128 << 10)
    assert (settings.config.io, settings.config.device_memory_budget) == ("direct", 1 << 20)
    assert loader._loader._queue_size == 3
    assert sum(1 for _ in loader.iterate_weights())
    loader.close()
    assert capsys.readouterr().err == ""


WRONG = [
    ({"loader": "3fs"}, "loader='3fs'"),
    ({"loader": "oss"}, "Unknown loader type: 'oss'"),
    ({"framework": "mxnet"}, "framework='mxnet'"),
    ({"disable_cache": 1}, "disable_cache=1"),
    ({"parallel": {"use_pipeline": "false"}}, "use_pipeline='false'"),
    ({"set_numa": "no"}, "set_numa='no'"),
    ({"base": {"copier_type": "3fs"}}, "copier_type='3fs': allowed are gds, fgds, nogds, unified"),
    ({"max_batch_bytes": 0}, "max_batch_bytes=0"),
    ({"base": {"io": "fast"}}, "io='fast'"),
]


@pytest.mark.parametrize(("data", "text"), WRONG, ids=str)
def test_wrong_configurations(elsewhere, paths, data, text) -> None:
    configured(elsewhere, **data)
    with pytest.raises(OptionError, match=text):
        AutoLoader(None, paths)
    configured(elsewhere, base={"nothing": 1})
    with pytest.raises(TypeError, match="'nothing'"):
        AutoLoader(None, paths)
