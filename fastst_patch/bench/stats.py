"""Medians and their spread, one definition for every table of the project."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SPREAD = "half the interquartile range"


@dataclass(frozen=True)
class Summary:
    """A median and its SPREAD."""

    median: float
    spread: float | None  # None for a single value


def summarize(values: Sequence[float]) -> Summary:
    """Return the median and spread of one or more values."""
    first, median, third = quartiles(values)
    return Summary(median, (third - first) / 2 if len(values) > 1 else None)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile of one or more values."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def paired_ratio(values: Sequence[float], baselines: Sequence[float]) -> Summary:
    """Summarize ratios of runs made side by side: the machine's drift cancels in each."""
    return summarize([value / base for value, base in zip(values, baselines, strict=True)])
