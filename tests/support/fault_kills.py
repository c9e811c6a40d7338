"""Processes that are killed while they load: what they leave, and the loads that follow.

Each function is a path of fault_matrix.py. A process is killed at each call that writes to the
folder of ``remote_cache``, and at random times. It leaves no shared memory, no semaphore, and no
file but in that folder. The next load gives stock's result, and leaves in the folder what a load
leaves that was not killed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cases_matrix import WAYS, ranks_files
from fault_calls import SEED, How, PythonCalls
from fault_loads import Load, Place, load_paths, remote_load
from ranks import Case, Nursery

KILL = How("killed", 1, PythonCalls.KILLED)
PATIENCE_S = 300

Tell = Callable[..., None]


def _forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run a function in a new process; its status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_NEW_IPC, _NEW_MOUNTS = 0x08000000, 0x00020000
_PRIVATE = 0x44000  # MS_REC | MS_PRIVATE


def _alone() -> bool:
    """Give this process shared memory and semaphores that no other process uses.

    False where that is not allowed: then what others leave cannot be told from what ours leave.
    """
    libc = ctypes.CDLL(None)
    return (
        libc.unshare(_NEW_IPC | _NEW_MOUNTS) == 0
        and libc.mount(b"none", b"/", None, _PRIVATE, None) == 0
        and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None) == 0
    )


def _left(alone: bool) -> dict[str, Any]:
    """What outlives processes."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    if not alone:
        return {"/dev/shm": [name for name in names if "fastst" in name]}
    found: dict[str, Any] = {"/dev/shm": sorted(names)}
    for kind in ("shm", "sem", "msg"):
        path = Path("/proc/sysvipc", kind)
        if path.exists():
            found[f"System V {kind}"] = path.read_text(encoding="ascii").splitlines()[1:]
    return found


def _files(folder: Path) -> set[str]:
    """Kinds of files in a folder of ``remote_cache``: suffixes of the names of remote files.

    Without the tag for backups: who is killed as he makes the folder may leave none.
    """
    names = os.listdir(folder) if folder.exists() else []
    return {
        name if name == ".lock" else "." + name.partition(".")[2]
        for name in names if name != "CACHEDIR.TAG"
    }  # fmt: skip


def _load(load: Load) -> None:
    load.check(load.call())
    load.settle()


def _repeat(load: Load) -> None:
    while True:
        load.before()
        _load(load)


COMPLETE = {".json", ".lock", ".safetensors"}
PARTLY = COMPLETE | {".part", ".journal", ".json.new"}


def kept(place: Place, thin: bool, tell: Tell) -> None:
    """A process that keeps a remote file is killed at each call, or at a random time."""
    folder = place.folder / "kept"
    numbers, alone = random.Random(SEED), _alone()
    with remote_load(place, "load_file", keep=True) as load:
        calls = load.calls["python"]
        before = _left(alone)

        def judge(cell: object, status: int) -> None:
            wrong = []
            if status not in (-signal.SIGKILL, 0):
                wrong.append(f"its process ended with status {status}")
            if _left(alone) != before:
                wrong.append(f"something is left: {before}, {_left(alone)}")
            if not _files(folder) <= PARTLY:
                wrong.append(f"files in the folder: {_files(folder)}")
            if _forked(partial(_load, load)) != 0:
                wrong.append("the next load failed")
            if _files(folder) != COMPLETE:
                wrong.append(f"files in the folder after the next load: {_files(folder)}")
            tell(cell=cell)
            outcome = "killed" if status else "ended before"
            tell(done={outcome: 1}, met=status != 0, wrong=wrong)

        def killed(name: str, n: int) -> None:
            calls.arm(name, KILL, n)
            _load(load)

        for name in calls.ways():
            for n in range(1, 2 if thin else 100):
                load.before()
                status = _forked(partial(killed, name, n))
                if status == 0:  # it makes no such call any more
                    break
                judge(["SIGKILL", name, n], status)
        for i in range(10 if thin else 200):
            load.before()
            judge(["SIGKILL", i], _forked(partial(_repeat, load), numbers.uniform(0, 0.1)))


def at_any_time(place: Place, thin: bool, tell: Tell) -> None:
    """A process is killed at random times, on several paths."""
    numbers, alone = random.Random(SEED), _alone()
    wanted = ("direct, load_file", "owned, walk", "readahead, load_file", "ring+direct, load_file",
              "gds, walk", "remote, prefetch")  # fmt: skip
    for path in load_paths():
        if path.name not in wanted or path.ready is None:
            continue
        before = _left(alone)
        for i in range(3 if thin else 60):
            # Before it has used a device: a child may not go on using its parent's.
            with path.ready(place) as load:
                names = sorted(os.listdir(place.folder))
                status = _forked(partial(_repeat, load), numbers.uniform(0, 0.15))
                wrong = [] if status == -signal.SIGKILL else [f"it ended with status {status}"]
                if (_left(alone), sorted(os.listdir(place.folder))) != (before, names):
                    wrong.append("something is left")
                if _forked(partial(_load, load)) != 0:
                    wrong.append("the next load failed")
            gc.collect()
            tell(cell=["SIGKILL", path.name, i])
            tell(done={"killed": 1}, met=True, wrong=wrong)


def ranks(place: Place, thin: bool, tell: Tell) -> None:
    """A rank is killed at random times, while it shares memory with another one."""
    files = ranks_files(place)
    numbers, alone = random.Random(SEED), _alone()
    nursery = Nursery(place.folder, place.library)
    try:
        for i in range(1 if thin else 20):
            before = _left(alone)
            way = WAYS[("exchange", "exchange+direct")[i % 2]]
            arguments = {"files": files, "bad": i // 2 % 2, "after": numbers.uniform(0, 0.2), **way}
            case = Case("cases_matrix.killed", arguments, name="killed")
            ran = nursery.run([case], 2, timeout=60, limit=PATIENCE_S, meet=False)
            other = 1 - i // 2 % 2
            said = ran.outcomes[other].get("killed")
            wrong = []
            if said is None or said.value != "RankError":
                wrong.append(f"{said}: {ran.log()}")
            if _left(alone) != before:
                wrong.append(f"something is left: {before}, {_left(alone)}")
            again = Case("cases_matrix.once", {"files": files, **way}, name="again")
            nursery.run([again], 2, timeout=60, limit=PATIENCE_S).values(again)
            tell(cell=["SIGKILL", "ranks", i])
            tell(done={"killed": 1}, met=True, wrong=wrong)
    finally:
        nursery.close()
