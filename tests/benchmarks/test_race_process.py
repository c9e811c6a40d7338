"""Copies of a process that has imported torch: as good as fresh ones, and gone like them."""

# ruff: noqa: F401, F811 - fixtures come from race_harness
from __future__ import annotations

import contextlib
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from race_harness import SOURCE, file, process, race_of, runner, screen, truth

from fastst_patch.bench.failures import BenchError
from fastst_patch.bench.process import ProcessFailedError

PATIENCE_S = 120.0


def message(file: Path, loader: str) -> dict[str, object]:
    path = file.parent / "truth.json"
    truth.write(truth.of([str(file)]), path)
    return {
        "kind": "load", "loader": loader, "module": SOURCE.module, "folder": SOURCE.folder,
        "device": "cpu", "files": [str(file)], "read": [str(file)], "truth": str(path),
    }  # fmt: skip


def told(file: Path, loader: str, copied: bool) -> tuple[Any, Any]:
    """What getting ready, and loading, came to."""
    with process.begin(message(file, loader), copied=copied) as child:
        try:
            ready = child.wait_ready(PATIENCE_S)
            return ready, child.go(PATIENCE_S)
        except ProcessFailedError as failed:
            return None, (failed.outcome, failed.detail)


def test_a_copy_loads_as_a_fresh_process(file: Path) -> None:
    """Right, wrong, raising and killed: the same answers, but for an import's time."""
    for loader in ("stock-mmap", "chatters", "swaps-bytes", "raises", "dies"):
        ready, copied = told(file, loader, True)
        fresh_ready, fresh = told(file, loader, False)
        if ready is None:
            assert copied == fresh
            continue
        assert ready == {"ready": True, "import_s": None, "context_s": 0.0}
        assert fresh_ready["import_s"] > 0
        for key in ("wrong", "wrong_count", "tensors", "bytes", "versions", "late_imports"):
            assert copied[key] == fresh[key], key


def test_copies_begin_alike(file: Path) -> None:
    """What one has loaded is not in the next; both are processes and groups of their own."""
    children = [
        process.begin(message(file, "stock-mmap"), copied=True) for _ in range(2)
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.enter_context(child)
        for child in children:
            child.wait_ready(PATIENCE_S)
        pids = [child._process.pid for child in children]
        assert len({*pids, fork_server(), os.getpid()}) == 4
        assert [os.getpgid(pid) for pid in pids] == pids
        # Neither holds the other's files, nor the fork server's: an end would not be seen.
        for pid in pids:
            pipes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
            assert not any(name.startswith("socket:") for name in pipes)
            other = next(one for one in pids if one != pid)
            for fd in (0, 1):
                assert os.readlink(f"/proc/{other}/fd/{fd}") not in pipes
        samples = [child.go(PATIENCE_S) for child in children]
    assert [one["wrong"] for one in samples] == [[], []]
    assert [child._process.returncode for child in children] == [0, 0]


def test_a_hanging_copy_is_ended(file: Path) -> None:
    with process.begin(message(file, "hangs"), copied=True) as child:
        child.wait_ready(PATIENCE_S)
        with pytest.raises(ProcessFailedError, match="time limit: 1 s passed"):
            child.go(1.0)
    assert child._process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{child._process.pid}").exists()


def test_an_environment_goes_first(file: Path, tmp_path: Path) -> None:
    """A loader's own folder is looked at before anything that is installed."""
    beside = tmp_path / "beside" / "safetensors"
    beside.mkdir(parents=True)
    (beside / "__init__.py").write_text("raise ImportError('of the side environment')\n")
    with process.begin(message(file, "stock-mmap"), str(beside.parent), copied=True) as child:
        with pytest.raises(ProcessFailedError, match="of the side environment"):
            child.wait_ready(PATIENCE_S)
    assert told(file, "stock-mmap", True)[1]["wrong"] == []  # the next has it not


def fork_server() -> int:
    return int(forkserver._forkserver._forkserver_pid)


def test_a_fork_server_that_is_gone_is_started_again(file: Path) -> None:
    assert told(file, "stock-mmap", True)[1]["wrong"] == []
    first = fork_server()
    os.kill(first, signal.SIGKILL)
    wait_for_end(first)
    assert told(file, "stock-mmap", True)[1]["wrong"] == []
    assert fork_server() != first


def wait_for_end(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def test_a_copy_outlives_its_fork_server(file: Path) -> None:
    with process.begin(message(file, "stock-mmap"), copied=True) as child:
        child.wait_ready(PATIENCE_S)
        os.kill(fork_server(), signal.SIGKILL)
        assert child.go(PATIENCE_S)["wrong"] == []
    assert child._process.returncode == 255  # nobody was told how it ended


def test_no_fork_server_is_said(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def refuse(*_: object) -> None:
        raise EOFError("it ended")

    monkeypatch.setattr(forkserver, "connect_to_new_process", refuse)
    with pytest.raises(BenchError, match="copying a process that has imported torch"):
        process.begin(message(file, "stock-mmap"), copied=True)


def test_a_race_starts_afresh_once(file: Path) -> None:
    """Round 1 of the first workload; all else by copies, where they are wanted."""
    race = race_of(file, "stock-mmap", "again", rounds=3, copied=True)
    runner.race(race, screen.Screen())
    assert [(run["outcome"], run["round"]) for run in race.runs] == [
        ("ok", number) for number in (1, 1, 2, 2, 3, 3)
    ]
    timed = {run["round"]: run["sample"]["import_s"] is not None for run in race.runs}
    assert timed == {1: True, 2: False, 3: False}


def test_what_imports_took_is_not_expected_again(file: Path) -> None:
    """Else a planner would drop cells for which there is time."""
    race = SimpleNamespace(
        copied=True, at_once=2,
        runs=[{"sample": {"import_s": 100.0}}, {"sample": None},
              {"sample": {"import_s": 3.0}}, {"sample": {"import_s": 1.0}}],
    )  # fmt: skip
    assert runner._importing(race, 1) == 2.0
    race.copied = False
    assert runner._importing(race, 1) == 0.0
