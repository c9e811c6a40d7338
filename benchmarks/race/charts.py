"""The summary chart of a race, one PNG: a bar for each family of loaders.

Four panels: time in either state of the page cache, time to the first tensor, memory. Each bar
is the family's best variant over all workloads; every single number is in report.md.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastst_patch.bench import plot
from fastst_patch.bench.failures import UsageError

from . import report, results
from .results import OURS, Found, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "summary"
_DPI = 100
_WIDTH, _PANEL = 16, 4.0  # inches; of a panel the height
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
_INK, _SOFT, _BAD = "#1f2530", "#6a7280", "#c2352b"

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
    rows = results.rows(found)
    if not any(row.total_s for row in rows):
        return []
    file_name = f"{NAME}{suffix}.png"
    try:
        _figure(found, rows).savefig(out / file_name)
    except OSError as error:
        raise UsageError(f"{out / file_name}: cannot write the chart: {error.strerror}") from error
    return [file_name]


# ---- what is drawn ------------------------------------------------------


def panels(rows: Sequence[Row]) -> list[Panel]:
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
              lambda row: own_gb(row) * 1e9 / row.bytes if row.memory else None,
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
                (min(values, default=0.0), max(values, default=0.0)), "" if values else "unknown")
        )  # fmt: skip
    return sorted(made, key=lambda bar: math.inf if bar.value is None else bar.value)


def _mean(values: Any) -> float | None:
    """Geometric; of what is nothing a thousandth counts."""
    known = [max(value, 1e-3) for value in values if value is not None]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def own_gb(row: Row) -> float:
    """GB at the peak that are the process's own: without pages of the file."""
    memory = row.memory or {}
    own = (memory.get("peak") or 0.0) - (memory.get("file") or 0.0)
    # Pinned memory is mapped by the driver: in no RSS.
    return (max(memory.get("anonymous") or 0.0, own) + (memory.get("pinned") or 0.0)) / 1e9


# ---- drawing ------------------------------------------------------------


def _figure(found: Found, rows: Sequence[Row]) -> Any:
    chosen = [(panel, bars(rows, panel)) for panel in panels(rows)]
    lines = math.ceil(len(chosen) / 2)
    # A Figure of its own, not pyplot: no display, no global state.
    figure = require_matplotlib().Figure(
        figsize=(_WIDTH, 1.7 + _PANEL * lines), dpi=_DPI, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.15)
    target = "the CPU" if found["device"] == "cpu" else "the GPU"
    figure.suptitle(f"Loading safetensors to {target}", x=0.01, ha="left", fontsize=26,
                    fontweight="bold", color=_INK)  # fmt: skip
    explained = (
        f"{report.machine(found)}. Geometric means over {len(found['workloads'])} models (those it "
        "loads); shorter is better. The best variant of each family is named below it. Time: 1 is "
        "plain patch(); the thin line goes from the best model to the worst. Memory: without pages "
        "of the file."
    )
    figure.supxlabel(textwrap.fill(explained, 140), x=0.01, ha="left", fontsize=14.5, color=_SOFT)
    places = figure.subplots(lines, 2, squeeze=False).flat
    for axes, (panel, some) in zip(places, chosen, strict=False):
        _panel(axes, panel, some)
    return figure


def _panel(axes: Axes, panel: Panel, some: Sequence[Bar]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=18, fontweight="bold", color=_INK, pad=8)
    known = [bar.value for bar in some if bar.value is not None]
    least, most = min(known, default=0.1), max(known, default=1.0)
    low = least / 3 if panel.logarithmic else 0.0
    high = most * ((most / low) ** 0.4 if panel.logarithmic else 1.25)
    if panel.logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(low, high or 1.0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False, which="both")
    labels = [f"{bar.family}\n{bar.variant}" if bar.variant else bar.family for bar in some]
    axes.set_yticks(range(len(some)), labels, fontsize=14)
    values = [low if bar.value is None else bar.value for bar in some]
    colours = [_COLOURS.get(bar.family, _OTHER) for bar in some]
    drawn = axes.barh(range(len(some)), [value - low for value in values], left=low, height=0.7,
                      color=colours)  # fmt: skip
    told = ["wrong bytes" if bar.state == "wrong" else bar.state for bar in some]
    texts = [told[place] if bar.value is None else panel.shown(bar.value)
             for place, bar in enumerate(some)]  # fmt: skip
    shown = axes.bar_label(drawn, texts, padding=7, fontsize=16, color=_INK)
    for place, bar in enumerate(some):
        if bar.family == OURS:
            for text in (shown[place], axes.get_yticklabels()[place]):
                text.set(color=_COLOURS[OURS], weight="bold")
        elif bar.value is None:
            shown[place].set(color=_BAD, style="italic")
        if bar.value is not None and panel.title.startswith("Time,"):
            axes.hlines(place + 0.42, bar.spread[0], min(bar.spread[1], high), color=_INK, lw=1.2)
