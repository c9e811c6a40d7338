"""What the processes of the fault matrix (fault_matrix.py) have told, in sums."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


class Summary:
    """Sums over paths.

    Attributes:
        cells: loads with faults.
        met: in how many the fault came.
        outcomes: as of `Ran`.
        reached: calls of any path.
        sites: as of `Allocations`.
        wrong: what went wrong, with path and fault.
        size: loads with faults of the matrix that is not thinned, as far as it is counted.
        rows: of each path: name, calls, cells, seconds of a processor.
    """

    def __init__(self) -> None:
        self.cells = self.met = self.size = 0
        self.outcomes: Counter[str] = Counter()
        self.reached: Counter[str] = Counter()
        self.sites: set[int] = set()
        self.wrong: list[str] = []
        self.rows: list[tuple[str, int, int, float]] = []

    def add(self, name: str, folder: Path, status: int, seconds: float) -> None:
        """Add a path's process, by what it has told, and print it."""
        before = len(self.wrong)
        cell: Any = None
        calls, cells = 0, 0
        finished = False
        with open(folder / "told.jsonl", encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                if "cell" in line:
                    cell = line["cell"]
                elif "counts" in line:
                    counts = {n: c for kind in line["counts"].values() for n, c in kind.items()}
                    self.reached.update(counts)
                    calls += sum(counts.values())
                elif "size" in line:
                    self.size += line["size"]
                elif "sites" in line:
                    self.sites.update(line["sites"])
                elif "end" in line:
                    finished = True
                elif "done" in line:
                    done = line.get("cells", bool(line["done"]))
                    cells += done
                    self.met += done if line["met"] else 0
                    self.outcomes.update(line["done"])
                    self.wrong += [f"{name}: {cell}: {text}" for text in line["wrong"]]
        if status or not finished:
            log = (folder / "log").read_text(encoding="utf-8", errors="replace")[-6000:]
            self.wrong.append(f"{name}: {cell}: its process ended with status {status}\n{log}")
        self.cells += cells
        self.rows.append((name, calls, cells, seconds))
        print(f"{name:45} {calls:6} calls {cells:6} faults {seconds:7.1f} s", flush=True)
        for one in self.wrong[before:]:
            print(f"WRONG {one}", flush=True)

    def text(self) -> str:
        """For people; the last line is the size."""
        outcomes = ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common())
        lines = [f"outcomes: {outcomes}"]
        lines += [
            f"{len(self.rows)} paths, {sum(1 for c in self.reached.values() if c)} kinds of calls,"
            f" {self.cells} loads with a fault ({self.size} without --thin, beside kills), of which"
            f" {self.met} met it; {len(self.wrong)} wrong"
        ]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """For tests."""
        return {
            "cells": self.cells, "met": self.met, "outcomes": self.outcomes,
            "reached": self.reached, "sites": sorted(self.sites), "wrong": self.wrong,
            "paths": [row[0] for row in self.rows], "text": self.text(),
        }  # fmt: skip
