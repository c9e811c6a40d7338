"""Copies to a device: what the bus gives. torch is imported when they begin."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_SLOTS = 2  # of each stream, in pinned memory


def copy_to(
    device: str, total: int, repeats: int, *, pinned: bool, slot: int, streams: int
) -> tuple[int, float]:
    """Copy about so many bytes from small buffers that are used again and again.

    From pinned memory one thread asks for the copies, and each stream has two buffers. From
    ordinary memory each stream has a thread and one buffer: stock copies so, with one.

    Args:
        device: such as "cuda:0".
        total: bytes, at least one buffer of each stream.
        repeats: of which the quickest counts, after one that does not.
        pinned: the kind of host memory.
        slot: bytes of a buffer.
        streams: how many.

    Returns:
        bytes and seconds.
    """
    import torch

    slots = _SLOTS if pinned else 1
    make_queue: Any = torch.cuda.Stream
    queues = [make_queue(device) for _ in range(streams)]
    pairs = [[(_buffer(slot, pinned=pinned), torch.empty(slot, dtype=torch.uint8, device=device))
              for _ in range(slots)] for _ in queues]  # fmt: skip
    rounds = max(1, total // (slot * slots * streams))

    def ask(number: int, times: int) -> None:
        with torch.cuda.stream(queues[number]):
            for _ in range(times):
                for source, target in pairs[number]:
                    target.copy_(source, non_blocking=True)

    def once() -> None:
        if pinned:
            for _ in range(rounds):
                for number in range(streams):
                    ask(number, 1)
        else:
            in_threads(streams, lambda number: ask(number, rounds))
        torch.cuda.synchronize(device)

    return rounds * slot * slots * streams, best(repeats, once)


def _buffer(nbytes: int, *, pinned: bool) -> Any:
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)


def best(repeats: int, run: Callable[[], object]) -> float:
    """Return the least of so many times in seconds, after one that is not counted."""
    run()
    return min(timed(run) for _ in range(repeats))


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call the function with 0, 1, ... in a thread each."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
