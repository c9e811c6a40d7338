"""The table that ``run --profile`` and IPython print: loads, totals, fallbacks with reasons."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Sequence

from .report import STREAMED, LoadReport
from .terminal import width, wrapped

__all__ = ["NOTHING", "fitted", "grid", "render"]

NOTHING = (
    "fastst_patch: no safetensors loads were seen. A load is seen when it goes through a patched"
    " function: see `fastst-patch doctor`"
)

_HEADINGS = ("pid", "file", "call", "device", "path", "loads", "tensors", "GB", "s", "GB/s")
_LEFT = frozenset(("file", "call", "device", "path"))
_ROWS = 40
_REASONS = 20
_WIDTH = 60
_NARROW = 16  # the least width of a file's name
_DROP = (
    "GB/s",
    "tensors",
    "loads",
    "device",
    "call",
    "pid",
)  # left out in this order when the table is too wide


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

    def cells(self, rated: bool = True) -> tuple[str, ...]:
        """The numbers as text. A map has no GB/s: its bytes are read later."""
        known = rated and self.bytes and self.seconds
        rate = f"{self.bytes / self.seconds / 1e9:.2f}" if known else "-"
        numbers = (f"{self.bytes / 1e9:.3f}", f"{self.seconds:.4f}", rate)
        return (str(self.loads), str(self.tensors), *numbers)


_Key = tuple[int, str, str, str, str]  # process, file, call, device, path


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
    """Lines of a table, without columns of ``drop`` as long as it is wider than the terminal.

    Args:
        cells: as for `grid`.
        left: as for `grid`.
        columns: width of the terminal.
        drop: headings of columns that may be left out, in this order.
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


def render(
    loads: Iterable[tuple[int, LoadReport]], columns: int | None = None, *, verbose: bool = False
) -> str:
    """The verdict, and a table with a row per process, file, call, device and path.

    Args:
        loads: reports in the order in which loads finished, each with its process.
        columns: width of the terminal; that of this process when None.
        verbose: show every column and whole names, however wide that is.
    """
    columns = width() if columns is None else columns
    total = _Sum()
    rows: dict[_Key, _Sum] = {}
    reasons: dict[tuple[str, str, str], _Sum] = {}
    paths: dict[_Key, str] = {}
    for pid, report in loads:
        # Loads of one mapped file share a row, whether or not they read ahead.
        key = (pid, report.file, report.call, report.device, report.path.partition("+")[0])
        if not report.path.startswith("mmap"):
            key = (*key[:4], report.path)
        paths[key] = max(paths.get(key, ""), report.path, key=len)
        rows.setdefault(key, _Sum()).add(report)
        total.add(report)
        if report.fallback_reason is not None:
            reason = (report.call, report.path, report.fallback_reason)
            reasons.setdefault(reason, _Sum()).add(report)
    if not rows:
        return NOTHING
    mapped = any(_is_map(key) for key in rows)
    several = len({key[0] for key in rows}) > 1
    shown = _largest(rows)
    files = f"total, {len(total.files)} file" + ("s" if len(total.files) > 1 else "")

    def table(longest: int, drop: Sequence[str]) -> list[str]:
        cells: list[tuple[str, ...]] = [_HEADINGS]
        for key in shown:
            numbers = rows[key].cells(not _is_map(key))
            cells.append((str(key[0]), _short(key[1], longest), *key[2:4], paths[key], *numbers))
        if len(shown) < len(rows):
            cells.append(("", *_rest(rows, shown, not mapped)))
        cells.append(("", files, "", "", "", *total.cells(not mapped)))
        return fitted([c if several else c[1:] for c in cells], _LEFT, columns, drop)

    lines = table(10**6 if verbose else _WIDTH, ())
    excess = max(map(len, lines)) - columns
    if excess > 0 and not verbose:
        longest = min(_WIDTH, max(len(key[1]) for key in shown))
        lines = table(max(_NARROW, longest - excess), _DROP)
    notes = []
    if mapped:
        notes.append("mmap: mapped, not copied; s does not count reading the bytes later.")
    notes += _reason_lines(reasons)
    verdict = wrapped([_verdict(rows, total)], columns)
    # The command is not wrapped, so that it can be copied.
    return "\n".join([*verdict, *lines, *wrapped(notes, columns), *_compare_line(rows)])


def _is_map(key: _Key) -> bool:
    """Whether the seconds of a row are not those of reading its bytes."""
    return key[4].startswith("mmap") and key[2] not in STREAMED


def _verdict(rows: dict[_Key, _Sum], total: _Sum) -> str:
    """How many loads took the fast path, in a sentence."""
    fast = sum(of_row.loads for key, of_row in rows.items() if key[4] != "stock")
    size = f"{total.bytes / 1e9:.3f} GB"
    if fast == total.loads:
        loads = "the load" if fast == 1 else f"all {fast} loads"
        return f"fastst_patch: {loads} took the fast path: {size}"
    if fast == 0:
        return f"fastst_patch: no load took the fast path: {total.loads} by stock, reasons below"
    nbytes = sum(of_row.bytes for key, of_row in rows.items() if key[4] != "stock")
    return (
        f"fastst_patch: {fast} of {total.loads} loads took the fast path,"
        f" {nbytes / 1e9:.3f} of {size}; reasons below"
    )


def _compare_line(rows: dict[_Key, _Sum]) -> list[str]:
    """The command that times the largest file, or the folder that holds all, against stock."""
    files = {key[1]: of_row.bytes for key, of_row in rows.items() if os.path.isfile(key[1])}
    if not files:
        return []
    folders = {os.path.dirname(file) for file in files}
    target = max(files, key=files.__getitem__)
    if len(files) > 1 and len(folders) == 1:
        target = folders.pop() or "."
    return [f"compare with stock: fastst-patch bench {shlex.quote(target)}"]


def _largest(rows: dict[_Key, _Sum]) -> list[_Key]:
    """The rows to show, in their order."""
    if len(rows) <= _ROWS:
        return list(rows)
    largest = set(sorted(rows, key=lambda key: rows[key].bytes, reverse=True)[: _ROWS - 1])
    return [key for key in rows if key in largest]


def _rest(rows: dict[_Key, _Sum], shown: list[_Key], rated: bool) -> tuple[str, ...]:
    rest = _Sum()
    for one in (rows[key] for key in rows.keys() - set(shown)):
        rest.loads += one.loads
        rest.tensors += one.tensors
        rest.bytes += one.bytes
        rest.seconds += one.seconds
    return (f"… {len(rows) - len(shown)} smaller rows", "", "", "", *rest.cells(rated))


def _short(file: str, longest: int = _WIDTH) -> str:
    file = file.encode("utf-8", "backslashreplace").decode("utf-8")
    return file if len(file) <= longest else "…" + file[1 - longest :]


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
