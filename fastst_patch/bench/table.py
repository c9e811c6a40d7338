"""What a person reads: the verdict, the table behind it, and notes, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report_table import fitted
from ..terminal import width, wrapped
from . import ceilings, residency, results
from .results import Row
from .runner import Outcome
from .stats import SPREAD, Summary

LEAST_ROUNDS = 3  # for a verdict: one round said 0.82 of stock, and the next 3.30
_SAME = 0.05  # differences up to this, or up to the spread, are none

_HEADINGS = (
    "cache", "loader", "s", "load s", "touch s", "GB/s", "patched / stock", "of raw read", "path",
)  # fmt: skip
_DROP = ("touch s", "load s", "of raw read", "GB/s", "path")  # for want of columns, in this order
_MEMORY_HEADINGS = (
    "loader", "cache", "device MB", "torch peak MB", "pinned MB", "RSS peak MB",
)  # fmt: skip
_LEFT = {"loader", "cache", "of raw read", "path"}
_SHORT = {
    ceilings.DIRECT: "O_DIRECT",
    ceilings.COLD_BUFFERED: "cold buffered",
    ceilings.PAGE_CACHE: "page cache",
    ceilings.HOST_TO_DEVICE: "bus",
}


def render(
    outcome: Outcome,
    environment: Mapping[str, object],
    columns: int | None = None,
    *,
    verbose: bool = False,
) -> str:
    """Return the verdict, conditions, rows, raw reads and notes as one text.

    Args:
        outcome: of a race.
        environment: of `machine.environment`.
        columns: of the terminal; those of this one when None.
        verbose: show every column, however wide that is.
    """
    rows = results.rows(outcome)
    columns = width() if columns is None else columns
    drop = () if verbose else _DROP
    first = rows[0]
    files = "1 file" if first.files == 1 else f"{first.files} files"
    parts = [
        verdict(outcome, rows),
        "",
        *conditions(environment).splitlines(),
        f"{first.bytes / 1e9:.2f} GB in {first.tensors} tensors, {files}, to {first.device}",
    ]
    text = list(wrapped(parts, columns))
    text += ["", *fitted([_HEADINGS, *map(_cells, rows)], _LEFT, columns, drop)]
    if outcome.plan.device != "cpu":
        text += ["", *fitted([_MEMORY_HEADINGS, *map(_memory_cells, rows)], _LEFT, columns, ())]
    if outcome.ceilings:
        text += ["", *wrapped(_raw_reads(outcome), columns)]
    return "\n".join([*text, "", *wrapped(_notes(outcome, rows), columns)])


def verdict(outcome: Outcome, rows: Sequence[Row]) -> str:
    """Return what the numbers say, in a sentence."""
    if outcome.verified is False:
        return "No verdict: a run did not find the page cache in the state that its row names."
    if outcome.rounds < LEAST_ROUNDS:
        return (
            f"Too few rounds for a verdict: {outcome.rounds}, and it takes {LEAST_ROUNDS}"
            " (--repeat, --max-seconds)."
        )
    found = [
        f"{row.cache.replace(', ', ' with ')} {_compared(row.ratio_to_stock)}"
        for row in rows
        if row.loader != "stock"
    ]
    return f"Patched against stock: {', '.join(found)}."


def gate(outcome: Outcome) -> tuple[bool, str]:
    """Return whether no row is slower than stock, as `verdict` uses the word, and a sentence on it.

    What allows no verdict does not pass: a gate that could not judge is no proof.
    """
    rows = results.rows(outcome)
    if outcome.verified is False or outcome.rounds < LEAST_ROUNDS:
        return False, f"Gate failed. {verdict(outcome, rows)}"
    slow = [row for row in rows if row.ratio_to_stock.median - 1 > _tolerance(row.ratio_to_stock)]
    if not slow:
        return True, "Gate passed: no row is slower than stock beyond its spread."
    found = [f"{row.cache} {with_spread(row.ratio_to_stock, 2)} of stock's time" for row in slow]
    return False, f"Gate failed: slower than stock beyond the spread: {'; '.join(found)}."


def _tolerance(ratio: Summary) -> float:
    return max(_SAME, ratio.spread or 0.0)


def _compared(ratio: Summary) -> str:
    tolerance = _tolerance(ratio)
    if abs(1 - ratio.median) <= tolerance:
        return f"the same (±{100 * tolerance:.0f} %)"
    times, word = (1 / ratio.median, "faster") if ratio.median < 1 else (ratio.median, "slower")
    return f"{times:.1f}x {word}" if times >= 1.5 else f"{times:.2f}x {word}"


def conditions(environment: Mapping[str, object]) -> str:
    """Return two lines on the machine and the versions."""
    memory = environment.get("memory")
    memory_text = f"{memory / 1e9:.0f} GB" if isinstance(memory, int) else "memory unknown"
    read_ahead = environment.get("read_ahead_kb")
    read_ahead_text = "unknown" if read_ahead is None else f"{read_ahead} KiB"
    return (
        f"{environment['cpu']}, {environment['cpus']} CPUs, {memory_text}; "
        f"{environment['kernel']}\n"
        f"{environment['fs']} on {environment['block_device']}, read-ahead {read_ahead_text}; "
        f"Python {environment['python']}, torch {environment['torch']}, "
        f"safetensors {environment['safetensors']}, fastst-patch {environment['fastst_patch']}"
    )


def _memory_cells(row: Row) -> tuple[str, ...]:
    found = results.memory(row)
    sizes = (found["device_used"], found["device_reserved_peak"], found["pinned"])
    return (
        row.loader,
        row.cache,
        *(f"{size / 1e6:.0f}" for size in (*sizes, found["peak_rss"])),
    )


def _cells(row: Row) -> tuple[str, ...]:
    fraction = "-"
    if row.ceiling and row.ceiling_fraction is not None:
        fraction = f"{row.ceiling_fraction:4.0%} {_SHORT[row.ceiling]}"
    return (
        row.cache + ("" if row.verified else "?" if row.verified is None else "!"),
        row.loader,
        with_spread(row.total_s),
        with_spread(row.load_s),
        with_spread(row.touch_s) if row.touch_s.median else "-",
        f"{row.gb_per_s:.2f}",
        "1" if row.loader == "stock" else with_spread(row.ratio_to_stock, 2),
        fraction,
        row.path,
    )


def with_spread(summary: Summary, decimals: int | None = None) -> str:
    """Format three or so significant digits, and the spread with as many decimals."""
    if decimals is None:
        decimals = next(
            (n for n, least in enumerate((100, 10, 0.5, 0.05)) if summary.median >= least), 4
        )
    text = f"{summary.median:.{decimals}f}"
    return text if summary.spread is None else f"{text} ±{summary.spread:.{decimals}f}"


def _raw_reads(outcome: Outcome) -> list[str]:
    lines = ["raw reads of the same files, and copies, in the same rounds:"]
    width = max(len(one.name) for one in outcome.ceilings)
    for one in outcome.ceilings:
        name = one.name.ljust(width)
        if not one.seconds:
            lines.append(f"  {name}  not available: {one.unavailable}")
            continue
        mark = "" if one.verified else "  (cache state not verified)"
        lines.append(f"  {name}  {results.gb_per_s(one):6.2f} GB/s  {one.chosen}{mark}")
    return lines


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"medians of {count} alternating rounds, ± {SPREAD},"


def _notes(outcome: Outcome, rows: Sequence[Row]) -> list[str]:
    plan = outcome.plan
    notes = [
        f"{_rounds(outcome.rounds)} in fresh processes; GB = 1e9 bytes;",
        "s = load + touch, where touch reads every byte once; GB/s = bytes / s; "
        "patched / stock is the ratio of seconds, the median of the rounds' own.",
    ]
    if any(row.cache == residency.SMALL_PAGES for row in rows):
        notes.append(
            "Free memory was there while the clock ran: in small and huge pages, or (small pages) "
            "in small ones only."
        )
    if outcome.verified:
        notes.insert(0, "Every byte was compared, and equal; the page cache was checked before "
                     "each run.")  # fmt: skip
    if any((row.ceiling_fraction or 0) > 1 and row.device == "cpu" for row in rows):
        notes.append(
            "Above 100% of the raw read: a map copies nothing, and reads ahead in larger pieces."
        )
    notes += [
        f"{row.loader}, {row.cache}: the load alone, all bytes moved and none touched, came at "
        f"{row.load_fraction:.0%} of the {row.ceiling}."
        for row in rows
        if row.load_fraction is not None
    ]
    if outcome.rounds < plan.rounds:
        notes.append(
            f"Stopped at the time cap of {plan.max_seconds:g} s (--max-seconds): "
            f"{outcome.rounds} of {plan.rounds} rounds done."
        )
    for row in rows:
        for reason in row.fallbacks:
            notes.append(f"{row.loader}, {row.cache}: fell back: {reason}")
    verdict = outcome.verified
    if verdict is None:
        notes.append("?: this kernel does not tell what is in the page cache; not verified.")
    elif not verdict:
        notes.append("!: a run did not find the cache in the state its row names: not valid.")
    return notes
