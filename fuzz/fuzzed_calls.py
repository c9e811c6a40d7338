"""Calls for the differential fuzzer: ways to read a file, and what is asked of a handle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lockstep import BAD_CALLS, BAD_NAMES, OPTIONS

__all__ = ["OF_HEADER", "device_options", "fuzzed_calls", "fuzzed_options", "fuzzed_way"]

Call = tuple[Any, ...]

OF_HEADER = frozenset({"open", "keys", "offset_keys", "metadata", "enter", "exit"})
"""Calls that a handle answers without a tensor."""

_STEPS = (None, None, 1, 1, 2, 3, 8, 0, -1)
_PLACES = (10**6, -(10**6), 2**63, None)
_WRITES = ("mutate", "zero")
_KINDS, _WEIGHTS = zip(
    *(("get_tensor", 30), ("slice_and_index", 20), ("get_slice", 10), ("index", 4), ("open", 3)),
    *((one, 3) for one in ("keys", "offset_keys", "metadata", "get_tensors", "mutate", "bad_call")),
    *((one, 2) for one in ("enter", "get_shape", "get_dtype", "exit", "exit_error", "zero")),
    ("bad_name", 4),
    strict=True,
)
_CHUNKS = (64 << 10, 4 << 20)


def fuzzed_way(rnd: random.Random) -> str:
    """How a file is read."""
    return rnd.choice(("handle",) * 9 + ("load_file",) * 6 + ("arrays",) * 3 + ("array_handle",) * 2
                      + ("file_object",))  # fmt: skip


def fuzzed_options(rnd: random.Random) -> dict[str, Any]:
    """Options for the CPU, the default ones mostly: those that start workers take longer."""
    chosen = rnd.choice(OPTIONS) if rnd.random() < 0.15 else {}
    return {name: value for name, value in chosen.items() if name != "fallback"}


def device_options(rnd: random.Random) -> dict[str, Any]:
    """Options for a device."""
    if rnd.random() < 0.3:
        return {}
    return {
        "tensors": rnd.choice(("auto", "dlpack", "owned")),
        "io": rnd.choice(("auto", "buffered", "direct")),
        "page_cache": rnd.choice(("auto", "keep", "drop")),
        "chunk_bytes": rnd.choice(_CHUNKS),
        "threads": rnd.choice((0, 1, 3)),
        "device_memory_budget": rnd.choice((None, 0, 1, 100, 3000, 1 << 40)),
        "pinned_bytes": rnd.choice((None, 0, 64 << 10, 1 << 40)),
    }


def fuzzed_calls(rnd: random.Random, framework: str, *, writes: bool) -> list[Call]:
    """Calls in lockstep, beginning with one that opens the file.

    Args:
        rnd: decides.
        framework: of the handles.
        writes: whether tensors are written to.
    """
    calls: list[Call] = [("open", framework)]
    for _ in range(rnd.choice((1, 2, 3, 4, 6, 9))):
        calls.append(_call(rnd, framework, writes))
    return calls


def _call(rnd: random.Random, framework: str, writes: bool) -> Call:
    (kind,) = rnd.choices(_KINDS, _WEIGHTS)
    chosen = rnd.randrange(6)
    if kind in _WRITES and not writes:
        kind = "get_tensor"
    made: dict[str, Call] = {
        "open": (framework,),
        "get_tensor": (chosen, rnd.randrange(6)),
        "get_slice": (chosen, rnd.randrange(6)),
        "bad_call": (chosen, rnd.choice(BAD_CALLS)),
        "mutate": (chosen, rnd.randrange(10**4)),
        "zero": (chosen, 0),
    }
    if kind == "bad_name":
        return rnd.choice(("get_tensor", "get_slice")), chosen, rnd.choice(BAD_NAMES)
    if kind == "index":
        return kind, chosen, fuzzed_index(rnd)
    if kind == "slice_and_index":
        return kind, chosen, rnd.randrange(6), fuzzed_index(rnd)
    return kind, *made.get(kind, (chosen,))


def fuzzed_index(rnd: random.Random) -> Any:
    """What stands between the brackets behind a slice."""
    if rnd.random() < 0.5:
        return _atom(rnd)
    return tuple(_atom(rnd) for _ in range(rnd.randrange(4)))


def _place(rnd: random.Random) -> Any:
    return rnd.choice(_PLACES) if rnd.random() < 0.4 else rnd.randrange(-9, 10)


def _atom(rnd: random.Random) -> Any:
    which = rnd.random()
    if which < 0.45:
        return slice(_place(rnd), _place(rnd), rnd.choice(_STEPS))
    if which < 0.65:
        return rnd.randrange(-5, 6)
    if which < 0.8:
        return rnd.choice((Ellipsis, None, slice(None)))
    return rnd.choice(_OTHERS)(rnd)


_OTHERS: tuple[Any, ...] = (
    lambda rnd: rnd.random() < 0.5,
    lambda rnd: [rnd.randrange(-5, 6) for _ in range(rnd.randrange(4))],
    lambda rnd: [rnd.random() < 0.5 for _ in range(rnd.randrange(5))],
    lambda rnd: np.int64(rnd.randrange(-5, 6)),
    lambda rnd: np.array([rnd.randrange(-3, 4) for _ in range(1 + rnd.randrange(3))]),
    lambda rnd: torch.tensor([rnd.randrange(-3, 4) for _ in range(1 + rnd.randrange(3))]),
    lambda rnd: torch.tensor([rnd.random() < 0.5 for _ in range(1 + rnd.randrange(4))]),
    lambda rnd: torch.tensor(rnd.randrange(-3, 4)),
    lambda rnd: range(2),
    lambda rnd: rnd.choice((1.5, "a", b"a", {}, object)),
)
