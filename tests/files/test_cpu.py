"""Reading ahead to the CPU, below the layers that ask for each tensor once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reported import reported
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine, machine
from fastst_patch.config import current
from fastst_patch.files.base import open_checked
from fastst_patch.files.cpu import HostFile

MIB = 1 << 20
COUNT = 6
COPIED = [{"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}]


@pytest.fixture
def opened(raw) -> Callable[..., HostFile]:
    """Opens a file whose tensor i is full of i."""
    path = raw.tensors({f"{i}": torch.full((50, 40), i, dtype=torch.int32) for i in range(COUNT)})

    def open_it(**options: Any) -> HostFile:
        with fastst_patch.config_context(**options):
            return HostFile(*open_checked(path), current())

    return open_it


@pytest.mark.parametrize("options", [{}, {"io": "mmap"}, *COPIED], ids=str)
@pytest.mark.parametrize("again", [[3, 3], [5, 0, 5, 1, 5, 0]], ids=str)
def test_tensors_asked_for_twice(opened, options, again) -> None:
    """Each time as from a handle: memory of its own, or the same bytes of the map."""
    file = opened(**options)
    ahead = file.ahead(again)
    taken = [(i, ahead.take(i)) for i in again]
    assert len({id(tensor) for _, tensor in taken}) == len(again)
    for i, tensor in taken:
        assert bool((tensor == i).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        if not file.mapped:
            tensor.fill_(-1)
    places = {tensor.data_ptr() for _, tensor in taken}
    assert len(places) == len(set(again) if file.mapped else again)
    assert file.account.tensors == len(again)
    with pytest.raises(KeyError):
        ahead.take(again[0])


@pytest.mark.parametrize("options", COPIED, ids=str)
def test_what_failed_is_read_anew(opened, options) -> None:
    file = opened(**options)
    engine.set_fault("pread", errno=5)
    engine.set_fault("preadv", errno=5)
    try:
        ahead = file.ahead([1, 1, 2])
        with pytest.raises(OSError, match="Input/output error"):
            ahead.take(1)
    finally:
        engine.clear_faults()
    for i in (1, 2):
        assert bool((ahead.take(i) == i).all())


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
    assert reported(checkpoint, **options).path in path


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
    reported(checkpoint, io="buffered", threads=2, chunk_bytes="64KiB")
    assert engine.counters()["threads"] == 2
    engine.shutdown()
    assert engine.counters()["threads"] == 0


def test_o_direct_has_twice_the_workers_unless_told(checkpoint: Path, need_o_direct) -> None:
    """With half a chunk each: 16 MB in chunks of 1 MiB, or as many as are asked for."""
    need_o_direct(checkpoint)
    by_itself = machine.io_threads(0)
    for options, workers in (({}, 2 * by_itself), ({"threads": by_itself}, by_itself)):
        engine.shutdown()
        reported(checkpoint, io="direct", chunk_bytes="1MiB", **options)
        assert engine.counters()["threads"] == workers
    engine.shutdown()


def test_chunk_bytes_bound_one_read(checkpoint: Path) -> None:
    calls = []
    for chunk in ("1MiB", "4MiB"):
        engine.set_fault("preadv", first=1 << 60)  # counts, never fails
        reported(checkpoint, io="buffered", chunk_bytes=chunk)
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


@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_files_of_every_small_size(tmp_path: Path, io: str) -> None:
    """Ends of files and of blocks, with odd sizes and offsets."""
    sizes = [0, 1, 7, 255, 256, 257, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20]
    source = {f"x{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes}
    path = tmp_path / "sizes.safetensors"
    save_file(source, path)
    for chunk in ("64KiB", "4MiB"):
        with fastst_patch.config_context(io=io, chunk_bytes=chunk, small_file_bytes=0):
            loaded = fastst_patch.load_file(path)
        assert all(torch.equal(loaded[name], source[name]) for name in source)
