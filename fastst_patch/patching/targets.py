"""Targets of ``patch()``: replacing their names, and putting them back.

A name of a module is replaced by a wrapt proxy, or by a function of an integration. The same
happens to its aliases in other modules (``from safetensors import safe_open`` is the rule), which
are found by identity in ``sys.modules``. Methods are replaced on their class by plain functions,
which bind, pickle and show their source as methods do. While a target is not in use our objects
call the original, so references that were taken while it was in use stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from .. import stock
from ..errors import UntestedVersionWarning, warn_caller
from ..integrations import Hook

__all__ = ["LATER", "PatchPoint", "PatchTarget", "sweep", "untested_version", "warn_of_untested"]

LATER = "is not imported yet; it is patched when it is"
"""How the reason ends when a target is patched later."""

# The oldest and newest versions that the test suite has passed with.
TESTED = {"safetensors": ("0.4.3", "0.8.0"), "torch": ("2.4.0", "2.15.0")}


# ---- versions ----


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+", maxsplit=1)[0])[:3])


def untested_version(package: str, oldest: str, newest: str) -> str | None:
    """The installed version of a package when it is outside a tested range; else None."""
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


# ---- names of modules ----


class Proxy(wrapt.FunctionWrapper):  # type: ignore[type-arg,misc,unused-ignore]
    """A wrapt proxy that pickles by name, as the function or class behind it does."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by name; a reference that outlived the patch pickles as the original."""
        name: str = self.__wrapped__.__qualname__
        module = sys.modules.get(self.__wrapped__.__module__)
        if module is not None and getattr(module, name, None) is self.__wrapped__:
            return pkgutil.resolve_name, (f"{module.__name__}:{name}",)
        return name

    @property
    def __signature__(self) -> inspect.Signature:
        # Since 3.13 inspect does not look behind what calls itself a class, and fails on it.
        if not isinstance(self.__wrapped__, type):
            raise AttributeError("__signature__")
        return inspect.signature(self.__wrapped__)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        # A class has a mappingproxy there, which inspect.getattr_static takes for a dict's
        # subclass, and so torch.compile failed on any function that names ours.
        return dict(self.__wrapped__.__dict__)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _skip_module(name: str) -> bool:
    return name == "fastst_patch" or name.startswith("fastst_patch.")


def sweep(places: Iterable[PatchPoint], *, back: bool = False) -> None:
    """Rebind the aliases of these places in other modules, or restore them with ``back``.

    One pass for all places, since a process may have thousands of modules. It reads ``__dict__``
    only, which triggers no lazy import.
    """
    wanted: dict[int, tuple[Any, Any, PatchPoint]] = {}
    for place in places:
        if place.replacement is not None and place.has_aliases():
            old, new = place.original, place.replacement
            old, new = (new, old) if back else (old, new)
            wanted[id(old)] = (old, new, place)
    if not wanted:
        return
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or _skip_module(module_name):
            continue
        names = module.__dict__
        if wanted.keys().isdisjoint(map(id, list(names.values()))):
            continue
        for name, value in list(names.items()):
            found = wanted.get(id(value))
            if found is None or value is not found[0]:
                continue
            names[name] = found[1]
            rebound = found[2].rebound
            if not back and (module, name) not in rebound:
                rebound.append((module, name))


def _function(original: Any, fast: Callable[..., Any], active: Callable[[], bool]) -> Any:
    """A plain function in the original's place, for methods and for functions dynamo may trace."""

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return fast(original, args, kwargs) if active() else original(*args, **kwargs)

    return replacement


def _proxy(original: Any, fast: Callable[..., Any], active: Callable[[], bool]) -> Any:
    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not active():
            return wrapped(*args, **kwargs)
        try:
            return fast(wrapped, args, kwargs)
        except BaseException as error:
            raise stock.trimmed(error)  # noqa: B904 - the same, with fewer frames

    return Proxy(original, call)


@dataclasses.dataclass(eq=False)
class PatchPoint:
    """One name that a target replaces, and its replacement."""

    hook: Hook
    replacement: Any = None
    original: Any = None
    rebound: list[tuple[types.ModuleType, str]] = dataclasses.field(default_factory=list)

    def _owner(self) -> tuple[Any, str]:
        """The module or class that holds the name, and the name in it."""
        owner: Any = sys.modules[self.hook.module]
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
                return f"{self.hook.module} is being imported; it is patched soon after"
            return f"the installed {self.hook.package} does not have {self.hook.name}"
        if self.replacement is None:
            original = stock.unwrapped(current) if not isinstance(owner, type) else current
            why = _unlike(original, self.hook.parameters)
            if why is not None:
                return f"{self.hook.name} {why}"
            make = _function if isinstance(owner, type) or self.hook.parameters else _proxy
            made = make(original, self.hook.fast, active)
            if self.replacement is None:  # a signal handler may have patched
                self.original, self.replacement = original, made
        if current is self.original:
            setattr(owner, name, self.replacement)
        elif not self.stands():  # others may wrap ours
            return "other code has replaced it"
        return None

    def in_progress(self) -> bool:
        """Whether its module is being imported, by this thread or by another one."""
        spec = getattr(sys.modules.get(self.hook.module), "__spec__", None)
        return bool(getattr(spec, "_initializing", False))

    def stands(self) -> bool:
        """Whether the name leads to our object, directly or through wrappers of others."""
        place = self._found()
        found = None if place is None else place[0].__dict__.get(place[1])
        for _ in range(32):  # some wrappers wrap themselves
            if found is None or found is self.replacement:
                break
            found = getattr(found, "__wrapped__", None)
        return found is not None and found is self.replacement

    def remove(self) -> None:
        """Put the original back if the name holds ours; `sweep` does so for aliases."""
        self.rebound.clear()
        if self.replacement is not None and (found := self._found()) is not None:
            owner, name = found
            if owner.__dict__.get(name) is self.replacement:
                setattr(owner, name, self.original)

    def has_aliases(self) -> bool:
        """Whether other modules may hold the original under names of their own."""
        # Modules do not hold methods of a class.
        return self.hook.elsewhere and "." not in self.hook.name

    def _found(self) -> tuple[Any, str] | None:
        try:
            return self._owner()
        except KeyError:
            return None


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
            if place.hook.module not in sys.modules:
                why: str | None = f"{place.hook.module} {LATER}"
            else:
                if self.tested is not None:
                    warn_of_untested(*self.tested)
                why = place.install(self._active)
            if why is not None:
                self.missing = why
                self.unsettled = place.in_progress()
                self.remove()
                return

    def why_not(self) -> str | None:
        """Why calls do not reach the fast version of a target in use; None when they do."""
        if self.missing is None and not all(place.stands() for place in self.places):
            return "other code has replaced it since"
        return self.missing

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
        if place.original is not None:
            return place.original
        return stock.original(place.hook.module, place.hook.name)
