"""The README's part about the race, from the results that are committed; never by hand.

`python -m benchmarks readme [--check]` writes it between two markers, for every
benchmarks/results/*/race/results.json, and the older table (benchmarks/readme_table.py) with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastst_patch.bench.errors import UsageError

from . import report, results
from .process import ROOT
from .results import Found, Row

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- race: written by python -m benchmarks readme -->"
END = "<!-- end of race -->"
CHART = "speed.png"


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
        print("README.md: the race is not that of the results; run", file=sys.stderr)
        print("    python -m benchmarks readme", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return status


def folders() -> list[Path]:
    """Those that hold results of a race, machines without a GPU first."""
    found = sorted(path.parent for path in RESULTS.glob("*/race/results.json"))
    return sorted(found, key=lambda folder: results.read(folder)["device"] != "cpu")


def with_race(readme: str, text: str) -> str:
    """The README with what stands between its markers replaced.

    Raises:
        UsageError: a marker is missing, or is there twice.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise UsageError(f"README.md: expected one line {BEGIN!r} and one {END!r}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{rest[rest.index(END) :]}"


def written(found: list[Path]) -> str:
    """What stands between the markers."""
    if not found:
        return "No results are committed yet: `python -m benchmarks race` makes them."
    return "\n\n".join(_section(folder) for folder in found)


def _section(folder: Path) -> str:
    found = results.read(folder)
    place = folder.relative_to(ROOT).as_posix()
    lines = [
        f"**{report.title(found)}.** Seconds until every byte is there"
        + (" and read once" if found["device"] == "cpu" else "")
        + f"; {report.conditions(found)} Everything else, the reasons of who could not run "
        f"included: [{place}/report.md]({place}/report.md).",
        "",
        *matrix(found),
        "",
        f"![GB/s of every loader against the ceiling]({place}/{CHART})",
    ]
    return "\n".join(lines)


def matrix(found: Found) -> list[str]:
    """Loaders by cells; the fastest of a cell in bold, whoever failed in words."""
    cells = results.cells(found)
    rows = {cell: {row.loader: row for row in results.rows(found, *cell)} for cell in cells}
    headings = ["loader", *(_heading(found, *cell) for cell in cells)]
    body = []
    for name in _order(found, cells, rows):
        shown = f"**{name}**" if name == results.OURS else name
        body.append([shown, *(_cell(rows[cell].get(name)) for cell in cells)])
    return report.table(headings, body)


def _heading(found: Found, workload: str, cache: str) -> str:
    facts = next(one for one in found["workloads"] if one["name"] == workload)
    size = facts["nbytes"]
    shown = f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
    return f"{workload}, {shown}, {cache}"


def _order(
    found: Found, cells: list[tuple[str, str]], rows: dict[tuple[str, str], dict[str, Row]]
) -> list[str]:
    """By rank in the first cell; who is not in it comes last."""
    names = [one["name"] for one in found["loaders"]]
    raced = [name for name in names if any(name in here for here in rows.values())]

    def place(name: str) -> tuple[bool, int]:
        row = rows[cells[0]].get(name)
        return (row is None or row.rank is None, row.rank if row and row.rank else 0)

    return sorted(raced, key=place)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.total_s is None or row.state in ("wrong", "crashed", "time limit"):
        return row.state
    seconds = row.total_s.median
    text = f"{seconds:.2f} s" if seconds >= 0.0995 else f"{1e3 * seconds:.2g} ms"
    return f"**{text}**" if row.rank == 1 else text
