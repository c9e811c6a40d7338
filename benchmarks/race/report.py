"""Results as Markdown: the tables, who could not run and why, the ceilings, the notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import ceilings

from . import results
from .plan import LEAST_ROUNDS
from .results import Found, Quartiles, Row

SHORT = {
    ceilings.DIRECT: "O_DIRECT",
    ceilings.COLD_BUFFERED: "buffered read",
    ceilings.PAGE_CACHE: "page-cache read",
    ceilings.TOUCH: "memory read",
    ceilings.PINNED: "bus",
    ceilings.PAGEABLE: "bus, pageable",
}

Column = tuple[str, Callable[[Row], str]]


def markdown(sections: Sequence[Found], charts: Sequence[Sequence[str]] = ()) -> str:
    """The whole page. ``charts`` holds the file names of each section's."""
    parts = ["# The race", "How it was measured, and where to look for the trick: "
             "`benchmarks/race/METHOD.md`."]  # fmt: skip
    for number, found in enumerate(sections):
        parts.append(section(found, charts[number] if number < len(charts) else ()))
    return "\n\n".join(parts) + "\n"


def section(found: Found, charts: Sequence[str] = ()) -> str:
    """One machine's and one device's results."""
    found = results.summarize(found)
    parts = [f"## {title(found)}", f"{conditions(found)} Quartiles are in brackets."]
    parts += [f"![{_alt(name)}]({name})" for name in charts]
    parts += [cell(found, workload, cache) for workload, cache in results.cells(found)]
    parts += [_missing(found), _ceilings(found), _whole(found), _notes(found)]
    return "\n\n".join(part for part in parts if part)


def _alt(name: str) -> str:
    return name.removesuffix(".png").replace("-", " ").replace("_", " ")


def title(found: Found) -> str:
    """What was loaded to, on what."""
    return f"To {'the GPU' if found['device'] != 'cpu' else 'the CPU'}: {machine(found)}"


def machine(found: Found) -> str:
    """Its cores, and its GPU if that takes part."""
    environment = found["environment"]
    gpu = f"{environment['gpu']}, " if environment.get("gpu") else ""
    return f"{gpu}{environment['cpus']} cores ({environment['cpu']})"


def conditions(found: Found) -> str:
    """One paragraph on the machine, the versions and the rounds."""
    one = found["environment"]
    read_ahead = one.get("read_ahead_kb")
    parts = [
        f"{one['memory'] / 1e9:.0f} GB",
        f"{one['fs']} on {one['block_device']}",
        f"read-ahead {'unknown' if read_ahead is None else f'{read_ahead} KiB'}",
        str(one["kernel"]),
        f"Python {one['python']}",
        f"torch {one['torch']}",
        f"safetensors {one['safetensors']}",
        f"fastst-patch {one['fastst_patch']}",
    ]
    if one.get("driver"):
        parts.append(f"driver {one['driver']}")
    counts = [row.rounds for row in results.rows(found) if row.total_s] or [0]
    rounds = "-".join(map(str, sorted({min(counts), max(counts)})))
    return (
        f"{', '.join(parts)}. Medians of {rounds} rounds in fresh processes and random "
        f"order (seed {found['seed']}); GB = 1e9 bytes."
    )


# ---- one cell -----------------------------------------------------------


def spread(value: Quartiles | None, decimals: int | None = None) -> str:
    """A median, and its quartiles where they differ from it as shown."""
    if value is None:
        return "-"
    if decimals is None:
        decimals = next((n for n, least in enumerate((100, 10, 1)) if value.median >= least), 3)
        decimals = max(decimals, 2) if value.median < 100 else decimals
    middle = f"{value.median:.{decimals}f}"
    low, high = f"{value.low:.{decimals}f}", f"{value.high:.{decimals}f}"
    return middle if low == high == middle else f"{middle} [{low}, {high}]"


def seconds(value: float) -> str:
    """Two digits, in seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 0.0995 else f"{1e3 * value:.2g} ms"


def megabytes(nbytes: float | None) -> str:
    """Bytes as MB."""
    return "-" if nbytes is None else f"{nbytes / 1e6:.0f}"


def _of_ceiling(row: Row) -> str:
    if row.of_ceiling is None or row.ceiling is None:
        return "-"
    return f"{row.of_ceiling:.0%} {SHORT.get(row.ceiling, row.ceiling)}"


def _of_memory(name: str) -> Callable[[Row], str]:
    return lambda row: megabytes((row.memory or {}).get(name))


COLUMNS: tuple[Column, ...] = (
    ("", lambda row: str(row.rank or "")),
    ("loader", lambda row: row.loader),
    ("s", lambda row: spread(row.total_s)),
    ("GB/s", lambda row: "-" if row.gb_per_s is None else f"{row.gb_per_s:.3g}"),
    ("of ceiling", _of_ceiling),
    ("time / stock", lambda row: spread(row.to_stock, 2)),
    ("time / ours", lambda row: spread(row.to_ours, 2)),
    ("first tensor s", lambda row: spread(row.first_s)),
    ("CPU s", lambda row: spread(row.cpu_s)),
    ("again s", lambda row: spread(row.again_s)),
    ("peak MB", _of_memory("peak")),
    ("own MB", _of_memory("anonymous")),
    ("from disk MB", lambda row: megabytes(row.storage_bytes)),
    ("left cached", lambda row: "-" if row.cached_after is None else f"{row.cached_after:.0%}"),
    ("import s", lambda row: "-" if row.import_s is None else f"{row.import_s.median:.2f}"),
)
DEVICE_COLUMNS: tuple[Column, ...] = (
    ("pinned MB", _of_memory("pinned")),
    ("device MB", _of_memory("device")),
    ("device peak MB", _of_memory("device_peak")),
    ("context s", lambda row: "-" if row.context_s is None else f"{row.context_s.median:.2f}"),
)


def columns(found: Found, rows: Sequence[Row]) -> list[Column]:
    """Those that say something here."""
    chosen = list(COLUMNS) + (list(DEVICE_COLUMNS) if found["device"] != "cpu" else [])
    return [one for one in chosen if one[0] in ("", "loader", "s") or
            any(one[1](row) != "-" for row in rows)]  # fmt: skip


def cell(found: Found, workload: str, cache: str) -> str:
    """The table of one workload in one state of the cache, and who failed in it."""
    facts = next(one for one in found["workloads"] if one["name"] == workload)
    rows = results.rows(found, workload, cache)
    shown = [row for row in rows if row.total_s is not None]
    chosen = columns(found, shown)
    files = "1 file" if facts["files"] == 1 else f"{facts['files']} files"
    scaled = "" if facts["scaled"] == 1.0 else f", scaled to {facts['scaled']:.3g} of its size"
    lines = [
        f"### {workload}, {cache}",
        "",
        f"{facts['description']}: {facts['nbytes'] / 1e9:.3f} GB in {facts['tensors']} tensors, "
        f"{facts['dtype']}, {files}{scaled}.",
        "",
    ]
    if shown:
        lines += table([heading for heading, _ in chosen],
                       [[shown_as(row) for _, shown_as in chosen] for row in shown])  # fmt: skip
    lines += [""] if shown else []
    few = [row.loader for row in rows if row.state == "few rounds"]
    if few:
        lines.append(f"- No rank, for fewer than {LEAST_ROUNDS} rounds: {', '.join(few)}.")
    for row in rows:
        if row.state not in ("ok", "few rounds"):
            lines.append(f"- **{row.loader}: {_STATES[row.state]}** ({row.detail}). No rank.")
        if row.late_imports:
            names = ", ".join(row.late_imports)
            lines.append(f"- {row.loader} imported {names} under the clock.")
        if row.state == "ok" and row.verified is None:
            lines.append(f"- {row.loader}: this kernel does not tell what is in the page cache.")
    for one in found["refused"]:
        if one["workload"] == workload:
            lines.append(f"- {one['loader']}: not run here: {one['reason']}.")
    return "\n".join(lines).rstrip()


_STATES = {
    "wrong": "WRONG BYTES",
    "crashed": "crashed",
    "time limit": "over the time limit",
    "cache": "page cache not as it should be",
}


def table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; names at the left, numbers at the right."""
    rule = ["---" if heading in _LEFT else "--:" for heading in headings]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *cells)]


_LEFT = {
    "loader",
    "files",
    "beside",
    "cache",
    "of ceiling",
    "reason",
    "ceiling",
    "best",
    "row",
    "path",
    "set up",
    "all tried",
}


# ---- the rest -----------------------------------------------------------


def _missing(found: Found) -> str:
    ran = {row.loader for row in results.rows(found)}
    entries = [
        [one["name"], one["version"] or "-", one["note"]]
        for one in found["loaders"]
        if one["name"] in ran
    ]
    lines = ["### Who ran, and who could not", ""]
    lines += table(["loader", "version", "set up"], entries)
    if found["missing"]:
        lines.append("")
        lines += table(["loader", "reason"], [list(one) for one in found["missing"].items()])
    return "\n".join(lines)


def _ceilings(found: Found) -> str:
    if not found["ceilings"]:
        return ""
    lines = [[one["workload"], *ceilings.cells(one)] for one in found["ceilings"]]
    shown = table(["beside", "ceiling", "GB/s", "best", "all tried"], lines)
    return "\n".join(["### What the machine can give, measured in the same rounds", "", *shown])


def _whole(found: Found) -> str:
    whole = found["end_to_end"]
    if not whole:
        return ""
    cells = []
    for one in whole["results"]:
        ratio = "1" if one["loader"] == "stock" else f"{one['total_ratio_to_stock']:.2f}"
        times = [f"{one['total_s']:.3f}", ratio, f"{one['import_s']:.2f}"]
        peak = megabytes(one["memory"].get("peak_rss"))
        rounds = str(one["rounds"])
        cells.append([one["title"], one["cache"], one["loader"], *times, peak, rounds])
    lines = ["### End to end", ""]
    if cells:
        headings = [
            "row",
            "cache",
            "loader",
            "s",
            "time / stock",
            "import s",
            "peak RSS MB",
            "rounds",
        ]
        lines += [*table(headings, cells), ""]
    for name, why in whole["skipped"].items():
        lines.append(f"- {name}: skipped: {why}.")
    for name, why in whole["errors"].items():
        lines.append(f"- **{name}: FAILED**: {' '.join(why.split())}")
    return "\n".join(lines).rstrip()


def _notes(found: Found) -> str:
    notes = []
    if found["device"] == "cpu":
        notes.append(
            "s = load plus reading every byte once by one core, by the same routine for all. "
            "peak and own MB = RSS beyond what the process held before; own is memory of the "
            "process alone, the rest are pages of the file that the page cache holds anyway."
        )
    notes.append(
        "time / stock, time / ours: medians of ratios within a round. again: a second load in a "
        "new process, with the cache as the first left it. from disk: by the kernel's count. "
        "left cached: of the files, after the process ended."
    )
    for name, why in found["absent"].items():
        notes.append(f"{name}: no such workload here: {why}.")
    for unit, why in found["dropped"].items():
        notes.append(f"{unit}: {why}.")
    return "\n".join(["### Notes", "", *(f"- {note}" for note in notes)])
