"""Other modules' names for what a target replaces (``from safetensors import safe_open``).

They are found by identity in ``sys.modules``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import engine

if TYPE_CHECKING:
    from .targets import PatchPoint

__all__ = ["sweep"]


def sweep(places: Iterable[PatchPoint], *, back: bool = False) -> None:
    """Rebind the aliases of these places in other modules, or restore them with ``back``.

    One pass for all places, since a process may have thousands of modules. It reads ``__dict__``
    only, which triggers no lazy import.
    """
    wanted: dict[int, tuple[Any, Any, PatchPoint]] = {}
    for place in places:
        if place.has_aliases():
            for old, new in place.replaced:
                wanted[id(new if back else old)] = (new, old, place) if back else (old, new, place)
    if not wanted:
        return
    wrapped = {place.hook.name for _, _, place in wanted.values() if place.of_safetensors}
    modules = [
        module
        for module_name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and module_name.partition(".")[0] != "fastst_patch"
    ]
    dicts = [module.__dict__ for module in modules]
    for name in wrapped:
        for module, names in zip(modules, dicts, strict=True):
            # A wrapper of others keeps its name, and what it wraps is replaced: unsloth's of
            # transformers.modeling_utils.safe_open.
            if name not in names:
                continue
            for cell in _cells(names[name]):
                found = wanted.get(id(cell.cell_contents))
                if found is not None and cell.cell_contents is found[0]:
                    cell.cell_contents = found[1]
                    found[2].note(module, name, back)
    for i in engine.dicts_holding(dicts, list(wanted)):
        _rebind(modules[i], wanted, back)


def _rebind(
    module: types.ModuleType, wanted: dict[int, tuple[Any, Any, PatchPoint]], back: bool
) -> None:
    names = module.__dict__
    package = str(names.get("__name__")).partition(".")[0]
    for name, value in list(names.items()):
        found = wanted.get(id(value))
        if found is None or value is not found[0]:
            continue
        if not back and package in found[2].others():
            continue  # they keep it in order to call it, and to put it back
        names[name] = found[1]
        found[2].note(module, name, back)


def _cells(value: Any) -> list[types.CellType]:
    """What a function refers to from outside of it."""
    closure = value.__closure__ if type(value) is types.FunctionType else None
    return [cell for cell in closure or () if cell != types.CellType()]  # an empty one raises
