"""Differential fuzzing: generated files, read by stock safetensors and by us in the same way.

    python fuzz/differential.py --seconds 60 --seed 1 [--device cuda] [--jobs 2]

Each case is a file and calls that read it; results, exception types and texts have to agree. Case
n of a seed is always the same. ``--device cuda`` reads to the fake driver of native/tests, and
stock to the CPU. A mismatch, a crash or a hang writes the file and the command that repeats it into
the folder ``--out``, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import gc
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import fake_device  # noqa: E402
from fuzzed_files import read_back, rebuilt  # noqa: E402
from harness import Case, Harness, case_of  # noqa: E402

HANG_SECONDS = 120
PROGRESS_SECONDS = 60
SHRINK_TRIES = 4000
LEAST_CASES = 1000  # below which shares say nothing
LEAST_FAST_OF_VALID = 0.7
LEAST_FAST = 0.35

Counts = collections.Counter[str]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", type=_range, help="A:B: these alone, however long they take")
    parser.add_argument("--file", type=Path, help="read this one in the place of the case's")
    parser.add_argument("--calls", type=_numbers, help="0,2,5: of the case's calls, these alone")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="for what is found")
    return parser.parse_args(argv)


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


# ---- one process ----


class Worker:
    """Runs every jobs-th case, and writes down what it finds.

    Args:
        args: of the command line.
        harness: installed.
        current: shared with the parent: the case that is running.
        stop: shared with the parent, who sets it to end the run early; None: nobody does.
    """

    def __init__(
        self, args: argparse.Namespace, harness: Harness, current: Any, stop: Any = None
    ) -> None:
        self.stop = stop
        self.args = args
        self.harness = harness
        self.current = current
        self.counts: Counts = collections.Counter()

    def run(self, numbers: Iterable[int], deadline: float) -> Counts:
        """Run cases up to a deadline, or to the first that differs."""
        gc.collect()
        gc.freeze()
        started, used = time.perf_counter(), time.process_time()
        for number in numbers:
            if time.monotonic() > deadline or (self.stop is not None and self.stop.value):
                break
            self.current.value = number
            case = self._case(number)
            try:
                result = self.harness.run(case)
            except AssertionError:
                self.counts["mismatches"] += 1
                self._report(case, traceback.format_exc())
                break
            self.counts["cases"] += 1
            self.counts["calls"] += result.calls
            self.counts["valid"] += result.valid
            self.counts["fast"] += result.fast
            self.counts[f"way {case.way}"] += 1
        self.counts["milliseconds"] += int(1000 * (time.perf_counter() - started))
        self.counts["milliseconds of a core"] += int(1000 * (time.process_time() - used))
        return self.counts

    def _case(self, number: int) -> Case:
        args = self.args
        case = case_of(args.seed, number, args.device)
        if args.file is not None:
            case = dataclasses.replace(case, file=read_back(args.file.read_bytes()))
        if args.calls is not None:
            case = dataclasses.replace(case, calls=[case.calls[i] for i in args.calls])
        return case

    # ---- what is found ----

    def _fails(self, case: Case) -> bool:
        try:
            self.harness.run(case)
        except AssertionError:
            return True
        return False

    def _report(self, case: Case, text: str) -> None:
        note = "" if self._fails(case) else "It does not fail alone: cases before it matter.\n"
        kept, small = self._smaller(case) if not note else (list(range(len(case.calls))), case)
        with contextlib.suppress(AssertionError):
            self.harness.run(small)
        write_finding(self.args, small, kept, note + text)

    def _smaller(self, case: Case) -> tuple[list[int], Case]:
        """Fewer calls, and a smaller file, that still fail."""
        kept = list(range(len(case.calls)))
        for i in reversed(range(1, len(case.calls))):
            fewer = dataclasses.replace(case, calls=[case.calls[k] for k in kept if k != i])
            if self._fails(fewer):
                kept.remove(i)
        case = dataclasses.replace(case, calls=[case.calls[k] for k in kept])
        return kept, self._of_fewer_bytes(self._of_fewer_tensors(case))

    def _of_fewer_tensors(self, case: Case) -> Case:
        for name in list(case.file.tensors):
            with contextlib.suppress(TypeError, ValueError):  # what seem to be offsets are none
                names = [one for one in case.file.tensors if one != name]
                fewer = dataclasses.replace(case, file=rebuilt(case.file, names))
                if self._fails(fewer):
                    case = fewer
        return case

    def _of_fewer_bytes(self, case: Case) -> Case:
        tries, step = SHRINK_TRIES, len(case.file.content)
        while step and tries:
            at = 0
            while at < len(case.file.content) and tries:
                tries -= 1
                cut = dataclasses.replace(case, file=read_back(_without(case, at, step)))
                if len(cut.file.content) < len(case.file.content) and self._fails(cut):
                    case = cut
                else:
                    at += step
            step //= 2
        return case


def _without(case: Case, at: int, step: int) -> bytes:
    """A file without some bytes; its length of the header shrinks with the header."""
    content = case.file.content
    length, body = int.from_bytes(content[:8], "little"), content[8:]
    header = min(len(body), length)
    gone = max(min(at + step, header) - at, 0)
    return (length - gone).to_bytes(8, "little") + body[:at] + body[at + step :]


def write_finding(args: argparse.Namespace, case: Case, kept: list[int], text: str) -> None:
    """Write a case's file, and how to repeat it, into the folder for findings."""
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{args.device}-{args.seed}-{case.number}"
    path = stem.with_suffix(".safetensors")
    path.write_bytes(case.file.content)
    command = ["python", "fuzz/differential.py", "--seed", str(args.seed)]
    command += ["--cases", str(case.number), "--file", str(path)]
    command += ["--calls", ",".join(map(str, kept)), "--device", args.device]
    lines = [shlex.join(command), "", f"way: {case.way}", f"options: {case.options}"]
    lines += [f"call: {call!r}" for call in case.calls]
    lines += [f"file: {case.file.content[:2000]!r}", "", text]
    stem.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    print("\n".join(lines), flush=True)


def work(
    args: argparse.Namespace, job: int, library: str | None, shared: tuple[Any, Any], pipe: Any
) -> None:
    """The main function of a process. It shares with its parent: see `Worker`."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it end
    numbers: Iterable[int] = range(job, 1 << 48, args.jobs)
    deadline = time.monotonic() + args.seconds
    if args.cases is not None:
        numbers, deadline = args.cases[job :: args.jobs], float("inf")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        with Harness(args.device, folder, library).installed() as harness:
            pipe.send(folder)
            pipe.send(Worker(args, harness, *shared).run(numbers, deadline))
    finally:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, "file.safetensors"))
            os.rmdir(folder)


# ---- all of them ----


@dataclasses.dataclass
class Running:
    """A process, as its parent sees it."""

    process: Any
    pipe: Any
    current: Any
    folder: str | None = None
    counts: Counts | None = None
    seen: int = -1
    since: float = 0.0

    def look(self) -> str | None:
        """Take what it has sent; why it is lost, if it is."""
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                got = self.pipe.recv()
                if isinstance(got, str):
                    self.folder = got
                else:
                    self.counts = got
        if self.counts is not None:
            return None
        if self.process.exitcode is not None:
            return f"the process ended with status {self.process.exitcode}"
        if self.current.value != self.seen or self.folder is None:
            self.seen, self.since = self.current.value, time.monotonic()
        if time.monotonic() - self.since > HANG_SECONDS:
            self.process.kill()
            return f"no progress in {HANG_SECONDS} seconds"
        return None


def run(args: argparse.Namespace) -> tuple[Counts, int]:
    """Start the processes and wait for them; their counts, and how many were lost."""
    context = multiprocessing.get_context("spawn")
    total: Counts = collections.Counter()
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        library = None
        if args.device == "cuda":
            built = fake_device.build(Path(folder))
            if built is None:
                sys.exit("the fake driver needs a C compiler")
            library = str(built)
        running = []
        stop = context.Value("b", 0, lock=False)
        for job in range(args.jobs):
            here, there = context.Pipe(duplex=False)
            current = context.Value("q", -1, lock=False)
            process = context.Process(
                target=work, args=(args, job, library, (current, stop), there)
            )
            process.start()
            there.close()
            running.append(Running(process, here, current))
        signal.signal(signal.SIGINT, lambda *_: setattr(stop, "value", 1))
        told = time.monotonic()
        while running:
            time.sleep(0.1)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                done = sum(one.current.value // args.jobs for one in running)
                print(f"about {done} cases so far", file=sys.stderr, flush=True)
            for one in list(running):
                why = one.look()
                if why is not None:
                    lost += 1
                    _report_lost(args, one, why)
                if why is not None or one.counts is not None:
                    running.remove(one)
                    one.process.join()
                    total += one.counts or collections.Counter()
    return total, lost


def _report_lost(args: argparse.Namespace, one: Running, why: str) -> None:
    number = one.current.value
    print(f"case {number}: {why}", flush=True)
    if number < 0:
        return
    case = case_of(args.seed, number, args.device)
    write_finding(args, case, list(range(len(case.calls))), why)


def main(argv: list[str] | None = None) -> int:
    """Run, print the counts, and return the exit status."""
    args = arguments(argv)
    counts, lost = run(args)
    cases, valid, fast = (counts[name] for name in ("cases", "valid", "fast"))
    seconds, used = (
        max(counts[name], 1) / 1000 for name in ("milliseconds", "milliseconds of a core")
    )
    print(
        f"{cases} cases on {args.device}, seed {args.seed}, {counts['calls']} calls compared,"
        f" {cases / seconds:.0f} cases/s a process, {cases / used:.0f} a second of a core;"
        f" {valid} files valid ({valid / max(cases, 1):.0%}),"
        f" {fast} on the fast path ({fast / max(cases, 1):.0%} of all,"
        f" {fast / max(valid, 1):.0%} of the valid);"
        f" {counts['mismatches']} mismatches, {lost} processes lost"
    )
    ways = ", ".join(f"{n[4:]} {k}" for n, k in sorted(counts.items()) if n.startswith("way "))
    print(f"ways: {ways}", flush=True)
    if counts["mismatches"] or lost:
        return 1
    if cases >= LEAST_CASES and (fast < LEAST_FAST * cases or fast < LEAST_FAST_OF_VALID * valid):
        print(f"too few on the fast path: at least {LEAST_FAST:.0%} of all are expected, and"
              f" {LEAST_FAST_OF_VALID:.0%} of the valid")  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
