"""Mapped files read name by name: the tensors read ahead, in any order, for any owner."""

from __future__ import annotations

import gc
import os
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from waiting import until

import fastst_patch
from fastst_patch import engine

MIB = 1 << 20
COUNT, SIZE = 96, 2 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """96 tensors of 2 MiB, numbered in the file's order; names sort in another."""
    path = tmp_path_factory.mktemp("walks") / "model.safetensors"
    # The writer sorts by name: the numbers of the names are padded, those in the text are not.
    save_file({_name(i): torch.full((SIZE // 4,), i, dtype=torch.int32) for i in range(COUNT)},
              path)  # fmt: skip
    yield path
    path.unlink()


def _name(i: int) -> str:
    return f"p{i:03d}.layers.{i}"


@pytest.fixture
def cold(model: Path, evict: Callable[[Path], None]) -> Path:
    evict(model)
    return model


def _cached(path: Path, i: int) -> float:
    """The cached fraction of tensor i without its edges, which share huge pages."""
    file = engine.open_file(str(path))
    begin = engine.read_layout(file).extent(i)[0] + SIZE // 4
    return file.residency(begin, SIZE // 2)[0] / (SIZE // 2)


def _idle() -> bool:
    return engine.counters()["jobs"] == 0


@pytest.mark.parametrize(("first", "step"), [(0, 1), (90, -1), (0, 10), (80, -7)])
def test_what_is_foreseen_is_read(cold: Path, first: int, step: int) -> None:
    with fastst_patch.safe_open(cold, "pt") as f:
        for k in range(3):
            asked = first + k * step
            tensor = f.get_tensor(_name(asked))
            # A fault before the workers have read it would make the kernel read around it.
            assert until(lambda asked=asked: _cached(cold, asked) == 1.0), asked
            assert tensor[9] == asked
        for k in range(3, 6):
            following = first + k * step
            assert until(lambda following=following: _cached(cold, following) == 1.0), following
        assert until(_idle)
    if abs(step) > 2:  # no more than that: the tensors between may never be asked for
        between = [i for i in range(COUNT) if (i - first) % step]
        assert sum(_cached(cold, i) for i in between) < len(between) / 10


def test_by_rows(cold: Path) -> None:
    """After some rows, only the same rows of the next tensors are read ahead."""
    with fastst_patch.safe_open(cold, "pt") as f:
        for i in range(3):
            piece = f.get_slice(_name(i))[SIZE // 8 :]
            assert piece.shape == (SIZE // 8,)
            assert bool((piece == i).all())
        assert until(_idle)
        file = engine.open_file(str(cold))
        layout = engine.read_layout(file)
        # Whole tensors as far as 64 MiB would be 32; halves are 64 of them.
        begin = layout.extent(60)[0]
        assert until(lambda: file.residency(begin + SIZE * 3 // 4, SIZE // 8)[0] == SIZE // 8)


def test_in_pieces(cold: Path) -> None:
    """The second piece of a tensor brings the rest of it, and nothing behind it."""
    with fastst_patch.safe_open(cold, "pt") as f:
        first, second = (f.get_slice(_name(50)) for _ in range(2))
        assert bool((first[: SIZE // 8] == 50).all())
        assert bool((second[SIZE // 8 :] == 50).all())
        assert until(lambda: _cached(cold, 50) == 1.0)
        for k in range(20):  # pieces of two others in turn: no walk starts
            for i in (60, 61):
                f.get_slice(_name(i))[k : SIZE // 8 + k]
        assert until(_idle)
        assert sum(_cached(cold, i) for i in range(COUNT)) < 48
        assert sum(_cached(cold, i) for i in range(40)) == 0


def test_two_handles_and_every_name(cold: Path) -> None:
    with fastst_patch.safe_open(cold, "pt") as even, fastst_patch.safe_open(cold, "pt") as odd:
        for i in range(COUNT):
            assert bool(((odd if i % 2 else even).get_tensor(_name(i)) == i).all())


def test_what_is_cached_starts_no_worker(model: Path) -> None:
    model.read_bytes()
    assert until(_idle)
    before = engine.counters()["bytes_prefetched"]
    with fastst_patch.profile() as seen, fastst_patch.safe_open(model, "pt") as f:
        names = f.keys()
        for name in names:
            f.get_tensor(name)
        assert engine.counters()["jobs"] == 0
    assert engine.counters()["bytes_prefetched"] == before
    assert seen.reports[0].path == "mmap"


def _as_nobody(path: Path, act: Callable[[str], None]) -> None:
    """Let a process that neither owns a file nor may write it do something."""
    known = path.with_name("known.safetensors")  # the other user may not be able to import
    save_file({"x": torch.ones(MIB)}, known)
    for io in ("auto", "buffered", "direct"):
        with fastst_patch.config_context(io=io):
            fastst_patch.load_file(known)
    os.chmod(path, 0o444)
    for folder in path.parents:
        if folder.stat().st_mode & 0o055 != 0o055 and folder.stat().st_uid == os.geteuid():
            os.chmod(folder, 0o755)
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            act(str(path))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


other_owner = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to become another user")


@other_owner
@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
def test_a_file_of_another_owner(cold: Path, io: str) -> None:
    """No probe works for this file. Probing reads nothing, and the whole file is read ahead."""
    size = cold.stat().st_size

    def look(path: str) -> None:
        file = engine.open_file(path)
        for _ in range(3):
            assert file.residency(0, size) == (0, "none")
        time.sleep(0.2)  # reads that a probe had started would be over

    def load(path: str, io: str) -> int:
        """Load the file, and wait until it is read ahead; the bytes that workers had to read."""
        before = engine.counters()["bytes_prefetched"]
        with fastst_patch.config_context(io=io, fallback="error"):
            with fastst_patch.profile() as seen:
                loaded = fastst_patch.load_file(path)
            # This thread's own reads would come before the workers'.
            assert until(_idle)
        assert [report.resident for report in seen.reports if report.file == path] == [None]
        del loaded  # not before: without a user of its map reading ahead ends
        return engine.counters()["bytes_prefetched"] - before

    def first(path: str) -> None:
        ahead = load(path, io)
        # A chunk that the kernel has read behind the one before is none that a worker had to read.
        assert (size * 3 // 4 < ahead <= size) if io == "auto" else ahead == 0

    def second(path: str) -> None:
        if io != "direct":  # cached by now: workers see no faults, but for those of their code
            assert load(path, "auto") < size // 8
        loaded = fastst_patch.load_file(path)
        assert all(bool((loaded[_name(i)] == i).all()) for i in range(COUNT))

    _as_nobody(cold, look)
    assert engine.residency(str(cold)).resident_bytes < MIB
    _as_nobody(cold, first)
    if io == "auto":  # for the owner the probe works
        assert engine.residency(str(cold)).resident_bytes == size
    _as_nobody(cold, second)


@other_owner
def test_nothing_is_left_of_another_owners_file(cold: Path) -> None:
    def drop(path: str) -> None:
        with fastst_patch.config_context(page_cache="drop", fallback="error"):
            loaded = fastst_patch.load_file(path)
        assert all(bool((loaded[_name(i)] == i).all()) for i in range(COUNT))

    _as_nobody(cold, drop)
    assert engine.residency(str(cold)).resident_bytes == 0


# ---- load_file, and where reading ahead ends ----


def test_load_file_reads_ahead_all_of_it(cold: Path) -> None:
    with fastst_patch.profile() as profile:
        loaded = fastst_patch.load_file(cold)
    assert profile.reports[0].path == "mmap+readahead"
    assert profile.reports[0].resident < 0.2
    size = cold.stat().st_size
    assert until(lambda: engine.residency(str(cold)).resident_bytes == size)
    assert all(loaded[_name(i)][-1] == i for i in range(COUNT))


def test_a_handle_reads_what_is_asked_for(cold: Path) -> None:
    with fastst_patch.profile() as profile, fastst_patch.safe_open(cold, "pt") as f:
        tensor = f.get_tensor(_name(60))
        assert until(lambda: _cached(cold, 60) == 1.0)
        assert _cached(cold, 88) == 0.0
        assert bool((tensor == 60).all())
    assert profile.reports[0].path == "mmap+readahead"


def test_a_handle_walked_in_order_runs_ahead(cold: Path) -> None:
    with fastst_patch.safe_open(cold, "pt") as f:
        f.get_slice(_name(0))[:]
        f.get_slice(_name(1))[:]
        assert until(lambda: all(_cached(cold, i) == 1.0 for i in range(64 * MIB // SIZE)))
        assert _cached(cold, 80) == 0.0
        for i in range(2, COUNT):
            assert f.get_tensor(_name(i))[5] == i


def test_reading_ahead_ends_with_the_last_tensor(cold: Path) -> None:
    for _ in range(20):
        loaded = fastst_patch.load_file(cold)
        one = loaded.pop(_name(3))
        del loaded
        assert one[0] == 3
        del one
        gc.collect()
    assert until(lambda: engine.counters()["jobs"] == 0)
    assert until(lambda: engine.counters()["arenas"] == 0)
    assert engine.counters()["files"] == 0


def test_reading_ahead_leaves_memory_alone(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastst_patch.files.readahead.RESERVE", 1 << 60)
    monkeypatch.setattr(engine, "memory_headroom", lambda: 1 << 62)  # a tenth is still too much
    with fastst_patch.config_context(progress=True):  # waits for the job
        loaded = fastst_patch.load_file(cold)
    rest = cold.stat().st_size - 32 * MIB
    assert engine.open_file(str(cold)).residency(32 * MIB, rest)[0] < rest / 2
    assert all(loaded[_name(i)][7] == i for i in range(COUNT))


def test_names_of_a_cached_file_are_not_sorted(tmp_path: Path) -> None:
    """To sort thousands of names takes longer than some requests for small tensors."""
    path = tmp_path / "small.safetensors"
    save_file({f"t{i}": torch.full((4,), i) for i in range(50)}, path)
    with fastst_patch.safe_open(path, "pt") as f:
        for i in (30, 7, 41, 12):
            assert f.get_tensor(f"t{i}")[0] == i
        assert "sorted_names" not in vars(f._opened.layout)


def test_scattered_extents_leave_the_map_in_one_piece(cold: Path) -> None:
    """A process has 65,530 entries for maps; advice for a part of one would split it, for good."""
    file = engine.open_file(str(cold))
    arena = engine.map_arena(file)

    def entries() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(cold))

    before = entries()
    stripes = [(at, SIZE, 0) for at in range(0, COUNT * SIZE, 2 * SIZE)]
    segments = array("Q", [number for stripe in stripes for number in stripe])
    job = engine.prefetch(file, arena, segments, threads=4, chunk_bytes=4 * MIB, reserve_bytes=0)
    job.wait()
    assert file.residency(0, SIZE)[0] == SIZE
    assert entries() == before
