"""Tensor parallelism on one machine: each rank loads its part, together they read the model once.

    torchrun --nproc-per-node 4 examples/four_ranks.py MODEL

MODEL is a folder, a file or an index of a Llama-like checkpoint; any other is loaded with all its
tensors whole. On the CPU the parts of rows and whole tensors are the file's own pages; on GPUs
every rank reads a fourth of what all need, and the ranks exchange it.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from fastst_patch import RankError, load_sharded
from fastst_patch.sharding import plan_from_tp_plan

# What a model of transformers says of itself: model.config.base_model_tp_plan.
TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def main() -> int:
    """Load, and say what came."""
    if len(sys.argv) != 2 or "RANK" not in os.environ:
        print(__doc__, file=sys.stderr)
        return 2
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        # The names of tensors matter only where experts are tensors of their own.
        tensors = load_sharded(sys.argv[1], plan=plan_from_tp_plan(TP_PLAN, names=()))
    except RankError as error:  # the same on all ranks, whichever of them failed
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    # With its end in one piece: ranks share the terminal.
    print(f"rank {rank} of {ranks}: {len(tensors)} tensors, {nbytes} bytes\n", end="", flush=True)
    dist.barrier()
    if rank == 0:
        for name, tensor in tensors.items():
            print(f"  {name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
