"""Handles over file objects, `safetensors._safe_open_handle`: private, and there since 0.6."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

pytestmark = pytest.mark.skipif(
    not hasattr(safetensors, "_safe_open_handle"),
    reason=f"safetensors {safetensors.__version__} has no _safe_open_handle",
)


class Odd:
    """Looks like a file as far as it is told to."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_handle_from_file_object(
    raw, sample, stock, fast, agree, assert_same, watch, tmp_path
) -> None:
    expected = stock.load_file(sample)
    with open(sample, "rb") as file, watch() as seen:
        file.seek(11)
        with fast.handle(file, framework="pt") as ours:
            assert_same(fast.all_tensors(ours), expected)
            assert_same(ours.get_slice("w")[3:, 1], expected["w"][3:, 1])
            assert ours.keys() == sorted(expected)
            assert file.tell() == 11
    seen.assert_fast(sample)
    replaced = raw.write(Path(sample).read_bytes(), "replaced")
    with open(replaced, "rb") as old:  # stock goes by name: it reads what replaced the file
        os.replace(raw.tensors({"new": torch.ones(3)}, "new"), replaced)
        agree(lambda: fast.handle(old, "pt").keys(), lambda: stock.handle(old, "pt").keys())
        agree(
            lambda: fast.all_tensors(fast.handle(old, "pt")),
            lambda: stock.all_tensors(stock.handle(old, "pt")),
        )
    descriptor = os.open(sample, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as unnamed, tempfile.NamedTemporaryFile() as temporary:
        temporary.write(Path(sample).read_bytes())
        temporary.flush()
        closed = open(sample, "rb")  # noqa: SIM115
        closed.close()
        odd = [Odd(name=sample), Odd(fileno=0), Odd(name=3, fileno=0), Odd(name=None, fileno=0)]
        odd += [Odd(name=sample, fileno=None), Odd(name=Path(sample), fileno=1)]
        odd += [Odd(name=os.fsencode(sample), fileno=1), Odd(name="missing", fileno=1)]
        for file in (unnamed, temporary, closed, io.BytesIO(b"x"), sample, None, 3, *odd):
            agree(
                lambda f=file: fast.all_tensors(fast.handle(f, "pt")),
                lambda f=file: stock.all_tensors(stock.handle(f, "pt")),
            )


def test_what_handles_say(sample, stock, fast, agree) -> None:
    """Messages name the class that was called, open or closed."""
    with open(sample, "rb") as file:
        ours, theirs = fast.handle(file, "pt"), stock.handle(file, "pt")
    for _ in ("open", "closed"):
        for use in (
            lambda h: h.no_such_method(),
            lambda h: h.get_tensor("missing"),
            lambda h: h.get_tensor(3),
            lambda h: h.keys(1),
            pickle.dumps,
            copy.copy,
            lambda h: repr(h).split(" at 0x")[0],
            lambda h: h.__exit__(None, None, None),
        ):
            agree(functools.partial(use, ours), functools.partial(use, theirs))
