"""The summary chart of a race, one PNG: a bar for each family of loaders.

Four panels: time in either state of the page cache, time to the first tensor, memory. Each bar
is the family's best variant over all workloads; every single number is in report.md.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastst_patch.bench import plot
from fastst_patch.bench.failures import UsageError

from . import report, results
from .results import OURS, Found, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "summary"
WIDTH, HEIGHT = 1600, 1200  # pixels, at most
_DPI = 100
_COLOURS = {
    "fastst": "#1746d1",
    "stock": "#5b6472",
    "torch": "#a3abb8",
    "fastsafetensors": "#e2a36b",
    "runai": "#7fbf9b",
    "safetensors-streaming": "#c39bd3",
    "instanttensor": "#e08e8e",
    "cattensors": "#d6c36b",
}
_OTHER = "#8fb8de"
_INK, _SOFT, _GRID, _BAD = "#1f2530", "#6a7280", "#e6e8ec", "#c2352b"
_LEFT, _RIGHT, _TOP, _BETWEEN = 2.85, 0.25, 1.85, 0.95  # inches around the panels

Measure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Panel:
    """One of the four."""

    title: str
    cache: str
    measure: Measure
    shown: Callable[[float], str]
    logarithmic: bool = False


@dataclass
class Bar:
    """A family in one panel."""

    family: str
    variant: str = ""
    value: float | None = None  # geometric mean over the workloads
    spread: tuple[float, float] = (0.0, 0.0)  # the least and the most of a workload
    state: str = ""  # why there is no value
    workloads: set[str] = field(default_factory=set)


def require_matplotlib() -> Any:
    """Import matplotlib.figure.

    Raises:
        UsageError: it is not installed.
    """
    return plot.require_matplotlib("charts need", ".[bench]")


def draw(found: Found, out: Path, suffix: str = "") -> list[str]:
    """Write the chart of one section; return its file name, or nothing if nobody has a time.

    Raises:
        UsageError: it cannot be written.
    """
    rows = [row for cell in results.cells(found) for row in results.rows(found, *cell)]
    if not any(row.total_s for row in rows):
        return []
    file_name = f"{NAME}{suffix}.png"
    try:
        _figure(found, rows).savefig(out / file_name)
    except OSError as error:
        raise UsageError(f"{out / file_name}: cannot write the chart: {error.strerror}") from error
    return [file_name]


# ---- what is drawn ------------------------------------------------------


def panels(found: Found, rows: Sequence[Row]) -> list[Panel]:
    """Those that this race has numbers for."""
    caches = list(dict.fromkeys(row.cache for row in rows))
    times = [Panel(f"Time, {cache}", cache, _relative(rows), lambda x: f"{x:.2f}")
             for cache in caches]  # fmt: skip
    return [
        *times,
        Panel(f"Time to the first tensor, {caches[0]}, logarithmic", caches[0],
              lambda row: row.first_s.median if row.first_s else None, report.seconds,
              logarithmic=True),
        Panel(f"Memory of its own / file size, {caches[0]}", caches[0],
              lambda row: own_and_whole(row)[0] * 1e9 / row.bytes if row.memory else None,
              lambda x: f"{x:.0%}"),
    ]  # fmt: skip


def _relative(rows: Sequence[Row]) -> Measure:
    """Time by that of plain `patch()` in the same round; by the fastest where that has not run."""
    fastest: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.total_s:
            cell = row.workload, row.cache
            fastest[cell] = min(row.total_s.median, fastest.get(cell, math.inf))

    def measure(row: Row) -> float | None:
        if row.to_ours or not row.total_s:
            return row.to_ours.median if row.to_ours else None
        return row.total_s.median / fastest[row.workload, row.cache]

    return measure


def bars(rows: Sequence[Row], panel: Panel) -> list[Bar]:
    """One a family, the least first, those without a value at the end."""
    speed = _relative(rows)
    here = [row for row in rows if row.cache == panel.cache]
    made = []
    for family in dict.fromkeys(row.family for row in here):
        variants: dict[str, list[Row]] = {}
        for row in here:
            if row.family == family:
                variants.setdefault(row.loader, []).append(row)
        timed = {name: [row for row in some if row.total_s] for name, some in variants.items()}
        timed = {name: some for name, some in timed.items() if some}
        if OURS in timed:
            timed = {OURS: timed[OURS]}  # what `patch()` does by itself
        states = [row.state for some in variants.values() for row in some]
        if not timed:
            made.append(Bar(family, state=states[0]))
            continue
        # The variant that took most workloads, and of those the fastest.
        name = min(timed, key=lambda one: (-len(timed[one]), _mean(map(speed, timed[one])) or 0))
        values = [value for value in map(panel.measure, timed[name]) if value is not None]
        made.append(
            Bar(family, name.removeprefix(family).lstrip("-"), _mean(values),
                (min(values, default=0.0), max(values, default=0.0)), "" if values else "unknown",
                {row.workload for row in timed[name]})
        )  # fmt: skip
    return sorted(made, key=lambda bar: math.inf if bar.value is None else bar.value)


def _mean(values: Any) -> float | None:
    """Geometric; of what is nothing a thousandth counts."""
    known = [max(value, 1e-3) for value in values if value is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def own_and_whole(row: Row) -> tuple[float, float]:
    """GB at the peak: memory that is the process's own, and that with the file's pages."""
    memory = row.memory or {}
    whole = memory.get("peak") or 0.0
    own = max(memory.get("anonymous") or 0.0, whole - (memory.get("file") or 0.0))
    own += memory.get("pinned") or 0.0  # mapped by the driver: in no RSS
    return own / 1e9, max(whole, own) / 1e9


# ---- drawing ------------------------------------------------------------


def _figure(found: Found, rows: Sequence[Row]) -> Any:
    chosen = [(panel, bars(rows, panel)) for panel in panels(found, rows)]
    lines = math.ceil(len(chosen) / 2)
    most = max(len(some) for _, some in chosen)
    width, highest = WIDTH / _DPI, HEIGHT / _DPI
    tall = min(0.62 * max(most, 2), (highest - _TOP - 0.5 - _BETWEEN * (lines - 1)) / lines)
    height = _TOP + lines * tall + (lines - 1) * _BETWEEN + 0.5
    # A Figure of its own, not pyplot: no display, no global state.
    figure = require_matplotlib().Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    wide = width / 2 - _LEFT - _RIGHT
    for number, (panel, some) in enumerate(chosen):
        line, column = divmod(number, 2)
        low = height - _TOP - tall * (line + 1) - _BETWEEN * line
        left = _LEFT + column * width / 2
        box = (left / width, low / height, wide / width, tall / height)
        _panel(figure.add_axes(box), panel, some)
    target = "the CPU" if found["device"] == "cpu" else "the GPU"
    figure.text(0.012, 1 - 0.15 / height, f"Loading safetensors to {target}", fontsize=26,
                fontweight="bold", color=_INK, va="top")  # fmt: skip
    explained = (
        f"{report.machine(found)}. Geometric means over {len(found['workloads'])} models (those it "
        "loads); shorter is better. The best variant of each family is named below it. Time: 1 is "
        "plain patch(); the thin line goes from the best model to the worst. Memory: without pages "
        "of the file."
    )
    figure.text(0.012, 1 - 0.68 / height, textwrap.fill(explained, 140), fontsize=14.5, color=_SOFT,
                va="top", linespacing=1.3)  # fmt: skip
    return figure


def _panel(axes: Axes, panel: Panel, some: Sequence[Bar]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=18, fontweight="bold", color=_INK, pad=8)
    values = [bar.value for bar in some if bar.value is not None]
    least, most = min(values, default=0.1), max(values, default=1.0)
    low = least / 3 if panel.logarithmic else 0.0
    high = most * ((most / low) ** 0.4 if panel.logarithmic else 1.25)
    if panel.logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(low, high or 1.0)
    axes.set_ylim(len(some) - 0.4, -0.6)
    axes.tick_params(length=0, labelbottom=False, which="both")
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    for place, bar in enumerate(some):
        ours = bar.family == OURS
        strong = {"color": _COLOURS[OURS] if ours else _INK, "weight": "bold" if ours else "normal"}
        _text(axes, -0.02, place - (0.13 if bar.variant else 0), bar.family, 16, ha="right",
              **strong)  # fmt: skip
        if bar.variant:
            _text(axes, -0.02, place + 0.27, bar.variant, 12.5, ha="right", color=_SOFT)
        if bar.value is None:
            text = {"wrong": "wrong bytes"}.get(bar.state, bar.state)
            _text(axes, 0.01, place, text, 14, color=_BAD, style="italic")
            continue
        colour = _COLOURS.get(bar.family, _OTHER)
        axes.barh(place, bar.value - low, left=low, height=0.7, color=colour, zorder=2)
        if not panel.logarithmic and panel.title.startswith("Time"):
            axes.plot([bar.spread[0], min(bar.spread[1], high)], [place + 0.42] * 2, color=_INK,
                      linewidth=1.2, zorder=3)  # fmt: skip
        axes.annotate(panel.shown(bar.value), (bar.value, place), xytext=(7, 0), va="center",
                      textcoords="offset points", fontsize=17, zorder=4, **strong)  # fmt: skip


def _text(axes: Axes, x: float, y: float, text: str, size: float, **style: Any) -> None:
    axes.annotate(text, (x, y), xycoords=("axes fraction", "data"), va="center", fontsize=size,
                  annotation_clip=False, **style)  # fmt: skip
