"""A package ``vllm`` with the functions of vLLM that are wrapped, and their signatures.

vLLM itself takes gigabytes and minutes; tests/engines/test_vllm_real.py runs with it. The bodies
here do what vLLM's do for safetensors files and nothing else.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_standin

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

_PACKAGE = "vllm/model_executor/model_loader"
_FILES = {
    "vllm/__init__.py": "",
    "vllm/config.py": _LOAD_CONFIG,
    "vllm/distributed/__init__.py": "",
    "vllm/distributed/parallel_state.py": _PARALLEL,
    "vllm/model_executor/__init__.py": "",
    f"{_PACKAGE}/__init__.py": _LOADERS,
    f"{_PACKAGE}/default_loader.py": _DEFAULT_LOADER,
    f"{_PACKAGE}/weight_utils.py": _WEIGHT_UTILS,
}


def write(folder: Path, parameters: str = NEW, more: str = "") -> None:
    """Write the package.

    Args:
        folder: where it goes; it belongs in ``sys.path``.
        parameters: of ``safetensors_weights_iterator``.
        more: arguments that the loader passes to it beside the first three.
    """
    engine_standin.write(folder, _FILES, PARAMETERS=parameters, MORE=more)


class Standin(engine_standin.Standin):
    """The package, imported.

    Attributes:
        loaders: ``vllm.model_executor.model_loader``.
        parallel: ``vllm.distributed.parallel_state``.
    """

    name, group, old, new = "vllm", "vllm.general_plugins", OLD, NEW
    module = "vllm.model_executor.model_loader"

    def __init__(self) -> None:
        self.loaders = importlib.import_module(self.module)
        self.utils = importlib.import_module(f"{self.module}.weight_utils")
        self.parallel = importlib.import_module("vllm.distributed.parallel_state")
        self._config = importlib.import_module("vllm.config").LoadConfig

    def loader(self, load_format: str = "auto", **options: Any) -> Any:
        """A loader as ``get_model_loader`` makes it."""
        return self.loaders.formats[load_format](self._config(load_format, **options))

    def pairs(
        self, folder: Path, model: Any, load_format: str = "auto", *,
        model_config: dict[str, Any] | None = None, local: set[int] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """See the class above; ``local``: numbers of the experts that are taken."""
        loader = self.loader(load_format, **options)
        loader.local_expert_ids = local
        config = SimpleNamespace(model=str(folder), prefix="", **(model_config or {}))
        return loader.get_all_weights(config, model)

    def unnoted(self, folder: Path) -> tuple[Any, Any]:
        """See the class above."""
        files = [str(path) for path in folder.iterdir()]
        source = SimpleNamespace(model_or_path=str(folder), prefix="")
        return (
            self.utils.safetensors_weights_iterator(files, False, None),
            self.loader()._get_weights_iterator(source),
        )

    def share(self, monkeypatch: Any, rank: int, size: int) -> None:
        """See the class above."""
        self.parallel.sizes["tensor"] = size
        self.parallel.rank = rank


def standing_in(
    folder: Path, parameters: str = NEW, more: str = ""
) -> AbstractContextManager[Standin]:
    """Let the package stand for vLLM in a ``with`` block; arguments as of `write`."""
    write(folder, parameters, more)
    return engine_standin.imported(folder, Standin)
