"""Tiny models for vLLM: random weights in several shards, and a tokenizer made in place."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

EXPERTS = 4


def write(folder: Path, layers: int = 2, seed: int = 3) -> None:
    """Write a Llama of some 300 KB; no network."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="120KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_mixture(folder: Path) -> None:
    """Write a Qwen3 mixture of `EXPERTS` experts, a tensor for each matrix of each."""
    torch.manual_seed(7)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64,
        "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 96,
        "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 64,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "self_attn.q_norm": (32,), "self_attn.k_norm": (32,),
        "input_layernorm": (64,), "post_attention_layernorm": (64,), "mlp.gate": (EXPERTS, 64),
        **{f"mlp.experts.{expert}.{part}_proj": (64, 64)
           for expert in range(EXPERTS) for part in ("gate", "up", "down")},
    }  # fmt: skip
    outside = {"model.embed_tokens": (96, 64), "model.norm": (64,), "lm_head": (96, 64)}
    for number, some in enumerate((outside, shapes, shapes)):
        prefix = f"model.layers.{number - 1}." if number else ""
        tensors = {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in some.items()}
        save_file(tensors, folder / f"model-{number}.safetensors")
