"""The charts: speed against the ceiling, time to the first tensor, peak memory. One PNG each.

A panel is a cell: workloads below each other, cold at the left, warm at the right. The fastest
is at the top; colours are families, and ours is the one that is not pale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastst_patch.bench.errors import UsageError

from . import ceilings, report, results
from .results import Found, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "fastst"
_COLOURS = {
    "fastst": "#1746d1",
    "stock": "#5b6472",
    "torch": "#a3abb8",
    "fastsafetensors": "#e2a36b",
    "runai": "#7fbf9b",
    "safetensors-streaming": "#c39bd3",
    "instanttensor": "#e08e8e",
}
_SPARE = ("#8fb8de", "#d6c06a", "#9fc5c0", "#d9a5c5", "#b8b08d")
_INK, _SOFT, _GRID = "#1f2530", "#6a7280", "#e6e8ec"
_CEILING = "#c2352b"
_ROW_INCHES = 0.27

_LAST = 1e9

Draw = Callable[["Axes", Sequence[Row], Found, dict[str, str]], None]


@dataclass(frozen=True)
class Kind:
    """One chart."""

    name: str
    heading: str
    explained: str
    panel: Draw
    order: Callable[[Row], float]


def require_matplotlib() -> Any:
    """Import matplotlib.figure.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UsageError(f"charts need matplotlib ({error}): pip install '.[bench]'") from error
    return matplotlib.figure


def draw(found: Found, out: Path, suffix: str = "") -> list[str]:
    """Write all charts of one section; return their file names.

    Raises:
        UsageError: they cannot be written.
    """
    cells = [(cell, results.rows(found, *cell)) for cell in results.cells(found)]
    if not any(row.total_s for _, rows in cells for row in rows):
        return []
    colours = _colours([row.family for _, rows in cells for row in rows])
    names = []
    for kind in _kinds(found["device"]):
        file_name = f"{kind.name}{suffix}.png"
        in_order = [(cell, sorted(rows, key=kind.order)) for cell, rows in cells]
        _figure(found, in_order, colours, kind, out / file_name)
        names.append(file_name)
    return names


def _kinds(device: str) -> list[Kind]:
    target = "the CPU" if device == "cpu" else "the GPU"
    until = "every byte is there and read" if device == "cpu" else "all tensors are on the device"
    return [
        Kind(
            "speed", f"Loading safetensors to {target}",
            f"GB/s until {until}; longer is better. Whiskers are quartiles, the dashed line is "
            "what the hardware can give.",
            _speed, lambda row: -(row.gb_per_s or 0.0),
        ),
        Kind(
            "first-tensor", f"Time to the first tensor on {target}",
            "Milliseconds, logarithmic; shorter is better.",
            _first, lambda row: row.first_s.median if row.first_s else _LAST,
        ),
        Kind(
            "memory", f"Memory while loading to {target}",
            "GB beyond what the process held before; shorter is better. Solid: its own. Pale: "
            "pages of the file, which the page cache holds anyway. Dotted: the checkpoint's size."
            + ("" if device == "cpu" else " Diamonds: memory of the device."),
            _memory, lambda row: sum(own_and_whole(row)) if row.memory else _LAST,
        ),
    ]  # fmt: skip


def _colours(families: Sequence[str]) -> dict[str, str]:
    chosen, spare = {}, list(_SPARE)
    for family in dict.fromkeys(families):
        chosen[family] = _COLOURS.get(family) or (spare.pop(0) if spare else _SOFT)
    return chosen


def _figure(
    found: Found,
    cells: Sequence[tuple[tuple[str, str], list[Row]]],
    colours: dict[str, str],
    kind: Kind,
    path: Path,
) -> None:
    workloads = list(dict.fromkeys(workload for (workload, _), _ in cells))
    caches = list(dict.fromkeys(cache for (_, cache), _ in cells))
    by_cell = dict(cells)
    tallest = [
        max(len(by_cell.get((workload, cache), ())) for cache in caches) for workload in workloads
    ]
    inches = [0.75 + _ROW_INCHES * max(count, 2) for count in tallest]
    names = max((len(row.loader) for _, rows in cells for row in rows), default=10)
    margin = 0.35 + 0.078 * names
    width = (4.6 + margin) * len(caches) if len(caches) > 1 else 6.5 + margin
    height = sum(inches) + 1.25
    # A Figure of its own, not pyplot: no display, no global state.
    figure = require_matplotlib().Figure(figsize=(width, height), dpi=130, facecolor="white")
    panel_width = (width - margin - 0.3 - (len(caches) - 1) * (margin + 0.15)) / len(caches)
    grid = figure.add_gridspec(
        len(workloads), len(caches), height_ratios=inches, left=margin / width,
        right=1 - 0.3 / width, top=1 - 1.2 / height, bottom=0.35 / height,
        wspace=(margin + 0.15) / panel_width, hspace=0.75 / (sum(inches) / len(inches)),
    )  # fmt: skip
    for line, workload in enumerate(workloads):
        for column, cache in enumerate(caches):
            if (workload, cache) not in by_cell:
                continue
            axes = figure.add_subplot(grid[line, column])
            rows = by_cell[workload, cache]
            _frame(axes, rows, _panel_title(found, workload, cache))
            kind.panel(axes, rows, found, colours)
    left = 0.18 / width
    figure.text(left, 1 - 0.16 / height, kind.heading, fontsize=17, fontweight="bold", color=_INK,
                va="top")  # fmt: skip
    machine = f"{report.machine(found)}, {found['environment']['memory'] / 1e9:.0f} GB"
    wrapped = textwrap.fill(f"{machine}. {kind.explained}", int(width * 14.5))
    figure.text(left, 1 - 0.48 / height, wrapped, fontsize=9, color=_SOFT, va="top",
                linespacing=1.35)  # fmt: skip
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the chart: {error.strerror}") from error


def _panel_title(found: Found, workload: str, cache: str) -> str:
    facts = next(one for one in found["workloads"] if one["name"] == workload)
    size = facts["nbytes"]
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
    files = "" if facts["files"] == 1 else f" in {facts['files']} files"
    return f"{workload}, {cache}: {facts['tensors']:,} tensors, {shown}{files}"


def _frame(axes: Axes, rows: Sequence[Row], title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=6)
    axes.set_yticks(range(len(rows)), [row.loader for row in rows], fontsize=8.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        ours = row.family == OURS
        label.set_color(_COLOURS[OURS] if ours else _INK)
        label.set_fontweight("bold" if row.loader == results.OURS else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_SOFT, length=0)
    axes.grid(axis="x", color=_GRID, zorder=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_axisbelow(True)
    for place, row in enumerate(rows):
        if row.state != "ok":
            text = {"wrong": "wrong bytes"}.get(row.state, row.state)
            axes.annotate(
                text, (0.01, place), xycoords=("axes fraction", "data"), va="center",
                fontsize=8, color=_CEILING, style="italic", zorder=5,
            ) if row.total_s is None else None  # fmt: skip


def _label(axes: Axes, x: float, place: int, text: str, strong: bool) -> None:
    axes.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", va="center",
                  fontsize=8.5, color=_INK if strong else _SOFT,
                  fontweight="bold" if strong else "normal", zorder=6,
                  bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none",
                        "alpha": 0.85})  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.995 else f"{value * 1e3:.3g} ms"


def _speed(axes: Axes, rows: Sequence[Row], found: Found, colours: dict[str, str]) -> None:
    highest = 0.0
    for place, row in enumerate(rows):
        if row.total_s is None or row.gb_per_s is None:
            continue
        axes.barh(place, row.gb_per_s, height=0.68, color=colours[row.family], zorder=2)
        slow, fast = (row.bytes / s / 1e9 for s in (row.total_s.high, row.total_s.low))
        axes.plot([slow, fast], [place, place], color=_INK, linewidth=1.1, zorder=4,
                  solid_capstyle="butt")  # fmt: skip
        text = f"{row.gb_per_s:.2f}  ·  {_seconds(row.total_s.median)}"
        _label(axes, max(fast, row.gb_per_s), place, text, row.loader == results.OURS)
        highest = max(highest, fast)
    limits = ceilings.speeds_of(found["ceilings"], rows[0].workload)
    name = ceilings.binding(rows[0].cache, found["device"], limits)
    if name is not None and limits[name] <= 6 * highest:
        limit = limits[name]
        axes.axvline(limit, color=_CEILING, linestyle=(0, (4, 2)), linewidth=1.3, zorder=3)
        axes.annotate(
            f"{report.SHORT.get(name, name)} {limit:.1f}", (limit, len(rows) - 0.45),
            xytext=(-3, 2), textcoords="offset points", ha="right", va="bottom", fontsize=7.5,
            color=_CEILING, zorder=6,
        )  # fmt: skip
        highest = max(highest, limit / 1.22)
    axes.set_xlim(0, 1.25 * highest or 1)


def _first(axes: Axes, rows: Sequence[Row], _found: Found, colours: dict[str, str]) -> None:
    known = [row.first_s for row in rows if row.first_s is not None]
    least = min(max(1e3 * one.low, 1e-2) for one in known) / 2 if known else 0.1
    most = max(1e3 * one.high for one in known) if known else 1.0
    axes.set_xscale("log")
    axes.set_xlim(least, most * 4)
    for place, row in enumerate(rows):
        if row.first_s is None:
            continue
        value = max(1e3 * row.first_s.median, least)
        axes.plot([least, value], [place, place], color=colours[row.family], linewidth=2.2,
                  zorder=2, solid_capstyle="butt")  # fmt: skip
        axes.plot([value], [place], "o", color=colours[row.family], markersize=6.5, zorder=3)
        _label(axes, value, place, _seconds(row.first_s.median), row.loader == results.OURS)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.minorticks_off()


def _memory(axes: Axes, rows: Sequence[Row], found: Found, colours: dict[str, str]) -> None:
    size, highest = rows[0].bytes / 1e9, 0.0
    for place, row in enumerate(rows):
        if row.memory is None or row.memory["peak"] is None:
            continue
        own, whole = own_and_whole(row)
        colour = colours[row.family]
        axes.barh(place, whole, height=0.68, color=colour, alpha=0.28, zorder=2)
        axes.barh(place, own, height=0.68, color=colour, zorder=3)
        text = f"{own:.2f}" + (f"  + {whole - own:.2f} of the file" if whole - own > 0.02 else "")
        far = whole
        device = row.memory.get("device_peak") or row.memory.get("device")
        if found["device"] != "cpu" and device is not None:
            axes.plot([device / 1e9], [place], "D", color=_INK, markersize=4.5, zorder=5)
            text += f"  ·  device {device / 1e9:.2f}"
            far = max(far, device / 1e9)
        _label(axes, far, place, text, row.loader == results.OURS)
        highest = max(highest, far)
    axes.axvline(size, color=_SOFT, linestyle=":", linewidth=1.2, zorder=1)
    room = 1.5 if found["device"] == "cpu" else 2.0  # for what stands beside the bars
    axes.set_xlim(0, room * max(highest, size))


def own_and_whole(row: Row) -> tuple[float, float]:
    """GB at the peak: memory that is the process's own, and that with the file's pages."""
    memory = row.memory or {}
    whole = memory.get("peak") or 0.0
    own = max(memory.get("anonymous") or 0.0, whole - (memory.get("file") or 0.0))
    own += memory.get("pinned") or 0.0  # mapped by the driver: in no RSS
    return own / 1e9, max(whole, own) / 1e9
