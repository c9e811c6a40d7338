"""Ranks of a process group that start in milliseconds: forks of a process that imported torch.

``python rank_nursery.py`` reads a job as a line of JSON from stdin, forks its ranks, waits for
them until a deadline and prints their ends as a line of JSON. A rank runs a list of cases,
functions ``case(rank, **arguments)`` of the modules ``cases_*``, and writes their values and
exceptions to a file, which tests read through ranks.py. Neither the engine nor gloo is started
before the fork.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_device
import torch
import torch.distributed as dist
import torch.distributed.tensor

import fastst_patch  # noqa: F401 - before the fork, because importing takes long

torch.set_num_threads(1)  # torch's threads would not survive the fork

GRACE_S = 3.0  # from a rank's SIGABRT, which prints its stacks, to its SIGKILL


class Rank:
    """The process that a case runs in.

    Attributes:
        rank: in the default group.
        world: size of that group.
        folder: of the job, the same for all ranks; the current folder is the rank's own.
        library: the fake device driver; None where it could not be built.
        limit: the group's timeout in seconds.
        runtime: the fake device's, while a case uses one.
    """

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.rank = rank
        self.world: int = job["world"]
        self.folder = Path(job["folder"])
        self.library: str | None = job["library"]
        self.limit: float = job["timeout"]
        self.runtime: Any = None
        self._driver: Any = None

    @contextlib.contextmanager
    def fake_cuda(self, **options: Any) -> Iterator[Any]:
        """Use the fake device as CUDA; check its rules at the end of the block."""
        if self._driver is None:
            assert self.library is not None
            self._driver = fake_device.Driver(Path(self.library))
            self._driver.lib.fake_devices(4)
        with fake_device.fake_cuda(self._driver, **options) as runtime:
            yield runtime

    def everyone(self, value: Any) -> list[Any]:
        """Each rank's value, by rank."""
        found: list[Any] = [None] * self.world
        if self.world == 1:
            return [value]
        dist.all_gather_object(found, value)
        return found

    def meet(self) -> None:
        """Wait for all other ranks."""
        if self.world > 1:
            dist.barrier()


def _described(error: BaseException) -> dict[str, Any]:
    """An exception as JSON."""
    cause = error.__cause__
    return {
        "type": type(error).__name__,
        "bases": [one.__name__ for one in type(error).__mro__],
        "text": str(error),
        "rank": getattr(error, "rank", None),
        "cause": getattr(error, "cause", None),
        "cause_type": None if cause is None else type(cause).__name__,
        "cause_bases": [one.__name__ for one in type(cause).__mro__] if cause else [],
        "cause_errno": getattr(cause, "errno", None),
        "trace": "".join(traceback.format_exception(error)),
    }


def attempt(call: Any) -> dict[str, Any]:
    """Call a function: its value or exception, and the seconds it took."""
    begin = time.monotonic()
    try:
        return {"value": call(), "error": None, "seconds": time.monotonic() - begin}
    except BaseException as error:
        return {
            "value": None, "error": _described(error), "seconds": time.monotonic() - begin,
        }  # fmt: skip


def _find(name: str) -> Any:
    module, function = name.split(".")
    return getattr(importlib.import_module(module), function)


def _store(rank: Rank, server: bool) -> dist.Store:
    """The ranks' store: a file, or a server in rank 0 whose port is in a file."""
    if not server:
        return dist.FileStore(str(rank.folder / "store"), rank.world)
    port = rank.folder / "port"
    if rank.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        written = port.with_suffix(".new")
        written.write_text(str(store.port), encoding="ascii")
        written.rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text(encoding="ascii")), is_master=False)


def _be_rank(job: dict[str, Any], number: int) -> None:
    rank = Rank(job, number)
    grouped = job["group"]
    if grouped:
        dist.init_process_group(
            "gloo",
            store=_store(rank, job["server"]),
            rank=number,
            world_size=rank.world,
            timeout=datetime.timedelta(seconds=rank.limit),
        )
    with open(rank.folder / f"outcomes-{number}.jsonl", "w", encoding="utf-8") as out:
        for case in job["cases"]:
            outcome = attempt(lambda c=case: _find(c["call"])(rank, **c["arguments"]))
            print(json.dumps({"name": case["name"], **outcome}), file=out, flush=True)
            if not job["meet"]:
                continue
            try:
                rank.meet()
            except Exception:
                print(f"after {case['name']}: out of step", file=sys.stderr)
                traceback.print_exc()
                raise SystemExit(3) from None
    if grouped and job["meet"]:
        dist.destroy_process_group()


def _fork_rank(job: dict[str, Any], number: int) -> int:
    """Fork a rank and return its pid; the child ends by SystemExit, as any program does."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    folder = Path(job["folder"])
    log = os.open(folder / f"log-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    faulthandler.enable(all_threads=True)
    os.environ.update(job["environment"])
    os.environ.update(job["environments"][number])
    own = folder / f"rank{number}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    try:
        _be_rank(job, number)
    except SystemExit as end:
        raise SystemExit(end.code) from None
    except BaseException:
        traceback.print_exc()
        raise SystemExit(4) from None
    raise SystemExit(0)


def _alive(group: int) -> bool:
    """Whether a process of a group is left after its leader was waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _wait(pids: list[int], limit: float, doomed: list[int]) -> list[dict[str, Any]]:
    """Wait for ranks, and return their ends; a status is as of subprocess.

    Ranks that are late are aborted, then killed. A doomed rank is late once all others have ended.
    """
    begin = time.monotonic()
    ends: dict[int, dict[str, Any]] = {}
    late: dict[int, float] = {}
    awaited = [pid for number, pid in enumerate(pids) if number not in doomed]
    while len(ends) < len(pids):
        now = time.monotonic()
        done = all(pid in ends for pid in awaited)
        for pid in pids:
            if pid in ends:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                orphans = _alive(pid)
                if orphans:
                    os.killpg(pid, signal.SIGKILL)
                ends[pid] = {
                    "status": code, "seconds": now - begin, "late": pid in late, "orphans": orphans,
                }  # fmt: skip
            elif (done or now - begin > limit) and pid not in late:
                late[pid] = now
                os.kill(pid, signal.SIGABRT)
            elif pid in late and now - late[pid] > GRACE_S:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [ends[pid] for pid in pids]


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        for module in job["preload"]:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # else collections in ranks copy the objects' pages
        sys.stdout.flush()
        pids = [_fork_rank(job, number) for number in range(job["world"])]
        print(json.dumps(_wait(pids, job["limit"], job["doomed"])), flush=True)


if __name__ == "__main__":
    main()
