"""`fastst-patch bench`: stock against patched safetensors, and raw reads beside them."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..config import misspelt_variables
from ..terminal import say, width, wrapped
from .failures import EXIT_FAILED, EXIT_INTERRUPTED, BenchError, UsageError
from .stopping import stopping_soon

if TYPE_CHECKING:
    from .checkpoint_files import CheckpointFile
    from .runner import Outcome, Plan

STDOUT = "-"


def main(args: argparse.Namespace) -> int:
    """Run the bench as the command line says; return the exit status."""
    name = "fastst-patch bench"
    with stopping_soon(name):
        return guarded(name, lambda: _bench(args))


def guarded(name: str, run: Callable[[], int]) -> int:
    """Turn what a user can cause or mend into a line on stderr and an exit status."""
    try:
        with ending_on_signals():
            return run()
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, so that the test checkpoint is removed."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bench(args: argparse.Namespace) -> int:
    from . import hardware, plot, remote, results, runner, table

    args.paths = remote.with_urls(args.paths)
    if remote.names_remote(args.paths):
        return _bench_remote(args)
    _refuse_early(args)
    if args.plot:
        _require_chart(args.plot)  # before minutes of measuring, not after
    for warning in misspelt_variables():
        say(f"fastst-patch bench: {warning}", sys.stderr)
    caches = _states(args.cache, args.device)
    with _measured_files(args.paths, args.dir) as files:
        _require_cache_possible(files, caches)
        plan = runner.Plan(
            files, args.device, caches, args.repeat, args.max_seconds, patch_options(args),
            args.ceilings,
        )  # fmt: skip
        environment = hardware.environment(files[0].path)
        _announce(plan, environment)
        outcome = runner.race(plan)
    first = outcome.runs[caches[0], "stock"][0].sample
    environment |= first.versions
    if args.device != "cpu":
        environment["gpu"] = first.device_name
    # Whoever reads JSON from standard output gets nothing else there.
    human = sys.stderr if args.json == STDOUT else sys.stdout
    passed, sentence = table.gate(outcome) if args.gate else (True, "")
    if args.gate:
        say("\n".join(wrapped([sentence], width())), human)
    say(table.render(outcome, environment, width(), verbose=args.verbose), human)
    if args.json:
        write_json(args.json, results.to_json(outcome, environment))
    if args.plot:
        plot.draw(outcome, environment, args.plot)
    return _verdict(outcome) or (0 if passed else EXIT_FAILED)


def _bench_remote(args: argparse.Namespace) -> int:
    from . import remote

    if args.gate:
        raise UsageError("--gate compares with stock, which loads no URLs: give files or folders")
    _refuse_early(args)
    text, numbers = remote.main(args, patch_options(args))
    say(text, sys.stderr if args.json == STDOUT else sys.stdout)
    if args.json:
        write_json(args.json, numbers)
    return 0


def _announce(plan: Plan, environment: Mapping[str, object]) -> None:
    """Say on which machine is measured and for how long at most, before that begins."""
    from . import table

    for line in wrapped(table.conditions(environment).splitlines(), width()):
        say(line, sys.stderr)
    rounds = "1 round" if plan.rounds == 1 else f"{plan.rounds} rounds"
    say(
        f"{rounds}; none begins that would end after {plan.max_seconds:g} s (--max-seconds)",
        sys.stderr,
    )


def patch_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for patch(): -o wins over --io."""
    short = {} if args.io is None else {"io": args.io}
    return {**short, **dict(args.options)}


def _refuse_early(args: argparse.Namespace) -> None:
    """Raise for what is known to be impossible before anything is written or measured."""
    from fastst_patch import OptionError, config_context, engine

    reason = engine.native_error()
    if reason is not None:
        raise BenchError(
            f"the native extension cannot be used ({reason}), so there is nothing to compare; "
            "`fastst-patch doctor` tells more"
        )
    try:
        with config_context(**patch_options(args)):
            pass  # only to see that it accepts them
    except OptionError as error:
        raise UsageError(str(error)) from error
    for output in (args.json, args.plot):
        if output and output != STDOUT:
            _require_writable(Path(output))
    if args.device != "cpu":
        from .job import CHILD
        from .process import run_json

        answer = run_json(CHILD, {"kind": "cuda", "device": args.device}, "asking torch for CUDA")
        if not answer["usable"]:
            raise UsageError(f"--device {args.device}: torch cannot use it: {answer['reason']}")


def _require_writable(path: Path) -> None:
    """Raise where a file cannot be written, by opening it; what is in it stays."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{path}: cannot write: {error.strerror}") from error


def _require_chart(file_name: str) -> None:
    """Raise where matplotlib is missing, or does not know the suffix."""
    from . import plot

    plot.require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = Path(file_name).suffix.removeprefix(".").lower()
    known = FigureCanvasBase.get_supported_filetypes()
    if file_name == STDOUT or (suffix and suffix not in known):
        raise UsageError(f"--plot {file_name}: cannot write the chart; allowed are files that end"
                         f" in {', '.join('.' + name for name in sorted(known))}")  # fmt: skip


@contextlib.contextmanager
def _measured_files(paths: Sequence[str], directory: str | None) -> Iterator[list[CheckpointFile]]:
    from . import checkpoint_files

    if paths:
        yield checkpoint_files.expand(paths)
        return
    with synthetic_checkpoint(directory) as path:
        yield [checkpoint_files.describe(path)]


@contextlib.contextmanager
def synthetic_checkpoint(directory: str | None) -> Iterator[Path]:
    """Hold a model-like file sized to this machine; a bar shows while it is written."""
    from tqdm import tqdm

    from . import checkpoint

    place = checkpoint.pick_directory(directory)
    specs = checkpoint.transformer_specs(checkpoint.budget(place))
    total = sum(spec.nbytes for spec in specs)
    with contextlib.ExitStack() as stack:
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False,
                   desc=f"writing a test checkpoint in {place}")  # fmt: skip
        with bar:
            path = stack.enter_context(checkpoint.temporary_checkpoint(place, specs, bar.update))
        yield path


def _states(cache: str, device: str) -> tuple[str, ...]:
    """Of the page cache and of free memory; a load to a device takes none of the latter."""
    from .residency import SMALL_PAGES

    cold = ("cold", SMALL_PAGES) if device == "cpu" else ("cold",)
    return {"cold": cold, "warm": ("warm",)}.get(cache, (*cold, "warm"))


def _require_cache_possible(files: Sequence[CheckpointFile], caches: Sequence[str]) -> None:
    from . import hardware

    for file in files:
        held_by = hardware.filesystem(file.path)
        if held_by.in_memory and "cold" in caches:
            raise UsageError(f"{file.path}: lies on {held_by.type}, which is memory and never "
                             "cold: use --cache warm, or a copy on a disk")  # fmt: skip
    total, available = sum(file.file_bytes for file in files), hardware.memory_available()
    if "warm" in caches and total > available:
        raise UsageError(
            f"{total / 1e9:.1f} GB of files do not fit the {available / 1e9:.1f} GB of memory "
            "available, so they cannot be warm: use --cache cold, or fewer files"
        )


def write_json(file_name: str, value: object) -> None:
    """Write indented JSON, to standard output for ``-``; or raise a line that names the file."""
    if file_name == STDOUT:
        print(json.dumps(value, indent=2), flush=True)
        return
    try:
        Path(file_name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file_name}: cannot write: {error.strerror}") from error


def _verdict(outcome: Outcome) -> int:
    if outcome.verified is not False:
        return 0
    print(
        "fastst-patch bench: a run did not find the page cache as it should be, see the table. "
        "Another program may be using these files, or memory may be short.",
        file=sys.stderr,
    )
    return EXIT_FAILED
