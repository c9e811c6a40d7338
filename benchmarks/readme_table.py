"""Writes the README's results from the measurements in benchmarks/results/cpu-2core/.

    python benchmarks/readme_table.py [--check]

Between the two markers in README.md stand one sentence that says what was measured on what, and
the table. With --check nothing is written, and the exit status is 1 when they are out of date.
The measurements are made by

    sudo python benchmarks/readahead.py --json benchmarks/results/cpu-2core/readahead.json
    fastst-patch bench --cache both --json benchmarks/results/cpu-2core/both.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = "benchmarks/results/cpu-2core"
BEGIN = "<!-- results: written by benchmarks/readme_table.py -->"
END = "<!-- end of results -->"

KERNEL_DEFAULT_KB = 128


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether it is up to date")
    args = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = with_results(before, results())
    if args.check and after != before:
        print("README.md: its results are not those of the JSON files; run", file=sys.stderr)
        print("    python benchmarks/readme_table.py", file=sys.stderr)
        return 1
    if after != before:
        README.write_text(after, encoding="utf-8")
    return 0


def with_results(readme: str, written: str) -> str:
    """The README with what stands between its markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md: expected one line {BEGIN!r} and one {END!r}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{written}\n{rest[rest.index(END) :]}"


def results() -> str:
    folder = ROOT / RESULTS
    runs = json.loads((folder / "readahead.json").read_text(encoding="utf-8"))["runs"]
    both = json.loads((folder / "both.json").read_text(encoding="utf-8"))
    lines = [
        conditions([*runs, both]),
        "",
        "| page cache | stock | patched | patched / stock | of a raw read |",
        "|---|---|---|---|---|",
        *(row(run, "cold") for run in runs),
        row(both, "warm"),
    ]
    return "\n".join(lines)


def conditions(runs: list[dict[str, Any]]) -> str:
    """The sentence above the table; of all runs, or it would be wrong of some."""
    sentences = {sentence(run) for run in runs}
    if len(sentences) != 1:
        raise SystemExit(f"{RESULTS}: not measured under the same conditions: {sentences}")
    return sentences.pop()


def sentence(run: dict[str, Any]) -> str:
    machine, rounds = run["environment"], run["rounds"]
    tensors = sum(file["tensors"] for file in run["files"])
    return (
        f"One bf16 checkpoint of {run['results'][0]['bytes'] / 1e9:.2f} GB in {tensors} tensors "
        f"to the CPU, load plus reading every byte, medians of {rounds['done']} alternating "
        f"rounds in fresh processes; {machine['cpus']} cores ({machine['cpu']}), "
        f"{machine['memory'] / 1e9:.0f} GB, {machine['fs']} on {machine['block_device']}, "
        f"{machine['kernel']}, torch {machine['torch']}, safetensors {machine['safetensors']}. "
        f"The numbers are in `{RESULTS}/`."
    )


def row(run: dict[str, Any], cache: str) -> str:
    """The run's line of the table for one state of the page cache."""
    by_loader = {one["loader"]: one for one in run["results"] if one["cache"] == cache}
    if not by_loader:
        raise SystemExit(f"{RESULTS}: a run has no {cache} results")
    if not all(one["verified"] for one in by_loader.values()):
        raise SystemExit(f"{RESULTS}: a {cache} run did not prove the state of the page cache")
    stock, patched = by_loader["stock"], by_loader["patched"]
    alone = patched.get("load_ceiling_fraction")
    by_load = "" if alone is None else f" ({alone:.0%} by the load alone)"
    return (
        f"| {label(run, cache)} | {stock['median_s']:.2f} s | {patched['median_s']:.2f} s "
        f"| **{patched['ratio_to_stock']:.2f}** "
        f"| {patched['ceiling_fraction']:.0%} of the {patched['ceiling']}{by_load} |"
    )


def label(run: dict[str, Any], cache: str) -> str:
    if cache == "warm":
        return cache
    kb = run["environment"]["read_ahead_kb"]
    size = f"{kb // 1024} MiB" if kb % 1024 == 0 else f"{kb} KiB"
    io = run["options"].get("io", "auto")
    if io != "auto":
        return f'{cache}, {size}, `io="{io}"`'
    return f"{cache}, read-ahead {size}" + " (kernel default)" * (kb == KERNEL_DEFAULT_KB)


if __name__ == "__main__":
    sys.exit(main())
