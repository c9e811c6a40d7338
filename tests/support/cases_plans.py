"""Cases of ranks: plans from transformers' tensor parallelism, against its own shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from cases_forms import full_of, loaded, way_of
from rank_nursery import attempt
from sharded import assert_tensors, load_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastst_patch import sharding

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _shard_of(style: str, name: str, tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """A parameter's shard as transformers takes it, by its placeholder and shard-on-read."""
    from transformers.core_model_loading import DtensorShardOperation
    from transformers.distributed import expert_parallel  # noqa: F401 - registers its styles
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    module, parameter = torch.nn.Module(), name.rpartition(".")[2]
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    module.register_parameter(parameter, torch.nn.Parameter(empty, requires_grad=False))
    ALL_PARALLEL_STYLES[style].shard_param(module, parameter, mesh)
    placed = module._parameters[parameter]
    if not isinstance(placed, DTensor):
        return tensor
    return DtensorShardOperation(placed).shard_tensor(tensor)


def styled(rank: Any, files: list[str], styles: Mapping[str, str], **way: Any) -> int:
    """Every tensor of the files, by the style of its module in a tp_plan.

    Args:
        rank: this process.
        files: tensors ``model.layers.N.MODULE.PARAMETER``.
        styles: a style for each module.
        way: options.
    """
    mesh = init_device_mesh("cpu", (rank.world,))
    full = full_of(files)
    patterns = {f"layers.*.{module}": style for module, style in styles.items()}
    plan = sharding.plan_from_tp_plan(patterns, list(full.tensors))

    def expect(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.split(".", 3)[-1].rpartition(".")[0]
        return _shard_of(styles[module], name, tensor, mesh) if module in styles else tensor

    with way_of(rank, way) as options:
        return assert_tensors(loaded(files, None, plan, **options), full, expect)


def unknown_style(rank: Any, files: list[str]) -> Any:
    return attempt(lambda: sharding.plan_from_tp_plan({"layers.*.q_proj": "sideways"}, []))["error"]


def unknown_placed_name(rank: Any, files: list[str]) -> Any:
    """A plan of placements has a name that is in no file."""
    mesh = init_device_mesh("cpu", (rank.world,))
    plan = sharding.plan_from_placements(mesh, {"nobody": [Shard(0)]})
    return attempt(lambda: load_sharded(files, None, plan) and None)["error"]


def experts(rank: Any, files: list[str], count: int) -> int:
    """Separate experts go to the ranks that would hold them merged."""
    full = full_of(files)
    patterns = {"layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
                "layers.*.mlp.experts.down_proj": "grouped_gemm"}  # fmt: skip
    plan = sharding.plan_from_tp_plan(patterns, list(full.tensors))
    mine = torch.chunk(torch.arange(count), rank.world)
    held = mine[rank.rank].tolist() if rank.rank < len(mine) else []

    def expect(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if ".experts." not in name:
            return tensor
        return tensor if int(EXPERT.search(name)[1]) in held else None

    return assert_tensors(loaded(files, None, plan), full, expect)
