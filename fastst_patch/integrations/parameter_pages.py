"""Huge pages for parameters on the CPU that an engine is about to fill.

An engine's model has memory for its parameters, which nobody has touched yet. The copy of a tensor
into its parameter takes that memory from the kernel page by page. With small pages this costs
more than the copy: of 1.5 GiB from the page cache, one thread, 0.6 s at each copy of 0.2 s. With
huge pages both together take 0.4 s.

Some hosts back a guest's free memory only when it is touched, and have taken back whole free
blocks. A huge page then takes 5 ms, and small ones are quicker. So the first page of a piece of
memory is taken here, and the processor time of that tells whether to ask for the rest of the piece.
While it is slow, fewer and fewer pieces are tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .. import engine

if TYPE_CHECKING:
    import torch

__all__ = ["in_huge_pages"]

MIB = 1 << 20
HUGE_PAGE = 2 * MIB

PIECE = 32 * MIB
"""Memory between two huge pages whose cost is measured. One takes 0.2 ms where memory is there."""

SLOW = 2_400_000
"""Nanoseconds of processor time of a huge page from which on small ones are tried. As many small
ones take half of it by faults, alone; here other threads compete for the cores."""

SMALLEST = 2 * HUGE_PAGE
"""A smaller parameter may have no whole huge page."""


def in_huge_pages(
    pairs: Iterator[tuple[str, torch.Tensor]], parameters: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same names and tensors. Asks for huge pages before the first tensor of each layer.

    Args:
        pairs: of an engine's load; closed with this iterator.
        parameters: of the engine's model, by name. They are held as long as the load takes.
    """
    pages = _Pages(parameters)
    try:
        for pair in pairs:
            pages.ask(pair[0])
            yield pair
            del pair  # else it would take room beside the next one
    finally:
        getattr(pairs, "close", tuple)()


class _Pages:
    """Memory of parameters that were not asked huge pages for yet, by layer."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._waiting: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._pause = 0  # pieces that were left alone after the last slow one
        self._left = 0  # of them, those to come
        for name, parameter in parameters.items():
            if _begin(parameter) and parameter.nbytes >= SMALLEST:
                self._waiting[_layer(name)].append(parameter)

    def ask(self, name: str) -> None:
        """Ask for huge pages for what a tensor of a name, and others of its layer, go to."""
        for parameter in self._waiting.pop(_layer(name), ()):
            begin = _begin(parameter)
            first = -(-begin // HUGE_PAGE) * HUGE_PAGE
            end = (begin + parameter.nbytes) // HUGE_PAGE * HUGE_PAGE
            for at in range(first, end, PIECE):
                self._ask_piece(at, min(PIECE, end - at))

    def _ask_piece(self, address: int, nbytes: int) -> None:
        if self._left:
            self._left -= 1
            return
        spent = engine.ask_for_huge_pages(address, HUGE_PAGE, fill=True)
        if spent is None or spent > SLOW:
            self._pause = self._left = 2 * self._pause + 1
        else:
            self._pause = 0
            engine.ask_for_huge_pages(address + HUGE_PAGE, nbytes - HUGE_PAGE, fill=False)


def _begin(parameter: torch.Tensor) -> int:
    """Address of a parameter's memory; 0 where it has none, or not on the CPU in one piece."""
    if parameter.device.type != "cpu" or not parameter.is_contiguous():
        return 0
    try:
        return parameter.data_ptr()
    except RuntimeError:  # it is a wrapper around others
        return 0


def _layer(name: str) -> str:
    """The first number in a name, which an engine keeps; without one, the last two parts.

    An engine's parameters have other names than the tensors they are filled from: several tensors
    go to one parameter, and prefixes differ.
    """
    parts = name.split(".")
    return next((part for part in parts if part.isdecimal()), ".".join(parts[-2:]))
