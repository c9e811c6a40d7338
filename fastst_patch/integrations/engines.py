"""What inference engines need: the tensors of a checkpoint, one after another, and one report.

    engine's own loop over safe_open      ->  Weights.pairs()
    name, tensor on the CPU               ->  name, tensor on the model's device
                                              copied into a parameter by the engine, then freed

An engine copies every tensor into a parameter of its own. On the CPU it takes views of the
file's map, read ahead of the copies. On a device it takes tensors that came through the pinned
ring, so that the copy stays on the device.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from .. import engine, tensors
from ..config import current, with_options
from ..errors import Fallback
from ..files.cuda import BUDGET
from ..report import Account

if TYPE_CHECKING:
    import torch

    from ..device import Device
    from ..layout import FileLayout

__all__ = ["Counts", "Exchanged", "TakesLittle", "Wanted", "Weights", "check_mode", "folder_of"]

_MORE = 1.5
"""A checkpoint with so many times the model's elements has tensors that the model does not take.

Tied weights that are stored twice make less than that.
"""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an engine asks for.

    Attributes:
        call: name of the engine, for reports.
        files: paths, in the order in which they are read.
        device: where the tensors go, as torch names it.
        reason: why that is not the model's device; None where it is.
        elements: of the model's parameters; None where that is not known.
        keep: names for which it is False are neither read nor given; None keeps all.
        progress: whether a bar is shown.
        options: of ours, for these files.
    """

    call: str
    files: Sequence[str]
    device: str = "cpu"
    reason: str | None = None
    elements: int | None = None
    keep: Callable[[str], bool] | None = None
    progress: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class TakesLittle(Fallback):
    """The files have much that the model does not take."""


def check_mode() -> None:
    """Raise Fallback unless the engine can read, and tensors made now are plain."""
    error = engine.native_error()
    if error is not None:
        raise Fallback(error)
    if not tensors.ordinary_mode():
        raise Fallback("a torch mode or default device is in force")


class Weights:
    """One load of an engine. Opens the files and reads their headers.

    Raises:
        TakesLittle: the files have much that the model does not take.
        Fallback: the engine's own loop has to do it.
        OptionError: an option has a bad name or value.
        OSError, SafetensorError: a file cannot be opened.
    """

    def __init__(self, wanted: Wanted) -> None:
        check_mode()
        self._wanted = wanted
        self._left_on_cpu: set[str] = set()
        self._given: set[str] = set()
        self._budget = with_options(current(), wanted.options).device_memory_budget
        self._loader = self._loader_to(wanted.device, self._goes_to_the_device)
        settings = self._loader.loader._settings
        if settings.fallback is not None:
            raise settings.fallback
        self._target: Device | None = settings.target
        self._entries = self._loader._open()
        try:
            self._sizes = self._wanted_sizes([entry.layout for entry in self._entries])
        except Fallback:
            self._entries.clear()  # another way opens the files; a cycle keeps ours until collected
            raise
        self._room = 0
        if self._target is not None:
            self._room = self._target.room()
            self._left_on_cpu = self._too_large()
        self._counts = Counts(wanted.reason)

    def _loader_to(self, device: str, keep: Callable[[str], bool] | None) -> Any:
        from ..loader.parallel import ParallelLoader

        wanted, options = self._wanted, dict(self._wanted.options)
        options.pop("device_memory_budget", None)
        return ParallelLoader(
            None,
            list(wanted.files),
            use_tqdm_on_load=wanted.progress,
            device=device,
            nogds=True,  # unless the option io says otherwise
            tensor_filter=keep,
            device_memory_budget=self._budget,
            accumulate_resident=False,  # what is given is copied, and freed
            **options,
        )

    def _goes_to_the_device(self, name: str) -> bool:
        keep = self._wanted.keep
        return name not in self._left_on_cpu and (keep is None or keep(name))

    def _wanted_sizes(self, layouts: Sequence[FileLayout]) -> dict[str, int]:
        """Bytes of each tensor that is wanted."""
        sizes: dict[str, int] = {}
        elements = 0
        for layout in layouts:
            for i, name in enumerate(layout.names):
                if not self._goes_to_the_device(name):
                    continue
                if name in sizes:
                    raise Fallback(f"tensor {name!r} is in two of the files")
                sizes[name] = layout.nbytes(i)
                elements += math.prod(layout.shape(i))
        taken = self._wanted.elements
        if taken is not None and elements > _MORE * taken:
            raise TakesLittle(
                f"the files have {elements} elements and the model {taken}: what it does not take"
                " is better not read"
            )
        return sizes

    @property
    def _ahead(self) -> int:
        """Bytes read ahead on the device."""
        return BUDGET if self._budget is None else self._budget

    def _too_large(self) -> set[str]:
        """Tensors for which there is no room beside the model and what else is on its way.

        That is what is read ahead, or a tensor as large, which the engine has not let go of yet.
        """
        return {
            name
            for name, nbytes in self._sizes.items()
            if nbytes + max(nbytes, self._ahead) > self._room
        }

    def pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, file by file; those that stay on the CPU come last.

        Closing the iterator lets go of what was read ahead.

        Raises:
            OSError, MemoryError, SafetensorError: a tensor cannot be read.
        """
        started = time.perf_counter()
        try:
            yield from self._to_device()
            left = self._sizes.keys() - self._given
            if left:
                yield from self._to_cpu(left)
        finally:
            self._counts.emit(self._wanted, time.perf_counter() - started)

    def _to_device(self) -> Iterator[tuple[str, torch.Tensor]]:
        entries, self._entries = self._entries, []
        pairs = self._loader._iterate(entries, self._counts.add)
        since = 0  # bytes given after the last look at the device
        try:
            for pair in pairs:
                self._given.add(pair[0])
                since += self._sizes[pair[0]]
                yield pair
                del pair  # else it would take room beside the next one
                if self._target is not None and since > self._ahead:
                    since = 0
                    if self._are_kept(self._target):
                        self._counts.reason = f"tensors on {self._target.name} are not let go of"
                        return
        except Exception as error:
            target = self._target
            if target is None or not target.runtime.is_out_of_memory(error):
                raise
            self._counts.reason = f"{target.name} is out of memory: the rest stays on the CPU"
        finally:
            pairs.close()
            self._loader.close()

    def _are_kept(self, target: Device) -> bool:
        """Whether the engine keeps the tensors, as a list of them does, beside the parameters."""
        given = self._sizes.keys() - self._left_on_cpu
        largest = max(self._sizes[name] for name in given)
        return self._room - target.room() > 2 * (self._ahead + largest)

    def _to_cpu(self, names: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        if self._counts.reason is None:
            self._counts.reason = "tensors that do not fit beside the model stay on the CPU"
        loader = self._loader_to("cpu", names.__contains__)
        try:
            yield from loader._iterate(loader._open(), self._counts.add)
        finally:
            loader.close()


class Exchanged:
    """One load of an engine by a group of ranks: each reads some files, and all get all tensors.

    All ranks of the group make one, and iterate over it in step.

    Args:
        wanted: the same on all ranks, but for the device.
        group: a ``torch.distributed.ProcessGroup``.

    Raises:
        Fallback: the engine's own loop has to do it; on all ranks.
        OptionError, RankError: an option has a bad value, here or on another rank.
    """

    def __init__(self, wanted: Wanted, group: Any) -> None:
        check_mode()
        from ..loader.parallel import ParallelLoader

        self._loader = ParallelLoader(
            group,
            list(wanted.files),
            use_tqdm_on_load=wanted.progress,
            device=wanted.device,
            nogds=True,  # unless the option io says otherwise
            **wanted.options,
        )
        self._loader.loader._call = wanted.call

    def pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, file by file.

        Raises:
            RankError: a rank failed.
        """
        with self._loader:
            yield from self._loader.iterate_weights()


class Counts:
    """Counts of all files of a load, by device and path.

    Args:
        reason: why tensors are on the CPU.
    """

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        self._accounts: dict[tuple[str, str], Account] = {}

    def add(self, file: Account, device: str) -> None:
        """Take over the counts of a file, which then has none."""
        total = self._accounts.setdefault((device, file.path), Account(file.path))
        _move(file, total)

    def use(self, file: Account, device: str, tensors: int, nbytes: int) -> None:
        """Count some tensors, or more bytes of them, beside the counts of their file."""
        total = self._accounts.get((device, file.path))
        if total is None:
            total = self._accounts[device, file.path] = Account(file.path)
        total.tensors += tensors
        total.bytes += nbytes
        total.reason = total.reason or file.reason

    def emit(self, wanted: Wanted, seconds: float) -> None:
        """One report, or one for each way by which the tensors came.

        Args:
            wanted: what was loaded.
            seconds: from the first request to the end, the engine's copies included.
        """
        self._merge_mapped()
        found = {key: total for key, total in self._accounts.items() if total.tensors}
        nbytes = sum(total.bytes for total in found.values())
        for (device, _), total in found.items():
            total.seconds = seconds * (total.bytes / nbytes if nbytes else 1 / len(found))
            if device == "cpu":
                total.reason = total.reason or self.reason
            total.emit(wanted.call, folder_of(wanted.files), device)

    def _merge_mapped(self) -> None:
        """Files that were cached beside others that were not: one way to the same tensors."""
        cached = self._accounts.get(("cpu", "mmap"))
        cold = self._accounts.get(("cpu", "mmap+readahead"))
        if cached is not None and cold is not None:
            _move(cached, cold)


def _move(counts: Account, total: Account) -> None:
    total.bytes += counts.bytes
    total.tensors += counts.tensors
    total.reason = total.reason or counts.reason
    counts.bytes = counts.tensors = 0


def folder_of(files: Sequence[str]) -> str:
    """What a report calls a checkpoint: its file, or the folder of its files."""
    return files[0] if len(files) == 1 else os.path.dirname(files[0]) if files else ""
