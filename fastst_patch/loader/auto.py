"""`AutoLoader`: a `ParallelLoader` whose arguments stand in a file, as fastsafetensors has it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import loader_config_path
from ..errors import OptionError
from .arguments import boolean
from .files_loader import SafeTensorsFileLoader
from .parallel import ParallelLoader

if TYPE_CHECKING:
    import torch

__all__ = ["AutoLoader", "LoaderConfig", "load_config"]

_log = logging.getLogger("fastst_patch")

_DEFAULT_PATH = "fastsafetensors.json"
_GROUPS = ("parallel", "debug")
_COMMON = ("framework", "debug_log", "set_numa", "disable_cache")
_PIPELINE = ("max_concurrent_producers", "queue_size", "use_tqdm_on_load")
_MEMORY = ("max_batch_bytes", "use_chunk_budget_as_allocation_size", "device_memory_budget")


@dataclasses.dataclass
class LoaderConfig:
    """Arguments of an `AutoLoader`.

    Attributes:
        loader: ``base``.
        framework: as of `SafeTensorsFileLoader`.
        debug_log: as of `SafeTensorsFileLoader`.
        set_numa: as of `SafeTensorsFileLoader`.
        disable_cache: has no effect: an iteration asks for each tensor once.
        use_pipeline: whether files are read ahead, as ``queue_size`` says; if not, a file is
            started when the one before it is used up, and there is a bar.
        max_concurrent_producers: as of `ParallelLoader`.
        queue_size: as of `ParallelLoader`.
        use_tqdm_on_load: as of `ParallelLoader`.
        max_batch_bytes: as of `ParallelLoader`.
        use_chunk_budget_as_allocation_size: as of `ParallelLoader`.
        device_memory_budget: as of `ParallelLoader`.

    Raises:
        ValueError: ``max_concurrent_producers`` is not 1.
    """

    loader: str = "base"
    framework: str = "pytorch"
    debug_log: bool = False
    set_numa: bool = True
    disable_cache: bool = True
    use_pipeline: bool = False
    max_concurrent_producers: int = 1
    queue_size: int = 0
    use_tqdm_on_load: bool = True
    max_batch_bytes: int | None = None
    use_chunk_budget_as_allocation_size: bool = False
    device_memory_budget: int | None = None
    _extensions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_concurrent_producers != 1:
            raise ValueError(
                f"max_concurrent_producers must be 1 (got {self.max_concurrent_producers})"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoaderConfig:
        """Of a parsed file. Names that are not known are left out, with a warning in the log.

        Raises ValueError where it is no mapping, and as the class.

        ``parallel`` and ``debug`` hold attributes, as the file itself does. Other objects in it
        hold arguments of the loader that has their name: see `get_extension_config`.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a JSON object of arguments is expected, not {data!r:.100}")
        known = {field.name for field in dataclasses.fields(cls)} - {"_extensions"}
        found: dict[str, Any] = {}
        extensions: dict[str, dict[str, Any]] = {}
        for key, value in data.items():
            if isinstance(value, dict) and key not in _GROUPS:
                extensions[key] = dict(value)
                continue
            for name, one in (value if isinstance(value, dict) else {key: value}).items():
                if name in known:
                    found[name] = one
                else:
                    _log.warning("LoaderConfig: %r is not known, and has no effect", name)
        return cls(**found, _extensions=extensions)

    @classmethod
    def from_file(cls, path: str) -> LoaderConfig:
        """Of a JSON file. Raises OSError, ValueError."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict(json.load(file))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def get_extension_config(self, name: str) -> dict[str, Any]:
        """Arguments for one loader alone, without those that are attributes here."""
        found = self._extensions.get(name, {})
        return {key: value for key, value in found.items() if key not in _COMMON}

    def create_parallel_kwargs(self) -> dict[str, Any]:
        """Arguments of `ParallelLoader` about reading ahead."""
        names = _PIPELINE + _MEMORY if self.use_pipeline else _MEMORY
        found = {name: getattr(self, name) for name in names}
        return {"queue_size": -1, **found}


def load_config() -> LoaderConfig:
    """Of the file that ``FASTSAFETENSORS_CONFIG`` names, or ``fastsafetensors.json``, or defaults.

    Raises:
        FileNotFoundError: the variable names no file.
        ValueError: the file is wrong.
    """
    path = loader_config_path()
    if path is not None and not os.path.isfile(path):
        raise FileNotFoundError(f"FASTSAFETENSORS_CONFIG={path}: there is no such file")
    if path is None and os.path.isfile(_DEFAULT_PATH):
        path = _DEFAULT_PATH
    return LoaderConfig() if path is None else LoaderConfig.from_file(path)


class AutoLoader:
    """Iterates over the tensors of files, with the arguments that `load_config` finds.

    Args:
        pg: process group; None or `SingleGroup` for a process on its own.
        hf_weights_files: paths of the files.
        device: where tensors go.

    Raises as `ParallelLoader` and `load_config`, and OptionError for ``loader="3fs"``.
    """

    def __init__(self, pg: Any, hf_weights_files: Sequence[str], device: Any = "cpu") -> None:
        config = self._config = load_config()
        if config.loader == "3fs":
            raise OptionError("loader='3fs' is not covered; 'base' reads 3FS by its mount")
        if config.loader != "base":
            raise OptionError(f"Unknown loader type: {config.loader!r}; allowed is 'base'")
        boolean("disable_cache", config.disable_cache)
        boolean("use_pipeline", config.use_pipeline)
        given = SafeTensorsFileLoader.process_extension_config(
            config.get_extension_config("base"), hf_weights_files=hf_weights_files
        )
        self._loader = ParallelLoader(
            pg,
            hf_weights_files,
            device=device,
            framework=config.framework,
            debug_log=config.debug_log,
            set_numa=config.set_numa,
            **config.create_parallel_kwargs(),
            **given,
        )
        self._loader.loader._call = "AutoLoader"

    @property
    def config(self) -> LoaderConfig:
        """The arguments that were found."""
        return self._config

    def iterate_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As of `ParallelLoader`."""
        return self._loader.iterate_weights()

    def close(self) -> None:
        """As of `ParallelLoader`."""
        self._loader.close()
