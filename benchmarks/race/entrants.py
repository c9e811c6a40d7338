"""Who races: the loaders of a module, and why some of them cannot run here."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastst_patch.bench.failures import UsageError

if TYPE_CHECKING:
    from .loaders import Loader

LOADERS_MODULE = "benchmarks.race.loaders"


@dataclass(frozen=True)
class Source:
    """Where loaders come from. A timed process imports them by these names."""

    module: str = LOADERS_MODULE
    folder: str | None = None  # put on sys.path for it; None: the repository is enough


@dataclass(frozen=True)
class Entrants:
    """Loaders that will run, and those that cannot, with the reason."""

    source: Source
    running: tuple[Loader, ...]
    missing: dict[str, str]  # by name
    everyone: tuple[Loader, ...]
    environments: dict[str, str] = field(default_factory=dict)  # folder of each side environment

    @property
    def running_by_name(self) -> dict[str, Loader]:
        """Loaders that will run."""
        return {loader.name: loader for loader in self.running}

    def environment_of(self, loader: Loader) -> str | None:
        """The folder that goes in front of sys.path before anything is imported."""
        return None if loader.environment is None else self.environments[loader.environment]


def load_module(source: Source) -> object:
    """Import the module that holds LOADERS, here or in a timed process."""
    if source.folder is not None and source.folder not in sys.path:
        sys.path.append(source.folder)
    return importlib.import_module(source.module)


def find(source: Source, name: str) -> Loader:
    """The loader of that name."""
    for loader in load_module(source).LOADERS:  # type: ignore[attr-defined]
        if loader.name == name:
            return loader
    raise SystemExit(f"{source.module} has no loader {name!r}")


def assemble(
    source: Source,
    device: str,
    wanted: Sequence[str] | None,
    wheels: Path | None,
    progress: Callable[[str], None],
) -> Entrants:
    """Find who can run on the device; whoever cannot is kept, with the reason.

    Raises:
        UsageError: a name was asked for that no loader has.
    """
    module = load_module(source)
    everyone: tuple[Loader, ...] = tuple(module.LOADERS)  # type: ignore[attr-defined]
    if wanted is not None:
        names = {loader.name for loader in everyone}
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UsageError(
                f"--loaders: {', '.join(unknown)}: not among {', '.join(sorted(names))}"
            )
        everyone = tuple(loader for loader in everyone if loader.name in wanted)
    prepared: dict[str, Path | str] = {}
    if any(loader.environment and device in loader.devices for loader in everyone):
        prepared = module.prepare(wheels, progress)  # type: ignore[attr-defined]
    running, missing = [], {}
    for loader in everyone:
        reason = _reason(loader, device, prepared)
        if reason is None:
            running.append(loader)
        else:
            missing[loader.name] = scrub(reason)
    folders = {name: str(path) for name, path in prepared.items() if isinstance(path, Path)}
    return Entrants(source, tuple(running), missing, everyone, folders)


def _reason(loader: Loader, device: str, prepared: dict[str, Path | str]) -> str | None:
    if loader.environment is not None and device in loader.devices:
        found = prepared.get(loader.environment, "its environment was not prepared")
        if not isinstance(found, Path):
            return str(found)
    return loader.missing(device)


_ABSOLUTE = re.compile(r"(?<![\w.:/])(?:/[\w.@+~%=-]+)+/([\w.@+~%=-]+)")


def scrub(text: str) -> str:
    """One line without the folders of this machine: results are shown to strangers."""
    return _ABSOLUTE.sub(r"\1", " ".join(text.split()))
