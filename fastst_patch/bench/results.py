"""An Outcome -> rows and numbers: for the table, the chart and the JSON file alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import ceilings, residency, stats
from .ceilings import Ceiling
from .harness import Run
from .job import Sample
from .runner import LOADERS, Outcome
from .stats import Summary


@dataclass(frozen=True)
class Row:
    """One loader under one cache state, over all rounds."""

    loader: str
    device: str
    cache: str
    files: int
    tensors: int
    bytes: int
    load_s: Summary
    touch_s: Summary
    total_s: Summary
    ratio_to_stock: Summary  # of load plus touch, paired by round
    ceiling: str | None
    ceiling_fraction: float | None
    path: str
    fallbacks: tuple[str, ...]
    verified: bool | None
    runs: tuple[Run[Sample], ...]

    @property
    def gb_per_s(self) -> float:
        """Bytes over the median of load plus touch."""
        return self.bytes / self.total_s.median / 1e9

    @property
    def load_fraction(self) -> float | None:
        """Of the ceiling, without the touch, where all bytes have been moved by then.

        Who copies to memory of its own moves them and is done, and the touch comes on top, however
        fast that was; a map's bytes are only moved as they are touched. None of the latter, and to
        devices, where nothing is touched.
        """
        mapped = self.path == "stock" or "mmap" in self.path
        if self.ceiling_fraction is None or mapped or self.device != "cpu":
            return None
        return self.ceiling_fraction * self.total_s.median / self.load_s.median


def rows(outcome: Outcome) -> list[Row]:
    """Return the rows in the order of the table."""
    speeds = {one.name: gb_per_s(one) for one in outcome.ceilings if one.seconds}
    return [
        _row(outcome, cache, loader, speeds) for cache in outcome.plan.caches for loader in LOADERS
    ]


def gb_per_s(ceiling: Ceiling) -> float:
    """Return the bytes over the median of the rounds."""
    return ceiling.bytes / statistics.median(ceiling.seconds) / 1e9


def binding_ceiling(cache: str, path: str, device: str, speeds: Mapping[str, float]) -> str | None:
    """Name the narrowest place on the way the bytes took; None if it was not measured."""
    if "direct" in path or "gds" in path:  # past the page cache
        source = ceilings.DIRECT
    else:
        source = ceilings.COLD_BUFFERED if residency.is_cold(cache) else ceilings.PAGE_CACHE
    on_the_way = [source] if device == "cpu" else [source, ceilings.HOST_TO_DEVICE]
    if not all(name in speeds for name in on_the_way):
        return None
    return min(on_the_way, key=speeds.__getitem__)


def _row(outcome: Outcome, cache: str, loader: str, speeds: Mapping[str, float]) -> Row:
    plan = outcome.plan
    runs = outcome.runs[cache, loader]
    samples = [run.sample for run in runs]
    totals = [sample.total_s for sample in samples]
    total_s = stats.summarize(totals)
    path = "; ".join(dict.fromkeys(sample.path for sample in samples))
    binding = binding_ceiling(cache, path, plan.device, speeds)
    speed = samples[0].bytes / total_s.median / 1e9
    return Row(
        loader=loader,
        device=plan.device,
        cache=cache,
        files=len(plan.files),
        tensors=samples[0].tensors,
        bytes=samples[0].bytes,
        load_s=stats.summarize([sample.load_s for sample in samples]),
        touch_s=stats.summarize([sample.touch_s for sample in samples]),
        total_s=total_s,
        ratio_to_stock=stats.paired_ratio(
            totals, [run.sample.total_s for run in outcome.runs[cache, "stock"]]
        ),
        ceiling=binding,
        ceiling_fraction=speed / speeds[binding] if binding else None,
        path=path,
        fallbacks=tuple(sorted({reason for one in samples for reason in one.fallbacks})),
        verified=residency.weakest(run.verified for run in runs),
        runs=tuple(runs),
    )


def memory(row: Row) -> dict[str, int]:
    """What a load to a device took, the most of all rounds, in bytes.

    ``device_used`` is the driver's figure, without what was in use before the load.
    """
    pairs = [(run.sample.memory, run.sample.memory_before) for run in row.runs]
    found = {
        name: max(after.get(name, 0) for after, _ in pairs)
        for name in ("peak_rss", "pinned", "device_allocated", "device_reserved_peak")
    }
    used = [after.get("device_used", 0) - before.get("device_used", 0) for after, before in pairs]
    return {**found, "device_used": max(used)}


def _parts(row: Row) -> dict[str, float]:
    names = {name for run in row.runs for name in run.sample.parts}
    return {
        name: statistics.median(run.sample.parts.get(name, 0.0) for run in row.runs)
        for name in sorted(names)
    }


def to_json(outcome: Outcome, environment: Mapping[str, object]) -> dict[str, Any]:
    """Return everything measured, raw numbers included."""
    plan = outcome.plan
    return {
        "environment": dict(environment),
        "files": [
            {"name": file.name, "bytes": file.file_bytes, "tensors": len(file.order)}
            for file in plan.files
        ],
        "options": dict(plan.options),
        "rounds": {"asked": plan.rounds, "done": outcome.rounds},
        "spread": stats.SPREAD,
        "verified": outcome.verified,
        "ceilings": {one.name: _ceiling_json(one) for one in outcome.ceilings},
        "results": [_row_json(row) for row in rows(outcome)],
    }


def _ceiling_json(ceiling: Ceiling) -> dict[str, Any]:
    if not ceiling.seconds:
        return {"gb_per_s": None, "seconds": [], "unavailable": ceiling.unavailable}
    return {
        "gb_per_s": gb_per_s(ceiling),
        "seconds": ceiling.seconds,
        "median_s": statistics.median(ceiling.seconds),
        "bytes": ceiling.bytes,
        "variant": ceiling.chosen,
        "verified": ceiling.verified,
    }


def _row_json(row: Row) -> dict[str, Any]:
    samples = [run.sample for run in row.runs]
    return {
        "loader": row.loader,
        "device": row.device,
        "cache": row.cache,
        "files": row.files,
        "tensors": row.tensors,
        "bytes": row.bytes,
        "seconds": [sample.total_s for sample in samples],
        "median_s": row.total_s.median,
        "spread_s": row.total_s.spread,
        "load_s": row.load_s.median,
        "touch_s": row.touch_s.median,
        "load_seconds": [sample.load_s for sample in samples],
        "touch_seconds": [sample.touch_s for sample in samples],
        "gb_per_s": row.gb_per_s,
        "ratio_to_stock": row.ratio_to_stock.median,
        "ratio_to_stock_spread": row.ratio_to_stock.spread,
        "ceiling": row.ceiling,
        "ceiling_fraction": row.ceiling_fraction,
        "load_ceiling_fraction": row.load_fraction,
        "path": row.path,
        "fallbacks": list(row.fallbacks),
        "verified": row.verified,
        "residency": [
            {
                "probe": run.prepared.probe,
                "before_start": run.prepared.fraction,
                "before_clock": run.sample.resident_before,
            }
            for run in row.runs
        ],
        "peak_rss": max(sample.memory.get("peak_rss", 0) for sample in samples),
        **({} if row.device == "cpu" else {"memory": memory(row), "parts": _parts(row)}),
        "digests": list(samples[0].digests),
    }
