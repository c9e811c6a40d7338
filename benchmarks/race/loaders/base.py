"""What every entrant of the race has: a name, where it can run, and one way to load files.

A loader ends with all tensors on the device, synchronised, and owned: they stay valid when the
loader's own objects are closed and collected. What it imports is imported by `warm_imports`, and
what it has to write first (a .pt file) by `make`, both outside the timed part.
"""

from __future__ import annotations

import abc
import ctypes
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import environments

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
First = Callable[[], None]  # called when the first tensor can be used


@dataclass(frozen=True)
class Loader(abc.ABC):
    """One way to load; a subclass per family says how."""

    name: str
    family: str  # for colours and groups
    package: str | None  # the distribution whose version is recorded
    note: str  # how it is set up, for the table
    devices: tuple[str, ...] = ("cpu", "cuda")
    least: str = ""  # the oldest version of the package that ends in the state promised above
    environment: str | None = None  # None: the installed one; else a folder to put on sys.path
    elsewhere: str = ""  # why it does not run on a device that `devices` does not name
    lacks: tuple[str, ...] = ()  # dtypes that it refuses, in the file's own names

    def missing(self, device: str) -> str | None:
        """Say why this loader cannot run here, or None. Imports neither torch nor the package."""
        kind = device.partition(":")[0]
        if kind not in self.devices:
            return self.elsewhere or f"does not load to {kind}"
        if self.environment is not None:
            return environments.missing(self.environment) or no_driver(kind)
        return self._not_installed() or no_driver(kind)

    def refuses(self, dtypes: Sequence[str]) -> str | None:
        """Say which of a workload's dtypes this loader does not know, or None."""
        unknown = [dtype for dtype in dtypes if dtype in self.lacks]
        return f"does not know the dtype {', '.join(unknown)}" if unknown else None

    def reads(self, files: list[str]) -> list[str]:
        """Return the files whose bytes it reads, for the page cache; not always those given."""
        return files

    def make(self, files: list[str]) -> None:  # noqa: B027 - most write nothing
        """Write what `reads` names and is not there yet. Imports torch if it has to."""

    @abc.abstractmethod
    def warm_imports(self, device: str) -> None:
        """Import, and set up what a program sets up once; timed apart from the load.

        Raises:
            RuntimeError: what is imported is not what this loader is named for.
        """

    @abc.abstractmethod
    def load(self, files: list[str], device: str, first: First) -> Tensors:
        """Load every tensor of the files to the device."""

    def _not_installed(self) -> str | None:
        if self.package is None:
            return None
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed: pip install '.[bench]'"
        if release(found) < release(self.least):
            return f"{self.package} {found} is installed, but this needs {self.least} or newer"
        return None


def release(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with, which is enough to say what is older."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))


def no_driver(kind: str) -> str | None:
    """Say why there can be no CUDA device here, or None."""
    if kind != "cuda":
        return None
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver here"
    return None


def finish(device: str) -> None:
    """Wait until everything that was started for the device is over."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def usable(device: str) -> None:
    """Wait for what the program's own stream has queued: a tensor made there can then be read."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.current_stream(device).synchronize()


def setting(name: str, value: str | None) -> None:
    """Set a variable of the environment, or see to it that a caller's does not decide."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def one_by_one(
    load_file: Callable[[str], Tensors], files: list[str], device: str, first: First
) -> Tensors:
    """Load file after file, as every program does with stock's `load_file`."""
    tensors: Tensors = {}
    for number, file in enumerate(files):
        tensors.update(load_file(file))
        if not number:
            usable(device)
            first()
    finish(device)
    return tensors


def collected(pairs: Iterable[tuple[str, torch.Tensor]], device: str, first: First) -> Tensors:
    """Take what a loader yields, name by name."""
    tensors: Tensors = {}
    for name, tensor in pairs:
        if not tensors:
            usable(device)
            first()
        tensors[name] = tensor
    finish(device)
    return tensors
