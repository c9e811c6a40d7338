"""transformers, patched: every way of from_pretrained gives stock's model, by the fast path.

Architectures are real and tiny, weights random, files written by save_pretrained itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MODELS, rewrite, transformers
from twice import Failed, data_bytes, portrait, tensor_bytes, twice, weights_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dtype auto": {"dtype": "auto"},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16 by name": {"dtype": "bfloat16"},
    "torch_dtype": {"torch_dtype": torch.bfloat16},
    "low memory": {"low_cpu_mem_usage": True},
    "device_map": {"device_map": {"": "cpu"}},
    "device_map by name": {"device_map": "cpu", "dtype": torch.float16},
    "device_map auto": {"device_map": "auto"},
    "safetensors asked for": {"use_safetensors": True},
}


def _inputs(model: Any) -> dict[str, Any]:
    tokens = torch.arange(12).view(2, 6) % 90
    if model.config.model_type == "t5":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    if model.config.model_type == "clip":
        return {"input_ids": tokens, "pixel_values": torch.ones(2, 3, 16, 16, dtype=model.dtype)}
    return {"input_ids": tokens}


# ---------------------------------------------------------------- every style of every model


@pytest.mark.parametrize("style", STYLES)
def test_from_pretrained(saved, same, style) -> None:
    """Each model, with its loading info and what it computes."""
    if "device_map" in STYLES[style]:
        pytest.importorskip("accelerate", reason="device_map needs accelerate")

    def load(name: str) -> Callable[[Path], Any]:
        config = json.loads((saved(name) / "config.json").read_text())
        cls = getattr(transformers, config["architectures"][0])

        def call(_: Path) -> Any:
            model, info = cls.from_pretrained(
                saved(name), output_loading_info=True, **STYLES[style]
            )
            with torch.no_grad():
                output = model(**_inputs(model)).to_tuple()
            tensors = [one for one in output if isinstance(one, torch.Tensor)]
            maps = getattr(model, "hf_device_map", None)
            return model, info, model.config.to_dict(), maps, tensors

        return call

    ours, theirs = same({name: load(name) for name in MODELS})
    for value in theirs.value.values():
        assert not isinstance(value, Failed), value
        assert not any(value[1].values())  # nothing missing, unexpected, mismatched
        assert value[4]
    ours.assert_fast(file for name in MODELS for file in weights_in(saved(name)))


@pytest.mark.parametrize(
    "options",
    [
        {"io": "mmap"},
        {"io": "buffered"},
        {"io": "direct"},
        {"tensors": "owned"},
        {"io": "buffered", "tensors": "owned", "chunk_bytes": "64KiB", "threads": 3},
        {"verify": True, "fallback": "error"},
    ],
    ids=str,
)
def test_options(saved, tmp_path, need_o_direct, options) -> None:
    """Memory of our own: the values, names and tied-ness of stock's model."""
    folders = [saved("tied shards"), saved("mixtral")]
    if options.get("io") == "direct":
        need_o_direct(str(weights_in(folders[0])[0]))
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, theirs = twice(
        lambda _: [load(folder, dtype="auto") for folder in folders], tmp_path, **options
    )
    ours.assert_fast(file for folder in folders for file in weights_in(folder))
    for pair in zip(ours.value, theirs.value, strict=True):
        mine, other = map(portrait, pair)
        for what in ("classes", "the same object", "the same memory", "the same storage"):
            assert mine[what] == other[what]
        for (key, a), (name_, b) in zip(mine["tensors"], other["tensors"], strict=True):
            assert (key, a.dtype, a.stride()) == (name_, b.dtype, b.stride())
            assert torch.equal(a, b)
            assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


@pytest.mark.parametrize("name", ["tied shards", "mixtral"])
def test_without_threads(saved, both, monkeypatch, name) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    both(transformers.AutoModelForCausalLM, saved(name), dtype="auto")


@pytest.mark.parametrize("name", ["tied shards", "mixtral", "t5"])
def test_progress_bar(saved, tmp_path, capsys, name) -> None:
    """transformers' own bar counts to its end, and to the same number."""
    bars = []

    def load(_: Path) -> Any:
        cls = (
            transformers.AutoModelForSeq2SeqLM
            if name == "t5"
            else (transformers.AutoModelForCausalLM)
        )
        capsys.readouterr()
        model = cls.from_pretrained(saved(name))
        shown = capsys.readouterr().err.replace("\r", "\n").split("\n")
        counts = [line.split("|")[-1].split("[")[0].strip() for line in shown if "weights" in line]
        bars.append(counts[-1])
        return model

    ours, _ = twice(load, tmp_path)
    ours.assert_fast(weights_in(saved(name)))
    done, total = bars[0].split("/")
    assert done == total != "0"
    assert bars[0] == bars[1]


# ---------------------------------------------------------------- names that do not fit


@pytest.mark.parametrize(
    "cls", ["BertModel", "BertForMaskedLM", "BertForTokenClassification", "AutoModel"]
)
def test_base_model_prefix(saved, both, tmp_path, cls) -> None:
    """A head where none is wanted, another head, and a base where a head is: prefixes move."""
    ours, _ = both(getattr(transformers, cls), saved("bert"), check=False)
    unexpected = ours.value[1]["unexpected_keys"]
    assert unexpected or ours.value[1]["missing_keys"]
    (file,) = weights_in(saved("bert"))
    sizes = tensor_bytes(file)  # what nobody expects is not read
    ours.assert_fast([file], sum(sizes.values()) - sum(sizes[key] for key in unexpected))
    base = tmp_path / "base"
    transformers.BertModel.from_pretrained(saved("bert")).save_pretrained(base)
    ours, _ = both(transformers.BertForSequenceClassification, base)
    assert ours.value[1]["missing_keys"] == {"classifier.weight", "classifier.bias"}


def test_old_names(own, both) -> None:
    """Before 2018 norms had a gamma and a beta."""
    folder = own("bert")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "LayerNorm" in key]:
            new = key.replace("weight", "gamma").replace("bias", "beta")
            tensors[new] = tensors.pop(key)

    rewrite(folder / "model.safetensors", rename)
    ours, _ = both(transformers.BertForSequenceClassification, folder)
    assert not ours.value[1]["missing_keys"]
    cls, key_mapping = transformers.BertForSequenceClassification, {"^bert": "elsewhere"}
    ours, _ = both(cls, folder, check=False, key_mapping=key_mapping)
    missing = ours.value[1]["missing_keys"]  # all of BERT in 5.0, later its norms
    assert missing
    sizes = {
        key.replace("gamma", "weight").replace("beta", "bias"): size
        for key, size in tensor_bytes(folder / "model.safetensors").items()
    }
    assert missing <= sizes.keys()  # what found no place is not read
    ours.assert_fast(weights_in(folder), sum(n for key, n in sizes.items() if key not in missing))


def _misfits(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    del tensors["bert.embeddings.LayerNorm.bias"]
    tensors["nobody.asked"] = torch.ones(2, 2)
    tensors["bert.nor.this"] = torch.empty(0)
    tensors["classifier.weight"] = torch.ones(5, 32)
    tensors["classifier.bias"] = torch.ones(5)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("ignore", [False, True])
def test_missing_unexpected_mismatched(own, both, ignore, dtype) -> None:
    folder = own("bert")
    rewrite(folder / "model.safetensors", _misfits)
    cls = transformers.BertForSequenceClassification
    taken = data_bytes(folder / "model.safetensors") - (2 * 2) * 4
    ours, theirs = both(cls, folder, check=False, ignore_mismatched_sizes=ignore, dtype=dtype)
    ours.assert_fast(weights_in(folder), taken)
    assert theirs.said  # the report of what did not fit
    if ignore:
        info = ours.value[1]
        assert len(info["mismatched_keys"]) == 2
        assert "nobody.asked" in info["unexpected_keys"]
    else:
        assert theirs.error is not None


def test_experts_that_do_not_merge(own, both) -> None:
    """One expert missing, one of another shape: the conversion fails as stock's does."""
    for spoil in ("missing", "shape"):
        folder = own("qwen3 moe")

        def change(tensors: dict[str, torch.Tensor], spoil: str = spoil) -> None:
            key = "model.layers.1.mlp.experts.2.up_proj.weight"
            tensor = tensors.pop(key)
            if spoil == "shape":
                tensors[key] = tensor[1:].clone()

        rewrite(folder / "model.safetensors", change)
        _, theirs = both(transformers.Qwen3MoeForCausalLM, folder, check=False)
        assert theirs.error is not None or theirs.value[1]["missing_keys"] or theirs.said
        shutil.rmtree(folder)
