"""Synthetic checkpoints on a real disk, written as a stream and removed afterwards."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path

from . import hardware
from .failures import BenchError, UsageError
from .stopping import removed

LARGEST = 1_700_000_000  # bytes; a second or so from a fast disk
SMALLEST = 64_000_000  # below this, process start-up noise is what one would measure

_LAYERS = 16
# As safetensors orders them in a file: the widest first, so that every tensor is aligned.
_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
_BLOCK = 4 << 20
_NOISE_BYTES = 32 << 20
_NOISE_STEP = 2_654_435  # odd, so that no two blocks of the stream are alike
_NOISE_SHARD_STEP = 104_729  # a prime: two files differ wherever one looks
_SYNC_EVERY = 256 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return _DTYPE_BYTES[self.dtype] * prod(self.shape)


def transformer_specs(budget: int) -> list[TensorSpec]:
    """Plan 147 bf16 tensors of a Llama-like model with 16 layers, at most `budget` bytes.

    Everything scales with the hidden size h: per layer 10.75 h² weights and two norms,
    32 h² for the embedding and lm_head together. That makes 408 h² + 66 h bytes.
    """
    hidden = max(8, isqrt(max(0, budget) // 408) // 8 * 8)
    if hidden > 8 and 408 * hidden**2 + 66 * hidden > budget:
        hidden -= 8
    inner, kv, vocabulary = hidden * 11 // 4, hidden // 4, hidden * 16
    layer_shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    specs = [
        TensorSpec("model.embed_tokens.weight", (vocabulary, hidden)),
        TensorSpec("model.norm.weight", (hidden,)),
        TensorSpec("lm_head.weight", (vocabulary, hidden)),
    ]
    for layer in range(_LAYERS):
        for part, shape in layer_shapes.items():
            specs.append(TensorSpec(f"model.layers.{layer}.{part}.weight", shape))
    return specs


def moe_specs(n_tensors: int, rows: int = 128, columns: int = 128) -> list[TensorSpec]:
    """Plan many small tensors, named as a mixture of experts names them."""
    parts, experts = ("gate_proj", "up_proj", "down_proj"), 128
    specs = []
    for number in range(n_tensors):
        expert, part = divmod(number, len(parts))
        layer, expert = divmod(expert, experts)
        name = f"model.layers.{layer}.mlp.experts.{expert}.{parts[part]}.weight"
        specs.append(TensorSpec(name, (rows, columns)))
    return specs


def write_checkpoint(
    path: Path,
    specs: Sequence[TensorSpec],
    progress: Progress,
    shard: int = 0,
    *,
    as_given: bool = False,
) -> None:
    """Write and fsync a valid file in 4 MiB blocks; `progress` gets the bytes of each.

    Files with other numbers of `shard` have other bytes, so that one read for another shows.
    Tensors lie in the order of safetensors' own writer (dtype, then name), or, ``as_given``, in
    that of ``specs``, as other writers leave them.
    """
    widest_first = list(_DTYPE_BYTES)
    ordered = sorted(specs, key=lambda spec: (widest_first.index(spec.dtype), spec.name))
    if as_given:
        ordered = list(specs)
    remaining = sum(spec.nbytes for spec in ordered)
    unsynced = 0
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(_header(ordered)))
        for window in _noise(shard):
            block = window[:remaining]
            _write_all(file.fileno(), block)
            remaining -= len(block)
            unsynced += len(block)
            progress(len(block))
            if unsynced >= _SYNC_EVERY or not remaining:
                os.fsync(file.fileno())  # now and then, so that progress tells the truth
                unsynced = 0
            if not remaining:
                return


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _noise(start: int = 0) -> Iterator[memoryview]:
    """Yield deterministic bytes without end, faster than disks: windows into one buffer.

    Random, because some filesystems compress; never the same window twice, because a
    loader that mixes up two chunks must produce a different checksum.
    """
    noise = _noise_bytes()
    begin = start * _NOISE_SHARD_STEP % (_NOISE_BYTES - _BLOCK)
    while True:
        yield noise[begin : begin + _BLOCK]
        begin = (begin + _NOISE_STEP) % (_NOISE_BYTES - _BLOCK)


@functools.cache
def _noise_bytes() -> memoryview:
    return memoryview(random.Random(0).randbytes(_NOISE_BYTES))


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def pick_directory(given: str | None) -> Path:
    """Return the directory asked for, else the first usual one that lies on a disk."""
    home = os.path.expanduser("~")
    candidates = [given] if given else [os.getcwd(), tempfile.gettempdir(), home]
    refusals = []
    for candidate in map(Path, candidates):
        refusal = _refusal(candidate)
        if refusal is None:
            return candidate.absolute()
        refusals.append(f"{candidate} ({refusal})")
    raise UsageError(
        "no place for a test checkpoint: "
        + ", ".join(refusals)
        + "; name a directory on a disk with --dir, or a PATH to measure"
    )


def _refusal(directory: Path) -> str | None:
    if not directory.is_dir():
        return "not a directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "not writable"
    held_by = hardware.filesystem(directory)
    if held_by.in_memory:
        return f"{held_by.type} is memory, not a disk"
    if shutil.disk_usage(directory).free // 4 < SMALLEST:
        return "too little free space"
    return None


def budget(directory: Path) -> int:
    """Return the bytes for a checkpoint that fills neither the memory nor the disk."""
    fair = min(LARGEST, hardware.memory_available() // 4, shutil.disk_usage(directory).free // 4)
    if fair < SMALLEST:
        raise UsageError(
            f"{directory}: a quarter of the free memory and disk is {fair / 1e6:.0f} MB, and "
            f"a meaningful test needs {SMALLEST / 1e6:.0f} MB; free some, or name a PATH"
        )
    return fair


@contextmanager
def temporary_folder(directory: Path) -> Iterator[Path]:
    """Hold a folder that exists as long as the context does, whatever ends it."""
    with removed(Path(tempfile.mkdtemp(prefix="fastst-bench-", dir=directory))) as folder:
        yield folder


@contextmanager
def temporary_checkpoint(
    directory: Path, specs: Sequence[TensorSpec], progress: Progress = lambda _: None
) -> Iterator[Path]:
    """Hold a file in a `temporary_folder`."""
    with temporary_folder(directory) as folder:
        path = folder / "model.safetensors"
        try:
            write_checkpoint(path, specs, progress)
        except OSError as error:
            raise BenchError(f"{path}: writing the test checkpoint: {error.strerror}") from error
        yield path
