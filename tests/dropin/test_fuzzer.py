"""The differential fuzzer: a few of its cases, and that it finds and reports what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

FUZZER = ROOT / "fuzz" / "differential.py"
CASES = range(300)


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FUZZER.parent))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))
    return importlib.import_module("differential")


@pytest.fixture
def worker(fuzzer, tmp_path) -> Any:
    """Makes workers in this process."""

    @contextlib.contextmanager
    def worker(*arguments: str, library: str | None = None) -> Iterator[Any]:
        args = fuzzer.arguments([*arguments, "--out", str(tmp_path / "out")])
        with fuzzer.Harness(args.device, str(tmp_path), library).installed() as harness:
            yield fuzzer.Worker(args, harness, types.SimpleNamespace(value=-1))

    return worker


def test_a_few_cases(worker) -> None:
    with worker("--seed", "7") as one:
        counts = one.run(CASES, float("inf"))
    assert (counts["cases"], counts["mismatches"]) == (len(CASES), 0)
    assert counts["valid"] > 0.4 * len(CASES)
    assert counts["fast"] > 0.8 * counts["valid"]


def test_a_few_cases_to_a_device(worker, fake_driver) -> None:
    with worker("--seed", "7", "--device", "cuda", library=fake_driver.path) as one:
        counts = one.run(CASES[:100], float("inf"))
    assert (counts["cases"], counts["mismatches"]) == (100, 0)
    assert counts["fast"] > 0.7 * counts["valid"] > 0.2 * 100


def test_cases_are_a_function_of_seed_and_number(fuzzer) -> None:
    def made(seed: int) -> list[tuple[Any, ...]]:
        cases = [fuzzer.case_of(seed, number, "cpu") for number in range(50)]
        return [(c.file.content, c.way, repr(c.calls), c.options, c.in_place) for c in cases]

    assert made(1) == made(1)
    assert len({content for content, *_ in made(1) + made(2)}) > 95


def test_what_differs_is_made_small_and_written_down(worker, tmp_path) -> None:
    """Every tensor of four bytes or more comes with one bit changed."""

    def wrong(load: Any) -> Any:
        def load_file(*args: Any) -> dict[str, torch.Tensor]:
            found = load(*args)
            for tensor in found.values():
                if tensor.nbytes >= 4:
                    tensor.untyped_storage()[3] ^= 1
            return found

        return load_file

    with worker() as one:
        fast = one.harness._fast
        one.harness._fast = dataclasses.replace(fast, load_file=wrong(fast.load_file))
        counts = one.run(CASES, float("inf"))
        assert counts["mismatches"] == 1
        text = next((tmp_path / "out").glob("*.txt")).read_text()
        path = next((tmp_path / "out").glob("*.safetensors"))
        assert "different bytes" in text
        assert path.stat().st_size < 100
        command = shlex.split(text.splitlines()[0])
        again = one.args.__class__(**vars(one.args))
        assert command[:2] == ["python", "fuzz/differential.py"]
        number = int(command[command.index("--cases") + 1])
        again.file, again.calls = path, []
        assert one.__class__(again, one.harness, one.current)._fails(one._case(number))


def test_processes_and_their_counts(tmp_path) -> None:
    command = [sys.executable, str(FUZZER), "--cases", "0:40", "--jobs", "2", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"40 cases on cpu, seed 3, \d+ calls compared, \d+ cases/s", done.stdout)
    assert list(tmp_path.iterdir()) == []


class Ended:
    """A process, or a pipe from it, that has nothing more to say."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        self.killed = False

    def poll(self) -> bool:
        return False

    def kill(self) -> None:
        self.killed = True


def test_a_process_that_crashes_or_hangs_is_lost(fuzzer, tmp_path, monkeypatch, capsys) -> None:
    current = types.SimpleNamespace(value=5)
    crashed = fuzzer.Running(Ended(-11), Ended(None), current)
    assert crashed.look() == "the process ended with status -11"
    hung = fuzzer.Running(Ended(None), Ended(None), current, folder="here")
    assert hung.look() is None
    monkeypatch.setattr(fuzzer, "HANG_SECONDS", -1)
    assert hung.look() == "no progress in -1 seconds"
    assert hung.process.killed
    args = fuzzer.arguments(["--out", str(tmp_path)])
    fuzzer._report_lost(args, crashed, "lost")
    assert (tmp_path / "cpu-0-5.safetensors").exists()
    assert "--cases 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ({"cases": 2000, "valid": 1000, "fast": 900}, 0),
        ({"cases": 2000, "valid": 1000, "fast": 600}, 1),
        ({"cases": 2000, "valid": 400, "fast": 400}, 1),
        ({"cases": 10, "valid": 4, "fast": 0}, 0),
        ({"cases": 2000, "valid": 1000, "fast": 900, "mismatches": 1}, 1),
    ],
)
def test_too_few_on_the_fast_path_is_a_failure(fuzzer, monkeypatch, counts, status) -> None:
    monkeypatch.setattr(fuzzer, "run", lambda args: (fuzzer.Counts(counts), 0))
    assert fuzzer.main([]) == status


def test_a_lost_process_is_a_failure(fuzzer, monkeypatch) -> None:
    monkeypatch.setattr(fuzzer, "run", lambda args: (fuzzer.Counts(cases=1), 1))
    assert fuzzer.main([]) == 1


def test_places(fuzzer) -> None:
    assert Path(fuzzer.__file__) == FUZZER
