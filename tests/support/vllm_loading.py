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
from fastst_patch.integrations import parts

parts.SMALL = 0  # models are small, and their parts are counted

Parameters = dict[str, torch.Tensor]


def config(folder: Any, **options: Any) -> Any:
    """vLLM's configuration for a model."""
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 32} | options
    return EngineArgs(str(folder), **options).create_engine_config()


def begin(tensor: int = 1, pipeline: int = 1, **options: Any) -> tuple[str, int]:
    """Make this process a rank of those that torchrun started, or the only one.

    Args:
        tensor: ranks that share each tensor.
        pipeline: ranks that share the layers.
        options: of vLLM's configuration. With ``data_parallel_size``, the remaining ranks share
            the experts.

    Returns:
        The folder that the program was given, and this process's rank.
    """
    folder = sys.argv[1]
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    where = "env://" if ranks > 1 else f"file://{tempfile.mkdtemp()}/rendezvous"
    if ranks > tensor * pipeline:  # else vLLM asks the configuration where its ranks meet
        torch.distributed.init_process_group("gloo")
    with set_current_vllm_config(config(folder, **options)):
        init_distributed_environment(ranks, rank, where, rank, backend="gloo")
        initialize_model_parallel(tensor, pipeline)
    return folder, rank


def load(folder: Any, times: int = 1, **options: Any) -> tuple[Parameters, list[Any], Any]:
    """Load up to where vLLM packs weights for its kernels, and drops the parameters.

    Returns:
        Parameters by name, what was reported, and the model.
    """
    made = config(folder, **options)
    with set_current_vllm_config(made), fastst_patch.profile() as seen:
        with set_default_torch_dtype(made.model_config.dtype):
            model = initialize_model(vllm_config=made)
        for _ in range(times):
            for parameter in model.parameters():
                parameter.data.view(-1).view(torch.uint8).fill_(0x77)
            get_model_loader(made.load_config).load_weights(model, made.model_config)
    reports = [[r.call, r.path, r.tensors, r.fallback_reason] for r in seen.reports]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert sum(p.nbytes for p in parameters.values()) > 50_000
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
