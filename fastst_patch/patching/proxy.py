"""The wrapt proxy that stands in the place of a function or class."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import wrapt

from ..integrations import Fast
from ..stock_objects import trimmed

__all__ = ["Proxy", "proxy"]


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


def proxy(original: Any, fast: Fast, active: Callable[[], bool], looks_like: Any) -> Any:
    """Stand in the place of a function or class.

    Args:
        original: what stood there; does all calls while the target is not in use.
        fast: does them otherwise.
        active: whether the target is in use.
        looks_like: what the proxy shows as its own.
    """

    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if not active():
            return original(*args, **kwargs)
        try:
            return fast(original, args, kwargs)
        except BaseException as error:
            raise trimmed(error)  # noqa: B904 - the same, with fewer frames

    return Proxy(looks_like, call)
