"""Which tensors are predicted, from the requests before."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastst_patch import engine
from fastst_patch.files.pattern import AccessPattern
from fastst_patch.layout import FileLayout


def layout_of(names: Sequence[str]) -> FileLayout:
    """The layout of a file of these tensors, in this order, one byte each."""
    entries = (
        f'"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
        for i, name in enumerate(names)
    )
    header = ("{" + ",".join(entries) + "}").encode()
    return engine.parse_header(header, 8 + len(header) + len(names))


LAYERED = ["embed"] + [f"layers.{i}.{part}" for i in range(24) for part in "qkvogud"] + ["head"]


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


ORDERS = {
    "file": LAYERED,
    "sorted": sorted(LAYERED),
    "natural": sorted(LAYERED, key=natural),
    "reversed": sorted(LAYERED)[::-1],
    "tenth": sorted(LAYERED)[::10],
    "every third, backwards": LAYERED[::-3],
    "from the middle": sorted(LAYERED)[40:],
}


def unforeseen(pattern: AccessPattern, numbers: Sequence[int], ahead: int = 8) -> list[int]:
    """Places of the requests that were not predicted; each walk runs so far ahead."""
    missed = []
    for at, i in enumerate(numbers):
        foreseen = any(i in walk.ahead for walk in pattern._walks)
        walk = pattern.request(i)
        assert (walk is not None) or not foreseen
        if not foreseen:
            missed.append(at)
        while walk is not None and len(walk.ahead) < ahead:
            following = walk.foresee()
            if following is None:
                break
            walk.add(following, 1)
    return missed


@pytest.mark.parametrize("order", ORDERS)
def test_a_walk_is_foreseen(order: str) -> None:
    """Each request is predicted except the first ones, and those where two orders part."""
    layout = layout_of(LAYERED)
    numbers = [layout.index[name] for name in ORDERS[order]]
    assert len(unforeseen(AccessPattern(layout), numbers)) <= 4


def test_threads_share_a_walk() -> None:
    """Slightly out of order, like requests of several threads."""
    layout = layout_of(LAYERED)
    numbers = [layout.index[name] for name in sorted(LAYERED)]
    for at in range(0, len(numbers) - 4, 4):
        numbers[at : at + 4] = random.Random(at).sample(numbers[at : at + 4], 4)
    assert len(unforeseen(AccessPattern(layout), numbers)) <= 8


def test_loops_at_several_places() -> None:
    """Four threads, each with a quarter of the names."""
    layout = layout_of(LAYERED)
    names = sorted(LAYERED)
    size = len(names) // 4
    numbers = [layout.index[names[k * size + at]] for at in range(size) for k in range(4)]
    assert len(unforeseen(AccessPattern(layout), numbers)) <= 8


def test_nothing_is_foreseen_of_a_single_request() -> None:
    layout = layout_of(LAYERED)
    pattern = AccessPattern(layout)
    assert pattern.request(3) is None
    assert pattern.request(90) is None


@given(st.lists(st.integers(0, 39), max_size=200), st.integers(1, 20))
def test_any_requests(numbers: list[int], ahead: int) -> None:
    """Each predicted tensor exists, and the bytes of a walk are those of its predictions."""
    names = [f"t{i:02d}" for i in range(40)]
    random.Random(1).shuffle(names)
    pattern = AccessPattern(layout_of(names))
    for i in numbers:
        walk = pattern.request(i)
        while walk is not None and len(walk.ahead) < ahead:
            following = walk.foresee()
            if following is None:
                break
            assert 0 <= following < 40
            walk.add(following, 3)
        for one in pattern._walks:
            assert one.nbytes == 3 * len(one.ahead)


@pytest.mark.parametrize("names", [["a"], ["9" * 30, "10", "2"], ["٣.x", "²", "1.x", "a1b2"]])
def test_odd_names(names: list[str]) -> None:
    pattern = AccessPattern(layout_of(names))
    for i in range(len(names)):
        pattern.request(i)
        pattern.request(len(names) - 1 - i)
        pattern.request(0)
