"""vLLM itself, its CPU build: two ranks, by tensors, by layers and by experts.

How a rank's part is read may change; that its parameters equal stock's may not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm_checkpoint
from vllm_running import NEEDS_VLLM, checkpoint, found_by  # noqa: F401 - a fixture

pytestmark = NEEDS_VLLM

RANKS = """
import fastst_patch
from vllm_loading import begin, load, same, tell

options = OPTIONS
folder, rank = begin(**{"tensor": options.get("tensor_parallel_size", 1),
                        "pipeline": options.get("pipeline_parallel_size", 1)} | MORE)
theirs, none, _ = load(folder, **options)
with fastst_patch.patched():
    ours, reports, _ = load(folder, **options)
tell([rank, same(ours, theirs) and not none, sorted(ours), reports])
"""


def loaded(script: Path, folder: Path, more: str = "{}", **options: Any) -> list[list[Any]]:
    """Names of the parameters and the reports of each rank, whose bytes are stock's."""
    text = RANKS.replace("OPTIONS", repr(options)).replace("MORE", more)
    found = sorted(found_by(script, folder, text, ranks=2))
    assert [rank for rank, *_ in found] == [0, 1]
    assert all(same for _, same, *_ in found)
    return [rest for _, _, *rest in found]


def test_by_tensors(checkpoint, tmp_path) -> None:  # noqa: F811
    for _, reports in loaded(tmp_path / "ranks.py", checkpoint, tensor_parallel_size=2):
        assert reports[0][0] == "vllm"


def test_by_layers(checkpoint, tmp_path) -> None:  # noqa: F811
    (first, one), (second, other) = loaded(
        tmp_path / "ranks.py", checkpoint, pipeline_parallel_size=2
    )
    assert "model.embed_tokens.weight" in set(first) - set(second)
    assert "lm_head.weight" in set(second) - set(first)
    assert one[0][0] == other[0][0] == "vllm"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    vllm_checkpoint.write_mixture(folder)
    return folder


BY_EXPERTS = {"enable_expert_parallel": True, "skip_tokenizer_init": True}


@pytest.mark.parametrize("only_local", [False, True])
def test_by_experts(mixture, tmp_path, only_local) -> None:
    ranks = loaded(
        tmp_path / "ranks.py", mixture, more="options", data_parallel_size=2,
        enable_ep_weight_filter=only_local, **BY_EXPERTS,
    )  # fmt: skip
    everything = 3 + 2 * (9 + 3 * vllm_checkpoint.EXPERTS)
    local = everything - 2 * 3 * vllm_checkpoint.EXPERTS // 2
    for _, reports in ranks:  # without the filter, those of other ranks are given and not used
        assert reports == [["vllm", "mmap", local, None]]
