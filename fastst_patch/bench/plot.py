"""The chart: one panel a cache state, a bar a loader, ceilings as dashed lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import ceilings, results
from .ceilings import Ceiling
from .failures import UsageError
from .results import Row
from .runner import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"stock": "#9aa5b1", "patched": "#1f77b4"}
_CEILING_COLOURS = {
    ceilings.DIRECT: "#d62728",
    ceilings.COLD_BUFFERED: "#ff7f0e",
    ceilings.PAGE_CACHE: "#2ca02c",
    ceilings.HOST_TO_DEVICE: "#9467bd",
}


def require_matplotlib(what: str = "--plot needs", extra: str = "fastst-patch[plot]") -> Any:
    """Import matplotlib.figure, an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UsageError(f"{what} matplotlib ({error}): pip install '{extra}'") from error
    return matplotlib.figure


def draw(outcome: Outcome, environment: Mapping[str, object], file_name: str) -> None:
    """Write the chart, in the format that the file name's suffix says."""
    caches = outcome.plan.caches
    # A Figure of its own, not pyplot: no display, no global state.
    figure = require_matplotlib().Figure(
        figsize=(10, 1.1 + 1.9 * len(caches)), dpi=150, layout="constrained"
    )
    panels = figure.subplots(len(caches), 1, squeeze=False)[:, 0]
    rows = results.rows(outcome)
    for cache, axes in zip(caches, panels, strict=True):
        # Cold and warm differ by an order of magnitude: each panel has its own scale.
        in_panel = [row for row in rows if row.cache == cache]
        _panel(axes, in_panel, _shown(outcome, in_panel))
        axes.set_title(f"{cache} cache", loc="left", fontsize=10, fontweight="bold")
    panels[-1].set_xlabel("GB/s (load and read every byte; longer is better)")
    figure.suptitle(_title(rows[0], environment), fontsize=10)
    try:
        figure.savefig(file_name)
    except (OSError, ValueError) as error:  # ValueError: a suffix it cannot write
        raise UsageError(f"{file_name}: cannot write the chart: {error}") from error


def _shown(outcome: Outcome, rows: Sequence[Row]) -> list[Ceiling]:
    """Pick the ceilings of this cache state, or that bind a bar; the bus bounds all."""
    caches = {"", *(row.cache.partition(",")[0] for row in rows)}
    binding = {row.ceiling for row in rows}
    measured = [one for one in outcome.ceilings if one.seconds]
    return [one for one in measured if one.cache in caches or one.name in binding]


def _panel(axes: Axes, rows: Sequence[Row], shown: Sequence[Ceiling]) -> None:
    speeds = [row.gb_per_s for row in rows]
    limits = {one.name: results.gb_per_s(one) for one in shown}
    axes.barh(
        [_bar_label(row) for row in rows],
        speeds,
        height=0.62,
        color=[_COLOURS[row.loader] for row in rows],
        zorder=2,
    )
    for place, row in enumerate(rows):
        # In a column beside the panel, where no dashed line crosses the text.
        axes.annotate(
            _speed_label(row),
            (1.015, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=10,
        )
    for name, limit in limits.items():
        label = f"{name}, {limit:.2f} GB/s"
        axes.axvline(
            limit,
            linestyle="--",
            color=_CEILING_COLOURS[name],
            linewidth=1.8,
            label=label,
            zorder=3,
        )
    axes.set_xlim(0, 1.06 * max([*speeds, *limits.values()]))
    axes.invert_yaxis()  # stock above patched, as in the table
    axes.grid(axis="x", color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if limits:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 0.99),
            ncols=len(limits),
            fontsize=8,
            frameon=False,
        )


def _bar_label(row: Row) -> str:
    return row.loader if row.path == row.loader else f"{row.loader}\n({row.path})"


def _speed_label(row: Row) -> str:
    speed = f"{row.gb_per_s:.2f} GB/s"
    if row.loader == "stock":
        return speed
    return f"{speed}\npatched / stock {row.ratio_to_stock.median:.2f}"


def _title(row: Row, environment: Mapping[str, object]) -> str:
    read_ahead = environment.get("read_ahead_kb")
    files = "1 file" if row.files == 1 else f"{row.files} files"
    return (
        f"Loading {row.bytes / 1e9:.2f} GB ({files}, {row.tensors} tensors) to {row.device}\n"
        f"{environment['cpu']}, {environment['cpus']} CPUs; {environment['fs']}, "
        f"read-ahead {'unknown' if read_ahead is None else f'{read_ahead} KiB'}"
    )
