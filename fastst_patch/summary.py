"""The table that ``run --profile`` and IPython print: loads, totals, fallbacks with reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from .report import LoadReport

__all__ = ["NOTHING", "fitted", "grid", "render"]

NOTHING = (
    "fastst_patch: no safetensors loads were seen; seen are those that went through a function"
    " while it was patched: see `fastst-patch doctor`"
)

_HEADINGS = ("pid", "file", "call", "device", "path", "loads", "tensors", "GB", "s", "GB/s")
_LEFT = frozenset(("file", "call", "device", "path"))
_ROWS = 40
_REASONS = 20
_WIDTH = 60


@dataclasses.dataclass
class _Sum:
    """Loads that share a row, or a reason."""

    loads: int = 0
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    files: dict[str, None] = dataclasses.field(default_factory=dict)  # as an ordered set

    def add(self, report: LoadReport) -> None:
        self.loads += 1
        self.tensors += report.tensors
        self.bytes += report.bytes
        self.seconds += report.seconds
        self.files[report.file] = None

    def cells(self) -> tuple[str, ...]:
        rate = f"{self.bytes / self.seconds / 1e9:.2f}" if self.bytes and self.seconds else "-"
        numbers = (f"{self.bytes / 1e9:.3f}", f"{self.seconds:.4f}", rate)
        return (str(self.loads), str(self.tensors), *numbers)


def grid(cells: Sequence[tuple[str, ...]], left: Iterable[str]) -> list[str]:
    """Lines of a table.

    Args:
        cells: the headings, then the rows, all of one length.
        left: headings of columns that begin at the left; the others end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if heading in left else cell.rjust(width)
            for cell, width, heading in zip(line, widths, cells[0], strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def fitted(
    cells: Sequence[tuple[str, ...]], left: Iterable[str], columns: int, drop: Sequence[str]
) -> list[str]:
    """Lines of a table that is at most so wide, if leaving columns out is enough.

    Args:
        cells: as for `grid`.
        left: as for `grid`.
        columns: of the terminal.
        drop: headings of columns that may go, the first of them first.
    """
    left = frozenset(left)
    lines = grid(cells, left)
    for heading in drop:
        if max(map(len, lines)) <= columns:
            break
        keep = [i for i, name in enumerate(cells[0]) if name != heading]
        cells = [tuple(line[i] for i in keep) for line in cells]
        lines = grid(cells, left)
    return lines


def render(loads: Iterable[tuple[int, LoadReport]]) -> str:
    """The table as text: a row per process, file, call, device and path.

    Args:
        loads: reports in the order in which loads finished, each with its process.
    """
    total = _Sum()
    rows: dict[tuple[int, str, str, str, str], _Sum] = {}
    reasons: dict[tuple[str, str, str], _Sum] = {}
    for pid, report in loads:
        key = (pid, report.file, report.call, report.device, report.path)
        rows.setdefault(key, _Sum()).add(report)
        total.add(report)
        if report.fallback_reason is not None:
            reason = (report.call, report.path, report.fallback_reason)
            reasons.setdefault(reason, _Sum()).add(report)
    if not rows:
        return NOTHING
    several = len({key[0] for key in rows}) > 1
    cells: list[tuple[str, ...]] = [_HEADINGS]
    shown = _largest(rows)
    cells += [(str(key[0]), _short(key[1]), *key[2:], *rows[key].cells()) for key in shown]
    if len(shown) < len(rows):
        cells.append(("", *_rest(rows, shown)))
    files = f"total, {len(total.files)} file" + ("s" if len(total.files) > 1 else "")
    cells.append(("", files, "", "", "", *total.cells()))
    lines = ["fastst_patch:", *grid([c if several else c[1:] for c in cells], _LEFT)]
    if any(key[4].startswith("mmap") for key in rows):
        lines.append("mmap: mapped, not copied; s and GB/s do not count reading the bytes later.")
    return "\n".join([*lines, *_reason_lines(reasons)])


def _largest(
    rows: dict[tuple[int, str, str, str, str], _Sum],
) -> list[tuple[int, str, str, str, str]]:
    """The rows to show, in their order."""
    if len(rows) <= _ROWS:
        return list(rows)
    largest = set(sorted(rows, key=lambda key: rows[key].bytes, reverse=True)[: _ROWS - 1])
    return [key for key in rows if key in largest]


def _rest(
    rows: dict[tuple[int, str, str, str, str], _Sum],
    shown: list[tuple[int, str, str, str, str]],
) -> tuple[str, ...]:
    rest = _Sum()
    for one in (rows[key] for key in rows.keys() - set(shown)):
        rest.loads += one.loads
        rest.tensors += one.tensors
        rest.bytes += one.bytes
        rest.seconds += one.seconds
    return (f"… {len(rows) - len(shown)} smaller rows", "", "", "", *rest.cells())


def _short(file: str) -> str:
    file = file.encode("utf-8", "backslashreplace").decode("utf-8")
    return file if len(file) <= _WIDTH else "…" + file[1 - _WIDTH :]


def _reason_lines(reasons: dict[tuple[str, str, str], _Sum]) -> list[str]:
    if not reasons:
        return []
    often = sorted(reasons, key=lambda key: reasons[key].loads, reverse=True)
    lines = ["fallbacks, and why:"]
    for key in often[:_REASONS]:
        call, path, reason = key
        files = list(reasons[key].files)
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        count, name = reasons[key].loads, _short(files[0])
        times = "once" if count == 1 else f"{count} times"
        lines.append(f"  {times}: {call} by {path}: {reason} ({name}{others})")
    cut = often[_REASONS:]
    if cut:
        loads = sum(reasons[key].loads for key in cut)
        lines.append(f"  {loads} times for {len(cut)} other reasons")
    return lines
