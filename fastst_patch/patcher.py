"""What is replaced and put back: targets, wrappers, the alias sweep, nesting.

A target is a dotted name in safetensors. Its object is replaced by a wrapt proxy that looks
like the original and, while the target is active, calls our version. References captured while
patched stay valid afterwards, because an inactive proxy passes everything through. Names that
other modules imported earlier (``from safetensors import safe_open`` is the rule) are found by
identity in ``sys.modules`` and rebound; putting back restores only what is still ours.

Activity is counted, not stacked: ``patch()`` marks its targets until ``unpatch()``, and every
``patched()`` marks its own for as long as it lasts, in any thread and any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import pkgutil
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import wrapt

from . import engine, handle, stock
from .config import environment_enabled, environment_targets, pop, push
from .errors import FallbackWarning, OptionError, UntestedVersionWarning
from .locks import fork_safe

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

# The oldest and newest versions that the test suite has passed with.
TESTED = {"safetensors": ("0.4.3", "0.8.0"), "torch": ("2.4.0", "2.15.0")}


@dataclasses.dataclass(frozen=True)
class TargetStatus:
    """Where a target stands.

    Attributes:
        name: dotted name.
        patched: whether calls reach the fast version now.
        reason: why not, when they do not.
        aliases: other names in imported modules that were rebound, as ``module.name``.
        summary: what the fast version does.
    """

    name: str
    patched: bool
    reason: str | None
    aliases: tuple[str, ...]
    summary: str


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What one ``patch()`` did.

    Attributes:
        targets: status of every known target afterwards, by name.
        reason: why nothing could be patched at all, or None.
    """

    targets: Mapping[str, TargetStatus]
    reason: str | None = None

    def __str__(self) -> str:
        """One line per target."""
        if self.reason is not None:
            return f"fastst_patch: nothing patched: {self.reason}"
        lines = ["fastst_patch:"]
        for status in self.targets.values():
            state = "patched" if status.patched else f"not patched ({status.reason})"
            aliases = f", {len(status.aliases)} aliases rebound" if status.aliases else ""
            lines.append(f"  {status.name}: {state}{aliases}")
        return "\n".join(lines)


@dataclasses.dataclass
class _Target:
    """A name to replace. ``fast`` takes (original, args, kwargs)."""

    name: str
    summary: str
    fast: Callable[[Any, Any, Any], Any]
    proxy: Any = None
    rebound: list[tuple[types.ModuleType, str]] = dataclasses.field(default_factory=list)
    uses: int = 0
    missing: str | None = None


class _Proxy(wrapt.FunctionWrapper):  # type: ignore[type-arg,misc,unused-ignore]
    """A wrapt proxy that pickles by name, as the function or class it stands for does."""

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

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


_TARGETS = {
    target.name: target
    for target in (
        _Target(
            "safetensors.safe_open",
            "CPU: zero-copy map, batched tensors, parallel read-ahead; CUDA: pinned ring",
            lambda original, args, kwargs: handle.safe_open(*args, **kwargs),
        ),
        _Target(
            "safetensors._safe_open_handle",
            "the same for file objects",
            lambda original, args, kwargs: handle.open_handle(
                original, handle.path_of_file_object, args, kwargs
            ),
        ),
        _Target(
            "safetensors.torch.load_file",
            "whole files in one batch, to the CPU or a CUDA device",
            lambda original, args, kwargs: handle.load_file(*args, **kwargs),
        ),
        _Target(
            "safetensors.torch.load_model",
            "stock's own code over the fast load_file",
            lambda original, args, kwargs: handle.load_model(*args, **kwargs),
        ),
    )
}

_lock = threading.RLock()
fork_safe(_lock)
_permanent: set[str] = set()
_permanent_options: list[object] = []
_hooked: set[str] = set()


# ---- one target ----


def _skip_module(name: str) -> bool:
    return name == "fastst_patch" or name.startswith("fastst_patch.")


def _sweep(old: Any, new: Any) -> list[tuple[types.ModuleType, str]]:
    """Rebind every module global that is ``old``. Reads ``__dict__`` only: no lazy imports."""
    found = []
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or _skip_module(module_name):
            continue
        names = [name for name, value in list(module.__dict__.items()) if value is old]
        for name in names:
            module.__dict__[name] = new
            found.append((module, name))
    return found


def _make_proxy(target: _Target, original: Any) -> Any:
    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return target.fast(wrapped, args, kwargs) if target.uses else wrapped(*args, **kwargs)

    return _Proxy(original, call)


def _install(target: _Target, rebind_aliases: bool) -> None:
    """Put the proxy in place where the target's module is imported already."""
    module_name, _, name = target.name.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None:
        _hook(module_name)
        target.missing = f"{module_name} is not imported yet; it is patched when it is"
        return
    current = module.__dict__.get(name)
    if current is None:
        target.missing = "the installed safetensors does not have it"
        return
    target.missing = None
    if target.proxy is None:
        target.proxy = _make_proxy(target, stock.original(target.name))
    original = target.proxy.__wrapped__
    if current is original:
        module.__dict__[name] = target.proxy
    elif current is not target.proxy:
        target.missing = "somebody else has replaced it"
    if rebind_aliases:
        swept = _sweep(original, target.proxy)
        target.rebound.extend(place for place in swept if place not in target.rebound)


def _remove(target: _Target) -> None:
    """Put the original back wherever the proxy stands, also where it was imported from us."""
    target.rebound.clear()
    if target.proxy is not None:
        _sweep(target.proxy, target.proxy.__wrapped__)


def _hook(module_name: str) -> None:
    """Patch a module's targets when it is imported; hooks stay, so they ask first."""
    if module_name in _hooked:
        return
    _hooked.add(module_name)

    def imported(module: Any) -> None:
        with _lock:
            for target in _TARGETS.values():
                if target.uses and target.name.rpartition(".")[0] == module_name:
                    _install(target, True)

    wrapt.register_post_import_hook(imported, module_name)


# ---- many ----


def _chosen(targets: str | Iterable[str] | None) -> list[str]:
    if targets is None:
        targets = environment_targets()
    if targets is None:
        return list(_TARGETS)
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if name not in _TARGETS:
            raise OptionError(f"unknown target {name!r}: allowed are {', '.join(_TARGETS)}")
    return names


def _use(names: Iterable[str], rebind_aliases: bool) -> None:
    for name in names:
        target = _TARGETS[name]
        target.uses += 1
        _install(target, rebind_aliases)


def _drop(names: Iterable[str]) -> None:
    for name in names:
        target = _TARGETS[name]
        target.uses -= 1
        if target.uses == 0:
            _remove(target)


def _impossible() -> str | None:
    if environment_enabled() is False:
        return "FASTST_ENABLED is 0"
    return engine.native_error()


@functools.cache
def _say_impossible(reason: str) -> None:
    if engine.native_error() is not None:  # FASTST_ENABLED=0 is the user's own word
        warnings.warn(f"fastst_patch patches nothing: {reason}", FallbackWarning, stacklevel=4)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+", maxsplit=1)[0])[:3])


@functools.cache
def _warn_of_untested_versions() -> None:
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not _version(oldest) <= _version(installed) <= _version(newest):
            warnings.warn(
                f"fastst_patch is tested with {package} {oldest} to {newest}; {installed} is"
                " installed. It will be used; verify=True compares every load with stock.",
                UntestedVersionWarning,
                stacklevel=4,
            )


# ---- public ----


def patch(
    targets: str | Iterable[str] | None = None, *, rebind_aliases: bool = True, **options: Any
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
    with _lock:
        token = push(options)
        reason = _impossible()
        if reason is not None:
            pop(token)
            _say_impossible(reason)
            return PatchReport(patch_map(), reason)
        _permanent_options.append(token)
        _warn_of_untested_versions()
        fresh = [name for name in names if name not in _permanent]
        _permanent.update(fresh)
        _use(fresh, rebind_aliases)
        return PatchReport(patch_map())


def unpatch() -> None:
    """End what ``patch()`` did; ``patched()`` blocks still running keep theirs."""
    with _lock:
        _drop(_permanent)
        _permanent.clear()
        while _permanent_options:
            pop(_permanent_options.pop())


_F = TypeVar("_F", bound=Callable[..., Any])


class patched(contextlib.ContextDecorator):  # noqa: N801 - reads as a verb: with patched()
    """Patch for the duration of a ``with`` block, or of a decorated function.

    Process-wide, like ``patch()``; blocks may nest and overlap in any threads. Takes the
    arguments of ``patch()``, and entering raises what ``patch()`` raises.
    """

    def __init__(
        self,
        targets: str | Iterable[str] | None = None,
        *,
        rebind_aliases: bool = True,
        **options: Any,
    ) -> None:
        self._arguments = (targets, rebind_aliases, options)
        self._entered: list[tuple[list[str], object]] = []

    def _recreate_cm(self) -> patched:
        targets, rebind_aliases, options = self._arguments
        return patched(targets, rebind_aliases=rebind_aliases, **options)

    def __enter__(self) -> PatchReport:
        """Patch; returns what was done."""
        targets, rebind_aliases, options = self._arguments
        names = _chosen(targets)
        with _lock:
            token = push(options)
            reason = _impossible()
            if reason is not None:
                names = []
                _say_impossible(reason)
            else:
                _warn_of_untested_versions()
            _use(names, rebind_aliases)
            self._entered.append((names, token))
            return PatchReport(patch_map(), reason)

    def __exit__(self, *exc_info: object) -> None:
        """Put back what this block alone had patched."""
        with _lock:
            names, token = self._entered.pop()
            _drop(names)
            pop(token)


def is_patched(target: str | None = None) -> bool:
    """Whether a target (any, when None) reaches the fast version now.

    Raises:
        OptionError: unknown target.
    """
    return any(_status(_TARGETS[name]).patched for name in _chosen_or_all(target))


def _chosen_or_all(target: str | None) -> list[str]:
    return list(_TARGETS) if target is None else _chosen(target)


def _status(target: _Target) -> TargetStatus:
    reason = _reason(target)
    aliases = tuple(
        f"{module.__name__}.{name}"
        for module, name in target.rebound
        if f"{module.__name__}.{name}" != target.name
    )
    return TargetStatus(target.name, reason is None, reason, aliases, target.summary)


def _reason(target: _Target) -> str | None:
    if not target.uses:
        return _impossible() or "not asked for"
    return target.missing


def patch_map() -> Mapping[str, TargetStatus]:
    """Every target there is, by name, and where it stands."""
    with _lock:
        return types.MappingProxyType({name: _status(target) for name, target in _TARGETS.items()})


def get_original(target: str) -> Any:
    """Stock's own object behind a target, patched or not.

    Raises:
        OptionError: unknown target.
        AttributeError: the installed safetensors does not have it.
    """
    (name,) = _chosen(target)
    return stock.original(name)
