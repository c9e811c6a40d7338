"""Ranks that load a model as vLLM's do; see parallel_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import vllm_standin
from engine_standin import Standin
from parallel_model import Parallel

import fastst_patch
import fastst_plugins
from fastst_patch import engine
from fastst_patch.integrations import parts


def load(engine: Standin, folder: str, model: Parallel, **options: Any) -> list[Any]:
    """Load a model; what was reported."""
    with fastst_patch.profile() as seen:
        model.load_weights(engine.pairs(Path(folder), model, **options))
    return seen.reports


def same(ours: Parallel, theirs: Parallel) -> bool:
    """Whether all parameters are equal, byte for byte."""
    return all(
        torch.equal(ours.params[name].view(torch.uint8), param.view(torch.uint8))
        if param.dim()
        else torch.equal(ours.params[name], param)
        for name, param in theirs.params.items()
    )


def _compared(rank: Any, folder: str, device: str, way: str, extra: dict[str, Any]) -> Any:
    parts.SMALL = 0  # the model is small, and its parts are counted
    with vllm_standin.standing_in(Path.cwd() / f"site-{way}-{device}") as vllm:
        fastst_plugins._watch_loaders.cache_clear()
        fastst_plugins.register_vllm()
        vllm.parallel.sizes["tensor"] = rank.world
        vllm.parallel.rank = rank.rank
        vllm.parallel.group = dist.group.WORLD
        theirs = Parallel(rank.rank, rank.world, device)
        load(vllm, folder, theirs)
        ours = Parallel(rank.rank, rank.world, device)
        before = engine.counters()
        if way == "patched":
            with fastst_patch.patched():
                reports = load(vllm, folder, ours)
        else:
            options = {"load_format": "fastst", "model_loader_extra_config": extra}
            reports = load(vllm, folder, ours, **options)
        after = engine.counters()
        return {
            "device": device, "same": same(ours, theirs), "keeps": ours.nbytes,
            "asked": len(vllm.utils.asked),
            "copied": after["bytes_copied"] - before["bytes_copied"],
            "reports": [[r.call, r.device, r.path, r.bytes, r.fallback_reason] for r in reports],
        }  # fmt: skip


def loads(
    rank: Any, folder: str, device: str, way: str, extra: dict[str, Any] | None = None
) -> Any:
    """Load with and without us."""
    if device == "cpu":
        return _compared(rank, folder, device, way, extra or {})
    with rank.fake_cuda() as runtime:
        found = _compared(rank, folder, device, way, extra or {})
        found["left"] = runtime.driver.live().blocks
        return found


def alone(rank: Any, folder: str) -> Any:
    """Only the first rank loads."""
    return _compared(rank, folder, "cpu", "patched", {}) if rank.rank == 0 else None
