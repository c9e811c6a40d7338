"""A file as a mapping of names to tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..dtypes import DTYPE_NAMES
from ..errors import OptionError
from .arguments import Settings, one_path
from .buffer import unknown_key
from .headers import open_entries
from .local_files import LocalFiles

if TYPE_CHECKING:
    import torch

__all__ = ["FastSafetensorsFile", "TensorInfo"]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header.

    Attributes:
        name: of the tensor.
        dtype: safetensors' name, such as ``BF16``.
        shape: of elements; for 4-bit dtypes these are numbers, not bytes.
        nbytes: in the file.
        offsets: file offsets of its first byte and of the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offsets: tuple[int, int]


class FastSafetensorsFile(Mapping[str, "torch.Tensor"]):
    """A safetensors file as a mapping: ``file["name"]`` is a tensor, read when it is requested.

    Names are in offset order; requests in that order are read ahead. It is a context manager, and
    tensors stay valid after it. It can be used from many threads.

    Args:
        path: of the file.
        device: where tensors go.
        framework: ``pt``, ``pytorch`` or ``torch``; without slices also ``np``, ``jax``, ``tf`` or
            ``paddle``.
        **options: our options for this file, such as ``io`` or ``device_memory_budget``.

    Raises:
        OSError, SafetensorError: it cannot be opened, or its header is wrong.
        OptionError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: Any = "cpu",
        framework: str = "pt",
        **options: Any,
    ) -> None:
        settings = Settings(device, framework, nogds=True, options=options)
        self._path = one_path(path, "FastSafetensorsFile")
        (entry,) = open_entries([(self._path, 0)], settings)
        self._layout = entry.layout
        self._settings = settings
        self._files = LocalFiles("FastSafetensorsFile", [entry], settings, settings.config)

    # ---- the header ----

    @property
    def path(self) -> str:
        """Path of the file, as it was given."""
        return self._path

    @property
    def metadata(self) -> dict[str, str]:
        """The header's free-form metadata; empty when there is none."""
        return dict(self._layout.metadata or {})

    def get_tensors(self) -> dict[str, TensorInfo]:
        """Each tensor's entry in the header, in offset order. Reads no tensor's bytes."""
        layout = self._layout
        return {
            name: TensorInfo(
                name,
                DTYPE_NAMES[layout.dtype(i)],
                tuple(layout.shape(i)),
                layout.nbytes(i),
                layout.extent(i),
            )
            for i, name in enumerate(layout.names)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.names)

    def __len__(self) -> int:
        return len(self._layout.names)

    def __contains__(self, name: object) -> bool:
        return name in self._layout.index

    # ---- tensors ----

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor.

        Raises:
            KeyError: the file has no such tensor.
            ValueError: the file is closed.
            OSError, MemoryError, SafetensorError: it could not be read.
        """
        self._check(name)
        result: torch.Tensor = self._settings.hand_out(self._files.take(name))
        return result

    def get_slice(self, name: str) -> Any:
        """A slice that reads when it is indexed; to a device, it reads only the needed rows.

        Raises as indexing, and OptionError with another framework than torch.
        """
        self._check(name)
        if self._settings.framework != "pytorch":
            raise OptionError(f"get_slice: slices are torch's, not {self._settings.framework}'s")
        return self._files.slice(name)

    def close(self) -> None:
        """Let go of the file. Tensors handed out stay valid. May be repeated."""
        self._files.close()

    def __enter__(self) -> FastSafetensorsFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FastSafetensorsFile {self._path!r}, {len(self)} tensors>"

    def _check(self, name: object) -> None:
        if self._files.closed:
            raise ValueError(f"{self._path} is closed: take tensors before close()")
        if name not in self._layout.index:
            raise KeyError(unknown_key(name, self._layout.index))
