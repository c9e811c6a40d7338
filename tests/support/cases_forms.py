"""Cases of ranks: every form of a plan, and torch's slices of the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from sharded import FAST, Expect, Full, assert_tensors, chunk, load_sharded

import fastst_patch
from fastst_patch import sharding

_full: dict[tuple[str, ...], Full] = {}


class Me(NamedTuple):
    """A rank in the group that loads."""

    index: int
    size: int


class Form(NamedTuple):
    """A plan, and this rank's expected shard of each tensor."""

    plan: Any
    expect: Expect


def full_of(files: list[str]) -> Full:
    """Stock's tensors, loaded once in a rank."""
    key = tuple(files)
    if key not in _full:
        _full[key] = Full(files)
    return _full[key]


# ---------------------------------------------------------------- the forms


def _by_dim(choose: Callable[[str, torch.Tensor], int | None]) -> Callable[[Full, Me], Form]:
    """A mapping from names to dimensions; tensors without one are left out, and thus whole."""

    def form(full: Full, me: Me) -> Form:
        dims = {name: choose(name, tensor) for name, tensor in full.tensors.items()}
        plan = {name: dim for name, dim in dims.items() if dim is not None}

        def expect(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return chunk(tensor, plan[name], *me) if name in plan else tensor

        return Form(plan, expect)

    return form


def _on(dim: int) -> Callable[[str, torch.Tensor], int | None]:
    return lambda _, t: dim if -t.dim() <= dim < t.dim() else None


def _number(name: str) -> int:
    return sum(name.encode())


def _alternating(name: str, tensor: torch.Tensor) -> int | None:
    return _number(name) % tensor.dim() if tensor.dim() else None


def _by_slices(choose: Callable[[torch.Size, Me], Any]) -> Callable[[Full, Me], Form]:
    def form(full: Full, me: Me) -> Form:
        plan = {n: choose(t.shape, me) for n, t in full.tensors.items() if t.dim()}
        return Form(plan, lambda name, t: t[plan[name]] if name in plan else t)

    return form


def _window(shape: torch.Size, me: Me) -> tuple[slice, ...]:
    """Windows on each dimension, which differ between ranks and overlap."""
    return tuple(slice(me.index % (n + 1), n - (me.size - me.index) // 3) for n in shape)


def _steps(shape: torch.Size, me: Me) -> tuple[slice, ...]:
    return tuple(slice(me.index, None, me.size if d % 2 == 0 else 1) for d in range(len(shape)))


def _inner_step(shape: torch.Size, me: Me) -> tuple[slice, ...]:
    return (*[slice(None)] * (len(shape) - 1), slice(me.index // 2, None, 3))


def _from_the_end(shape: torch.Size, me: Me) -> slice:
    return slice(-1 - me.index, None)


def _beyond(shape: torch.Size, me: Me) -> slice:
    return slice(me.index, 10_000_000)


def _owners(full: Full, me: Me) -> Form:
    def owners(name: str) -> list[int]:
        number = _number(name)
        return sorted({number % me.size, number // 7 % me.size})

    plan = {
        name: sharding.Owner(owners(name)[0] if len(owners(name)) == 1 else owners(name))
        for name in full.tensors
    }
    return Form(plan, lambda name, t: t if me.index in owners(name) else None)


def _skipped(full: Full, me: Me) -> Form:
    """All ranks skip some tensors, this rank skips others, and takes rows of the rest."""

    def spec(name: str, shape: Any, dtype: Any) -> Any:
        if _number(name) % 3 == 0 or _number(name) % 5 == me.index:
            return sharding.SKIP
        return 0 if len(shape) else None

    def expect(name: str, t: torch.Tensor) -> torch.Tensor | None:
        found = spec(name, t.shape, t.dtype)
        if found is sharding.SKIP:
            return None
        return t if found is None else chunk(t, 0, *me)

    return Form(spec, expect)


def _left_out(full: Full, me: Me) -> Form:
    """All ranks skip the same tensors."""
    plan: dict[str, Any] = {
        name: sharding.SKIP if left_out(name) else 0 if tensor.dim() else None
        for name, tensor in full.tensors.items()
    }

    def expect(name: str, t: torch.Tensor) -> torch.Tensor | None:
        if left_out(name):
            return None
        return chunk(t, 0, *me) if t.dim() else t

    return Form(plan, expect)


def _whole_or_left_out(full: Full, me: Me) -> Form:
    """All ranks take a tensor whole, or skip it."""
    plan = {name: sharding.SKIP for name in full.tensors if left_out(name)}
    return Form(plan, lambda name, t: None if left_out(name) else t)


def left_out(name: str) -> bool:
    """Whether the forms of that name skip a tensor."""
    return _number(name) % 3 == 0


def _callable(full: Full, me: Me) -> Form:
    """A function, which is called with the tensors' shapes and dtypes."""
    asked: dict[str, Any] = {}

    def spec(name: str, shape: Any, dtype: Any) -> Any:
        asked[name] = (tuple(shape), dtype)
        return "replicate" if len(shape) < 2 else -1

    def expect(name: str, t: torch.Tensor) -> torch.Tensor:
        assert asked[name][0] == tuple(t.shape), (name, asked[name])
        assert str(asked[name][1]) == str(t.dtype), (name, asked[name])
        return t if t.dim() < 2 else chunk(t, -1, *me)

    return Form(spec, expect)


def _each_its_own(full: Full, me: Me) -> Form:
    """Every rank has another spec for every tensor."""

    def choose(name: str, t: torch.Tensor) -> int:
        return (_number(name) + me.index) % 5 if t.dim() else 1

    def spec(name: str, shape: Any, dtype: Any) -> Any:
        chosen = choose(name, full.tensors[name])
        if chosen == 0:
            return slice(0, (shape[0] + 1) // 2)
        return {1: None, 2: sharding.SKIP, 3: 0, 4: -1}[chosen]

    def expect(name: str, t: torch.Tensor) -> torch.Tensor | None:
        chosen = choose(name, t)
        if chosen in (3, 4):
            return chunk(t, 0 if chosen == 3 else -1, *me)
        if chosen == 0:
            return t[: (t.shape[0] + 1) // 2]
        return t if chosen == 1 else None

    return Form(spec, expect)


FORMS: Mapping[str, Callable[[Full, Me], Form]] = {
    "whole": lambda full, me: Form(None, lambda _, t: t),
    "empty mapping": lambda full, me: Form({}, lambda _, t: t),
    "replicate": lambda full, me: Form(dict.fromkeys(full.tensors, "replicate"), lambda _, t: t),
    "rows": _by_dim(_on(0)),
    "columns": _by_dim(_on(1)),
    "last": _by_dim(_on(-1)),
    "first from the end": _by_dim(lambda _, t: -t.dim() if t.dim() else None),
    "third": _by_dim(_on(2)),
    "alternating": _by_dim(_alternating),
    "windows": _by_slices(_window),
    "steps": _by_slices(_steps),
    "inner step": _by_slices(_inner_step),
    "from the end": _by_slices(_from_the_end),
    "beyond": _by_slices(_beyond),
    "owners": _owners,
    "skip": _skipped,
    "left out": _left_out,
    "whole or left out": _whole_or_left_out,
    "callable": _callable,
    "each its own": _each_its_own,
}
SLICED = ("windows", "steps", "inner step", "from the end", "beyond", "each its own")


# ---------------------------------------------------------------- ways to load


@contextlib.contextmanager
def way_of(rank: Any, way: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Keywords of load_sharded; ``device="cuda"`` is the fake device, which checks its rules."""
    if not str(way.get("device")).startswith("cuda"):
        yield dict(way)
        return
    with rank.fake_cuda() as rank.runtime:
        yield dict(way)
    rank.runtime = None


def loaded(files: Any, group: Any, plan: Any, **options: Any) -> dict[str, torch.Tensor]:
    """load_sharded, without fallbacks."""
    with fastst_patch.profile() as seen:
        result = load_sharded(files, group, plan, **options)
    assert seen.reports, "nothing was reported"
    assert {r.fallback_reason for r in seen.reports} == {None}, seen.reports
    for report in seen.reports:
        assert set(report.path.split("+")) <= {p for name in FAST for p in name.split("+")}, report
    assert sum(r.bytes for r in seen.reports) == sum(t.nbytes for t in result.values())
    return result


def form(rank: Any, files: list[str], form: str, **way: Any) -> int:
    """One form over the default group."""
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    with way_of(rank, way) as options:
        views = options.get("contiguous") is False
        return assert_tensors(loaded(files, None, plan, **options), full, expect, views=views)


def views_by_default(rank: Any, files: list[str]) -> int:
    """By default, columns are views of the file's map."""
    full = full_of(files)
    plan, expect = FORMS["last"](full, Me(rank.rank, rank.world))
    result = fastst_patch.load_sharded(files, None, plan)
    assert_tensors(result, full, expect, views=True)
    return sum(t.untyped_storage().nbytes() > t.nbytes for t in result.values())


def rounds(rank: Any, files: list[str]) -> int:
    """Number of message exchanges in a load from maps."""
    gather, counted = sharding.Group.gather, 0

    def counting(self: Any, value: Any) -> list[Any]:
        nonlocal counted
        counted += 1
        return gather(self, value)

    full = full_of(files)
    plan, expect = FORMS["alternating"](full, Me(rank.rank, rank.world))
    with mock.patch.object(sharding.Group, "gather", counting):
        assert_tensors(loaded(files, None, plan), full, expect)
    return counted


def groups(rank: Any, files: list[str], forms: list[str], **way: Any) -> None:
    """Two groups at once, with ranks 1, 3 and 0, 2 of four; then groups of one, and of all."""
    pairs = [dist.new_group([1, 3]), dist.new_group([0, 2])]
    alone = [dist.new_group([k]) for k in range(4)]
    full = full_of(files)
    rounds = [
        (pairs[1 - rank.rank % 2], Me(rank.rank // 2, 2)),
        (alone[rank.rank], Me(0, 1)),
        (None, Me(rank.rank, 4)),
        (dist.group.WORLD, Me(rank.rank, 4)),
    ]
    with way_of(rank, way) as options:
        for group, me in rounds:
            for name in forms:
                plan, expect = FORMS[name](full, me)
                assert_tensors(loaded(files, group, plan, **options), full, expect)


def no_group(rank: Any, files: list[str], forms: list[str], **way: Any) -> None:
    """Without a process group, a process is the only rank."""
    assert not dist.is_initialized()
    full = full_of(files)
    with way_of(rank, way) as options:
        for name in forms:
            plan, expect = FORMS[name](full, Me(0, 1))
            assert_tensors(loaded(files, None, plan, **options), full, expect)


def outside(rank: Any, files: list[str]) -> str:
    """A rank outside the group raises and does not wait; the others load."""
    group = dist.new_group([0])
    if rank.rank == 0:
        assert len(load_sharded(files, group)) == len(full_of(files).tensors)
        return "loaded"
    try:
        load_sharded(files, group)
    except ValueError as error:
        return type(error).__name__
    return "nothing was raised"


def uneven_groups(rank: Any, files: list[str]) -> None:
    """Ranks load in groups that others are not in, before all load together."""
    few = [dist.new_group([0]), dist.new_group([0, 3]), dist.new_group([1, 2, 3])]
    full = full_of(files)
    for group, members in zip(few, ([0], [0, 3], [1, 2, 3]), strict=True):
        if rank.rank in members:
            me = Me(members.index(rank.rank), len(members))
            plan, expect = FORMS["alternating"](full, me)
            assert_tensors(loaded(files, group, plan), full, expect)
    plan, expect = FORMS["alternating"](full, Me(rank.rank, rank.world))
    assert_tensors(loaded(files, None, plan), full, expect)
