"""Options: precedence, validation, and that each has an effect."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import OptionError, engine, machine, stock
from fastst_patch.config import current, pop, push
from fastst_patch.dropin import handle
from fastst_patch.files import cpu

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({f"w{i}": torch.randn(1024, 1024, generator=generator) for i in range(4)}, path)
    return path


def _load(path: Path, **options: object) -> fastst_patch.LoadReport:
    """Load with options; the report of that load, after comparing every byte with stock."""
    expected = fastst_patch.get_original("safetensors.torch.load_file")(path)
    with fastst_patch.config_context(**options), fastst_patch.profile() as profile:
        found = fastst_patch.load_file(path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(profile.reports) == 1
    return profile.reports[0]


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
    if name == "node_id":  # any text will do
        return
    monkeypatch.setenv(f"FASTST_{name.upper()}", "no such value")
    with pytest.raises(fastst_patch.OptionError, match=f"FASTST_{name.upper()}='no such value'"):
        fastst_patch.config()


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


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"io": "mmap"}, {"mmap"}),
        ({"io": "buffered"}, {"buffered"}),
        ({"io": "direct"}, {"direct", "buffered"}),
        ({"tensors": "owned"}, {"owned"}),
        ({"tensors": "owned", "io": "direct"}, {"owned"}),
        ({"page_cache": "drop"}, {"direct", "buffered"}),
        ({"page_cache": "keep"}, {"mmap", "mmap+readahead"}),
        ({"tensors": "dlpack"}, {"mmap", "mmap+readahead"}),
    ],
)
def test_path_taken(checkpoint: Path, options: dict[str, str], path: set[str]) -> None:
    assert _load(checkpoint, **options).path in path


def test_io_auto_reads_ahead_and_mmap_does_not(
    checkpoint: Path, evict: Callable[[Path], None]
) -> None:
    evict(checkpoint)
    with fastst_patch.config_context(io="mmap"), fastst_patch.profile() as profile:
        kept = fastst_patch.load_file(checkpoint)
    assert profile.reports[0].path == "mmap"
    before = engine.counters()["bytes_prefetched"]
    with fastst_patch.profile() as profile, fastst_patch.config_context(progress=True):
        again = fastst_patch.load_file(checkpoint)  # progress waits for the bytes
    assert profile.reports[0].path == "mmap+readahead"
    assert engine.counters()["bytes_prefetched"] > before  # reading the header cached some
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_page_cache_drop_leaves_nothing_cached(
    checkpoint: Path, io: str, evict: Callable[[Path], None]
) -> None:
    evict(checkpoint)
    with fastst_patch.config_context(io=io, page_cache="drop"):
        fastst_patch.load_file(checkpoint)
    assert engine.residency(str(checkpoint)).resident_bytes <= MIB // 4  # the header, at most
    with fastst_patch.config_context(io="buffered", page_cache="keep"):
        fastst_patch.load_file(checkpoint)
    assert engine.residency(str(checkpoint)).resident_bytes == checkpoint.stat().st_size


def test_threads_bound_the_workers(checkpoint: Path) -> None:
    engine.shutdown()
    _load(checkpoint, io="buffered", threads=2, chunk_bytes="64KiB")
    assert engine.counters()["threads"] == 2
    engine.shutdown()
    assert engine.counters()["threads"] == 0


@pytest.mark.parametrize("index", [slice(None, None, 2), (None, 0), (None, slice(-10, 8, 7))])
def test_verify_takes_slices_of_one_element(tmp_path: Path, index: Any) -> None:
    """Whose stride is anything, and which count as contiguous all the same."""
    path = tmp_path / "two.safetensors"
    save_file({"b": torch.arange(2)}, path)
    with stock.safe_open(path, "pt") as handle:
        try:
            expected = handle.get_slice("b")[index]
        except Exception as error:
            pytest.skip(f"this safetensors does not take such an index: {error}")
    with fastst_patch.config_context(verify=True), fastst_patch.safe_open(path, "pt") as handle:
        assert torch.equal(handle.get_slice("b")[index], expected)


def test_o_direct_has_twice_the_workers_unless_told(checkpoint: Path, need_o_direct) -> None:
    """With half a chunk each: 16 MB in chunks of 1 MiB, or as many as are asked for."""
    need_o_direct(checkpoint)
    by_itself = machine.io_threads(0)
    for options, workers in (({}, 2 * by_itself), ({"threads": by_itself}, by_itself)):
        engine.shutdown()
        _load(checkpoint, io="direct", chunk_bytes="1MiB", **options)
        assert engine.counters()["threads"] == workers
    engine.shutdown()


def test_chunk_bytes_bound_one_read(checkpoint: Path) -> None:
    calls = []
    for chunk in ("1MiB", "4MiB"):
        engine.set_fault("preadv", first=1 << 60)  # counts, never fails
        _load(checkpoint, io="buffered", chunk_bytes=chunk)
        calls.append(engine.fault_calls("preadv"))
        engine.clear_faults()
    assert calls[0] >= 16 > calls[1] >= 4


def test_owned_tensors_can_be_resized(checkpoint: Path) -> None:
    with fastst_patch.config_context(tensors="owned"):
        tensor = fastst_patch.load_file(checkpoint)["w0"]
    assert tensor.resize_(2048, 1024).shape == (2048, 1024)


def test_arena_tensors_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({f"t{i}": torch.arange(i, dtype=torch.uint8) for i in range(1, 40)}, path)
    for io in ("buffered", "direct"):
        with fastst_patch.config_context(io=io, small_file_bytes=0):
            found = fastst_patch.load_file(path)
        assert all(tensor.data_ptr() % 256 == 0 for tensor in found.values())


def test_small_files_go_to_stock(checkpoint: Path) -> None:
    report = _load(checkpoint, small_file_bytes=checkpoint.stat().st_size)
    assert (report.path, report.fallback_reason) == ("stock", "the file is small")
    assert _load(checkpoint, small_file_bytes=checkpoint.stat().st_size - 1).path != "stock"
    with fastst_patch.config_context(small_file_bytes="1GiB", fallback="error"):
        fastst_patch.load_file(checkpoint)  # by design, hence no error


@pytest.mark.parametrize("call", ["load_file", "safe_open"])
def test_fallback_policies(checkpoint: Path, call: str) -> None:
    def run() -> None:
        if call == "load_file" and stock.BACKENDS:
            fastst_patch.load_file(checkpoint, backend="pread")
        elif call == "load_file":
            with torch.inference_mode():
                fastst_patch.load_file(checkpoint)
        else:
            fastst_patch.safe_open(checkpoint, "np")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    with fastst_patch.config_context(fallback="warn"):
        with pytest.warns(fastst_patch.FallbackWarning, match=r"pread|np|mode"):
            run()
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="left to stock"):
            run()
        with pytest.raises(FileNotFoundError):  # stock's own error comes first
            fastst_patch.load_file(checkpoint.with_name("absent"))
        fastst_patch.load_file(checkpoint)


def test_verify_compares_with_stock(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _load(checkpoint, verify=True)
    right = cpu.HostFile.all_tensors

    def wrong(self: cpu.HostFile) -> dict[str, torch.Tensor]:
        found = right(self)
        found["w2"][5, 5] += 1
        return found

    monkeypatch.setattr(cpu.HostFile, "all_tensors", wrong)
    with caplog.at_level(logging.ERROR, "fastst_patch"):
        _load(checkpoint, verify=True)  # stock's tensors are handed out
    assert "w2" in caplog.text
    with fastst_patch.config_context(verify=True, fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="w2"):
            fastst_patch.load_file(checkpoint)


def test_verify_on_handles(checkpoint: Path) -> None:
    with fastst_patch.config_context(verify=True):
        with fastst_patch.safe_open(checkpoint, "pt") as f:
            if hasattr(stock.safe_open, "get_tensors"):
                assert set(f.get_tensors()) == set(f.keys())
            assert f.get_tensor("w1").shape == (1024, 1024)


@pytest.mark.parametrize("index", [..., slice(3, 9), (slice(None), 5)], ids=str)
def test_verify_on_slices(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, index: Any
) -> None:
    def read() -> torch.Tensor:
        with fastst_patch.safe_open(checkpoint, "pt") as f:
            return f.get_slice("w1")[index]

    expected = read()
    with fastst_patch.config_context(verify=True, fallback="error"):
        assert torch.equal(read(), expected)
    right = handle.FastSlice._indexed
    monkeypatch.setattr(handle.FastSlice, "_indexed", lambda *args: right(*args) + 1)
    with fastst_patch.config_context(verify=True), caplog.at_level(logging.ERROR, "fastst_patch"):
        assert torch.equal(read(), expected)  # stock's is handed out
    assert "a slice of 'w1' differs" in caplog.text
    with fastst_patch.config_context(verify=True, fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="a slice of 'w1' differs"):
            read()


def test_progress_shows_a_bar(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for io in ("auto", "direct"):
        _load(checkpoint, io=io, progress=True)
        assert "model.safetensors" in capfd.readouterr().err


class _StruckLock:
    """tqdm's lock, in the middle of whose taking Ctrl-C strikes at the n-th time."""

    def __init__(self, strike_at: int) -> None:
        self.strike_at, self.taken, self.held = strike_at, 0, 0

    def acquire(self, *_: Any) -> None:
        self.taken += 1
        self.held += 1
        if self.taken == self.strike_at:
            signal.raise_signal(signal.SIGINT)

    def release(self) -> None:
        self.held -= 1

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize("strike_at", range(1, 7))
def test_ctrl_c_leaves_tqdm_usable(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, io: str, strike_at: int
) -> None:
    """A lock of tqdm's that stays taken would hang the program's next bar."""
    import tqdm

    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # its thread would take the lock, too
    monkeypatch.setattr(tqdm.tqdm, "_lock", lock := _StruckLock(strike_at), raising=False)
    try:
        _load(checkpoint, io=io, progress=True)
    except KeyboardInterrupt:
        pass
    else:
        assert lock.taken < strike_at
    assert lock.held == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if strike_at == 1:
        assert lock.taken > 1  # the bar was closed


def test_log_level_gives_one_line_per_load(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _load(checkpoint)
    assert capfd.readouterr().err == ""
    with fastst_patch.config_context(log_level="info"):
        fastst_patch.load_file(checkpoint)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in (str(checkpoint), " GB", " s,", "path mmap"):
        assert part in lines[0]
    fastst_patch.load_file(checkpoint)
    assert capfd.readouterr().err == ""


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


def test_stats_and_profile(checkpoint: Path) -> None:
    before = fastst_patch.stats()["paths"].get("buffered", {"loads": 0, "bytes": 0})
    report = _load(checkpoint, io="buffered")
    after = fastst_patch.stats()
    assert after["paths"]["buffered"]["loads"] == before["loads"] + 1
    assert after["paths"]["buffered"]["bytes"] == before["bytes"] + 16 * MIB
    assert (report.bytes, report.tensors, report.call) == (16 * MIB, 4, "load_file")
    assert report.seconds > 0
    assert report.gb_per_s > 0
    assert after["native"]["arenas"] >= 0
