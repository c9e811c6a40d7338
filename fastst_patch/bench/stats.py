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
    if len(values) < 2:
        return Summary(values[0], None)
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, (third - first) / 2)


def paired_ratio(values: Sequence[float], baselines: Sequence[float]) -> Summary:
    """Summarize ratios of runs made side by side: the machine's drift cancels in each."""
    return summarize([value / base for value, base in zip(values, baselines, strict=True)])
