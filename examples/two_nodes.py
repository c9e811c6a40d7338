"""Expert parallelism over two machines: experts go to their owners, the rest to everybody.

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/two_nodes.py MODEL [--read-once job]

on both of them. MODEL is the checkpoint's folder, file or index, under one name everywhere. Each
machine reads from its storage what its own ranks need, once. With ``--read-once job`` every byte
is read on one machine and sent to the other, which pays where the network is faster than the
storage. A machine that lacks a file is sent it in any case.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fastst_patch import RankError, load_sharded
from fastst_patch.sharding import Owner

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def main() -> int:
    """Load, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--read-once", choices=("node", "job"), default="node")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start it with torchrun:\n{__doc__}")
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def plan(name: str, shape: Sequence[int], dtype: torch.dtype) -> Owner | None:
        """Expert 0 to rank 0, expert 1 to rank 1, ..., and around; None: whole, to all."""
        expert = EXPERT.search(name)
        return Owner(int(expert[1]) % ranks) if expert else None

    try:
        tensors = load_sharded(args.model, plan=plan, read_once=args.read_once)
    except RankError as error:  # the same on all ranks, whichever of them failed
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    experts = sorted({int(found[1]) for name in tensors if (found := EXPERT.search(name))})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    # With its end in one piece: ranks share the terminal.
    print(f"rank {rank} of {ranks}: experts {experts}, {nbytes} bytes\n", end="", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
