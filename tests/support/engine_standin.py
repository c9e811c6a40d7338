"""What the stand-ins for inference engines have in common, and models and loads for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from watching import Watch

from fastst_patch.patching import patcher

ELEMENTS = 2 * (64 * 48 + 5) + 4 * 640 + 3  # of the fixture `tensors`
LARGEST = 64 * 48 * 4 + 256


class Standin:
    """An engine's package, imported.

    Attributes:
        name: of the package, and of our calls in reports.
        group: of its entry points.
        module: that has its loaders.
        old: the iterator's parameters in its oldest version that is supported.
        new: the same in the newest version.
        utils: the module that has its iterators.
    """

    name: str
    group: str
    module: str
    old: str
    new: str
    utils: Any

    def pairs(self, folder: Path, model: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The iterator that a model is given.

        Args:
            folder: of the checkpoint.
            model: its parameters tell where it goes.
            **options: of the engine; ``model_config`` has attributes for the model's configuration.
        """
        raise NotImplementedError

    def load(self, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        """What a model is given; arguments as of `pairs`."""
        return dict(self.pairs(*arguments, **options))

    def unnoted(self, folder: Path) -> tuple[Any, Any]:
        """Iterators whose load nothing is known of: one called alone, one by its loader."""
        raise NotImplementedError

    def share(self, monkeypatch: Any, rank: int, size: int) -> None:
        """Make this process one of several ranks."""
        raise NotImplementedError

    def loading(self) -> Loading:
        """Collects what is reported of the engine's loads."""
        return Loading(self.name)


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

    def named_parameters(self) -> Iterator[Any]:
        """None: they have no memory."""
        return iter(())


class Loading(Watch):
    """What one load has reported as an engine's."""

    def __init__(self, call: str = "vllm") -> None:
        super().__init__()
        self._call = call

    @property
    def reports(self) -> list[Any]:
        return [report for report in super().reports if report.call == self._call]

    @property
    def only(self) -> Any:
        (report,) = self.reports
        return report


def most_held(cuda: Any, pairs: Iterator[Any]) -> int:
    """Most bytes on the device while a load's tensors are taken, and dropped, one by one."""
    return max(cuda.driver.live().block_bytes for _ in pairs)


def write(folder: Path, files: Mapping[str, str], **replaced: str) -> None:
    """Write a package into a folder that belongs in ``sys.path``, some words replaced."""
    for name, text in files.items():
        filled = text
        for word, by in replaced.items():
            filled = filled.replace(word, by)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled, encoding="utf-8")


_S = TypeVar("_S", bound=Standin)


@contextmanager
def imported(folder: Path, standin: type[_S], *arguments: Any) -> Iterator[_S]:
    """Let a package stand for an engine in a ``with`` block, patched as nothing was before."""

    def ours() -> list[str]:
        return [name for name in sys.modules if f"{name}.".startswith(f"{standin.name}.")]

    def forget() -> None:  # what was patched in a package that is gone
        for place in patcher._TARGETS[f"{standin.name}.load"].places:
            place.replaced.clear()
            place.rebound.clear()

    before: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in ours()}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    forget()
    try:
        yield standin(*arguments)
    finally:
        forget()
        sys.path.remove(str(folder))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
