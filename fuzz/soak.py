"""Threads and processes that load, and are interrupted, forked and truncated, for as long as told.

    python fuzz/soak.py [--seconds 3600] [--threads 64] [--processes 8] [--seed S]

What they do is in `_soak_operations.py`. Every byte is compared; at the end nothing may be held
that was not held after the warm-up, and no thread may have stood still. The verdict comes first.
Exits with 1 when it is not PASS; the folder with the files and logs stays then.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import faulthandler
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import fake_device
import torch
from _soak_files import Contents
from _soak_process import ENDED, READY, Plan, run

from fastst_patch.bench.hardware import filesystem
from fastst_patch.bench.process import end_with_parent

SLOTS, STILL = 16, 4  # files that are replaced, and files that are not
RSS_KIB = 16 << 10
RSS_FROM_S = 60.0
"""Shorter runs do not fail by their memory: allocators have not met every size by then."""

NEVER_HELD = ("engine:", "fake driver: blocks", "fake driver: ranges", "maps of files")
RSS = "anonymous KiB"
EVENTS = 1024
"""Spare events are kept, as many as copies were under way at a time: some for each thread."""

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
BACKTRACES_S = 120
LOG_SHOWN = 100_000


@dataclasses.dataclass
class Child:
    """A process, as its parent sees it.

    Attributes:
        beats: its threads'; see `Plan.slots`.
        moved: when each beat was seen to change.
    """

    number: int
    pid: int
    beats: memoryview
    seen: list[int]
    moved: list[float]
    status: int | None = None

    def stalled(self, limit_s: float) -> list[int]:
        """Threads that have done nothing for so long."""
        now = time.monotonic()
        for slot in range(1, len(self.beats)):
            if self.beats[slot] in (self.seen[slot], ENDED):
                if self.beats[slot] == ENDED:
                    self.moved[slot] = now
                continue
            self.seen[slot], self.moved[slot] = self.beats[slot], now
        return [slot for slot in range(1, len(self.beats)) if now - self.moved[slot] > limit_s]


# ---------------------------------------------------------------- the run


def prepare(plan: Plan, contents: Contents) -> None:
    """Write the first version of every file."""
    for number in range(SLOTS):
        contents.write(plan.folder / f"slot-{number}.safetensors", number)
    for number in range(200, 200 + STILL):
        contents.write(plan.folder / f"still-{number}.safetensors", number)


def start(number: int, plan: Plan, contents: Contents, beats: memoryview) -> Child:
    """Fork a process; its output goes to a file."""
    now = time.monotonic()
    beats[:] = memoryview(bytes([0] * 8 + [255] * 8 * (len(beats) - 1))).cast("Q")
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        log = os.open(plan.folder / f"log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        run(number, plan, contents, beats)
    return Child(number, pid, beats, list(beats), [now] * len(beats))


def watch(children: Sequence[Child], plan: Plan, limit_s: float) -> list[str]:
    """Send signals to the processes until all have ended; return what went wrong."""
    numbers = random.Random(plan.seed)
    while True:
        for child in children:
            if child.status is None:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if pid:
                    child.status = os.waitstatus_to_exitcode(status)
        running = [child for child in children if child.status is None]
        failed = [child for child in children if child.status]
        if failed:
            return [f"process {child.number} ended with {child.status}" for child in failed]
        if not running:
            return []
        for child in running:
            stalled = child.stalled(limit_s)
            if stalled:
                show_stacks(child, plan)
                return [f"process {child.number}: threads {stalled} stood still {limit_s:.0f} s"]
            if child.beats[0] == READY:
                os.kill(child.pid, numbers.choice((signal.SIGINT, signal.SIGUSR1)))
        time.sleep(numbers.uniform(0.02, 0.1))


def show_stacks(child: Child, plan: Plan) -> None:
    """Have a process write the stacks of its threads to its log, and gdb those of C to a file."""
    os.kill(child.pid, signal.SIGUSR2)
    time.sleep(3)
    debugger = shutil.which("gdb")
    if debugger is None:
        return
    command = [debugger, "-p", str(child.pid), "-batch", "-ex", "thread apply all backtrace 16"]
    with (plan.folder / f"stacks-{child.number}").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(command, stdout=log, stderr=log, timeout=BACKTRACES_S, check=False)
        except subprocess.TimeoutExpired:
            print("gdb took too long", file=log)


# ---------------------------------------------------------------- the verdict


def judge(results: Sequence[dict[str, Any]], plan: Plan) -> list[str]:
    """What is wrong with the processes' results."""
    wrong = []
    for number, result in enumerate(results):
        wrong += [f"process {number}: {text}" for text in result["failures"]]
        wrong += [f"process {number}: fake driver: {text}" for text in result["violations"]]
        for name, after in result["after"].items():
            before = result["before"][name]
            most = 0 if name.startswith(NEVER_HELD) else before
            if name == "fake driver: events":
                most = EVENTS
            if name == RSS:
                most = before + RSS_KIB if plan.seconds >= RSS_FROM_S else after
            if after > most:
                wrong.append(f"process {number}: {name}: {after}, after the warm-up {before}")
    return wrong


def show(results: Sequence[dict[str, Any]], wrong: Sequence[str], plan: Plan) -> None:
    """Print the verdict, then the operations by kind, then what is held."""
    done = sum((Counter(one["judged"]) for one in results), Counter())
    seconds = max((one["seconds"] for one in results), default=0.0)
    nbytes = sum(one["bytes"] for one in results)
    verdict = "FAIL" if wrong else "PASS"
    print(
        f"{verdict}: {sum(done.values())} operations and {nbytes / 1e9:.1f} GB compared in"
        f" {seconds:.0f} s, {plan.processes} processes of {plan.threads} threads, seed {plan.seed}"
    )
    for text in wrong:
        print(f"  {text}")
    if not results:
        return
    print(f"\n{'operation':<28}{'count':>10}{'per s':>10}")
    for name, count in sorted(done.items(), key=lambda item: -item[1]):
        print(f"{name:<28}{count:>10}{count / max(seconds, 1e-9):>10.1f}")
    dropped = sum((Counter(one["dropped"]) for one in results), Counter())
    print(f"thrown into a __del__, where it ends: {dict(dropped)}")
    print(f"\n{'held, most of a process':<28}{'before':>10}{'after':>10}{'grown':>10}")
    for name in results[0]["after"]:
        pairs = [(one["before"][name], one["after"][name]) for one in results]
        most = [max(one[side] for one in pairs) for side in (0, 1)]
        print(f"{name:<28}{most[0]:>10}{most[1]:>10}{max(b - a for a, b in pairs):>10}")


def give_back_freed_memory() -> None:
    """Have malloc map large blocks apart, so that freed ones are gone, and keep few pools.

    Else free blocks stay by the ten MiB, and a leak does not show beside them. What is used after
    it was freed crashes, too.
    """
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_THRESHOLD, 64 << 10), (M_ARENA_MAX, 2)):
        if hasattr(libc, "mallopt"):  # not with every C library
            libc.mallopt(option, value)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--seconds", type=float, default=3600.0)
    made.add_argument("--threads", type=int, default=64, help="of each process")
    made.add_argument("--processes", type=int, default=8)
    made.add_argument("--ranks", type=int, default=2, help="processes that load shards together")
    made.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    made.add_argument("--warm-up", type=float, help="seconds; by default a tenth, at most 60")
    made.add_argument("--dir", help="where files are written, on a disk")
    made.add_argument("--library", type=Path, help="the fake driver, where it is built already")
    made.add_argument("--limit", type=float, help="seconds after which a thread stands still")
    return made.parse_args()


def main() -> int:
    """Run it; return the status."""
    given = arguments()
    give_back_freed_memory()
    torch.set_num_threads(1)  # torch's threads do not survive a fork
    folder = Path(tempfile.mkdtemp(prefix="fastst-soak-", dir=given.dir))
    if filesystem(folder).in_memory:
        print(f"{folder} is in memory: nothing is evicted or read past the page cache")
    library = given.library or fake_device.build(folder)
    if library is None:
        print("needs a C compiler, for the fake device driver")
        return 1
    warm_s = min(60.0, given.seconds / 10) if given.warm_up is None else given.warm_up
    ranks = min(given.ranks, given.processes)
    plan = Plan(
        folder, library, given.seed, given.seconds, warm_s, given.threads, given.processes,
        ranks if ranks > 1 else 0,
    )  # fmt: skip
    # Each thread has its turn only after all others.
    limit_s = given.limit or 60.0 + plan.processes * plan.threads
    contents = Contents(plan.seed)
    prepare(plan, contents)
    board = memoryview(mmap.mmap(-1, 8 * plan.processes * plan.slots)).cast("Q")
    children = []
    try:
        for number in range(plan.processes):
            beats = board[number * plan.slots : (number + 1) * plan.slots]
            children.append(start(number, plan, contents, beats))
        wrong = watch(children, plan, limit_s)
    finally:
        for child in children:
            if child.status is None:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
    paths = sorted(folder.glob("result-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    wrong += judge(results, plan)
    show(results, wrong, plan)
    if wrong:
        print(f"\nfiles and logs: {folder}")
        for path in sorted(folder.glob("log-*")):
            sys.stdout.write(f"--- {path.name}\n{path.read_text(errors='replace')[-LOG_SHOWN:]}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
