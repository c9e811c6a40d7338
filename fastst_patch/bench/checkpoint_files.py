"""PATH arguments -> the safetensors files they mean, and what the bench must know of each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .failures import UsageError

INDEX_NAME = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_HEADER_MAX = 100_000_000  # the limit of safetensors itself


@dataclass(frozen=True)
class CheckpointFile:
    """One file to measure."""

    path: str  # absolute
    file_bytes: int
    tensor_bytes: int
    order: tuple[str, ...]  # tensor names by file offset

    @property
    def name(self) -> str:
        """The file's name alone: folders may tell who works here."""
        return os.path.basename(self.path)


def expand(arguments: Sequence[str]) -> list[CheckpointFile]:
    """Return every file named, or found in a folder named, once, in order."""
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument).absolute()
        for found in _in_folder(path) if path.is_dir() else [path]:
            paths[found] = None
    return [describe(path) for path in paths]


def _in_folder(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        return _in_index(index)
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"{folder}: no *.safetensors file in this folder")
    return found


def _in_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{index}: not an index of safetensors files ({error!r}); "
            "name the files themselves instead of their folder"
        ) from error
    paths = [index.parent / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UsageError(f"{index}: lists files that are not there: {', '.join(missing)}")
    return paths


def header(path: str | Path) -> tuple[dict[str, Any], int]:
    """Return the entries of a file's tensors by name, and where their bytes begin.

    Raises:
        OSError, ValueError, AttributeError, TypeError: it cannot be read, or is something else.
    """
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if header_bytes > min(_HEADER_MAX, file_bytes - _LENGTH_BYTES):
            raise ValueError("its first 8 bytes are no length of a header")
        entries: dict[str, Any] = json.loads(file.read(header_bytes))
    entries.pop("__metadata__", None)
    return entries, _LENGTH_BYTES + header_bytes


def describe(path: Path) -> CheckpointFile:
    """Read the header, before the cache is prepared: it makes pages resident."""
    try:
        file_bytes = path.stat().st_size
        entries, begin = header(path)
        spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a safetensors file: {error}") from error
    end = begin + max((end for _, end in spans.values()), default=0)
    if end != file_bytes:
        raise UsageError(
            f"{path}: its header describes a file of {end} bytes, and it has {file_bytes}"
            + (": truncated?" if file_bytes < end else "")
        )
    if not spans:
        raise UsageError(f"{path}: holds no tensors, so there is nothing to time")
    return CheckpointFile(
        path=str(path),
        file_bytes=file_bytes,
        tensor_bytes=sum(end - begin for begin, end in spans.values()),
        order=tuple(sorted(spans, key=spans.__getitem__)),
    )
