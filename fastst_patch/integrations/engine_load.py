"""What the hooks of an inference engine know of a load, and which way of loading suits it.

    the engine's loader is given a model  ->  `note`: where the load goes
    it makes an iterator                  ->  `within`, `begun`: the load that it is part of
    the iterator runs                     ->  `streamed`: `Weights`, `Parts` or `Exchanged`, or
                                              the engine's own loop, and the reason in a report

The iterator gets files and no model, and runs late. So where the load goes is noted on the loader,
and kept in a context variable while the iterator is made.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import stock
from ..config import current, environment_enabled
from ..dropin.eligibility import fell_back, report_stock
from ..errors import Fallback, FaststError
from .engines import Exchanged, TakesLittle, Wanted, Weights, folder_of
from .parameter_pages import in_huge_pages

if TYPE_CHECKING:
    import torch

    from .parts import Parts

__all__ = [
    "Load",
    "Place",
    "arguments",
    "begun",
    "destination",
    "fell_back_unasked",
    "note",
    "noted",
    "streamed",
    "within",
]


class Place(NamedTuple):
    """Where tensors go, and why that is the CPU though the model is elsewhere."""

    device: str = "cpu"
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine's iterator is not told of the load it is part of.

    Attributes:
        place: where whole tensors go.
        place_of_parts: where parts go that are copied as they are.
        elements: of the model's parameters.
        parameters: finds the parameters of the model by name, as long as it lives.
        left: why all of it is left to the engine.
        ranks: number of this rank among those that share each tensor, and how many these are;
            None: this process takes all of the model.
        experts: whether other ranks have experts that this one does not take.
        exchange: gives the process group in which these ranks exchange whole tensors; None: they
            do not.
    """

    place: Place = Place()  # noqa: RUF009 - it is immutable
    place_of_parts: Place = Place()  # noqa: RUF009
    elements: int | None = None
    parameters: Callable[[], Mapping[str, torch.Tensor]] = dict
    left: str | None = None
    ranks: tuple[int, int] | None = None
    experts: bool = False
    exchange: Callable[[], Any] | None = None


_load: contextvars.ContextVar[Any] = contextvars.ContextVar("fastst_load", default=None)
_elements: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_NOTED = "_fastst_load"


# ---- where a load goes ----


def destination(
    model: torch.nn.Module, kept: Callable[[], tuple[str | None, str | None]]
) -> tuple[Place, Place, int, Callable[[], Mapping[str, torch.Tensor]]]:
    """The first four attributes of a `Load`.

    Args:
        model: into which the tensors are copied.
        kept: says, for a model on a device, why whole tensors are given on the CPU, and why parts
            are, too; None for each that is not.
    """
    parameters = list(model.parameters())
    devices = {str(parameter.device) for parameter in parameters}
    on_cuda = [device for device in devices if device.startswith("cuda")]
    whole = parts = Place()
    if len(on_cuda) == len(devices) == 1:
        why_whole, why_parts = kept()
        parts = Place(reason=why_parts) if why_parts else Place(on_cuda[0])
        whole = Place(reason=why_whole) if why_whole else parts
    elif on_cuda:
        whole = parts = Place(reason="the model is on several devices")
    # On the CPU vLLM packs weights for its kernels, and drops the parameters until it loads again:
    # the load that found most of them tells.
    now = sum(parameter.numel() for parameter in parameters)
    _elements[model] = most = max(now, _elements.get(model, 0))
    alive = weakref.ref(model)  # it may let go of parameters before its loader is gone

    def named() -> Mapping[str, torch.Tensor]:
        found = alive()
        return {} if found is None else dict(found.named_parameters())

    return whole, parts, most, named


def note(loader: Any, describe: Callable[[], Load]) -> None:
    """Keep on an engine's loader where the load that begins goes."""
    try:
        found = describe()
    except Exception as error:  # a version that we do not know
        found = Load(left=f"{type(error).__name__}: {error}")
    setattr(loader, _NOTED, found)


def noted(loader: Any, method: str) -> Load:
    """What `note` kept; ``method`` is the engine's that calls it."""
    unknown = Load(left=f"{method} was not called before")
    found: Load = getattr(loader, _NOTED, unknown)
    return found


@contextlib.contextmanager
def within(load: Load | None) -> Iterator[None]:
    """Keep where the load goes for iterators that are made in a ``with`` block."""
    token = _load.set(load)
    try:
        yield
    finally:
        _load.reset(token)


def begun(iterator: str) -> Load:
    """The load that an iterator, made now, is part of. Iterators run later, in other contexts."""
    return _load.get() or Load(left=f"{iterator} was not called by DefaultModelLoader")


# ---- the iterator ----


def arguments(
    original: Callable[..., Any], args: Any, kwargs: Any, load: Load, known: Set[str]
) -> dict[str, Any]:
    """The arguments of a call of an iterator that is ours to do, defaults included.

    Args:
        original: the iterator.
        args: of the call.
        kwargs: of the call.
        load: that the call is part of.
        known: names of parameters whose meaning is known.

    Raises:
        Fallback: it is left to the engine.
    """
    if environment_enabled() is False:
        raise Fallback("FASTST_ENABLED is 0")
    if load.left is not None:
        raise Fallback(load.left)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    unknown = sorted(bound.arguments.keys() - known)
    if unknown:
        raise Fallback(
            f"{original.__name__} takes {', '.join(unknown)}, which this version does not know"
        )
    return bound.arguments


def streamed(
    call: str,
    files: Iterable[str],
    load: Load,
    wanted: Callable[[], Wanted],
    left: Callable[[], Iterator[tuple[str, torch.Tensor]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a load, or the engine's own loop, with the reason in a report.

    Args:
        call: name of the engine.
        files: paths, as the engine gives them.
        load: that this is part of.
        wanted: what is asked for; may raise Fallback.
        left: the engine's own loop.

    Raises:
        FaststError: an option is wrong; or it is left to the engine with ``fallback="error"``.
    """
    weights, damaged = None, False
    try:
        weights = _way(wanted(), load)
    except FaststError:
        raise
    except Exception as error:
        fallback = Fallback.alone(error)
        # Such a file is the engine's to tell, in stock's words.
        damaged = isinstance(error, (OSError, stock.SafetensorError))
    if weights is not None:
        yield from in_huge_pages(weights.pairs(), load.parameters())
        return
    folder = folder_of(list(files))
    report_stock(call, folder, "cpu", fallback)
    if not damaged:
        fell_back_unasked(call, folder, fallback)
    yield from left()


def fell_back_unasked(call: str, path: str, fallback: Fallback) -> None:
    """As `fell_back`, unless the environment asked for it."""
    if environment_enabled() is not False:
        fell_back(current(), call, path, fallback)


def _way(wanted: Wanted, load: Load) -> Weights | Parts | Exchanged:
    """A load by the way that suits what this process takes of the tensors."""
    shared = load.ranks is not None and load.ranks[1] > 1
    if load.exchange is not None and shared and wanted.keep is None:
        return Exchanged(wanted, load.exchange())
    if load.ranks is None and (wanted.keep is not None or not load.experts):
        with contextlib.suppress(TakesLittle):
            return Weights(wanted)
    from .parts import Parts

    place = load.place_of_parts
    wanted = dataclasses.replace(wanted, device=place.device, reason=place.reason)
    return Parts(wanted, *load.ranks or (0, 1))
