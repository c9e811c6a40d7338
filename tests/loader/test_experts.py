"""Filters of expert parallelism: every expert on exactly one rank, and everything else on all."""

from __future__ import annotations

import re

import pytest
import torch

from fastst_patch import ParallelLoader, expert_parallel_filter, owned_expert_range


@pytest.mark.parametrize(("experts", "ranks"), [(256, 2), (10, 3), (13, 4), (3, 5), (0, 2)])
def test_ranges(experts, ranks) -> None:
    found = [range(*owned_expert_range(experts, ranks, rank)) for rank in range(ranks)]
    assert [expert for some in found for expert in some] == list(range(experts))
    lengths = [len(some) for some in found]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "rank"), [(0, 0), (-1, 0), (2, 2), (2, -1)])
def test_ranks_that_are_not_there(size, rank) -> None:
    for call in (owned_expert_range, expert_parallel_filter):
        with pytest.raises(ValueError, match="ep_"):
            call(8, size, rank)


def test_a_filter_of_an_iteration(raw) -> None:
    names = [
        *(f"model.layers.0.mlp.experts.{k}.w1.weight" for k in range(4)),
        *(f"layers.0.ffn.experts.{k}.scale" for k in range(4)),
        "model.embed.weight", "layers.0.shared_experts.1.weight", "layers.1.experts.gate_up",
    ]  # fmt: skip
    path = raw.tensors({name: torch.full((3,), k) for k, name in enumerate(names)})
    found: list[str] = []
    for rank in range(2):
        keep = expert_parallel_filter(4, 2, rank)
        with ParallelLoader(None, [path], use_tqdm_on_load=False, tensor_filter=keep) as loader:
            for name, tensor in loader.iterate_weights():
                assert bool((tensor == names.index(name)).all())
                found.append(name)
    assert sorted(found) == sorted([*names, *names[8:]])


def test_names_of_ones_own() -> None:
    keep = expert_parallel_filter(8, 4, 1, pattern=re.compile(r"expert_([0-9]+)$"))
    assert [k for k in range(8) if keep(f"expert_{k}")] == [2, 3]
    assert keep("x.experts.7.y")
