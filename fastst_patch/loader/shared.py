"""The files of a group: `fastst_patch.sharding` behind what a loader and its buffers ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .. import sharding, stock
from ..config import Config
from ..dtypes import header_shape

if TYPE_CHECKING:
    import torch

__all__ = ["SharedFiles", "refuse_opening"]


def refuse_opening(pg: Any, error: Exception) -> NoReturn:
    """Raise an error of arguments on all ranks of a group, while the others open files.

    Raises:
        RankError: on all; or the error itself, where all are wrong in the same way.
    """
    core: Any = sharding
    core.Group.of(pg).agree(error)
    raise error


class SharedFiles:
    """Files whose tensors the ranks of a group take together.

    Opening, taking and pushing are collective: every rank does the same in the same order.

    Args:
        files: paths by rank, the same on all ranks.
        pg: the process group.
        device: where tensors go.
        config: options of the files.
        call: who reads, for reports.

    Raises:
        RankError: a rank failed, or headers differ.
    """

    def __init__(
        self,
        files: Mapping[int, Sequence[str]],
        pg: Any,
        device: str,
        config: Config,
        call: str,
    ) -> None:
        core: Any = sharding
        self.config = config
        self._paths = {path: (rank, at) for rank, some in files.items()
                       for at, path in enumerate(some)}  # fmt: skip
        self._core = core.ShardedFiles(files, core.Group.of(pg), device, config, call=call)
        self.names: list[str] = list(self._core.names)

    def describe(self, name: str) -> tuple[str, list[int]]:
        """Path of the file that has a tensor, and the tensor's shape. KeyError for none."""
        path, _ = self._core.where(name)
        shape, dtype = self._core.describe(name)
        return path, header_shape(shape, dtype)

    def metadata(self) -> dict[str, Mapping[str, str] | None]:
        """The free-form metadata of each file."""
        found: dict[str, Mapping[str, str] | None] = {}
        for source in self._core.sources:
            if source.doubt is None:
                found[source.path] = source.layout.metadata
            else:
                with stock.safe_open(source.path, "pt") as handle:
                    found[source.path] = handle.metadata()
        return found

    def places(self, keep: Callable[[str], bool] | None) -> dict[str, tuple[int, int]]:
        """Each name's rank, and the number of its file among that rank's."""
        return {
            name: self._paths[self._core.where(name)[0]]
            for name in self.names
            if keep is None or keep(name)
        }

    def read_ahead(self) -> None:
        """Start reading ahead what comes from maps, each rank of a node a share of it."""
        self._core.read_ahead()

    def take(self, name: str, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's part of a tensor, all of it for ``dim`` -1. Collective."""
        shape = self.describe(name)[1]
        if dim != -1 and not 0 <= dim < len(shape):
            self.refuse(
                name,
                IndexError(f"tensor {name!r} of shape {shape} has no dimension {dim} to shard"),
            )
        result: torch.Tensor = self._core.take(name, dim, dtype)
        # The core casts what models cast; this interface casts whole numbers, too.
        return result if dtype is None else result.to(dtype)

    def push(
        self, name: str, dst_rank: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor | None:
        """The whole tensor on one rank, None on the others. Collective."""
        result: torch.Tensor | None = self._core.push(name, dst_rank, dtype)
        return result if result is None or dtype is None else result.to(dtype)

    def refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error of arguments; on all ranks, where they wait for each other to take."""
        self._core.refuse(name, error)
        raise error

    def close(self) -> None:
        """Let go of the files. What is known of them stays known."""
        self._core.close()
