"""Models of real architectures, tiny, with random weights, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from twice import Run, portrait, twice, weights_in

transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="needs transformers 5: dtype=, weight conversion"
)

_DECODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ENCODER = {**_DECODER, "num_attention_heads": 4, "max_position_embeddings": 32}


def _llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**_DECODER, **_HEADS, **options)
    return transformers.LlamaForCausalLM(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(
        **_DECODER, **_HEADS, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**_DECODER, **_HEADS, **experts, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


def _bert() -> Any:
    config = transformers.BertConfig(**_ENCODER, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, **sizes))


def _gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _clip() -> Any:
    text = {**_ENCODER, "num_attention_heads": 4}
    vision = {**_DECODER, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    del vision["vocab_size"]
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config)


# Name: architecture, dtype of the file, arguments of save_pretrained.
MODELS: dict[str, tuple[Callable[[], Any], torch.dtype, dict[str, Any]]] = {
    "tied shards": (lambda: _llama(tie_word_embeddings=True), torch.float32, {"max": "20KB"}),
    "one file": (_llama, torch.bfloat16, {}),
    "mixtral": (_mixtral, torch.bfloat16, {"max": "20KB"}),
    "qwen3 moe": (_qwen3_moe, torch.float32, {}),
    "bert": (_bert, torch.float16, {}),
    "t5": (_t5, torch.float16, {"max": "10KB"}),  # shared embeddings, some kept in float32
    "gpt2": (_gpt2, torch.float32, {}),  # tied, buffers
    "clip": (_clip, torch.float32, {"max": "30KB"}),  # convolutions, scalars
}


class Saved:
    """Folders of models, each saved when first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._folders: dict[str, Path] = {}

    def __call__(self, name: str) -> Path:
        if name not in self._folders:
            make, dtype, options = MODELS[name]
            torch.manual_seed(1)
            path = self._factory.mktemp("saved")
            make().to(dtype).save_pretrained(path, max_shard_size=options.get("max", "1GB"))
            assert (len(weights_in(path)) > 1) == ("max" in options)
            self._folders[name] = path
        return self._folders[name]


class Both:
    """from_pretrained of a folder, stock and patched: the same models, the same loading info."""

    def __init__(self, tmp_path: Path, assert_same: Callable[[Any, Any], None]) -> None:
        self._tmp_path = tmp_path
        self._assert_same = assert_same

    def __call__(
        self, cls: Any, folder: Path, check: bool = True, **options: Any
    ) -> tuple[Run, Run]:
        """Ours and theirs; with `check` all files of the folder must have been read once."""
        options.setdefault("output_loading_info", True)
        ours, theirs = twice(lambda _: cls.from_pretrained(folder, **options), self._tmp_path)
        if theirs.error is None:
            self._assert_same(portrait(ours.value[0]), portrait(theirs.value[0]))
            assert ours.value[1] == theirs.value[1]
            assert ours.value[0].config.to_dict() == theirs.value[0].config.to_dict()
            device_maps = [getattr(run.value[0], "hf_device_map", None) for run in (ours, theirs)]
            assert device_maps[0] == device_maps[1]
        if check:
            ours.assert_fast(weights_in(folder))
        return ours, theirs


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a file in a copy, and save them under its name."""
    tensors = {key: t.clone() for key, t in safetensors.torch.load_file(file).items()}
    change(tensors)
    file.unlink()
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
