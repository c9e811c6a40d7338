"""Ranks of an engine, stood in for: tensors that are not worth deferring."""

from __future__ import annotations

import parallel_model
import pytest
import torch
from cases_parallel import load, same
from engine_standin import Model
from parallel_model import Parallel
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine
from fastst_patch.integrations import parts

COUNT, ROWS = 3000, 2048


@pytest.fixture
def rank_of_two(vllm):
    vllm.parallel.sizes["tensor"] = 2
    vllm.parallel.rank = 1
    return vllm


@pytest.fixture
def scales(tmp_path):
    """24 MB in tensors of 8 KiB."""
    tensors = {f"{n:05}.scale": torch.full((ROWS,), float(n)) for n in range(COUNT)}
    path = tmp_path / "scales" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("device", "cold"), [("cpu", False), ("cpu", True), ("cuda:0", False)])
def test_they_are_the_views_that_stock_gives(
    rank_of_two, tmp_path, cuda, evict, on_disk, device, cold
) -> None:
    parallel_model.write(tmp_path / "llama")
    llama = str(tmp_path / "llama")
    ours, theirs = (Parallel(1, 2, device) for _ in range(2))
    load(rank_of_two, llama, theirs)
    if cold:
        for path in (tmp_path / "llama").iterdir():
            evict(path)
    nbytes, kinds = [], set()
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        for name, tensor in rank_of_two.pairs(llama, ours):
            kinds.add((tensor.nbytes < parts.SMALL, type(tensor) is torch.Tensor))
            nbytes += [tensor.nbytes] * (tensor.nbytes < parts.SMALL)
            ours.load_weights([(name, tensor)])
    assert same(ours, theirs)
    assert kinds == {(True, True), (False, device == "cpu" and not cold)}
    of_map = [report for report in seen.reports if report.device == "cpu"]
    assert sum(report.tensors for report in of_map) >= len(nbytes)
    if device != "cpu":
        assert [(r.tensors, r.bytes) for r in of_map] == [(len(nbytes), sum(nbytes))]
        assert "small" in str(of_map[0].fallback_reason)


@pytest.mark.parametrize("cold", [False, True])
def test_cold_ones_are_read_ahead(rank_of_two, scales, evict, on_disk, monkeypatch, cold) -> None:
    monkeypatch.setattr(parts, "AHEAD", 8 << 20)  # six groups
    whole = scales.stat().st_size
    if cold:
        evict(scales)
    asked = []  # how much of it workers bring depends on who is first: they, or the reader

    def prefetch(file, arena, segments, *, start=engine.prefetch, **options):
        asked.extend(segments[1::3])
        return start(file, arena, segments, **options)

    monkeypatch.setattr(engine, "prefetch", prefetch)
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        found = rank_of_two.load(scales.parent, Model(1, "cpu"))
    assert [int(tensor[-1]) for tensor in found.values()] == list(range(COUNT))
    (report,) = seen.reports
    assert (report.tensors, report.bytes) == (COUNT, COUNT * 4 * ROWS)
    assert report.path == ("mmap+readahead" if cold else "mmap")
    assert (sum(asked) >= 0.9 * whole) if cold else not asked


def test_one_that_is_dropped_half_way(rank_of_two, scales, nothing_left) -> None:
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        pairs = rank_of_two.pairs(scales.parent, Model(1, "cpu"))
        for _ in range(3):
            next(pairs)
        pairs.close()
    assert [report.tensors for report in seen.reports] == [3]
