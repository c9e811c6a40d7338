"""Plans from transformers' tp_plan and DTensor placements, against those libraries' own shards.

transformers applies a module's style to an empty parameter, and reads the file's tensor by its own
shard-on-read; see cases_plans.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import sharded
import torch
from ranks import Case, Ran

from fastst_patch import engine, sharding
from fastst_patch.sharding.spec import shard_of

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

READER = "transformers.distributed.tensor_parallel"

# Style: shapes of parameters that it may meet. Odd lengths where the style takes them.
STYLES = {
    **{
        style: {"weight": (7, 10), "bias": (7,), "small.weight": (3, 2)}
        for style in ("colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep",
                      "rowwise_split_input")
    },
    "packed_colwise": {"weight": (20, 5), "bias": (20,), "gate_up_proj": (3, 20, 4)},
    "packed_rowwise": {"weight": (5, 20), "bias": (5,), "gate_up_proj": (3, 4, 20)},
    "embedding_rowwise": {"weight": (11, 6)},
    "embedding_colwise": {"weight": (6, 11)},
    "replicated_with_grad_allreduce": {"weight": (7,)},
    "mla_kv_a_proj": {"weight": (7, 4)},
    "replicate": {"weight": (7, 4), "bias": (7,)},
    "all_reduce": {"weight": (7, 4)},
    "grouped_gemm": {"gate_up_proj": (8, 3, 5), "down_proj": (8, 5, 3)},
}  # fmt: skip


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, dict[str, str]]:
    """A file with two layers of modules, one or two for each style, and their styles."""
    tensors, styles = [("model.norm.weight", "BF16", (6,))], {}
    for layer in range(2):
        for style, parameters in STYLES.items():
            for name, shape in parameters.items():
                inner, _, parameter = name.rpartition(".")
                module = f"of_{style}" + (f".{inner}" if inner else "")
                styles[module] = style
                tensors.append((f"model.layers.{layer}.{module}.{parameter}", "BF16", shape))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    sharded.write_file(path, tensors)
    return str(path), styles


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    """Six experts in each of two layers, over 4 ranks 2, 2, 2 and 0; and two other tensors."""
    tensors = [("model.norm.weight", "BF16", (6,)), ("model.layers.0.q.weight", "F32", (4, 4))]
    tensors += [
        (f"model.layers.{layer}.mlp.experts.{number}.{part}.weight", "BF16", (4, 6))
        for layer in range(2) for number in range(6) for part in ("gate_proj", "down_proj")
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("experts") / "model.safetensors"
    sharded.write_file(path, tensors)
    return str(path)


def _of_style(model: tuple[str, dict[str, str]], style: str, way: str) -> Case:
    path, styles = model
    options = {"device": "cuda"} if way == "cuda" else {}
    chosen = {module: one for module, one in styles.items() if one == style}
    arguments = {"files": [path], "styles": chosen, **options}
    return Case("cases_plans.styled", arguments, name=f"{way}: {style}")


@pytest.fixture(scope="module", params=[2, 4])
def styled(request, nursery, model) -> Ran:
    if not _has(READER):
        pytest.skip("this transformers, if any, does not read shards as DTensor's placements")
    cases = [_of_style(model, style, way) for style in STYLES for way in ("default", "cuda")]
    readers = ["transformers.core_model_loading", READER]
    return nursery.run(cases, request.param, preload=readers)


@pytest.mark.parametrize("way", ["default", "cuda"])
@pytest.mark.parametrize("style", STYLES)
def test_style(styled, model, style, way) -> None:
    total = sum(end - begin for begin, end in sharded.data_offsets(model[0]).values())
    values = styled.values(_of_style(model, style, way))
    whole = style in ("replicated_with_grad_allreduce", "mla_kv_a_proj", "replicate", "all_reduce")
    assert (values == [total] * len(values)) == whole


# From transformers 5, for Qwen3-MoE and Mixtral, reduced to attention and experts.
MERGED_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("module", "gate", "up", "down"),
    [
        ("mlp", "gate_proj", "up_proj", "down_proj"),
        ("block_sparse_moe", "w1", "w3", "w2"),
    ],
)
def test_separate_experts_are_sharded_as_merged_ones(module, gate, up, down, size) -> None:
    """A rank's shards of separate experts, merged, equal its shard of the merged experts."""
    count, inner, hidden = 3, 10, 6
    prefix = f"model.layers.0.{module}.experts"
    whole = {
        f"{prefix}.{e}.{part}.weight": torch.randn(
            (hidden, inner) if part == down else (inner, hidden)
        )
        for e in range(count) for part in (gate, up, down)
    }  # fmt: skip
    merged = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack([
            torch.cat([whole[f"{prefix}.{e}.{p}.weight"] for p in (gate, up)])
            for e in range(count)
        ]),
        "model.layers.0.mlp.experts.down_proj": torch.stack([
            whole[f"{prefix}.{e}.{down}.weight"] for e in range(count)
        ]),
    }  # fmt: skip

    def shards(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
        plan = sharding.plan_from_tp_plan(MERGED_PLAN, list(tensors)).sized(size)
        found = {}
        for name, tensor in tensors.items():
            spec = plan(name, tensor.shape, tensor.dtype)
            shard = shard_of(spec, name, tensor.shape, rank, size)
            assert shard is not None
            pieces = [tensor[region.index] for region in shard.regions]
            found[name] = torch.cat(pieces, shard.dim) if len(pieces) > 1 else pieces[0]
        return found

    for rank in range(size):
        apart, together = shards(whole, rank), shards(merged, rank)
        for e in range(count):
            expert = f"{prefix}.{e}"
            ours = torch.cat([apart[f"{expert}.{p}.weight"] for p in (gate, up)])
            assert torch.equal(ours, together["model.layers.0.mlp.experts.gate_up_proj"][e])
            theirs = together["model.layers.0.mlp.experts.down_proj"][e]
            assert torch.equal(apart[f"{expert}.{down}.weight"], theirs)


def test_no_tp_plan_means_whole() -> None:
    plan = sharding.plan_from_tp_plan(None, ["a"])
    assert plan("a", (2, 2), torch.float32) is None


@pytest.fixture(scope="module")
def planned(nursery, experts) -> Ran:
    return nursery.run([
        Case("cases_plans.experts", {"files": [experts], "count": 6}, name="experts"),
        Case("cases_plans.unknown_style", {"files": [experts]}, name="style"),
        Case("cases_plans.unknown_placed_name", {"files": [experts]}, name="placed name"),
    ], 4)  # fmt: skip


def test_experts(planned, experts) -> None:
    values = planned.values("experts")
    size = Path(experts).stat().st_size
    assert values[0] == values[1] == values[2] > values[3]
    assert sum(values) < 2 * size


def test_unknown_style(planned) -> None:
    for error in planned.values("style"):
        assert error is not None
        assert "ValueError" in error["bases"]
        assert "sideways" in error["text"]
        assert "layers.*.q_proj" in error["text"]


def test_placement_of_a_name_that_no_file_has(planned) -> None:
    """It raises as any other plan does."""
    for error in planned.values("placed name"):
        assert error is not None, "nothing was raised"
        assert "ValueError" in error["bases"]
        assert "nobody" in error["text"]
