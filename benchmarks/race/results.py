"""results.json: written, read, merged, and made into rows. METHOD.md documents its fields.

summary.json holds the rows in place of the single loads: all that the page, the charts and the
README are drawn from, in a few percent of the size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from fastst_patch.bench import residency, stats
from fastst_patch.bench.failures import UsageError

from .plan import LEAST_ROUNDS

SCHEMA, FILE_NAME = "fastst-race/1", "results.json"
SUMMARY_SCHEMA, SUMMARY_NAME = "fastst-race-summary/1", "summary.json"
STOCK, OURS = "stock-mmap", "fastst"  # that the others are compared with

Found = dict[str, Any]  # what a results.json or a summary.json holds

# Same machine and same software: their rounds may stand in one row.
_SAME = (
    "cpu", "cpus", "memory", "kernel", "fs", "block_device", "read_ahead_kb", "python", "torch",
    "safetensors", "fastst_patch", "gpu", "driver",
)  # fmt: skip
PEAK_SLACK = 64 << 20  # bytes freed between resetting the peak and reading it
_FAILURES = ("wrong", "crashed", "time limit")


@dataclass(frozen=True)
class Quartiles:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    def scaled(self, factor: float) -> Quartiles:
        """Of the same values in another unit."""
        return Quartiles(self.low * factor, self.median * factor, self.high * factor)


def quartiles(values: Iterable[float | None]) -> Quartiles | None:
    """Of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return Quartiles(*stats.quartiles(known)) if known else None


@dataclass(frozen=True)
class Row:
    """One loader in one cell, over all rounds."""

    workload: str
    cache: str
    device: str
    loader: str
    family: str
    version: str | None
    state: str  # "ok", or one of "wrong", "crashed", "time limit", "cache", "few rounds"
    detail: str | None
    rank: int | None  # by the median time; None unless state is "ok"
    rounds: int
    bytes: int
    tensors: int
    total_s: Quartiles | None = None  # load plus, on the CPU, reading every byte
    first_s: Quartiles | None = None
    again_s: Quartiles | None = None  # total of a second load in a new process
    cpu_s: Quartiles | None = None
    import_s: Quartiles | None = None
    context_s: Quartiles | None = None
    to_stock: Quartiles | None = None  # of total_s, paired by round
    to_ours: Quartiles | None = None
    ceiling: str | None = None
    of_ceiling: float | None = None
    memory: Mapping[str, float | None] | None = None  # see _memory; medians, bytes
    cached_after: float | None = None  # fraction of the files in the page cache afterwards
    storage_bytes: float | None = None
    verified: bool | None = None
    late_imports: tuple[str, ...] = ()  # what was imported under the clock, in any round

    @property
    def gb_per_s(self) -> float | None:
        """Bytes over the median time, 1e9 bytes per second."""
        return self.bytes / self.total_s.median / 1e9 if self.total_s else None


# ---- rows ---------------------------------------------------------------


def total(run: Mapping[str, Any]) -> float:
    """What a program waits: a lazy load is paid for when the bytes are read."""
    return float(run["sample"]["load_s"] + run["sample"]["touch_s"])


def cells(found: Found) -> list[tuple[str, str]]:
    """Workloads and states of the cache that were raced, in the order of the results."""
    return list(dict.fromkeys((row.workload, row.cache) for row in rows(found)))


def rows(found: Found, workload: str | None = None, cache: str | None = None) -> list[Row]:
    """The rows of all cells, or of one; the fastest first, those without a rank at the end."""
    return [
        _row_of(one)
        for one in summarize(found)["rows"]
        if workload in (None, one["workload"]) and cache in (None, one["cache"])
    ]


def _cell(found: Found, workload: str, cache: str) -> list[Row]:
    """The rows of one cell, from its single loads."""
    speeds = ceilings.speeds_of(found["ceilings"], workload)
    by_loader: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        if (run["workload"], run["cache"]) == (workload, cache):
            by_loader.setdefault(run["loader"], []).append(run)
    made = [
        _row(found, workload, cache, name, by_loader=by_loader, speeds=speeds) for name in by_loader
    ]
    made.sort(key=lambda row: (row.state != "ok", row.total_s.median if row.total_s else 1e9))
    return [replace(row, rank=place if row.state == "ok" else None)
            for place, row in enumerate(made, 1)]  # fmt: skip


def _row(
    found: Found,
    workload: str,
    cache: str,
    name: str,
    *,
    by_loader: Mapping[str, list[dict[str, Any]]],
    speeds: dict[str, float],
) -> Row:
    facts = next(one for one in found["loaders"] if one["name"] == name)
    sizes = next(one for one in found["workloads"] if one["name"] == workload)
    runs = by_loader[name]
    good = [run for run in runs if run["outcome"] == "ok" and not run["again"]]
    second = [run for run in runs if run["outcome"] == "ok" and run["again"]]
    state, detail = _state(runs, good)
    version = next(
        (run["sample"]["versions"].get(facts["package"]) for run in good), facts["version"]
    )
    row = Row(
        workload=workload, cache=cache, device=found["device"], loader=name,
        family=facts["family"], version=version, state=state, detail=detail, rank=None,
        rounds=len(good), bytes=sizes["nbytes"], tensors=sizes["tensors"],
    )  # fmt: skip
    # Of a loader that is wrong even once no time is shown: it would be read as a result.
    if not good or state == "wrong":
        return row
    samples = [run["sample"] for run in good]
    total_s = quartiles(map(total, good))
    assert total_s is not None
    ceiling = ceilings.binding(cache, found["device"], speeds)
    speed = sizes["nbytes"] / total_s.median / 1e9
    return replace(
        row,
        total_s=total_s,
        **{name: quartiles(one[name] for one in samples)
           for name in ("first_s", "import_s", "context_s")},
        again_s=quartiles(map(total, second)),
        cpu_s=quartiles(one["done"]["user_s"] + one["done"]["system_s"] for one in samples),
        to_stock=_paired(good, by_loader.get(STOCK, [])),
        to_ours=_paired(good, by_loader.get(OURS, [])),
        ceiling=ceiling,
        of_ceiling=speed / speeds[ceiling] if ceiling else None,
        memory=_memory(samples),
        cached_after=_median(run["resident_after"] for run in good),
        storage_bytes=_median(one["done"].get("storage_bytes") for one in samples),
        verified=residency.weakest(run["verified"] for run in good),
        late_imports=tuple(sorted({name for one in samples for name in one["late_imports"]})),
    )  # fmt: skip


def _state(
    runs: Sequence[Mapping[str, Any]], good: Sequence[Mapping[str, Any]]
) -> tuple[str, str | None]:
    """What the row is worth as a whole; one failure spoils it."""
    for outcome in (*_FAILURES, "cache"):
        for run in runs:
            if run["outcome"] == outcome and not (outcome == "cache" and run["again"]):
                return outcome, f"round {run['round']}: {run['detail']}"
    if len(good) < LEAST_ROUNDS:
        return "few rounds", f"{len(good)}, and at least {LEAST_ROUNDS} are wanted"
    return "ok", None


def _median(values: Iterable[float | None]) -> float | None:
    found = quartiles(values)
    return found.median if found else None


def _paired(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> Quartiles | None:
    """Ratios of loads made in the same round: the machine's drift cancels in each."""
    by_round = {
        (run.get("source"), run["round"]): total(run)
        for run in base
        if run["outcome"] == "ok" and not run["again"]
    }
    pairs = ((run, by_round.get((run.get("source"), run["round"]))) for run in runs)
    return quartiles(total(run) / other for run, other in pairs if other)


def _memory(samples: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Bytes beyond what the process held when its clock started; medians over the rounds.

    ``peak``: the highest RSS during the load. ``anonymous`` and ``file``: of what is held with
    all tensors alive, memory of its own, and pages of files, which the page cache holds anyway.
    ``pss``: the same, each page divided by the processes that map it.
    """

    def grown(after: str, before: str) -> float | None:
        return _median(
            max(0, one["after"][after] - one["before"][before])
            if after in one["after"] and before in one["before"]
            else None
            for one in samples
        )

    # Where the kernel lets nobody reset the peak, it is that of getting ready: no number then.
    reset = all(
        one["before"].get("peak_rss", 0) <= one["before"].get("rss", 0) + PEAK_SLACK
        for one in samples
    )
    return {
        "peak": grown("peak_rss", "rss") if reset else None,
        "anonymous": grown("rss_anonymous", "rss_anonymous"),
        "file": grown("rss_file", "rss_file"),
        "pss": grown("pss", "pss"),
        "pinned": grown("pinned", "pinned"),
        "device": grown("device_used", "device_used"),
        "device_peak": _median(one.get("device_peak") for one in samples),
    }


# ---- the summary --------------------------------------------------------

_QUARTILES = tuple(name for name, kind in Row.__annotations__.items() if "Quartiles" in kind)
_DIGITS = 9  # significant: with 6, one ratio of the committed race was rounded to another


def summarize(found: Found) -> Found:
    """What the page, the charts and the README are made of: rows in place of loads and orders."""
    if found["schema"] == SUMMARY_SCHEMA:
        return found
    kept = {name: value for name, value in found.items() if name not in ("runs", "orders")}
    kept["schema"] = SUMMARY_SCHEMA
    kept["rows"] = [
        _entry_of(row)
        for workload in found["workloads"]
        for cache in ("cold", "warm")
        for row in _cell(found, workload["name"], cache)
    ]
    whole = found["end_to_end"]
    if whole:
        kept["end_to_end"] = {
            "results": [_call_of(one) for one in whole["results"]],
            "skipped": whole["skipped"],
            "errors": whole["errors"],
        }
    rounded: Found = _rounded(kept)
    return rounded


def _call_of(one: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a row of end_to_end.py."""
    runs = one["runs"]
    return {
        "title": one["title"],
        "cache": one["cache"],
        "loader": one["contender"],
        "total_s": _median(run["total_s"] for run in runs),
        "total_ratio_to_stock": one["time / stock"]["median"],
        "import_s": one["import s"]["median"],
        "rounds": len(runs),
        "memory": {"peak_rss": max(run["memory"].get("peak_rss", 0) for run in runs)},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _entry_of(row: Row) -> dict[str, Any]:
    known = {name: value for name, value in asdict(row).items() if value not in (None, ())}
    return known | {name: list(known[name].values()) for name in _QUARTILES if name in known}


def _row_of(entry: Mapping[str, Any]) -> Row:
    quartiles = {name: Quartiles(*entry[name]) for name in _QUARTILES if name in entry}
    row = Row(**{"detail": None, "rank": None, "version": None, **entry, **quartiles})
    return replace(row, late_imports=tuple(row.late_imports))


def save_summary(found: Found, folder: Path) -> None:
    """Write summary.json, one line a row.

    Raises:
        UsageError: it cannot be written.
    """
    lines = []
    for name, value in summarize(found).items():
        several = isinstance(value, list) and value and isinstance(value[0], dict)
        text = json.dumps(value)
        if several:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    _write(folder / SUMMARY_NAME, "{\n" + ",\n".join(lines) + "\n}\n")


# ---- files --------------------------------------------------------------


def save(found: Found, folder: Path) -> None:
    """Write results.json.

    Raises:
        UsageError: it cannot be written.
    """
    _write(folder / FILE_NAME, json.dumps(found, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot write: {error.strerror}") from error


def read(path: Path) -> Found:
    """Read a results.json or a summary.json, given itself or its folder.

    Of a folder that holds both, the results.

    Raises:
        UsageError: it is not there, or is something else.
    """
    if path.is_dir():
        both = (path / FILE_NAME, path / SUMMARY_NAME)
        path = next((one for one in both if one.exists()), both[0])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") not in (SCHEMA, SUMMARY_SCHEMA):
        raise UsageError(f"{path}: not results of `python -m benchmarks race` ({SCHEMA})")
    return found


def merge(several: Sequence[Found]) -> list[Found]:
    """Put together what was measured under the same conditions; the rest stays apart.

    Rounds of the same cells are added up, each paired within its own race. What differs in
    machine, device, versions or in a workload's files is another section.

    Raises:
        UsageError: one of several is a summary.
    """
    if len(several) == 1:
        return list(several)
    if any(found["schema"] == SUMMARY_SCHEMA for found in several):
        raise UsageError(f"a {SUMMARY_NAME} holds no rounds to put together: give {FILE_NAME}")
    merged: dict[str, Found] = {}
    for number, found in enumerate(several):
        key = json.dumps([found["device"], *(found["environment"].get(name) for name in _SAME)])
        while key in merged and _conflict(merged[key], found):
            key += "'"
        # Of what was put together before, too.
        marked = [run | {"source": f"{number} {run.get('source', '')}"} for run in found["runs"]]
        if key not in merged:
            merged[key] = found | {"runs": marked}
            continue
        into = merged[key]
        into["runs"] = into["runs"] + marked
        into["orders"] = into["orders"] + found["orders"]
        into["seed"] = _together(into["seed"], found["seed"])
        for part in ("workloads", "loaders"):
            names = {one["name"] for one in into[part]}
            into[part] = into[part] + [one for one in found[part] if one["name"] not in names]
        ran = {run["loader"] for run in into["runs"]}
        missing = found["missing"] | into["missing"]
        into["missing"] = {name: why for name, why in missing.items() if name not in ran}
        dropped = into["dropped"] | found["dropped"]
        into["dropped"] = {unit: why for unit, why in dropped.items() if not _ran(unit, into)}
        new = [one for one in found["refused"] if one not in into["refused"]]
        into["refused"] = into["refused"] + new
        into["ceilings"] = _merge_ceilings(into["ceilings"], found["ceilings"])
        into["end_to_end"] = into["end_to_end"] or found["end_to_end"]
    return list(merged.values())


def _ran(unit: str, found: Found) -> bool:
    """Whether all that a `plan.Unit` names has runs, by now."""
    cell, _, loaders = unit.partition(": ")
    ran = {(f"{run['workload']}, {run['cache']}", run["loader"]) for run in found["runs"]}
    return all((cell, loader) in ran for loader in loaders.split(", "))


def _together(one: Any, other: Any) -> list[Any]:
    return (one if isinstance(one, list) else [one]) + [other]


def _conflict(one: Found, other: Found) -> bool:
    """Whether a workload of that name is another, or a loader another version."""
    for part, facts in (("workloads", ("files", "tensors", "nbytes")), ("loaders", ("version",))):
        known = {entry["name"]: [entry[fact] for fact in facts] for entry in one[part]}
        for entry in other[part]:
            if known.get(entry["name"]) not in (None, [entry[fact] for fact in facts]):
                return True
    return False


def _merge_ceilings(one: list[Found], other: list[Found]) -> list[Found]:
    """Rounds added up by workload, name and state of the cache."""
    both: dict[tuple[str, str, str | None], Found] = {}
    for entry in [*one, *other]:
        key = (entry["workload"], entry["name"], entry["cache"])
        rounds = both[key]["rounds"] + entry["rounds"] if key in both else entry["rounds"]
        before = both.get(key, entry)
        tried = before["tried"] | {
            name: max(speed, before["tried"].get(name, 0)) for name, speed in entry["tried"].items()
        }
        both[key] = before | {
            "rounds": rounds,
            "tried": tried,
            "gb_per_s": stats.quartiles(rounds)[1] if rounds else None,
            "unavailable": None if rounds else entry["unavailable"],
            "verified": residency.weakest([before["verified"], entry["verified"]]),
        }
    return list(both.values())
