"""Loads by vLLM's own loaders in this process. Imports vLLM: for programs that tests start."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

import fastst_patch

Parameters = dict[str, torch.Tensor]


def config(folder: Any, **options: Any) -> Any:
    """vLLM's configuration for a model."""
    args = EngineArgs(str(folder), dtype="float32", enforce_eager=True, max_model_len=32, **options)
    return args.create_engine_config()


def begin() -> tuple[str, int]:
    """Make this process a rank of those that torchrun started, or the only one.

    Returns:
        The folder that the program was given, and this process's rank.
    """
    folder = sys.argv[1]
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    where = "env://" if ranks > 1 else f"file://{tempfile.mkdtemp()}/rendezvous"
    with set_current_vllm_config(config(folder)):
        init_distributed_environment(ranks, rank, where, rank, backend="gloo")
        initialize_model_parallel(ranks, 1)
    return folder, rank


def load(folder: Any, times: int = 1, **options: Any) -> tuple[Parameters, list[Any], Any]:
    """Load up to where vLLM packs weights for its kernels, and drops the parameters.

    Returns:
        Parameters by name, what was reported, and the model.
    """
    made = config(folder, **options)
    with set_current_vllm_config(made), fastst_patch.profile() as seen:
        with set_default_torch_dtype(torch.float32):
            model = initialize_model(vllm_config=made)
        for _ in range(times):
            for parameter in model.parameters():
                parameter.data.view(-1).view(torch.uint8).fill_(0x77)
            get_model_loader(made.load_config).load_weights(model, made.model_config)
    reports = [[r.call, r.path, r.tensors, r.fallback_reason] for r in seen.reports]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert sum(p.nbytes for p in parameters.values()) > 100_000
    return parameters, reports, model


def same(ours: Parameters, theirs: Parameters) -> bool:
    """Whether two models have the same parameters, byte for byte."""
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(raw(ours[name]), raw(theirs[name]))
        for name in theirs
    )


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def tell(found: Any) -> None:
    """Hand a result to `vllm_running.found_by`."""
    print("FOUND", json.dumps(found), flush=True)
