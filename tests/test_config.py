"""Options: precedence, validation, and that each has an effect."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fastst_patch
from fastst_patch import OptionError
from fastst_patch.cli import doctor
from fastst_patch.config import (
    current,
    environment_enabled,
    environment_profile,
    environment_targets,
    loader_config_path,
    pop,
    push,
)  # fmt: skip

MIB = 1 << 20


# ---- validation ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("io", "fast"), ("io", 3), ("io", "cufile"), ("page_cache", "maybe"), ("threads", -1),
        ("threads", 65), ("threads", "many"), ("chunk_bytes", 1), ("chunk_bytes", "4 parsecs"),
        ("chunk_bytes", True), ("pinned_bytes", -1), ("device_memory_budget", "1XiB"),
        ("tensors", "views"), ("fallback", "silent"), ("verify", "perhaps"), ("progress", 2),
        ("log_level", "loud"), ("small_file_bytes", -1),
    ],
)  # fmt: skip
def test_bad_value_names_option_value_and_what_is_allowed(name: str, value: object) -> None:
    before = fastst_patch.config()
    with pytest.raises(fastst_patch.OptionError) as caught:
        fastst_patch.patch(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert "allowed" in str(caught.value)
    assert isinstance(caught.value, fastst_patch.FaststError)
    assert fastst_patch.config() == before
    assert not fastst_patch.is_patched()


def test_unknown_option_and_target() -> None:
    with pytest.raises(fastst_patch.OptionError, match="unknown option 'speed'"):
        fastst_patch.patch(speed="max")
    with pytest.raises(fastst_patch.OptionError, match="unknown target 'torch\\.load'"):
        fastst_patch.patch("torch.load")
    with pytest.raises(fastst_patch.OptionError, match="unknown target 3: allowed are safetensors"):
        fastst_patch.patch([3])
    with pytest.raises(fastst_patch.OptionError, match="option targets=3: allowed are safetensors"):
        fastst_patch.patch(3)


@pytest.mark.parametrize("name", ["verify", "progress"])
def test_numbers_that_are_booleans(name: str) -> None:
    for value, meant in ((1, True), (0, False), ("1", True), ("off", False)):
        with fastst_patch.config_context(**{name: value}) as config:
            assert getattr(config, name) is meant


@pytest.mark.parametrize(
    "options",
    [{"io": "mmap", "page_cache": "drop"}, {"io": "mmap", "tensors": "owned"}],
)
def test_options_that_contradict_each_other(options: dict[str, str]) -> None:
    with pytest.raises(fastst_patch.OptionError, match="exclude each other"):
        fastst_patch.patch(**options)


def test_environment_below_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_THREADS", "3")
    monkeypatch.setenv("FASTST_CHUNK_BYTES", "2MiB")
    monkeypatch.setenv("FASTST_VERIFY", "yes")
    assert fastst_patch.config().threads == 3
    assert fastst_patch.config().chunk_bytes == 2 * MIB
    assert fastst_patch.config().verify is True
    with fastst_patch.config_context(threads=5):
        assert fastst_patch.config().threads == 5
        assert fastst_patch.config().chunk_bytes == 2 * MIB
    assert fastst_patch.config().threads == 3


_GIVEN = {
    "io": ("Direct", "direct"), "page_cache": ("drop", "drop"), "threads": ("7", 7),
    "chunk_bytes": ("1MiB", MIB), "pinned_bytes": ("3 GB", 3 * 10**9),
    "device_memory_budget": ("0", 0), "tensors": ("owned", "owned"), "fallback": ("warn", "warn"),
    "verify": ("on", True), "progress": ("1", True), "log_level": ("INFO", "info"),
    "small_file_bytes": ("2k", 2048), "node_id": ("here", "here"),
    "remote_cache": ("/data", "/data"), "remote_cache_bytes": ("2k", 2048),
    "remote_offline": ("1", True),
    "host_memory_budget": ("1KiB", 1024), "storage_options": ('{"a": 1}', {"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(fastst_patch.Config)])
def test_every_option_has_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = _GIVEN[name]
    default = getattr(fastst_patch.Config(), name)
    assert value != default
    monkeypatch.setenv(f"FASTST_{name.upper()}", text)
    assert getattr(fastst_patch.config(), name) == value
    with fastst_patch.config_context(**{name: default}) as config:
        assert getattr(config, name) == default
    if name in ("node_id", "remote_cache"):  # any text will do
        return
    monkeypatch.setenv(f"FASTST_{name.upper()}", "no such value")
    shown = "" if name == "storage_options" else "='no such value'"  # which may be a password
    with pytest.raises(fastst_patch.OptionError, match=f"FASTST_{name.upper()}{shown}"):
        fastst_patch.config()


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_STORAGE_OPTIONS", '{"key": "SECRET"}')
    config = fastst_patch.config()
    assert config.storage_options == {"key": "SECRET"}
    assert config.public()["storage_options"] == ["key"]
    assert "SECRET" not in repr(config) + str(config.public()) + str(doctor.examine([]))


@pytest.mark.parametrize("which", ["geteuid", "getegid"])
def test_no_variable_counts_with_the_rights_of_another(monkeypatch, which) -> None:
    monkeypatch.setenv("FASTST_ENABLED", "1")
    monkeypatch.setenv("FASTST_STORAGE_OPTIONS", '{"proxy_url": "http://elsewhere"}')
    monkeypatch.setenv("FASTST_TARGETS", "safetensors.safe_open")
    monkeypatch.setenv("FASTST_PROFILE_FILE", "/somewhere")
    monkeypatch.setenv("FASTSAFETENSORS_CONFIG", "/somewhere")
    read = (
        environment_enabled, environment_targets, environment_profile,
        loader_config_path, lambda: fastst_patch.config().storage_options,
    )  # fmt: skip
    assert None not in [one() for one in read]
    monkeypatch.setattr(os, which, lambda: 4_000_000)
    assert [one() for one in read] == [None] * 5


def test_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_IO", "warp")
    with pytest.raises(fastst_patch.OptionError, match="FASTST_IO='warp'"):
        fastst_patch.patch()


@pytest.mark.parametrize("bad", [{"FASTST_THREADS": "many"}, {"FASTST_IO": "mmap"}])
def test_putting_back_never_raises(monkeypatch, bad) -> None:
    """Not even where the environment went bad meanwhile: that is for who asks for it next."""
    monkeypatch.setenv("FASTST_THREADS", "3")
    with fastst_patch.patched():
        fastst_patch.patch(io="direct", threads=5)
        with pytest.raises(ZeroDivisionError), fastst_patch.config_context(tensors="owned"):
            for name, value in bad.items():
                monkeypatch.setenv(name, value)
            raise ZeroDivisionError
        fastst_patch.unpatch()
        in_force = current()
        assert (in_force.io, in_force.tensors) != ("direct", "owned")
        assert in_force.threads == 3
    assert not fastst_patch.is_patched()
    if "FASTST_THREADS" in bad:
        with pytest.raises(OptionError, match="FASTST_THREADS"):
            fastst_patch.config()


def test_options_left_that_exclude_each_other(monkeypatch) -> None:
    """Of two that overlap the outer one ends first; the inner one does not suit what is left."""
    outer = push({"io": "direct"})
    monkeypatch.setenv("FASTST_IO", "mmap")
    inner = push({"tensors": "owned"})
    pop(outer)
    with pytest.raises(OptionError, match="exclude each other"):
        fastst_patch.config()
    pop(inner)
    assert fastst_patch.config().io == "mmap"


def test_options_of_patch_last_until_unpatch() -> None:
    fastst_patch.patch(threads=2)
    fastst_patch.patch(chunk_bytes=MIB)
    with fastst_patch.patched(threads=7):
        assert fastst_patch.config().threads == 7
        assert fastst_patch.config().chunk_bytes == MIB
    assert fastst_patch.config().threads == 2
    fastst_patch.unpatch()
    assert fastst_patch.config() == fastst_patch.Config()


# ---- effect ----


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True")])
def test_enabled_variable(
    value: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTST_ENABLED", value)
    call = "" if value == "1" else "report = fastst_patch.patch(); print(report.reason);"
    code = f"import fastst_patch; {call} print(fastst_patch.is_patched())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split()[-1] == expected


_PATCHES = """
import sys, warnings
warnings.simplefilter("always")
import fastst_patch
fastst_patch.patch()
fastst_patch.patch(threads=2)
with fastst_patch.patched():
    pass
"""


@pytest.mark.parametrize(
    ("launched", "enabled"), [(False, None), (False, "1"), (True, None)], ids=str
)
def test_a_misspelt_variable_is_warned_of_once(
    launched: bool, enabled: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTST_THREAD", "4")
    if enabled is not None:
        monkeypatch.setenv("FASTST_ENABLED", enabled)
    script = tmp_path / "script.py"
    script.write_text(_PATCHES)
    launcher = ["-m", "fastst_patch", "run"] if launched else []
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    text = "FASTST_THREAD has no effect: there is no such option; did you mean FASTST_THREADS?"
    assert done.stderr.count("FASTST_THREAD ") == 1
    assert text in done.stderr
    assert launched or f"{script}:" in done.stderr  # names the line of the program


def test_a_misspelt_variable_as_an_error_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTST_THREAD", "4")
    code = "import fastst_patch\ntry: fastst_patch.patch(threads=3)\nexcept UserWarning: pass\n"
    code += "print(fastst_patch.is_patched(), fastst_patch.config().threads)"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["False", "0"]


def test_targets_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_TARGETS", "safetensors.torch.load_file")
    fastst_patch.patch()
    assert fastst_patch.is_patched("safetensors.torch.load_file")
    assert not fastst_patch.is_patched("safetensors.safe_open")
    fastst_patch.unpatch()
    monkeypatch.setenv("FASTST_TARGETS", "nonsense")
    with pytest.raises(fastst_patch.OptionError, match="'nonsense' in FASTST_TARGETS: allowed"):
        fastst_patch.patch()


def test_empty_variables_are_as_good_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENABLED", "TARGETS", *(f.name.upper() for f in fields(fastst_patch.Config))):
        monkeypatch.setenv(f"FASTST_{name}", "")
    assert fastst_patch.config() == fastst_patch.Config()
    assert fastst_patch.patch().reason is None
    assert fastst_patch.is_patched("safetensors.safe_open")
    assert fastst_patch.is_patched("safetensors.torch.load_file")
