"""Targets of ``patch()``: replacing their names, and putting them back.

A name of a module is replaced by a wrapt proxy, or by a function of an integration. The same
happens to its `aliases` in other modules. Methods are replaced on their class by plain functions,
which bind, pickle and show their source as methods do. While a target is not in use our objects
call the original, so references that were taken while it was in use stay valid.

Where other code had put a function of its own in the place of safetensors', ours goes over it. Both
that function and stock's own are replaced in other modules, each by an object of its own, so that
everything can be put back as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from .. import stock_objects
from ..errors import UntestedVersionWarning, warn_caller
from ..integrations import Fast, Hook
from .others import maker, package_of

__all__ = [
    "LATER",
    "TESTED",
    "PatchPoint",
    "PatchTarget",
    "untested_version",
    "warn_of_untested",
]

LATER = "is not imported yet; it is patched when it is"
"""How the reason ends when a target is patched later."""

SOON = "is being imported; it is patched soon after"
"""How it ends while the module is being imported."""

# The oldest and newest versions that the test suite has passed with.
TESTED = {"safetensors": ("0.4.3", "0.8.0"), "torch": ("2.4.0", "2.15.0")}


# ---- versions ----


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+", maxsplit=1)[0])[:3])


def untested_version(package: str, oldest: str, newest: str) -> str | None:
    """The installed version of a package when it is outside a tested range; else None."""
    import importlib.metadata  # takes 15 ms in a process that has imported nothing

    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if _numbers(oldest) <= _numbers(installed) <= _numbers(newest) else installed


@functools.cache
def warn_of_untested(package: str, oldest: str, newest: str) -> None:
    """Warn, once in a process, when the installed version is outside a tested range."""
    installed = untested_version(package, oldest, newest)
    if installed is not None:
        warn_caller(
            f"fastst_patch was tested with {package} {oldest} to {newest}, and {installed} is"
            " installed. Loads are accelerated all the same. FASTST_VERIFY=1 compares each with"
            " stock; warnings.filterwarnings('ignore', category=UntestedVersionWarning) silences"
            " this.",
            UntestedVersionWarning,
        )


# ---- replacements ----


def _function(original: Any, fast: Fast, active: Callable[[], bool]) -> Any:
    """A plain function in the original's place, for methods and for functions dynamo may trace."""

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return fast(original, args, kwargs) if active() else original(*args, **kwargs)

    return replacement


@dataclasses.dataclass(eq=False)
class PatchPoint:
    """One name that a target replaces, and its replacements.

    Attributes:
        hook: which name, and what replaces it.
        replaced: what was found there, or is stock's own, each with its replacement.
        rebound: aliases that hold a replacement, or others' wrapper around it: module and name.
    """

    hook: Hook
    replaced: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    rebound: list[tuple[types.ModuleType, str]] = dataclasses.field(default_factory=list)

    @property
    def of_safetensors(self) -> bool:
        """Whether the name is safetensors' own, which others replace, too."""
        return self.hook.package == "safetensors"

    def _owner(self) -> tuple[Any, str]:
        """The module or class that holds the name, and the name in it."""
        owner: Any = sys.modules[self.hook.module]
        if owner is None:  # so that it cannot be imported
            raise KeyError(self.hook.module)
        *classes, name = self.hook.name.split(".")
        for class_name in classes:
            owner = owner.__dict__[class_name]
        return owner, name

    def install(self, active: Callable[[], bool]) -> str | None:
        """Put the replacement in place. Returns why that is impossible, else None.

        The module has been imported.
        """
        try:
            owner, name = self._owner()
            current = owner.__dict__[name]
        except KeyError:
            if self.in_progress():
                return f"{self.hook.module} {SOON}"
            return f"the installed {self.hook.package} does not have {self.hook.name}"
        if self.stands():  # others may wrap ours
            return None
        why = _unlike(current, self.hook.parameters)
        if why is not None:
            return f"{self.hook.name} {why}"
        looks_like = current
        if self.of_safetensors and not stock_objects.own(
            current
        ):  # its aliases may hold stock's own
            looks_like = stock_objects.original(self.hook.module, self.hook.name)
        for original in (looks_like, current):
            if all(original is not old for old, _ in self.replaced):
                if isinstance(owner, type) or self.hook.parameters:
                    made = _function(original, self.hook.fast, active)
                else:
                    from .proxy import proxy  # and wrapt, which imports asyncio

                    made = proxy(original, self.hook.fast, active, looks_like)
                self.replaced.append((original, made))
        setattr(owner, name, next(new for old, new in self.replaced if old is current))
        return None

    def in_progress(self) -> bool:
        """Whether its module is being imported, by this thread or by another one."""
        spec = getattr(sys.modules.get(self.hook.module), "__spec__", None)
        return bool(getattr(spec, "_initializing", False))

    def note(self, module: types.ModuleType, name: str, back: bool) -> None:
        """Note that an alias holds a replacement, or a wrapper around it, unless put ``back``."""
        if not back and (module, name) not in self.rebound:
            self.rebound.append((module, name))

    def stands(self) -> bool:
        """Whether the name leads to our object, directly or through wrappers of others."""
        found = self._held()
        for _ in range(32):  # some wrappers wrap themselves
            if found is None or self._behind(found) is not None:
                break
            found = getattr(found, "__wrapped__", None)
        return self._behind(found) is not None

    def remove(self) -> None:
        """Put the original back if the name holds ours; `sweep` does so for aliases."""
        self.rebound.clear()
        original = self._behind(self._held())
        if original is not None:
            owner, name = self._owner()
            setattr(owner, name, original)

    def _held(self) -> Any:
        """What the name holds; None when it is not there."""
        try:
            owner, name = self._owner()
        except KeyError:
            return None
        return owner.__dict__.get(name)

    def _behind(self, value: Any) -> Any:
        """What an object of ours replaces; None when the object is not ours."""
        return next((old for old, new in self.replaced if new is value), None)

    def standing(self) -> Any:
        """What stands at the name beneath ours, or in place of it; None when nothing does."""
        held = self._held()
        behind = self._behind(held)
        return held if behind is None else behind

    def wraps(self) -> str | None:
        """Whose function ours stands over, or would; None: safetensors' own, or that of a library.

        Above ours there may be another one: see `wrapped_by`.
        """
        if not self.of_safetensors or self.wrapped_by() is not None:
            return None
        standing = self.standing()
        return None if standing is None or stock_objects.own(standing) else maker(standing)

    def wrapped_by(self) -> str | None:
        """Whose function stands at the name and leads to ours; None when ours stands there."""
        held = self._held()
        return maker(held) if self._behind(held) is None and self.stands() else None

    def others(self) -> set[str]:
        """Packages whose functions ours has replaced in the place of safetensors'."""
        if not self.of_safetensors:
            return set()
        return {package_of(old) for old, _ in self.replaced if not stock_objects.own(old)}

    def has_aliases(self) -> bool:
        """Whether other modules may hold the original under names of their own."""
        # Modules do not hold methods of a class.
        return self.hook.elsewhere and "." not in self.hook.name


def _unlike(original: Any, parameters: tuple[str, ...]) -> str | None:
    """Why a function is not the one that an integration was written for; None when it is."""
    if not parameters:
        return None
    try:
        found = tuple(inspect.signature(original).parameters)
    except (TypeError, ValueError):
        return "has no signature to check"
    if found[: len(parameters)] != parameters:
        return f"takes ({', '.join(found)}), not ({', '.join(parameters)}, ...)"
    return None


# ---- targets ----


@dataclasses.dataclass(eq=False)
class PatchTarget:
    """Names that are replaced together.

    Attributes:
        name: as ``patch()`` takes it.
        summary: what the fast version does.
        places: the names. When one of them cannot be replaced, none is.
        tested: package and range of versions that an integration was tested with.
        uses: how many ``patch()`` and ``patched()`` are in force.
        missing: why the names are not replaced.
        unsettled: whether ``missing`` is an import in progress, whose end calls no hook.
    """

    name: str
    summary: str
    places: tuple[PatchPoint, ...]
    tested: tuple[str, str, str] | None = None
    uses: int = 0
    missing: str | None = None
    unsettled: bool = False

    def _active(self) -> bool:
        return self.uses > 0

    @property
    def modules(self) -> list[str]:
        """Modules whose names are replaced."""
        return list(dict.fromkeys(place.hook.module for place in self.places))

    def install(self) -> None:
        """Replace the names of imported modules; `missing` says why that was impossible."""
        self.missing = None
        self.unsettled = False
        for place in self.places:
            if sys.modules.get(place.hook.module) is None:
                why: str | None = f"{place.hook.module} {LATER}"
            else:
                if self.tested is not None:
                    warn_of_untested(*self.tested)
                why = place.install(self._active)
            if why is not None:
                self.missing = why
                self.unsettled = why.endswith(SOON)
                self.remove()
                return

    def is_due(self) -> bool:
        """Whether it waits for modules that are there, since no hook was called for them."""
        waits = self.missing is not None and self.missing.endswith(LATER)
        return waits and None not in map(sys.modules.get, self.modules)

    def why_not(self) -> str | None:
        """Why calls do not reach the fast version of a target in use; None when they do."""
        if self.missing is not None:
            return self.missing
        for place in self.places:
            if not place.stands():
                by = place.wraps()
                return f"other code has replaced it since{'' if by is None else f': {by}'}"
        return None

    def remove(self) -> None:
        """Put the originals back where our objects are."""
        for place in self.places:
            place.remove()

    @property
    def rebound(self) -> list[tuple[types.ModuleType, str]]:
        """Aliases that were rebound: module and name."""
        return [found for place in self.places for found in place.rebound]

    def original(self) -> Any:
        """Stock's object behind the first place.

        Raises:
            AttributeError: the installed version does not have it.
            ImportError: its module cannot be imported.
        """
        place = self.places[0]
        if place.replaced and not place.of_safetensors:
            return place.replaced[-1][0]
        return stock_objects.original(place.hook.module, place.hook.name)
