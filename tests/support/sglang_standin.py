"""A package ``sglang`` with the functions of SGLang that are wrapped, and their signatures.

SGLang itself needs a GPU; tests/engines/test_sglang_real.py runs with its modules. The bodies here
do what SGLang's do for safetensors files and nothing else.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_standin
from torch import distributed

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
                files, max_workers=8, **config.optionsMORE
            )
        else:
            found = safetensors_weights_iterator(files, **config.optionsMORE)
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

_PACKAGE = "sglang/srt/model_loader"
_FILES = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    f"{_PACKAGE}/__init__.py": "",
    f"{_PACKAGE}/loader.py": _LOADER,
    f"{_PACKAGE}/weight_utils.py": _WEIGHT_UTILS,
}
_ARGS = {  # the module that has the server's arguments, and the function that gives them
    OLD: ("server_args", "get_global_server_args"),
    NEW: ("runtime_context", "get_server_args"),
}


def _args_of(parameters: str) -> tuple[str, str]:
    return _ARGS.get(parameters, _ARGS[NEW])


def write(folder: Path, parameters: str = NEW, more: str = "") -> None:
    """Write the package into a folder that belongs in ``sys.path``.

    Args:
        folder: where it goes.
        parameters: of the iterators, behind those that all versions have.
        more: arguments that the loader passes to them beside its options.
    """
    module, getter = _args_of(parameters)
    files = _FILES | {f"sglang/srt/{module}.py": _SERVER_ARGS}
    engine_standin.write(folder, files, PARAMETERS=parameters, GETTER=getter, MORE=more)


class Standin(engine_standin.Standin):
    """The package, imported.

    Attributes:
        args: the module that has the server's arguments.
        multithread: whether the loader is told to read in threads.
    """

    name, group, old, new = "sglang", "sglang.srt.plugins", OLD, NEW
    module = "sglang.srt.model_loader.loader"
    multithread = True

    def __init__(self, parameters: str) -> None:
        self.loader = importlib.import_module(self.module)
        self.utils = importlib.import_module("sglang.srt.model_loader.weight_utils")
        self.args = importlib.import_module(f"sglang.srt.{_args_of(parameters)[0]}")

    def _made(self, **options: Any) -> Any:
        config = SimpleNamespace(multithread=self.multithread, options=options)
        return self.loader.DefaultModelLoader(config)

    def pairs(
        self,
        folder: Path,
        model: Any,
        *,
        model_config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """See the class above."""
        config = SimpleNamespace(model_path=str(folder), prefix="", **(model_config or {}))
        return self._made(**options)._get_all_weights(config, model)

    def unnoted(self, folder: Path) -> tuple[Any, Any]:
        """See the class above."""
        files = sorted(str(path) for path in folder.iterdir())
        source = SimpleNamespace(model_or_path=str(folder), prefix="")
        return (
            self.utils.safetensors_weights_iterator(files),
            self._made()._get_weights_iterator(source),
        )

    def share(self, monkeypatch: Any, rank: int, size: int) -> None:
        """See the class above."""
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: size)
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)


def standing_in(
    folder: Path, parameters: str = NEW, more: str = ""
) -> AbstractContextManager[Standin]:
    """Let the package stand for SGLang in a ``with`` block; arguments as of `write`."""
    write(folder, parameters, more)
    return engine_standin.imported(folder, Standin, parameters)
