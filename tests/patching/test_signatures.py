"""What an editor, ``help`` and ``inspect`` tell of what is public and of what is swapped."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import pydoc
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch

import fastst_patch
from fastst_patch import Config, engine
from fastst_patch.config import Options


def test_keywords_are_the_options() -> None:
    hints = typing.get_type_hints(Options)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    assert hints.keys() == fields.keys()
    kinds = typing.get_type_hints(Config)
    for name, hint in hints.items():
        allowed = set(typing.get_args(hint)) or {hint}
        if typing.get_origin(hint) is typing.Literal:
            with fastst_patch.config_context(**{name: typing.get_args(hint)[0]}):
                pass
            continue
        wanted = set(typing.get_args(kinds[name])) or {kinds[name]}
        literals = {type(arg) for one in allowed for arg in typing.get_args(one)}
        assert wanted <= allowed | literals, name


@pytest.mark.parametrize(
    "function", [fastst_patch.patch, fastst_patch.patched, fastst_patch.config_context]
)
def test_options_are_typed(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    assert parameters["options"].annotation == "Unpack[Options]"
    assert parameters.keys() <= {"targets", "rebind_aliases", "options"}


def test_the_fast_versions_show_stocks_signatures() -> None:
    for ours, stock in (
        (fastst_patch.load_file, safetensors.torch.load_file),
        (fastst_patch.load_model, safetensors.torch.load_model),
        (fastst_patch.safe_open, safetensors.safe_open),
    ):
        shown = inspect.signature(ours)
        assert shown == inspect.signature(stock)
        assert str(shown) == str(inspect.signature(stock))
        assert pickle.loads(pickle.dumps(shown.replace())) == shown
        assert (
            shown.bind("path", "pt").arguments
            == inspect.signature(stock).bind("path", "pt").arguments
        )
        assert str(shown) in pydoc.plain(pydoc.render_doc(ours))


def test_signatures_import_torch_only_when_they_are_looked_at(tmp_path: Path) -> None:
    code = "import sys, inspect, fastst_patch as f; print('torch' in sys.modules)\n"
    code += "print(list(inspect.signature(f.load_file).parameters)[:2])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["False", "['filename', 'device']"]


@pytest.mark.skipif(engine.native_error() is not None, reason="no native extension")
def test_what_is_swapped_looks_as_stock() -> None:
    names = ("load_file", "load_model")
    stocks = [getattr(safetensors.torch, name) for name in names] + [safetensors.safe_open]
    with fastst_patch.patched():
        ours = [getattr(safetensors.torch, name) for name in names] + [safetensors.safe_open]
        for stock, swapped in zip(stocks, ours, strict=True):
            assert swapped is not stock
            assert inspect.signature(swapped) == inspect.signature(stock)
            assert inspect.getdoc(swapped) == inspect.getdoc(stock)
        text = pydoc.plain(pydoc.render_doc(safetensors.torch.load_file))
    assert "load_file(filename" in text
    assert "device" in text
