"""The tables of results in README.md and docs/benchmarks.md, from the committed results.

`python -m benchmarks readme [--check]` writes them between markers; they are never written by hand.
The README's table is of these measurements:

    sudo python benchmarks/readahead.py --json benchmarks/results/cpu-2core/readahead.json
    fastst-patch bench --cache both --json benchmarks/results/cpu-2core/both.json

The race's part is of every benchmarks/results/*/race/summary.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.race import charts, report, results
from benchmarks.race.results import Found, Row
from fastst_patch.bench.failures import UsageError

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
CPU = "cpu-2core"  # the machine of the README's table
CHART = f"{charts.NAME}.png"

KERNEL_DEFAULT_KB = 128


def main(check: bool) -> int:
    """Write both parts, or with ``check`` tell whether they are current.

    Raises:
        UsageError: a page has no place for them.
    """
    outdated = []
    for path, name, make in parts():
        before = path.read_text(encoding="utf-8")
        after = replaced(path.name, before, name, make())
        if after != before:
            outdated.append(path)
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in outdated if check else ():
        print(f"{path.name}: its results are not the committed ones; run", file=sys.stderr)
        print("    python -m benchmarks readme", file=sys.stderr)
    return int(check and bool(outdated))


def parts() -> list[tuple[Path, str, Callable[[], str]]]:
    """A page, the name of a part in it, and what writes it."""
    return [(README, "results", dense_checkpoint), (PAGE, "race", race)]


def markers(name: str) -> tuple[str, str]:
    """The lines at the beginning and the end of a part."""
    return f"<!-- {name}: written by python -m benchmarks readme -->", f"<!-- end of {name} -->"


def replaced(page: str, text: str, name: str, written: str) -> str:
    """The page with what stands between the markers replaced.

    Raises:
        UsageError: a marker is missing, or is there twice.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise UsageError(f"{page}: expected one line {begin!r} and one {end!r}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{written}\n{rest[rest.index(end) :]}"


# ---- one dense checkpoint, of README.md ---------------------------------


def dense_checkpoint() -> str:
    folder = RESULTS / CPU
    runs = json.loads((folder / "readahead.json").read_text(encoding="utf-8"))["runs"]
    both = json.loads((folder / "both.json").read_text(encoding="utf-8"))
    lines = [
        _conditions([*runs, both]),
        "",
        "| page cache | stock | patched | patched / stock | of a raw read |",
        "|---|---|---|---|---|",
        *(_line(run, "cold") for run in runs),
        _line(both, "warm"),
    ]
    return "\n".join(lines)


def _conditions(runs: list[dict[str, Any]]) -> str:
    """The sentence above the table; of all runs, or it would be wrong of some."""
    sentences = {_sentence(run) for run in runs}
    if len(sentences) != 1:
        raise SystemExit(f"{CPU}: not measured under the same conditions: {sentences}")
    return sentences.pop()


def _sentence(run: dict[str, Any]) -> str:
    machine, rounds = run["environment"], run["rounds"]
    tensors = sum(file["tensors"] for file in run["files"])
    return (
        f"One bf16 checkpoint of {run['results'][0]['bytes'] / 1e9:.2f} GB in {tensors} tensors "
        f"to the CPU, load plus reading every byte, medians of {rounds['done']} alternating "
        f"rounds in fresh processes; {machine['cpus']} cores ({machine['cpu']}), "
        f"{machine['memory'] / 1e9:.0f} GB, {machine['fs']} on {machine['block_device']}, "
        f"{machine['kernel']}, torch {machine['torch']}, safetensors {machine['safetensors']}. "
        f"The numbers are in `benchmarks/results/{CPU}/`."
    )


def _line(run: dict[str, Any], cache: str) -> str:
    """The run's line of the table for one state of the page cache."""
    by_loader = {one["loader"]: one for one in run["results"] if one["cache"] == cache}
    if not by_loader:
        raise SystemExit(f"{CPU}: a run has no {cache} results")
    if not all(one["verified"] for one in by_loader.values()):
        raise SystemExit(f"{CPU}: a {cache} run did not prove the state of the page cache")
    stock, patched = by_loader["stock"], by_loader["patched"]
    alone = patched.get("load_ceiling_fraction")
    by_load = "" if alone is None else f" ({alone:.0%} by the load alone)"
    return (
        f"| {_label(run, cache)} | {stock['median_s']:.2f} s | {patched['median_s']:.2f} s "
        f"| **{patched['ratio_to_stock']:.2f}** "
        f"| {patched['ceiling_fraction']:.0%} of the {patched['ceiling']}{by_load} |"
    )


def _label(run: dict[str, Any], cache: str) -> str:
    if cache == "warm":
        return cache
    kb = run["environment"]["read_ahead_kb"]
    size = f"{kb // 1024} MiB" if kb % 1024 == 0 else f"{kb} KiB"
    io = run["options"].get("io", "auto")
    if io != "auto":
        return f'{cache}, {size}, `io="{io}"`'
    return f"{cache}, read-ahead {size}" + " (kernel default)" * (kb == KERNEL_DEFAULT_KB)


# ---- the race, of docs/benchmarks.md ------------------------------------


def folders() -> list[Path]:
    """Those that hold results of a race, machines without a GPU first."""
    found = sorted(path.parent for path in RESULTS.glob(f"*/race/{results.SUMMARY_NAME}"))
    return sorted(found, key=lambda folder: _read(folder)["device"] != "cpu")


def _read(folder: Path) -> Found:
    return results.read(folder / results.SUMMARY_NAME)


def race() -> str:
    """The tables of every committed race."""
    found = folders()
    if not found:
        return "No results are committed yet: `python -m benchmarks race` makes them."
    return "\n\n".join(_section(folder) for folder in found)


def _section(folder: Path) -> str:
    found = _read(folder)
    place = folder.relative_to(ROOT).as_posix()
    place = "../" * len(PAGE.parent.relative_to(ROOT).parts) + place
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
    text = report.seconds(seconds)
    variant = row.loader.removeprefix(row.family).lstrip("-")
    text = f"**{text}**" if row.rank and seconds == first else text
    return f"{text} ({variant})" if variant else text
