"""Quantized checkpoints through transformers: stock and patched, and over the fake driver.

fp8 and mxfp4 files are written here as their publishers write them; without a GPU transformers
dequantizes both. Those of torchao and compressed-tensors stay quantized, in tensors of torchao's
own classes and in modules of compressed-tensors.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import transformers
from torch import nn
from twice import data_bytes, tensor_bytes, twice, weights_in

import fastst_patch
from fastst_patch.integrations import prefetch

pytest.importorskip("accelerate", reason="quantizers of transformers need accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
BLOCK = 64


def _llama(folder: Path) -> type:
    config = transformers.LlamaConfig(**SMALL)
    return _save(transformers.LlamaForCausalLM(config), folder)


def _save(model: Any, folder: Path) -> type:
    model.to(torch.bfloat16).save_pretrained(folder)
    return type(model)


def _rewrite(
    folder: Path,
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    quantization: dict[str, Any],
) -> None:
    """Put other tensors in each one's place, in two files, and tell the config how to read them."""
    (file,) = weights_in(folder)
    found = safetensors.torch.load(file.read_bytes())
    file.unlink()
    tensors = {new: t for name, old in found.items() for new, t in change(name, old).items()}
    names = list(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------- checkpoints


def _fp8(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of one scale each, as DeepSeek and Qwen publish them."""
    if "proj" not in name:
        return {name: t}
    blocks = t.float().reshape(t.shape[0] // BLOCK, BLOCK, t.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    small = (blocks / scale).reshape(t.shape).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": scale[:, 0, :, 0].contiguous()}


FP8 = {
    "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip


def _fp8_dense(folder: Path) -> type:
    made = _llama(folder)
    _rewrite(folder, _fp8, FP8)
    return made


def _fp8_experts(folder: Path) -> type:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": BLOCK}
    config = transformers.Qwen3MoeConfig(**SMALL, **experts)
    made = _save(transformers.Qwen3MoeForCausalLM(config), folder)
    _rewrite(folder, _fp8, FP8)
    return made


def _mxfp4(folder: Path) -> type:
    """Two numbers a byte and a scale for 32, as of gpt-oss."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    made = _save(
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, **experts)), folder
    )

    def change(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: t}
        count, rows, columns = t.shape
        shape = (count, columns, rows // 32)
        return {
            f"{name}_blocks": torch.randint(256, (*shape, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(118, 124, shape, dtype=torch.uint8),
        }

    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    _rewrite(folder, change, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return made


def _compressed_tensors(folder: Path) -> type:
    """Packed 4-bit numbers, a scale for each row."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    made = _llama(folder)

    def change(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
        if "proj" not in name:
            return {name: t}
        packed = torch.randint(-(2**31), 2**31, (t.shape[0], t.shape[1] // 8), dtype=torch.int32)
        return {
            f"{name}_packed": packed,
            f"{name}_scale": t.abs().amax(1, keepdim=True) / 7,
            f"{name}_shape": torch.tensor(t.shape),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}}
    options = {"format": "pack-quantized", "quantization_status": "compressed"}
    _rewrite(folder, change, {"quant_method": "compressed-tensors", "ignore": ["lm_head"],
                              "config_groups": groups, **options})  # fmt: skip
    return made


def _torchao(kind: str, **options: Any) -> Callable[[Path], type]:
    def make(folder: Path) -> type:
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is not installed"
        )
        made = _llama(folder / "plain")
        config = transformers.TorchAoConfig(getattr(quantization, kind)(**options))
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder / "plain", quantization_config=config, dtype=torch.bfloat16)
        shutil.rmtree(folder / "plain")
        model.save_pretrained(folder, max_shard_size="100KB")
        return made

    return make


MAKERS: dict[str, Callable[[Path], type]] = {
    "fp8": _fp8_dense,
    "fp8 experts": _fp8_experts,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "torchao int8": _torchao("Int8WeightOnlyConfig", version=2),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "torchao int8 by both": _torchao("Int8DynamicActivationInt8WeightConfig", version=2),
}
DEQUANTIZED = {"fp8", "fp8 experts", "mxfp4"}
TORCHAO = {name for name in MAKERS if "torchao" in name}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[Any, Path]]:
    found: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in found:
            torch.manual_seed(2)
            folder = tmp_path_factory.mktemp("quantized") / "model"
            found[name] = MAKERS[name](folder), folder
            assert len(weights_in(folder)) > 1
        return found[name]

    return make


# ---------------------------------------------------------------- all there is to a model


def _plain(name: str, t: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that one of a class of its own is made of."""
    if hasattr(t, "__tensor_flatten__"):
        for inner in t.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(t, inner))
    else:
        yield name, t


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return (pair for named in model.state_dict(keep_vars=True).items() for pair in _plain(*named))


def _compare(ours: nn.Module, theirs: nn.Module) -> None:
    assert [(n, type(m)) for n, m in ours.named_modules()] == [
        (n, type(m)) for n, m in theirs.named_modules()
    ]
    wholes = [list(model.state_dict(keep_vars=True).items()) for model in (ours, theirs)]
    for (name, mine), (other, yours) in zip(*wholes, strict=True):
        assert (name, type(mine), mine.requires_grad) == (other, type(yours), yours.requires_grad)
    for (name, mine), (other, yours) in zip(_tensors(ours), _tensors(theirs), strict=True):
        assert (name, mine.dtype, mine.shape, mine.stride()) == (
            other, yours.dtype, yours.shape, yours.stride()
        )  # fmt: skip
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (mine, yours)]
        assert torch.equal(*raw), name
    assert ours.config.to_dict() == theirs.config.to_dict()


def _compute(ours: nn.Module, theirs: nn.Module) -> None:
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


# ---------------------------------------------------------------- to the CPU


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_quantized_checkpoint(made, tmp_path, name, options) -> None:
    cls, folder = made(name)
    ours, theirs = twice(
        lambda _: cls.from_pretrained(folder, output_loading_info=True, **options), tmp_path
    )
    assert theirs.error is None
    assert ours.value[1] == theirs.value[1]
    assert not any(theirs.value[1].values())  # nothing missing, unexpected, mismatched
    model = theirs.value[0]
    _compare(ours.value[0], model)
    found = {str(t.dtype) for key, t in _tensors(model) if "proj.weight" in key}
    assert name in DEQUANTIZED or found & {"torch.int8", "torch.int32", "torch.float8_e4m3fn"}
    if "dtype" not in options:
        _compute(ours.value[0], model)
    # torchao's quantizer looks into the metadata, with torch's default device being meta.
    looked = [r for r in ours.reports if r.path == "stock"]
    reason = "a torch mode or default device is in force"
    assert {r.fallback_reason for r in looked} <= {reason}
    assert [r.tensors for r in looked] == [0] * (name in TORCHAO) * len(weights_in(folder))
    ours.reports = [r for r in ours.reports if r.path != "stock"]
    ours.assert_fast(weights_in(folder))


# ---------------------------------------------------------------- over the fake driver


def _reports(seen: Any) -> list[Any]:
    return [report for report in seen.reports if report.call == "from_pretrained"]


@pytest.mark.parametrize("tensors", ["auto", "dlpack", "owned"])
@pytest.mark.parametrize("name", MAKERS)
def test_quantized_to_a_device(pretrained_to_cuda, made, name, tensors) -> None:
    cls, folder = made(name)
    expected = cls.from_pretrained(folder)
    before = pretrained_to_cuda.driver.live().blocks
    with fastst_patch.config_context(tensors=tensors), fastst_patch.profile() as seen:
        model = cls.from_pretrained(folder, device_map={"": "cuda:0"})
    reports = _reports(seen)
    assert {(r.path, r.device, r.fallback_reason) for r in reports} == {("ring", "cuda:0", None)}
    assert sorted(report.file for report in reports) == sorted(map(str, weights_in(folder)))
    assert sum(report.bytes for report in reports) == sum(map(data_bytes, weights_in(folder)))
    _compare(model, expected)
    # What a converter hands on as it was given has a block of its own, like any parameter.
    if tensors == "auto" and name not in DEQUANTIZED:
        sizes = {key for file in weights_in(folder) for key in tensor_bytes(file)}
        assert pretrained_to_cuda.driver.live().blocks - before == len(sizes)
    _compute(model, expected)
    del model
    gc.collect()
    assert pretrained_to_cuda.driver.live().blocks == before


@pytest.mark.parametrize("method", ["torchao", "quanto"])
def test_quantizing_on_the_fly_stays_lazy(
    pretrained_to_cuda, tmp_path, monkeypatch, method
) -> None:
    """Each tensor is read when its turn comes, straight to its device, and nothing ahead."""
    cls = _llama(tmp_path)
    if method == "torchao":
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is not installed"
        )
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    else:
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        config = transformers.QuantoConfig(weights="int8")
    expected = cls.from_pretrained(tmp_path, quantization_config=config)

    def forbidden(*args: Any) -> None:
        raise AssertionError("read ahead")

    monkeypatch.setattr(prefetch.RequestPrefetcher, "ask", forbidden)
    with fastst_patch.profile() as seen:
        model = cls.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cuda:0"})
    (file,) = weights_in(tmp_path)
    (report,) = _reports(seen)
    assert (report.path, report.device, report.fallback_reason) == ("ring", "cuda:0", None)
    assert report.bytes == data_bytes(file)
    _compare(model, expected)
