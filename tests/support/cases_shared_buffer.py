"""Cases of ranks: exchange through shared memory, and by gloo where it is not available."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases_forms import FORMS, Me, full_of
from rank_nursery import attempt
from sharded import assert_tensors, load_sharded

import fastst_patch
from fastst_patch import engine, sharding
from fastst_patch.config import current
from fastst_patch.files.cpu import HostFile
from fastst_patch.files.readahead import ReadAhead
from fastst_patch.loader import SafeTensorsFileLoader
from fastst_patch.sharding import exchange, shared_buffer


def _fail(*_: Any) -> Any:
    raise OSError(38, "no such call")


def _with_wrong_token(real: Any) -> Any:
    """The first rank of a node offers memory that is not its own."""

    def offer(self: Any, nbytes: int) -> Any:
        made = real(self, nbytes)
        return dataclasses.replace(made, token=b"?" * len(made.token))

    return offer


@contextlib.contextmanager
def trouble(what: str | None) -> Iterator[None]:
    """Make shared memory fail in this rank."""
    patches = {
        "no call": lambda: mock.patch.object(os, "memfd_create", _fail),
        "no pages": lambda: mock.patch.object(os, "posix_fallocate", _fail),
        "no room": lambda: mock.patch.object(engine, "memory_headroom", return_value=0),
        "out of reach": lambda: mock.patch.object(os, "readlink", _fail),
        "no map": lambda: mock.patch.object(shared_buffer, "_map", return_value=None),
        "wrong token": lambda: mock.patch.object(shared_buffer.SharedBuffer, "offer",
                                                 _with_wrong_token(shared_buffer.SharedBuffer.offer)),
    }  # fmt: skip
    with patches[what]() if what is not None else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _slow(seconds: float) -> Iterator[None]:
    """Copy results late, when other ranks may already read later steps."""
    place = exchange._place

    def late(*args: Any, **named: Any) -> None:
        time.sleep(seconds)
        place(*args, **named)

    with mock.patch.object(exchange, "_place", late if seconds else place):
        yield


@contextlib.contextmanager
def _counted(counts: dict[str, int]) -> Iterator[None]:
    """Count the files whose units are in shared memory, and the exchanges by gloo."""
    use, by_gloo = exchange.Exchange.use_shared_buffer, exchange.Subgroup.exchange

    def shared(self: Any, memory: Any) -> None:
        counts["shared"] += 1
        use(self, memory)

    def exchanged(self: Any, *args: Any) -> Any:
        counts["by gloo"] += 1
        return by_gloo(self, *args)

    with (
        mock.patch.object(exchange.Exchange, "use_shared_buffer", shared),
        mock.patch.object(exchange.Subgroup, "exchange", exchanged),
    ):
        yield


def _held() -> dict[str, Any]:
    gc.collect()
    engine.shutdown()
    with open("/proc/self/maps", encoding="utf-8") as file:
        maps = [line for line in file if "memfd:" in line]
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return {"maps": len(maps), "descriptors": len([one for one in links if "memfd:" in one])}


def load(
    rank: Any,
    files: list[str],
    form: str,
    where: list[int] | None = None,
    what: str | None = None,
    slow: list[int] | None = None,
    **way: Any,
) -> dict[str, Any]:
    """A load that exchanges, with trouble on some ranks. The tensors are right in any case.

    Args:
        rank: this process.
        files: to load.
        form: of the plan.
        where: ranks that have trouble.
        what: the trouble.
        slow: ranks that copy results late.
        way: options.

    Returns:
        How often each way to exchange was taken, and maps and descriptors that are left.
    """
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    counts = {"shared": 0, "by gloo": 0}
    late = 0.002 if slow and rank.rank in slow else 0.0
    with trouble(what if where and rank.rank in where else None), _counted(counts), _slow(late):
        result = load_sharded(files, None, plan, **way)
    assert_tensors(result, full, expect)
    del result
    return {**counts, **_held()}


def tensor_by_tensor(rank: Any, files: list[str], **way: Any) -> dict[str, Any]:
    """Shared memory grows with the requested tensors, and is reused."""
    full = full_of(files)
    counts = {"shared": 0, "by gloo": 0}
    made: list[int] = []
    make = shared_buffer._make

    def counted(nbytes: int, token: bytes) -> Any:
        made.append(nbytes)
        return make(nbytes, token)

    with _counted(counts), mock.patch.object(shared_buffer, "_make", counted):
        loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", **way)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        for name, tensor in full.tensors.items():
            if tensor.numel() > 1:
                mine = tensor.view(torch.int16).chunk(rank.world, 1)[rank.rank]
                assert buffers.get_sharded(name, 1).view(torch.int16).equal(mine)
        buffers.close()
        loader.close()
    del loader, buffers
    return {**counts, "made": made, **_held()}


def no_memory(rank: Any, files: list[str], bad: int) -> dict[str, Any]:
    """One rank gets neither shared memory nor its own: all ranks raise."""

    def refused(self: Any, **_: Any) -> None:
        raise MemoryError("none left")

    with trouble("no call"):
        outcome = attempt(lambda: _refusing(rank, files, bad, refused))
    full = full_of(files)
    plan, expect = FORMS["columns"](full, Me(rank.rank, rank.world))
    assert_tensors(load_sharded(files, None, plan, io="direct"), full, expect)
    return outcome


def _refusing(rank: Any, files: list[str], bad: int, refused: Any) -> None:
    plan, _ = FORMS["columns"](full_of(files), Me(rank.rank, rank.world))
    allocate = exchange.Exchange.allocate

    def allocated(self: Any, **named: Any) -> None:
        (refused if rank.rank == bad and named != {"shared": False} else allocate)(self, **named)

    with mock.patch.object(exchange.Exchange, "allocate", allocated):
        load_sharded(files, None, plan, io="direct")


class _Interrupted:
    """Ctrl-C in the patched function."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt("struck")


def struck(rank: Any, files: list[str], bad: int, where: str, by_name: bool) -> dict[str, Any]:
    """One rank is interrupted before it exchanges: it ends at once, and the others raise."""
    places = {
        "preparing": (exchange.Memory, "empty"), "mapping": (shared_buffer, "_map"),
    }  # fmt: skip
    plan, expect = FORMS["columns"](full_of(files), Me(rank.rank, rank.world))
    name = next(iter(full_of(files).tensors))

    def call() -> None:
        if by_name:
            loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", io="direct")
            loader.add_filenames({0: files})
            loader.copy_files_to_device().get_sharded(name, 1)
        else:
            load_sharded(files, None, plan, io="direct")

    with contextlib.ExitStack() as stack:
        if rank.rank == bad:
            stack.enter_context(mock.patch.object(*places[where], _Interrupted()))
        outcome = attempt(call)
    assert_tensors(load_sharded(files, None, plan, io="direct"), full_of(files), expect)
    return {**outcome, **_held()}


def retried(rank: Any, files: list[str], bad: int) -> list[dict[str, Any]]:
    """Loads of the same files fail and are tried again: nothing accumulates."""

    def refused(*_: Any) -> Any:
        raise MemoryError("none left")

    held = []
    plan, expect = FORMS["columns"](full_of(files), Me(rank.rank, rank.world))
    with (
        fastst_patch.config_context(io="direct"),
        sharding.ShardedFiles(
            files, sharding.Group.of(dist.group.WORLD), None, current()
        ) as opened,
    ):
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                if rank.rank == bad:
                    stack.enter_context(mock.patch.object(exchange.Memory, "empty", refused))
                outcome = attempt(lambda: opened.load(plan))
            assert outcome["error"]["type"] == "RankError", outcome
            held.append(_held())
        assert_tensors(opened.load(plan), full_of(files), expect)
    held.append(_held())
    return held


def unmapped(rank: Any, files: list[str], bad: int) -> dict[str, Any]:
    """One rank has no address space for a map, which reading ahead needs first."""

    def refused(*_: Any) -> Any:
        raise MemoryError("no map")

    with contextlib.ExitStack() as stack:
        if rank.rank == bad:
            stack.enter_context(mock.patch.object(engine, "map_arena", refused))
            stack.enter_context(mock.patch.object(ReadAhead, "cold", return_value=True))
        plan, _ = FORMS["columns"](full_of(files), Me(rank.rank, rank.world))
        return attempt(lambda: load_sharded(files, None, plan))


def unread(rank: Any, files: list[str], bad: int) -> dict[str, Any]:
    """With verify=True one rank's storage fails: the others do not report a difference to stock."""

    def refused(*_: Any) -> Any:
        raise OSError(5, "no such sector")

    with contextlib.ExitStack() as stack:
        if rank.rank == bad:
            stack.enter_context(mock.patch.object(HostFile, "read_into", refused))
        plan, _ = FORMS["columns"](full_of(files), Me(rank.rank, rank.world))
        return attempt(lambda: load_sharded(files, None, plan, io="direct", verify=True))
