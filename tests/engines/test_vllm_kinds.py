"""vLLM itself, its CPU build: other loaders, and other kinds of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_running import NEEDS_VLLM, checkpoint, found_by  # noqa: F401 - a fixture

pytestmark = NEEDS_VLLM

KINDS = '''
import json, shutil, tempfile
from pathlib import Path
import torch
import fastst_patch
from safetensors.torch import load_file, save_file
from vllm_loading import begin, load, same, tell

source = Path(begin()[0])
tensors = {}
for path in sorted(source.glob("*.safetensors")):
    tensors.update(load_file(path))
found = {}

def folder():
    """With all but the weights."""
    made = Path(tempfile.mkdtemp())
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, made)
    return made

def compare(name, where, **options):
    theirs, _, _ = load(where, **options)
    with fastst_patch.patched():
        ours, reports, _ = load(where, **options)
    found[name] = [same(ours, theirs), sorted({str(p.dtype) for p in ours.values()}), reports]

# sharded_state: a file for each rank.
from vllm.model_executor.model_loader import ShardedStateLoader
made = folder()
ShardedStateLoader.save_model(load(source)[2], str(made))
compare("sharded_state", made, load_format="sharded_state")

# compressed-tensors: linear layers in eight bits.
made, packed = folder(), {}
for name, tensor in tensors.items():
    packed[name] = tensor.clone()
    if name.endswith("_proj.weight"):
        scale = tensor.abs().amax(1, keepdim=True) / 127
        packed[name] = (tensor / scale).round().to(torch.int8)
        packed[name + "_scale"] = scale
save_file(packed, made / "model.safetensors")
eight = {"num_bits": 8, "type": "int", "symmetric": True}
group = {
    "targets": ["Linear"],
    "weights": {**eight, "strategy": "channel", "dynamic": False},
    "input_activations": {**eight, "strategy": "token", "dynamic": True},
}
described = json.loads((made / "config.json").read_text())
described["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
    "quantization_status": "compressed", "config_groups": {"group_0": group},
}
(made / "config.json").write_text(json.dumps(described))
compare("compressed-tensors", made)

# fp8: linear layers in eight bits, a scale for each.
made, packed = folder(), {}
for name, tensor in tensors.items():
    packed[name] = tensor.to(torch.bfloat16)
    if name.endswith("_proj.weight"):
        scale = tensor.abs().max() / 448
        packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
        packed[name + "_scale"] = scale
save_file(packed, made / "model.safetensors")
described = json.loads((made / "config.json").read_text())
described["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
(made / "config.json").write_text(json.dumps(described))
compare("fp8", made, dtype="bfloat16")

# A model that does not take all that is in its files.
made = folder()
more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(200_000)}
save_file({**tensors, **more}, made / "model.safetensors")
compare("part", made)

# LoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
made, adapter = Path(tempfile.mkdtemp()), {}
for name, rows in (("q_proj", 64), ("v_proj", 32)):
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        adapter[f"{prefix}.lora_A.weight"] = torch.randn(4, 64)
        adapter[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4)
save_file(adapter, made / "adapter_model.safetensors")
(made / "adapter_config.json").write_text(json.dumps({
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA",
    "bias": "none", "base_model_name_or_path": "x",
}))

def lora():
    model = LoRAModel.from_local_checkpoint(
        str(made), {"q_proj", "v_proj"}, peft_helper=PEFTHelper.from_local_dir(str(made), 32),
        lora_model_id=1, device="cpu", dtype=torch.float32,
    )
    return {n + k: t for n, w in model.loras.items() for k, t in (("a", w.lora_a), ("b", w.lora_b))}

theirs = lora()
with fastst_patch.patched(), fastst_patch.profile() as seen:
    ours = lora()
reports = [[r.call, r.path, r.tensors, r.fallback_reason] for r in seen.reports]
found["lora"] = [same(ours, theirs) and len(ours) == 8, [], reports]
tell(found)
'''


@pytest.fixture(scope="module")
def kinds(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    (found,) = found_by(tmp_path_factory.mktemp("kinds") / "kinds.py", checkpoint, KINDS)
    return found


@pytest.mark.parametrize("kind", ["sharded_state", "compressed-tensors", "fp8", "part", "lora"])
def test_equals_stock(kinds, kind) -> None:
    assert kinds[kind][0]


def test_quantized_weights_are_streamed(kinds) -> None:
    _, dtypes, reports = kinds["compressed-tensors"]
    assert dtypes == ["torch.float32", "torch.int8"]
    assert reports == [["vllm", "mmap", 35, None]]
    _, dtypes, reports = kinds["fp8"]
    assert "torch.float8_e4m3fn" in dtypes
    assert reports == [["vllm", "mmap", 35, None]]


def test_a_model_takes_a_part_of_the_files(kinds) -> None:
    assert kinds["part"][2] == [["vllm", "mmap", 21, None]]


@pytest.mark.parametrize("kind", ["sharded_state", "lora"])
def test_others_go_by_safe_open(kinds, kind) -> None:
    (report,) = kinds[kind][2]
    assert report[0] == "safe_open"
    assert report[1].startswith("mmap")


RANKS = """
import fastst_patch
from vllm_loading import begin, load, same, tell

folder, rank = begin()
theirs, _, _ = load(folder, tensor_parallel_size=2)
found = {"rank": rank, "keeps": sum(p.nbytes for p in theirs.values())}

def compare(name, **options):
    with fastst_patch.profile() as seen:
        ours, reports, _ = load(folder, tensor_parallel_size=2, **options)
    nbytes = sum(report.bytes for report in seen.reports)
    found[name] = [same(ours, theirs), reports, nbytes]

with fastst_patch.patched():
    compare("patched")
compare("format", load_format="fastst")
compare("group", load_format="fastst", model_loader_extra_config={"group": "tp"})
tell(found)
"""


def test_two_ranks_take_their_parts(checkpoint, tmp_path) -> None:  # noqa: F811
    found = found_by(tmp_path / "ranks.py", checkpoint, RANKS, ranks=2)
    assert sorted(one["rank"] for one in found) == [0, 1]
    for one in found:
        for way in ("patched", "format"):
            same, reports, nbytes = one[way]
            assert same
            assert reports == [["vllm", "mmap", 21, None]]
            assert nbytes <= 1.1 * one["keeps"]
        same, reports, _ = one["group"]
        assert same
        assert {report[0] for report in reports} == {"vllm"}
        assert sum(report[2] for report in reports) == 21
