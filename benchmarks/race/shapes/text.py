"""Language models."""

from __future__ import annotations

from collections.abc import Iterator

from fastst_patch.bench.checkpoint import TensorSpec


def gpt2_medium() -> Iterator[TensorSpec]:
    """openai-community/gpt2-medium: float32, and the causal masks were saved, too."""
    hidden, layers = 1024, 24

    def both(name: str, *shape: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{name}.weight", shape, "F32")
        yield TensorSpec(f"{name}.bias", shape[-1:], "F32")

    yield TensorSpec("wte.weight", (50257, hidden), "F32")
    yield TensorSpec("wpe.weight", (1024, hidden), "F32")
    for layer in range(layers):
        yield from both(f"h.{layer}.ln_1", hidden)
        yield TensorSpec(f"h.{layer}.attn.bias", (1, 1, 1024, 1024), "F32")
        yield from both(f"h.{layer}.attn.c_attn", hidden, 3 * hidden)
        yield from both(f"h.{layer}.attn.c_proj", hidden, hidden)
        yield from both(f"h.{layer}.ln_2", hidden)
        yield from both(f"h.{layer}.mlp.c_fc", hidden, 4 * hidden)
        yield from both(f"h.{layer}.mlp.c_proj", 4 * hidden, hidden)
    yield from both("ln_f", hidden)


def qwen2_5_7b() -> Iterator[TensorSpec]:
    """Qwen/Qwen2.5-7B: bfloat16, biases in the attention."""
    hidden, inner, kv = 3584, 18944, 512
    yield TensorSpec("model.embed_tokens.weight", (152064, hidden))
    for layer in range(28):
        at = f"model.layers.{layer}"
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield TensorSpec(f"{at}.self_attn.{part}_proj.weight", (rows, hidden))
            yield TensorSpec(f"{at}.self_attn.{part}_proj.bias", (rows,))
        yield TensorSpec(f"{at}.self_attn.o_proj.weight", (hidden, hidden))
        yield from _mlp(f"{at}.mlp", hidden, inner)
        yield from _norms(at, hidden)
    yield from _head(152064, hidden)


def llama_3_8b() -> Iterator[TensorSpec]:
    """meta-llama/Meta-Llama-3-8B: bfloat16."""
    hidden = 4096
    yield TensorSpec("model.embed_tokens.weight", (128256, hidden))
    for layer in range(32):
        at = f"model.layers.{layer}"
        yield from _attention(at, hidden, hidden, 1024)
        yield from _mlp(f"{at}.mlp", hidden, 14336)
        yield from _norms(at, hidden)
    yield from _head(128256, hidden)


def llama_3_8b_fp8() -> Iterator[TensorSpec]:
    """The same in fp8, as AutoFP8 writes it: two scalar scales beside each linear's weight."""
    for spec in llama_3_8b():
        if "_proj." not in spec.name:
            yield spec
            continue
        yield TensorSpec(spec.name, spec.shape, "F8_E4M3")
        yield TensorSpec(f"{spec.name}_scale", (), "F32")
        yield TensorSpec(spec.name.replace(".weight", ".input_scale"), (), "F32")


def llama_3_8b_lora() -> Iterator[TensorSpec]:
    """A LoRA adapter of rank 8 on its q_proj and v_proj, as peft saves it."""
    hidden, rank = 4096, 8
    for layer in range(32):
        for part, rows in (("q_proj", hidden), ("v_proj", 1024)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            yield TensorSpec(f"{at}.lora_A.weight", (rank, hidden))
            yield TensorSpec(f"{at}.lora_B.weight", (rows, rank))


def qwen3_30b_a3b() -> Iterator[TensorSpec]:
    """Qwen/Qwen3-30B-A3B: bfloat16, 128 experts in each of 48 layers."""
    return qwen3_moe(48, hidden=2048, inner=768, head=128, queries=32, keys=4, experts=128,
                     vocabulary=151936)  # fmt: skip


def qwen3_moe(
    layers: int,
    *,
    hidden: int,
    inner: int,
    head: int,
    queries: int,
    keys: int,
    experts: int,
    vocabulary: int,
) -> Iterator[TensorSpec]:
    """A mixture of experts; ``queries`` and ``keys`` are numbers of heads."""
    yield TensorSpec("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield from _attention(at, hidden, queries * head, keys * head)
        yield TensorSpec(f"{at}.self_attn.q_norm.weight", (head,))
        yield TensorSpec(f"{at}.self_attn.k_norm.weight", (head,))
        yield TensorSpec(f"{at}.mlp.gate.weight", (experts, hidden))
        for expert in range(experts):
            yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, inner)
        yield from _norms(at, hidden)
    yield from _head(vocabulary, hidden)


def _attention(at: str, hidden: int, queries: int, kv: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{at}.self_attn.q_proj.weight", (queries, hidden))
    yield TensorSpec(f"{at}.self_attn.k_proj.weight", (kv, hidden))
    yield TensorSpec(f"{at}.self_attn.v_proj.weight", (kv, hidden))
    yield TensorSpec(f"{at}.self_attn.o_proj.weight", (hidden, queries))


def _mlp(at: str, hidden: int, inner: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{at}.gate_proj.weight", (inner, hidden))
    yield TensorSpec(f"{at}.up_proj.weight", (inner, hidden))
    yield TensorSpec(f"{at}.down_proj.weight", (hidden, inner))


def _norms(at: str, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{at}.input_layernorm.weight", (hidden,))
    yield TensorSpec(f"{at}.post_attention_layernorm.weight", (hidden,))


def _head(vocabulary: int, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec("model.norm.weight", (hidden,))
    yield TensorSpec("lm_head.weight", (vocabulary, hidden))
