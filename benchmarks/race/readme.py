"""The part of docs/benchmarks.md about the race, from the committed results; never by hand.

`python -m benchmarks readme [--check]` writes it between two markers, for every
benchmarks/results/*/race/summary.json, and the older table (benchmarks/readme_table.py) with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastst_patch.bench.failures import UsageError

from . import charts, report, results
from .process import ROOT
from .results import Found, Row

README = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- race: written by python -m benchmarks readme -->"
END = "<!-- end of race -->"
CHART = f"{charts.NAME}.png"


def main(check: bool) -> int:
    """Write both parts, or with ``check`` tell whether they are current.

    Raises:
        UsageError: the README has no place for them.
    """
    from benchmarks import readme_table

    status = readme_table.main(["--check"] if check else [])
    before = README.read_text(encoding="utf-8")
    after = with_race(before, written(folders()))
    if after == before:
        return status
    if check:
        print(f"{README.name}: the race is not that of the results; run", file=sys.stderr)
        print("    python -m benchmarks readme", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return status


def folders() -> list[Path]:
    """Those that hold results of a race, machines without a GPU first."""
    found = sorted(path.parent for path in RESULTS.glob(f"*/race/{results.SUMMARY_NAME}"))
    return sorted(found, key=lambda folder: _read(folder)["device"] != "cpu")


def _read(folder: Path) -> Found:
    return results.read(folder / results.SUMMARY_NAME)


def with_race(readme: str, text: str) -> str:
    """The README with what stands between its markers replaced.

    Raises:
        UsageError: a marker is missing, or is there twice.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UsageError(f"{README.name}: expected one line {BEGIN!r} and one {END!r}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{rest[rest.index(END) :]}"


def written(found: list[Path]) -> str:
    """What stands between the markers."""
    if not found:
        return "No results are committed yet: `python -m benchmarks race` makes them."
    return "\n\n".join(_section(folder) for folder in found)


def _section(folder: Path) -> str:
    found = _read(folder)
    place = folder.relative_to(ROOT).as_posix()
    place = "../" * len(README.parent.relative_to(ROOT).parts) + place
    lines = [
        f"**{report.title(found)}.** Seconds until every byte is there"
        + (" and read once" if found["device"] == "cpu" else "")
        + f". The column {results.OURS} is plain `patch()`; of every other loader the fastest of "
        "its settings is shown, named in brackets (0.9: the release candidate of safetensors). "
        "Models are shrunk to the size given, each with all its tensors; a blank cell is a loader "
        "that does not take these files. The last column is the median of the ratios within each "
        "round, which may differ from the quotient of the medians beside it. "
        f"{report.conditions(found)} All variants, quartiles, memory, ceilings, and who could not "
        f"run and why: [{place}/report.md]({place}/report.md).",
        "",
        *matrix(found),
        "",
        f"![Time, first tensor and memory, a bar for each family of loaders]({place}/{CHART})",
    ]
    return "\n".join(lines)


def matrix(found: Found) -> list[str]:
    """Cells by families; of each family but ours the loader that was fastest in that cell.

    The fastest of a cell is in bold, and whoever failed in words. The last column is the fastest
    of the others by ours, paired by round.
    """
    families = list(dict.fromkeys(one["family"] for one in found["loaders"]))
    rows = {cell: results.rows(found, *cell) for cell in results.cells(found)}
    raced = [name for name in families if any(row.family == name for here in rows.values()
                                              for row in here)]  # fmt: skip
    raced.sort(key=lambda name: name != results.OURS)
    body = []
    for cell, here in rows.items():
        best = {name: _best(here, name) for name in raced}
        others = [row for name, row in best.items() if name != results.OURS and row is not None]
        times = [row.total_s.median for row in best.values() if row and row.rank and row.total_s]
        first = min(times, default=None)
        body.append([_heading(found, *cell), *(_cell(best[name], first) for name in raced),
                     _ahead(others)])  # fmt: skip
    return report.table(["files", *(_title(name) for name in raced), "fastest other / ours"], body)


def _title(family: str) -> str:
    return f"**{family}**" if family == results.OURS else family


def _best(rows: list[Row], family: str) -> Row | None:
    """The family's fastest; of ours, what `patch()` does by itself."""
    here = [row for row in rows if row.family == family]
    if family == results.OURS:
        here = [row for row in here if row.loader == results.OURS]
    ranked = [row for row in here if row.rank is not None and row.total_s is not None]
    return min(ranked, key=lambda row: row.rank or 0, default=next(iter(here), None))


def _ahead(others: list[Row]) -> str:
    ratios = [row.to_ours.median for row in others if row.rank is not None and row.to_ours]
    return f"{min(ratios):.2f}" if ratios else ""


def _heading(found: Found, workload: str, cache: str) -> str:
    facts = next(one for one in found["workloads"] if one["name"] == workload)
    size = facts["nbytes"]
    shown = f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
    return f"{workload}, {shown}, {cache}"


def _cell(row: Row | None, first: float | None) -> str:
    if row is None:
        return ""
    if row.total_s is None or row.state in ("wrong", "crashed", "time limit"):
        return row.state
    seconds = row.total_s.median
    text = f"{seconds:.2f} s" if seconds >= 0.0995 else f"{1e3 * seconds:.2g} ms"
    variant = row.loader.removeprefix(row.family).lstrip("-")
    text = f"**{text}**" if row.rank and seconds == first else text
    return f"{text} ({variant})" if variant else text
