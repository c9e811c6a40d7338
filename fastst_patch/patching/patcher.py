"""The targets of ``patch()``, and its nesting.

A target is a name in safetensors, or an integration, which may replace several names; `targets`
does the replacing. Only names that still hold our object are put back.

Uses are counted, not stacked: ``patch()`` uses its targets until ``unpatch()``, and every
``patched()`` uses its own until its block ends, in any thread and any order.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .. import engine
from ..config import (
    Options,
    environment_enabled,
    environment_targets,
    pop,
    push,
)
from ..errors import FallbackWarning, OptionError, warn_caller
from ..integrations import INTEGRATIONS, Hook, Late
from ..locks import Carried, interrupted
from . import others
from .aliases import sweep
from .imports import is_being_imported, when_imported
from .notices import say_once, warn_of_other_processes, warn_of_this_process, watch
from .status import PatchReport, TargetStatus
from .targets import PatchPoint, PatchTarget

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "PatchReport",
    "TargetStatus",
    "get_original",
    "is_patched",
    "patch",
    "patch_map",
    "patched",
    "unpatch",
]


def _safetensors(
    module: str, name: str, summary: str, fast: str, where: str = "dropin.handle"
) -> PatchTarget:
    late = Late(where, fast)

    def settled(standing: Any, args: Any, kwargs: Any) -> Any:
        if _unsettled and not interrupted():
            _settle()
        return late.function(standing, args, kwargs)

    hook = Hook("safetensors", module, name, settled)
    return PatchTarget(f"{module}.{name}", summary, (PatchPoint(hook),))


_load_model_over = Late("dropin.handle", "load_model_over")


def load_model(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``load_model``: over what stands in the place of ``load_file``."""
    over = _load_model_over.imported()
    if over is None:
        return original(*args, **kwargs)
    load_file = _TARGETS["safetensors.torch.load_file"].places[0].standing()
    return over(load_file, args, kwargs)


_TARGETS = {
    target.name: target
    for target in (
        _safetensors(
            "safetensors",
            "safe_open",
            "CPU: zero-copy map, batched tensors, parallel read-ahead; CUDA: pinned ring",
            "safe_open_over",
        ),
        _safetensors(
            "safetensors",
            "_safe_open_handle",
            "the same for file objects",
            "safe_open_handle_over",
        ),
        _safetensors(
            "safetensors.torch",
            "load_file",
            "whole files in one batch, to the CPU or a CUDA device",
            "load_file_over",
        ),
        _safetensors(
            "safetensors.torch",
            "load_model",
            "stock's own code over the fast load_file",
            "load_model",
            "patching.patcher",
        ),
        *(
            PatchTarget(
                found.name, found.summary, tuple(map(PatchPoint, found.hooks)), found.tested
            )
            for found in INTEGRATIONS
        ),
    )
}

_patching = Carried()
_permanent: set[str] = set()
_permanent_options: list[object] = []
_hooked: set[str] = set()
_unsettled: set[str] = set()
_log = logging.getLogger("fastst_patch")


def _hook(module_name: str) -> None:
    """Patch a module's targets when it is imported. Hooks are not removed, so it checks uses."""
    if module_name in _hooked:
        when_imported(module_name)
        return

    def imported(_: Any) -> None:
        with _patching.lock():
            found = [t for t in _TARGETS.values() if t.uses and module_name in t.modules]
            _install_quietly(found)

    when_imported(module_name, imported)
    _hooked.add(module_name)  # last: another thread that calls patch() relies on the hook


def _prepare(names: Iterable[str]) -> None:
    """Watch for modules to come, without our lock: threads that import them may wait for it.

    Raises:
        ImportError: safetensors or wrapt is missing.
    """
    for package in ("safetensors", "wrapt"):
        if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
            importlib.import_module(package)  # says so
    for name in names:
        for module_name in _TARGETS[name].modules:
            _hook(module_name)
    if is_being_imported("safetensors"):  # by a thread that may be past our finder
        importlib.import_module("safetensors")


def _install(targets: Sequence[PatchTarget], rebind_aliases: bool) -> None:
    for target in targets:
        target.install()
        if target.unsettled or (target.missing and any(map(is_being_imported, target.modules))):
            _unsettled.add(target.name)
    if rebind_aliases:
        sweep(place for target in targets if target.missing is None for place in target.places)
    sweep((place for t in targets if t.missing is not None for place in t.places), back=True)
    for target in targets:
        if target.missing is None:
            _tell_of_others(target)


def _tell_of_others(target: PatchTarget) -> None:
    wraps = target.places[0].wraps()
    text = others.lost(target.name, wraps)
    if text is not None:
        say_once(text)
    elif wraps is not None:
        why = others.KNOWN[wraps.partition(".")[0]]
        _log.info("%s: over %s: %s", target.name, wraps, why)


def _install_quietly(targets: Sequence[PatchTarget]) -> None:
    """Install targets inside an import or a load of the program, which must not fail by it."""
    for target in targets:
        try:
            _install([target], True)
        except Exception as error:  # such as a warning that is turned into an error
            target.missing = f"{type(error).__name__}: {error}"
            target.remove()
            sweep(target.places, back=True)
            _log.warning("%s: not patched: %s", target.name, target.missing)


def _settle() -> None:
    """Patch modules that were in the middle of their import when ``patch()`` was called."""
    with _patching.lock():
        names = set(_unsettled)
        _unsettled.clear()
        used = [target for target in _TARGETS.values() if target.uses]
        _install_quietly([t for t in used if t.name in names or t.is_due()])


# ---- many ----


def _chosen(targets: str | Iterable[str] | None) -> list[str]:
    source = ""
    if targets is None:
        targets, source = environment_targets(), " in FASTST_TARGETS"
    if targets is None:
        return list(_TARGETS)
    if not isinstance(targets, Iterable):
        raise OptionError(f"option targets={targets!r}: allowed are {', '.join(_TARGETS)}")
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if not isinstance(name, str) or name not in _TARGETS:
            raise OptionError(f"unknown target {name!r}{source}: allowed are {', '.join(_TARGETS)}")
    return list(dict.fromkeys(names))


def _use(names: Iterable[str], rebind_aliases: bool) -> None:
    used = []
    try:
        for name in names:
            _TARGETS[name].uses += 1
            used.append(name)
        _install([_TARGETS[name] for name in used], rebind_aliases)
    except BaseException:  # such as a warning turned into an error, or Ctrl-C
        _drop(used)
        raise


def _drop(names: Iterable[str]) -> None:
    gone = []
    for name in names:
        target = _TARGETS[name]
        target.uses -= 1
        if target.uses == 0:
            target.remove()
            gone.append(target)
    sweep((place for target in gone for place in target.places), back=True)


def _impossible() -> str | None:
    if environment_enabled() is False:
        return "FASTST_ENABLED is 0"
    return engine.native_error()


@functools.cache
def _say_impossible(reason: str) -> None:
    if engine.native_error() is not None:  # FASTST_ENABLED=0 was set by the user
        warn_caller(f"fastst_patch patches nothing: {reason}", FallbackWarning)


@functools.cache
def _watch() -> None:
    watch(lambda: [name for name, target in _TARGETS.items() if target.uses])


# ---- public ----


def patch(
    targets: str | Iterable[str] | None = None,
    *,
    rebind_aliases: bool = True,
    **options: Unpack[Options],
) -> PatchReport:
    """Make programs that read safetensors use the fast versions, from now on.

    Calling it again adds targets and puts options on top; ``unpatch()`` ends all of it.

    Args:
        targets: names from ``patch_map()``; all, or those in ``FASTST_TARGETS``, when None.
        rebind_aliases: also rebind names that modules have imported already.
        **options: as in ``Config``; in force until ``unpatch()``.

    Raises:
        OptionError: unknown target, or a bad option; nothing has changed then.
    """
    names = _chosen(targets)
    _prepare(names)
    with _patching.lock():
        token = push(options)
        reason = _impossible()
        if reason is not None:
            pop(token)
            _say_impossible(reason)
            return PatchReport(_statuses(), reason)
        fresh = [name for name in names if name not in _permanent]
        try:
            warn_of_this_process()
            _watch()
            warn_of_other_processes(fresh)
            _use(fresh, rebind_aliases)
        except BaseException:
            pop(token)
            raise
        _permanent_options.append(token)
        _permanent.update(fresh)
        return PatchReport(_statuses())


def unpatch() -> None:
    """Undo every ``patch()``; targets that running ``patched()`` blocks use stay patched."""
    with _patching.lock():
        _drop(_permanent)
        _permanent.clear()
        while _permanent_options:
            pop(_permanent_options.pop())


_F = TypeVar("_F", bound=Callable[..., Any])


class patched(contextlib.ContextDecorator):  # noqa: N801 - reads as a verb: with patched()
    """Patch for the duration of a ``with`` block, or of a decorated function.

    Process-wide, like ``patch()``; blocks may nest and overlap in any threads. Takes the
    arguments of ``patch()``, and entering raises what ``patch()`` raises. A decorated coroutine
    function or generator is patched while its body runs, not only while it is called.
    """

    def __new__(
        cls, targets: Any = None, *, rebind_aliases: bool = True, **options: Unpack[Options]
    ) -> Any:
        """``@patched`` without parentheses decorates as ``@patched()`` does."""
        return cls()(targets) if callable(targets) else super().__new__(cls)

    def __init__(
        self,
        targets: str | Iterable[str] | None = None,
        *,
        rebind_aliases: bool = True,
        **options: Unpack[Options],
    ) -> None:
        self._arguments = (targets, rebind_aliases, options)
        self._entered: list[tuple[list[str], object]] = []

    def _recreate_cm(self) -> patched:
        targets, rebind_aliases, options = self._arguments
        return patched(targets, rebind_aliases=rebind_aliases, **options)

    def __call__(self, function: _F) -> _F:
        """Decorate a function.

        Raises:
            TypeError: it is an asynchronous generator; use ``with`` inside it.
        """
        if inspect.isasyncgenfunction(function):
            raise TypeError(f"patched() cannot decorate {function!r}: use `with` inside it")
        inner: Any
        if inspect.iscoroutinefunction(function):

            async def inner(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            def inner(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return (yield from function(*args, **kwargs))

        else:
            return super().__call__(function)
        decorated: Any = functools.wraps(function)(inner)
        return cast(_F, decorated)

    def __enter__(self) -> PatchReport:
        """Patch, and return the report."""
        targets, rebind_aliases, options = self._arguments
        names = _chosen(targets)
        _prepare(names)
        with _patching.lock():
            token = push(options)
            try:
                reason = _impossible()
                if reason is not None:
                    names = []
                    _say_impossible(reason)
                else:
                    warn_of_this_process()
                    _watch()
                _use(names, rebind_aliases)
            except BaseException:
                pop(token)
                raise
            self._entered.append((names, token))
            return PatchReport(_statuses(), reason)

    def __exit__(self, *exc_info: object) -> None:
        """Put back the targets that nothing else uses."""
        with _patching.lock():
            names, token = self._entered.pop()
            _drop(names)
            pop(token)


def is_patched(target: str | None = None) -> bool:
    """Whether a target (any, when None) reaches the fast version now.

    Raises:
        OptionError: unknown target.
    """
    return any(patch_map()[name].patched for name in _chosen_or_all(target))


def _chosen_or_all(target: str | None) -> list[str]:
    return list(_TARGETS) if target is None else _chosen(target)


def _status(target: PatchTarget) -> TargetStatus:
    reason = _reason(target)
    aliases = tuple(
        f"{module.__name__}.{name}"
        for module, name in target.rebound
        if f"{module.__name__}.{name}" != target.name
    )
    place = target.places[0]
    replaced_since = reason is not None and target.uses > 0
    wraps = None if replaced_since else place.wraps()
    return TargetStatus(
        target.name,
        reason is None,
        reason,
        aliases,
        target.summary,
        wraps,
        place.wrapped_by(),
        others.lost(target.name, wraps),
    )


def _reason(target: PatchTarget) -> str | None:
    if not target.uses:
        return _impossible() or "not asked for"
    return target.why_not()


def _statuses() -> Mapping[str, TargetStatus]:
    return types.MappingProxyType({name: _status(target) for name, target in _TARGETS.items()})


def patch_map() -> Mapping[str, TargetStatus]:
    """The state of every target, by name.

    A ``patch()`` before the import of safetensors replaces its names when it is imported. This
    imports it then, so that what is said holds.
    """
    awaited = _TARGETS["safetensors.safe_open"]
    if awaited.uses and "safetensors" not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("safetensors")
    _settle()
    with _patching.lock():
        return _statuses()


def get_original(target: str) -> Any:
    """Stock's own object behind a target, patched or not.

    Raises:
        OptionError: unknown target.
        AttributeError: the installed safetensors does not have it.
    """
    (name,) = _chosen(target)
    return _TARGETS[name].original()
