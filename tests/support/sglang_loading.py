"""Loads by SGLang's own loader in this process: for programs that tests start.

SGLang imports packages of GPU kernels that a CPU has no use for. `stand_in` puts empty ones in the
place of those that are missing; all modules of SGLang are its own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

# ---- packages that are missing ----


class _Kind(type):
    """The class of what a missing package gives: anything may be done with it while importing."""

    def __getattr__(cls, name: str) -> Any:
        return _lacking(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return object

    __ror__ = __or__


def _lacking(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    class Missing(metaclass=_Kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return _lacking(name)()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            decorates = len(args) == 1 and callable(args[0]) and not kwargs
            return args[0] if decorates else self

    return Missing


class _Package(types.ModuleType):
    __version__ = "3.4.0"
    __path__: list[str] = []  # noqa: RUF012 - as of a package

    def __getattr__(self, name: str) -> Any:
        found = _lacking(name)
        setattr(self, name, found)
        return found


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody else found, for SGLang alone: others may do without."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        top = name.partition(".")[0]
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        ours = isinstance(sys.modules.get(top), _Package)
        asked = name == top != "sglang" and "/sglang/" in frame.f_code.co_filename
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours | asked else None

    def create_module(self, spec: Any) -> Any:
        return _Package(spec.name)

    def exec_module(self, module: Any) -> None: ...


def stand_in() -> None:
    """Let SGLang be imported where packages of GPU kernels are missing."""
    import transformers
    from transformers.utils import import_utils

    for name in dir(import_utils):  # transformers then knows what is really there
        if name.startswith("is_") and name.endswith("_available"):
            try:
                getattr(import_utils, name)()
            except Exception:  # it takes arguments, or wants more
                continue
    original = transformers.AutoConfig.register  # newer versions know models that SGLang adds
    transformers.AutoConfig.register = staticmethod(
        lambda name, config, exist_ok=False: original(name, config, exist_ok=True)
    )
    torch.compile = lambda function=None, **_: function or (lambda found: found)  # type: ignore
    sys.meta_path.append(_Missing())


# ---- loads ----


class Model(torch.nn.Module):
    """Takes what a checkpoint has by SGLang's own ``default_weight_loader``."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        super().__init__()
        self.taken = {
            name: torch.nn.Parameter(torch.full(shape, 7.0), requires_grad=False)
            for name, shape in shapes.items()
        }
        for number, parameter in enumerate(self.taken.values()):
            self.register_parameter(f"p{number}", parameter)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        from sglang.srt.model_loader.weight_utils import default_weight_loader

        for name, tensor in weights:
            default_weight_loader(self.taken[name], tensor)


_GETTERS = ("get_model", "get_server_args", "get_global_server_args")


def _give_arguments(module: Any, told: dict[str, Any]) -> None:
    """Arguments of the server, as far as loading asks for them, by what each version calls."""
    given = {
        "model_checksum": None,
        "weight_loader_disable_mmap": False,
        "weight_loader_prefetch_checkpoints": False,
        "weight_loader_prefetch_num_threads": 2,
        "weight_loader_drop_cache_after_load": False,
        **told,
    }
    for name in _GETTERS:
        if hasattr(module, name):
            setattr(module, name, lambda: types.SimpleNamespace(**given))


def load(folder: str, shapes: dict[str, Any], extra: Any = None, **told: Any) -> tuple[Any, Any]:
    """Load as ``DefaultModelLoader.load_model`` does, between making the model and packing it.

    Args:
        folder: the checkpoint.
        shapes: of the model's parameters.
        extra: ``model_loader_extra_config``.
        **told: arguments of the server.

    Returns:
        Parameters by name, and what was reported.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader as module

    import fastst_patch  # not before: SGLang's plug-ins shall be the first to import it

    _give_arguments(module, told)
    loader = module.DefaultModelLoader(LoadConfig(model_loader_extra_config=extra or {}))
    config = types.SimpleNamespace(
        model_path=folder, revision=None, quantization=None, hf_config=types.SimpleNamespace()
    )
    model = Model(shapes)
    with fastst_patch.profile() as seen:
        model.load_weights(loader._get_all_weights(config, model))
    reports = [[r.call, r.path, r.tensors, r.fallback_reason] for r in seen.reports]
    return {name: p.detach().clone() for name, p in model.taken.items()}, reports


def tell(found: Any) -> None:
    """Hand a result to the test."""
    print("FOUND", json.dumps(found), flush=True)
