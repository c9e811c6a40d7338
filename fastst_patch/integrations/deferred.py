"""Tensors that tell which part of them is copied, and let that part come from elsewhere.

A `DeferredTensor` is what stock's loop gives: a view of the file's map, of which nothing is read
before it is used. It is a real tensor, so every operation of any program has stock's result. A few
functions are known:

==============================  ==================================================================
views such as ``narrow``        give a `DeferredTensor` again
``parameter.copy_(deferred)``   the source says which tensor to copy in its place: the same part,
                                read to the parameter's device
shape, dtype, …                 are told
everything else                 makes it a plain tensor, for good, and then works on that
==============================  ==================================================================

Whatever is not known may change the tensor, or hand out its memory to code that does. The source
is told, and from then on all its views are copied from the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..locks import shared

if TYPE_CHECKING:
    from weakref import WeakValueDictionary

__all__ = ["DeferredTensor", "Source", "plain"]

_T: Any = torch.Tensor
_Untouched: Any = torch._C.DisableTorchFunctionSubclass

_FACTS = frozenset(
    getattr(_T, name).__get__
    for name in (
        "device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized",
        "is_sparse", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape",
    )
) | frozenset(
    (
        _T.__len__, _T.dim, _T.element_size, _T.is_complex, _T.is_contiguous, _T.is_floating_point,
        _T.ndimension, _T.numel, _T.size, _T.storage_offset, _T.stride, torch.is_complex,
        torch.is_floating_point, torch.numel,
    )
)  # fmt: skip
"""Functions that tell something of a tensor and do nothing else."""

_VIEWS = frozenset(
    getattr(_T, name).__get__ for name in ("T", "data", "mT")
) | frozenset(
    (
        _T.__getitem__, _T.chunk, _T.contiguous, _T.detach, _T.expand, _T.expand_as, _T.flatten,
        _T.movedim, _T.narrow, _T.permute, _T.requires_grad_, _T.reshape, _T.reshape_as, _T.select,
        _T.split, _T.split_with_sizes, _T.squeeze, _T.swapaxes, _T.swapdims, _T.t, _T.tensor_split,
        _T.to, _T.transpose, _T.type, _T.unbind, _T.unflatten, _T.unsqueeze, _T.view, _T.view_as,
        torch.chunk, torch.flatten, torch.movedim, torch.narrow, torch.permute, torch.reshape,
        torch.select, torch.split, torch.squeeze, torch.swapaxes, torch.t, torch.tensor_split,
        torch.transpose, torch.unbind, torch.unsqueeze,
    )
)  # fmt: skip
"""Functions whose results are views of the first argument, or have memory of their own."""

_COPIES = {_T.copy_: 1, _T.__setitem__: 2}
"""Functions that copy an argument into the first one, and which argument that is."""


class Source(Protocol):
    """Where the tensors of one file's tensor come from.

    Attributes:
        storage: address of torch's storage of the map.
        alive: deferred tensors that exist, by their ids; those of this source are added.
    """

    storage: int
    alive: WeakValueDictionary[int, DeferredTensor]

    @property
    def over(self) -> bool:
        """Whether tensors are to be plain from now on."""

    def part(self, view: torch.Tensor, into: torch.Tensor) -> torch.Tensor | None:
        """A tensor with the elements of a view, to be copied in its place; None: the view itself.

        Args:
            view: a plain tensor.
            into: where it is copied.
        """

    def used(self, view: torch.Tensor) -> None:
        """Note that a view, a plain tensor, is read, and not changed."""

    def settle(self, view: torch.Tensor) -> None:
        """Note that a view, a plain tensor now, is used in a way that is not known."""


class DeferredTensor(torch.Tensor):
    """See the module. Another thread may make it plain at any time."""

    _source: Source

    @classmethod
    def over(cls, tensor: torch.Tensor, source: Source) -> DeferredTensor:
        """A tensor that its source has made, deferred."""
        return _owned(_T._make_subclass(cls, tensor), source)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do one of torch's functions."""
        kwargs = kwargs or {}
        alone = types == (DeferredTensor,)
        if alone and func in _FACTS:
            with _Untouched():
                return func(*args, **kwargs)
        source = getattr(args[0], "_source", None) if alone and args and func in _VIEWS else None
        if source is not None:
            with _Untouched():
                return _deferred(func(*args, **kwargs), source, args[0])
        at = _COPIES.get(func)
        if at is not None and _is_copied(args, at):
            return func(*args[:at], _copied(args[at], args[0]), *args[at + 1 :], **kwargs)
        _each(settle, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, proto: Any) -> Any:
        """As of a plain tensor."""
        return settle(self).__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> Any:
        """As of a plain tensor."""
        return settle(self).__deepcopy__(memo)


def plain(tensor: Any) -> Source | None:
    """Make a deferred tensor plain, for good: the same object is of torch's own class then.

    Returns:
        Its source, to one of the threads that make it plain.
    """
    if type(tensor) is not DeferredTensor:
        return None
    with shared:
        if type(tensor) is not DeferredTensor:  # since another thread came first
            return None
        source: Source | None = vars(tensor).pop("_source", None)
        parameter = vars(tensor).pop("_is_param", False)
        found: Any = tensor
        found.__class__ = torch.nn.Parameter if parameter else torch.Tensor
    return source


def settle(tensor: Any) -> Any:
    """Make a deferred tensor plain, and tell its source."""
    source = plain(tensor)
    if source is not None:
        source.settle(tensor)
    return tensor


def _is_copied(args: Any, at: int) -> bool:
    """Whether a deferred tensor is copied, and nothing else is done to one."""
    return (
        len(args) > at
        and type(args[at]) is DeferredTensor
        and DeferredTensor not in map(type, args[:at])
        and isinstance(args[0], torch.Tensor)
    )


def _copied(view: DeferredTensor, into: torch.Tensor) -> torch.Tensor:
    source = getattr(view, "_source", None)
    with _Untouched():
        as_it_is = view.as_subclass(torch.Tensor)
    found = None if source is None else source.part(as_it_is, into)
    return as_it_is if found is None else found


def _deferred(result: Any, source: Source, of: torch.Tensor) -> Any:
    """The result of a function of a tensor, with all views of the map in it deferred."""
    if type(result) in (list, tuple):
        return type(result)(_deferred(one, source, of) for one in result)
    if type(result) is not torch.Tensor:
        return result
    if result.untyped_storage()._cdata != source.storage:
        source.used(of.as_subclass(torch.Tensor))
        return result
    return _owned(result.as_subclass(DeferredTensor), source)


def _owned(made: Any, source: Source) -> DeferredTensor:
    made._source = source
    source.alive[id(made)] = made
    if source.over:  # the end did not find it
        plain(made)
    return made  # type: ignore[no-any-return]


def _each(do: Callable[[Any], Any], found: Any) -> None:
    """Call a function with each tensor in lists, tuples and dicts."""
    if isinstance(found, torch.Tensor):
        do(found)
    elif isinstance(found, (list, tuple)):
        for one in found:
            _each(do, one)
    elif isinstance(found, dict):
        for one in found.values():
            _each(do, one)
