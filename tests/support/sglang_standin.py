"""A package ``sglang`` with the functions of SGLang that are wrapped, and their signatures.

SGLang itself needs a GPU; tests/engines/test_sglang_real.py runs with its modules. The bodies here
do what SGLang's do for safetensors files and nothing else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import vllm_standin

from fastst_patch.patching import patcher

OLD = "disable_mmap=False, prefetch=False, prefetch_num_threads=4"  # 0.5.11
NEW = f"{OLD}, drop_cache_after_load=False"  # from 0.5.13 on

_WEIGHT_UTILS = """
import safetensors, safetensors.torch

asked = []  # files that SGLang's own loops have opened

def _read(path, disable_mmap):
    asked.append(path)
    if disable_mmap:
        with open(path, "rb") as file:
            return safetensors.torch.load(file.read())
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}

def _pairs(hf_weights_files, disable_mmap):
    for path in hf_weights_files:
        found = _read(path, disable_mmap)
        for name in sorted(found):
            yield name, found[name]

def safetensors_weights_iterator(hf_weights_files, PARAMETERS):
    yield from _pairs(hf_weights_files, disable_mmap)

def buffered_multi_thread_safetensors_weights_iterator(hf_weights_files, max_workers, PARAMETERS):
    assert max_workers > 0
    yield from _pairs(hf_weights_files, disable_mmap)
"""

_LOADER = """
import glob, os
from types import SimpleNamespace
from sglang.srt.model_loader.weight_utils import (
    buffered_multi_thread_safetensors_weights_iterator,
    safetensors_weights_iterator,
)

class DefaultModelLoader:
    def __init__(self, load_config):
        self.load_config = load_config

    def _get_weights_iterator(self, source):
        config = self.load_config
        files = glob.glob(os.path.join(source.model_or_path, "*.safetensors"))
        files.sort()
        if config.multithread:
            found = buffered_multi_thread_safetensors_weights_iterator(
                files, max_workers=8, **config.options
            )
        else:
            found = safetensors_weights_iterator(files, **config.options)
        return ((source.prefix + name, tensor) for (name, tensor) in found)

    def _get_all_weights(self, model_config, model):
        yield from self._get_weights_iterator(
            SimpleNamespace(model_or_path=model_config.model_path, prefix=model_config.prefix)
        )
"""

_SERVER_ARGS = """
from types import SimpleNamespace

args = SimpleNamespace(enable_memory_saver=False)

def GETTER():
    if args is None:
        raise ValueError("Global server args is not set yet!")
    return args
"""


def write(folder: Path, parameters: str = NEW) -> None:
    """Write the package into a folder that belongs in ``sys.path``.

    Args:
        folder: where it goes.
        parameters: of the iterators, behind those that all versions have.
    """
    loaders = "sglang/srt/model_loader"
    for name, text in {
        "sglang/__init__.py": "",
        "sglang/srt/__init__.py": "",
        _args_module(parameters).replace(".", "/") + ".py": _SERVER_ARGS,
        f"{loaders}/__init__.py": "",
        f"{loaders}/loader.py": _LOADER,
        f"{loaders}/weight_utils.py": _WEIGHT_UTILS,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        getter = "get_global_server_args" if parameters == OLD else "get_server_args"
        filled = text.replace("PARAMETERS", parameters).replace("GETTER", getter)
        path.write_text(filled, encoding="utf-8")


def _args_module(parameters: str) -> str:
    return f"sglang.srt.{'server_args' if parameters == OLD else 'runtime_context'}"


class Standin:
    """The package, imported.

    Attributes:
        loader: ``sglang.srt.model_loader.loader``.
        utils: ``sglang.srt.model_loader.weight_utils``.
        args: the module that has the server's arguments.
    """

    def __init__(self, parameters: str) -> None:
        self.loader = importlib.import_module("sglang.srt.model_loader.loader")
        self.utils = importlib.import_module("sglang.srt.model_loader.weight_utils")
        self.args = importlib.import_module(_args_module(parameters))

    def pairs(
        self, folder: Path, model: Any, *,
        multithread: bool = True, model_config: dict[str, Any] | None = None, **options: Any,
    ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
        """The iterator that a model is given."""
        load_config = SimpleNamespace(multithread=multithread, options=options)
        config = SimpleNamespace(model_path=str(folder), prefix="", **(model_config or {}))
        found: Any = self.loader.DefaultModelLoader(load_config)._get_all_weights(config, model)
        return found

    def load(self, folder: Path, model: Any, **options: Any) -> dict[str, torch.Tensor]:
        """What a model is given."""
        return dict(self.pairs(folder, model, **options))


class Loading(vllm_standin.Loading):
    """What one load has reported as SGLang's."""

    call = "sglang"


def _ours(name: str) -> bool:
    return name == "sglang" or name.startswith("sglang.")


def _forget() -> None:
    """What was patched in a package that is gone."""
    for place in patcher._TARGETS["sglang.load"].places:
        place.replaced.clear()
        place.rebound.clear()


@contextmanager
def standing_in(folder: Path, parameters: str = NEW) -> Iterator[Standin]:
    """Let the package stand for SGLang in a ``with`` block; arguments as of `write`."""
    write(folder, parameters)
    before: dict[str, ModuleType] = {k: sys.modules.pop(k) for k in list(sys.modules) if _ours(k)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    _forget()
    try:
        yield Standin(parameters)
    finally:
        _forget()
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
