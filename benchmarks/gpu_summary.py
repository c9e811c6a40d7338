"""Puts the results of `gpu.sh` into one JSON file and one page, whatever there is of them by now.

    python benchmarks/gpu_summary.py RAW RESULTS

Standard library only: it runs after every step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    raw, results = map(Path, sys.argv[1:3])
    found = {path.stem: _read(path) for path in sorted(raw.glob("*.json"))}
    steps = raw / "steps.tsv"
    lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
    rows = [line.split("\t") for line in lines]
    order = {row[0]: place for place, row in enumerate(rows)}
    names = sorted(filter(found.get, found), key=lambda name: order.get(name, -1))
    found = {name: found[name] for name in names} | {"steps": rows}
    (results / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (results / "summary.md").write_text(summary(found), encoding="utf-8")
    return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a step was ended while it wrote
        return None


def summary(found: dict[str, Any]) -> str:
    parts = [
        conditions(found),
        bench_table(found),
        scenario_table(found, "many"),
        scenario_table(found, "first-load"),
        whole_table(found.get("end-to-end")),
        ceilings_table(found.get("ceilings")),
        steps_table(found["steps"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def conditions(found: dict[str, Any]) -> str:
    runs = [value for name, value in found.items() if name.startswith("bench-")]
    if not runs:
        return ""
    machine, result = runs[0]["environment"], runs[0]["results"][0]
    gpu = found.get("ceilings", {}).get("environment", {})
    driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
    return (
        f"{result['bytes'] / 1e9:.2f} GB in {result['tensors']} tensors to {machine.get('gpu')}"
        f"{driver}, medians of {runs[0]['rounds']['done']} alternating rounds in fresh processes; "
        f"{machine['cpus']} cores ({machine['cpu']}), {machine['memory'] / 1e9:.0f} GB, "
        f"{machine['fs']} on {machine['block_device']}, {machine['kernel']}, torch "
        f"{machine['torch']}, safetensors {machine['safetensors']}. The context is made before "
        "the clock starts; opening the driver and pinning count."
    )


def bench_table(found: dict[str, Any]) -> str:
    lines = []
    for name, run in found.items():
        if not name.startswith("bench-"):
            continue
        options = ", ".join(f"{key}={value}" for key, value in run["options"].items())
        file = "" if name.startswith("bench-dense") else f"{run['files'][0]['tensors']} tensors, "
        for cache in dict.fromkeys(row["cache"] for row in run["results"]):
            rows = {row["loader"]: row for row in run["results"] if row["cache"] == cache}
            stock, patched = rows["stock"], rows["patched"]
            memory = patched.get("memory", {})
            proven = "" if stock["verified"] and patched["verified"] else " (cache not proven)"
            ceiling = "-"
            if patched["ceiling_fraction"] is not None:
                ceiling = f"{patched['ceiling_fraction']:.0%} of {patched['ceiling']}"
            lines.append(
                f"| {file}{cache}{proven}, {options} | {stock['load_s']:.2f} s "
                f"| {patched['load_s']:.2f} s | {patched['gb_per_s']:.2f} "
                f"| **{patched['ratio_to_stock']:.2f}** | {patched['path']} | {ceiling} "
                f"| {memory.get('device_used', 0) / 1e9:.2f} / {memory.get('pinned', 0) / 1e6:.0f} "
                f"/ {memory.get('peak_rss', 0) / 1e6:.0f} MB |"
            )
            lines += [f"| fell back: {reason} | | | | | | | |" for reason in patched["fallbacks"]]
    return _table(
        "| page cache, options | stock | patched | GB/s | patched / stock | path | of the ceiling "
        "| device GB / pinned / host peak |",
        lines,
    )


def scenario_table(found: dict[str, Any], name: str) -> str:
    """The rows of a script's `_scenario.Table`, of every step whose name begins so."""
    lines, headings = [], ""
    for step, run in found.items():
        if not step.startswith(name):
            continue
        for row in run["results"]:
            cells = {key: _cell(value) for key, value in row.items() if key != "runs"}
            headings = f"| {name} | {' | '.join(cells)} |"
            options = ", ".join(f"{key}={value}" for key, value in run["options"].items())
            lines.append(f"| {options} | {' | '.join(cells.values())} |")
    return _table(headings, lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = value["median"]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def whole_table(run: dict[str, Any] | None) -> str:
    run = run or {"results": [], "skipped": {}, "errors": {}}
    stocks = {row["row"]: row for row in run["results"] if row["loader"] == "stock"}
    pairs = ((stocks[row["row"]], row) for row in run["results"] if row["loader"] == "patched")
    lines = [
        f"| {stock['title']}: {stock['bytes'] / 1e9:.2f} GB in {stock['file_tensors']} tensors, "
        f"{stock['cache']} | {_seconds(stock)} | {_seconds(patched)} "
        f"| {_ratio(patched, 'weights')} | **{_ratio(patched, 'total')}** "
        f"| {patched.get('of_pinned_copy', 0):.0%} | {patched['path']} |"
        for stock, patched in pairs
    ]
    lines += [f"| {name}: skipped: {why} | | | | | | |" for name, why in run["skipped"].items()]
    lines += [
        f"| {name}: FAILED: {' '.join(why.split())} | | | | | | |"
        for name, why in run["errors"].items()
    ]
    return _table(
        "| whole call | stock: weights, whole | patched: weights, whole | weights / stock "
        "| whole / stock | of the pinned copy | path |",
        lines,
    )


def _seconds(row: dict[str, Any]) -> str:
    weights = "-" if row["weights_s"] is None else f"{row['weights_s']:.2f} s"
    return f"{weights}, {row['total_s']:.2f} s"


def _ratio(row: dict[str, Any], name: str) -> str:
    ratio = row[f"{name}_ratio_to_stock"]
    return "-" if ratio is None else f"{ratio:.2f}"


def ceilings_table(run: dict[str, Any] | None) -> str:
    """What is read and copied at most, and the sections of gpu_ceilings.py."""
    run = run or {"ceilings": []}
    lines = [
        f"| {one['name']} | {one['gb_per_s']:.3g} GB/s, {one['variant']} |"
        if one["gb_per_s"]
        else f"| {one['name']} | not available: {one['unavailable']} |"
        for one in run["ceilings"]
    ]
    for name, value in run.items():
        if name not in ("environment", "ceilings"):
            for row in value if isinstance(value, list) else [value]:
                cells = [f"{key} {_cell(one)}" for key, one in row.items() if one is not None]
                lines.append(f"| {name} | {', '.join(cells)} |")
    return _table("| ceiling | |", lines)


def steps_table(steps: list[list[str]]) -> str:
    return _table("| step | result | s |", [f"| {' | '.join(step)} |" for step in steps])


def _table(head: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


if __name__ == "__main__":
    sys.exit(main())
