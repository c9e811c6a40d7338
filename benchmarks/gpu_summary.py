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
    steps = raw / "steps.tsv"
    lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
    rows = [line.split("\t") for line in lines]
    read = {row[0]: _read(raw / f"{row[0]}.json") for row in rows}
    found = {name: value for name, value in read.items() if value} | {"steps": rows}
    (results / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ended = _table("| step | result | s |", [f"| {' | '.join(row)} |" for row in rows])
    parts = [conditions(found), bench_table(found), *printed(raw, found), ended]
    page = "\n\n".join(part for part in parts if part)
    (results / "summary.md").write_text(page + "\n", encoding="utf-8")
    return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it writes none, or was ended while it did
        return None


def printed(raw: Path, found: dict[str, Any]) -> list[str]:
    """What the other steps with numbers wrote to the terminal."""
    names = [name for name in found if name != "steps" and not name.startswith("bench-")]
    texts = [(raw / f"{name}.txt").read_text(encoding="utf-8", errors="replace") for name in names]
    pairs = zip(names, texts, strict=True)
    return [f"## {name}\n\n```\n{text.strip()}\n```" for name, text in pairs]


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


def _table(head: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


if __name__ == "__main__":
    sys.exit(main())
