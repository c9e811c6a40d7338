"""All that tensors of a file came from, and its end in any order."""

from __future__ import annotations

import gc
import os
from typing import Any

from hypothesis import strategies as st

ORDERS = st.permutations(["close", "handle", "slice", "file", "gc", "siblings", "loaded"])


def owners_of(loaders: Any, path: str, *device: str) -> dict[str, Any]:
    """A handle, a slice of its tensor ``w``, and all tensors by it and by ``load_file``."""
    handle = loaders.safe_open(path, "pt", *device)
    return {
        "handle": handle,
        "loaded": loaders.load_file(path, *device),
        "slice": handle.get_slice("w"),
        "siblings": loaders.all_tensors(handle),
    }


def end(owners: dict[str, Any], step: str, path: str) -> None:
    """Let go of one of them, close the handle, remove the file, or collect."""
    if step == "close" and "handle" in owners:
        owners["handle"].__exit__(None, None, None)
    elif step == "file":
        os.unlink(path)
    elif step == "gc":
        gc.collect(0)
    owners.pop(step, None)
