"""A package ``vllm`` with the functions of vLLM that are wrapped, and their signatures.

vLLM itself takes gigabytes and minutes; tests/engines/test_vllm_real.py runs with it. The bodies
here do what vLLM's do for safetensors files and nothing else.
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
from watching import Watch

from fastst_patch.patching import patcher

ELEMENTS = 2 * (64 * 48 + 5) + 4 * 640 + 3  # of the fixture `tensors`

OLD = "hf_weights_files, use_tqdm_on_load, safetensors_load_strategy='lazy'"  # 0.11.2 to 0.17.1
NEW = (  # 0.22.0 to 0.33.0
    "hf_weights_files, use_tqdm_on_load, safetensors_load_strategy=None, local_expert_ids=None,"
    " *, safetensors_prefetch_num_threads=8, safetensors_prefetch_block_size=16 << 20"
)

_WEIGHT_UTILS = """
import re
from safetensors.torch import safe_open

asked = []  # files that vLLM's own loop has opened

def _natural_sort_key(path):
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(path))]

def enable_tqdm(use_tqdm_on_load):
    return use_tqdm_on_load

def should_skip_weight(name, local_expert_ids):
    found = re.search(r"\\.experts\\.([0-9]+)\\.", name)
    return bool(local_expert_ids is not None and found and int(found[1]) not in local_expert_ids)

def safetensors_weights_iterator(PARAMETERS):
    local = locals().get("local_expert_ids")
    for path in sorted(hf_weights_files, key=_natural_sort_key):
        asked.append(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if not should_skip_weight(name, local):
                    yield name, file.get_tensor(name)
"""

_DEFAULT_LOADER = """
import glob, os
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

class DefaultModelLoader:
    def __init__(self, load_config):
        unexpected = set(load_config.model_loader_extra_config) - {"enable_weights_track"}
        if load_config.load_format not in ("auto", "safetensors") or unexpected:
            raise ValueError(f"not known: {load_config.load_format}, {unexpected}")
        self.load_config = load_config
        self.local_expert_ids = None

    def _get_weights_iterator(self, source):
        files = glob.glob(os.path.join(source.model_or_path, "*.safetensors"))
        if not files:
            return iter([("from a .bin", None)])
        config = self.load_config
        args = (files, config.use_tqdm_on_load, config.safetensors_load_strategy)
        if self.local_expert_ids is None:
            found = safetensors_weights_iterator(*argsMORE)
        else:
            found = safetensors_weights_iterator(*args, local_expert_ids=self.local_expert_ids)
        return ((source.prefix + name, tensor) for (name, tensor) in found)

    def get_all_weights(self, model_config, model):
        yield from self._get_weights_iterator(source_of(model_config))

def source_of(model_config):
    from types import SimpleNamespace
    return SimpleNamespace(model_or_path=model_config.model, prefix=model_config.prefix)
"""

_LOADERS = """
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

formats = {"auto": DefaultModelLoader}

def register_model_loader(load_format):
    def wrapper(cls):
        formats[load_format] = cls
        return cls
    return wrapper
"""

_PARALLEL = """
from types import SimpleNamespace

sizes = {"tensor": 1, "pipeline": 1}
rank = 0  # of tensor parallelism
group = None
_EP = None

def model_parallel_is_initialized():
    return True

def get_tensor_model_parallel_world_size():
    return sizes["tensor"]

def get_tensor_model_parallel_rank():
    return rank

def get_tp_group():
    return SimpleNamespace(device_group=group)

def get_pp_group():
    return SimpleNamespace(world_size=sizes["pipeline"])
"""

_LOAD_CONFIG = """
import dataclasses
from typing import Any

@dataclasses.dataclass
class LoadConfig:
    load_format: str = "auto"
    safetensors_load_strategy: Any = None
    model_loader_extra_config: Any = dataclasses.field(default_factory=dict)
    use_tqdm_on_load: bool = False
"""


def write(folder: Path, parameters: str = NEW, more: str = "") -> None:
    """Write the package.

    Args:
        folder: where it goes; it belongs in ``sys.path``.
        parameters: of ``safetensors_weights_iterator``.
        more: arguments that the loader passes to it beside the first three.
    """
    loaders = "vllm/model_executor/model_loader"
    for name, text in {
        "vllm/__init__.py": "",
        "vllm/config.py": _LOAD_CONFIG,
        "vllm/distributed/__init__.py": "",
        "vllm/distributed/parallel_state.py": _PARALLEL,
        "vllm/model_executor/__init__.py": "",
        f"{loaders}/__init__.py": _LOADERS,
        f"{loaders}/default_loader.py": _DEFAULT_LOADER,
        f"{loaders}/weight_utils.py": _WEIGHT_UTILS,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        filled = text.replace("PARAMETERS", parameters).replace("MORE", more)
        path.write_text(filled, encoding="utf-8")


class Standin:
    """The package, imported.

    Attributes:
        loaders: ``vllm.model_executor.model_loader``.
        default: its ``default_loader``.
        utils: its ``weight_utils``.
        parallel: ``vllm.distributed.parallel_state``.
    """

    def __init__(self) -> None:
        name = "vllm.model_executor.model_loader"
        self.loaders = importlib.import_module(name)
        self.default = importlib.import_module(f"{name}.default_loader")
        self.utils = importlib.import_module(f"{name}.weight_utils")
        self.parallel = importlib.import_module("vllm.distributed.parallel_state")
        self._config = importlib.import_module("vllm.config").LoadConfig

    def loader(self, load_format: str = "auto", **options: Any) -> Any:
        """A loader as ``get_model_loader`` makes it."""
        return self.loaders.formats[load_format](self._config(load_format, **options))

    def load(
        self, folder: Path, model: Any, load_format: str = "auto", *,
        model_config: dict[str, Any] | None = None, local: set[int] | None = None, **options: Any,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """What a model is given."""
        loader = self.loader(load_format, **options)
        loader.local_expert_ids = local
        config = SimpleNamespace(model=str(folder), prefix="", **(model_config or {}))
        return dict(loader.get_all_weights(config, model))


class Model:
    """Parameters with devices that this machine does not have.

    Args:
        elements: of all parameters.
        devices: of the parameters.
    """

    def __init__(self, elements: int, *devices: str) -> None:
        share = elements // len(devices)
        self._parameters = [
            SimpleNamespace(device=torch.device(device), numel=lambda: share) for device in devices
        ]

    def parameters(self) -> Iterator[Any]:
        return iter(self._parameters)


class Loading(Watch):
    """What one load has reported as vLLM's."""

    call = "vllm"

    @property
    def reports(self) -> list[Any]:
        return [report for report in super().reports if report.call == self.call]

    @property
    def only(self) -> Any:
        (report,) = self.reports
        return report


LARGEST = 64 * 48 * 4 + 256


def most_held(loader: Any, folder: Path, cuda: Any, model: Model) -> int:
    """Most bytes on the device while a load's tensors are taken, and dropped, one by one."""
    config = SimpleNamespace(model=str(folder), prefix="")
    pairs = loader.get_all_weights(config, model)
    return max(cuda.driver.live().block_bytes for _ in pairs)


def _ours(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


def _forget() -> None:
    """What was patched in a package that is gone."""
    for place in patcher._TARGETS["vllm.load"].places:
        place.replaced.clear()
        place.rebound.clear()


@contextmanager
def standing_in(folder: Path, parameters: str = NEW, more: str = "") -> Iterator[Standin]:
    """Let the package stand for vLLM in a ``with`` block; arguments as of `write`."""
    write(folder, parameters, more)
    before: dict[str, ModuleType] = {k: sys.modules.pop(k) for k in list(sys.modules) if _ours(k)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    _forget()
    try:
        yield Standin()
    finally:
        _forget()
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
