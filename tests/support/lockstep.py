"""One loader driven by operations, beside another that is driven by the same ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors
import torch
from generated_files import File

BAD_NAMES = ("no such tensor", "__metadata__", "\ud800", 3, None, b"w", True, ("w",))
BAD_CALLS: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("get_tensor", (), {}),
    ("get_tensor", ("a", "b"), {}),
    ("get_tensor", (), {"nm": "a"}),
    ("get_tensor", ("a",), {"name": "a"}),
    ("get_slice", (), {}),
    ("get_slice", (), {"key": "a"}),
    ("get_tensors", (1,), {}),
    ("keys", (1,), {}),
    ("keys", (), {"sort": True}),
    ("offset_keys", (1,), {}),
    ("metadata", (1,), {}),
    ("__enter__", (1,), {}),
    ("__exit__", (), {}),
    ("__exit__", (None,), {}),
    ("__exit__", (None, None, None, None), {}),
    ("no_such_method", (), {}),
    ("close", (), {}),
    ("filename", (), {}),
    # Our handles have it with every version of safetensors.
    *([("get_tensor_meta", (), {})] if hasattr(safetensors.safe_open, "get_tensor_meta") else []),
)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"io": "mmap"},
    {"io": "buffered"},
    {"io": "direct"},
    {"io": "buffered", "threads": 1, "chunk_bytes": 65536},
    {"io": "direct", "threads": 3, "chunk_bytes": 1 << 20},
    {"tensors": "dlpack"},
    {"tensors": "owned"},
    {"io": "buffered", "tensors": "owned"},
    {"io": "direct", "tensors": "owned"},
    {"page_cache": "keep"},
    {"page_cache": "drop"},
    {"verify": True, "fallback": "error"},
    {"verify": True, "fallback": "error", "io": "buffered"},
    {"fallback": "error"},
)


def flip(tensor: Any, position: int) -> None:
    """Change a byte of a tensor's storage, or of an array."""
    if isinstance(tensor, torch.Tensor):
        raw: Any = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        size = raw.numel()
    else:
        raw = tensor.reshape(-1).view(np.uint8)
        size = raw.size
    if size:
        raw[position % size] ^= 0xFF


def _zero(tensor: Any) -> Any:
    return tensor.zero_() if isinstance(tensor, torch.Tensor) else tensor.fill(0)


class Side:
    """One loader, driven by operations; remembers what it was given."""

    def __init__(self, safe_open: Any, file: File, path: str) -> None:
        self.safe_open, self.file, self.path = safe_open, file, path
        self.framework = "pt"  # of the last handle
        self.names = sorted(file.tensors)
        self.handles: list[Any] = []
        self.slices: list[Any] = []
        self.tensors: list[Any] = []  # or arrays

    def keep(self, value: Any) -> Any:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            self.tensors.append(value)
        return value

    def do(self, op: tuple[Any, ...]) -> Any:
        kind, *args = op
        if kind == "open":
            self.framework = args[0]
            self.handles.append(self.safe_open(self.path, args[0]))
            return None
        if kind in ("index", "get_shape", "get_dtype"):
            chosen = self.slices[args[0] % len(self.slices)] if self.slices else None
            if chosen is None:
                return None
            return self.keep(chosen[args[1]]) if kind == "index" else getattr(chosen, kind)()
        if kind in ("mutate", "zero"):
            if not self.tensors:
                return None
            tensor = self.tensors[args[0] % len(self.tensors)]
            return flip(tensor, args[1]) if kind == "mutate" else _zero(tensor)
        handle = self.handles[args[0] % len(self.handles)]
        if kind == "exit":
            return handle.__exit__(None, None, None)
        if kind == "exit_error":
            with handle:
                raise KeyError("inside the with block")
        if kind == "enter":
            return handle.__enter__() is handle
        if kind == "bad_call":
            name, positional, keywords = args[1]
            return getattr(handle, name)(*positional, **keywords)
        if kind == "offset_keys":
            return self.file.order(handle.offset_keys())
        if kind == "get_tensors":
            tensors = handle.get_tensors()
            self.tensors += [tensors[name] for name in sorted(tensors)]
            return self.file.order(list(tensors)), tensors
        if kind in ("keys", "metadata"):
            return getattr(handle, kind)()
        name = args[1]
        if type(name) is int and self.names:  # subclasses of str are names, too
            name = (np.str_ if name % 8 == 3 else str)(self.names[name % len(self.names)])
        if kind == "get_tensor":
            return self.keep(handle.get_tensor(name))
        if kind == "slice_and_index":
            return self.keep(handle.get_slice(name)[args[2]])
        self.slices.append(handle.get_slice(name))
        return None
