"""vLLM itself, its CPU build: an engine in one process that drafts tokens, and loads again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import vllm_checkpoint
from vllm_running import NEEDS_VLLM, checkpoint, run  # noqa: F401 - a fixture

pytestmark = NEEDS_VLLM

ENGINE = """
import sys
from vllm import LLM, SamplingParams
from vllm_loading import tell

target, drafter = sys.argv[1:]

def models(worker):
    runner = worker.model_runner
    return {
        f"{part} {name}": hash(parameter.detach().float().numpy().tobytes())
        for part, model in (("target", runner.model), ("drafter", runner.drafter.model))
        for name, parameter in model.named_parameters()
    }

llm = LLM(
    target, dtype="float32", enforce_eager=True, max_model_len=32, seed=0,
    distributed_executor_backend="uni",
    speculative_config={
        "model": drafter, "method": "draft_model", "num_speculative_tokens": 2,
        "draft_tensor_parallel_size": 1,
    },
)
sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

def state():
    out = llm.generate([{"prompt_token_ids": [1, 5, 6, 7]}], sampling)
    (weights,) = llm.collective_rpc(models)
    return list(out[0].outputs[0].token_ids), weights

first = state()
llm.collective_rpc("reload_weights")
tell([first, state()])
"""


@pytest.fixture(scope="module")
def states(checkpoint, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    """For each way: tokens and parameters after the load, the same after loading again; lines."""
    place = tmp_path_factory.mktemp("engine")
    vllm_checkpoint.write(place / "drafter", layers=1, seed=4)
    script = place / "engine.py"
    script.write_text(ENGINE, encoding="utf-8")
    found = {}
    for way, enabled in (("stock", "0"), ("patched", "1")):
        out, err = run(
            [str(script), str(checkpoint), str(place / "drafter")], FASTST_ENABLED=enabled,
            FASTST_LOG_LEVEL="info", VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_ALLOW_INSECURE_SERIALIZATION="1", PYTHONHASHSEED="0",
        )  # fmt: skip
        (told,) = [line for line in out.splitlines() if line.startswith("FOUND ")]
        lines = [line for line in (out + err).splitlines() if line.startswith("fastst_patch: vllm")]
        found[way] = [*json.loads(told.removeprefix("FOUND ")), lines]
    return found


def test_target_and_drafter_equal_stocks(states) -> None:
    tokens, weights = states["patched"][0]
    assert (tokens, weights) == tuple(states["stock"][0])
    assert len(tokens) == 12
    assert {name.split()[0] for name in weights} == {"target", "drafter"}


def test_loading_again_equals_stocks(states) -> None:
    assert states["patched"][1] == states["stock"][1] == states["stock"][0]


def test_all_three_loads_are_streamed(states) -> None:
    assert states["stock"][2] == []
    target, drafter, again = states["patched"][2]
    assert "in 21 tensors" in target
    assert "in 12 tensors" in drafter
    assert "in 21 tensors" in again
    assert all("path mmap" in line for line in states["patched"][2])
