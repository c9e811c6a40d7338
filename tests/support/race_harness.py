"""What the tests of the race share: modules, a race over one small file, children that lie."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from places import ROOT

from fastst_patch import engine
from fastst_patch.bench import residency
from fastst_patch.bench.checkpoint import transformer_specs, write_checkpoint

if engine.native_error() is not None:
    pytest.skip("no native extension", allow_module_level=True)
if not (ROOT / "benchmarks" / "race").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))  # last: what is installed is tested, and not the checkout

ceilings = importlib.import_module("benchmarks.ceilings")
charts = importlib.import_module("benchmarks.race.charts")
command = importlib.import_module("benchmarks.race.command")
entrants = importlib.import_module("benchmarks.race.entrants")
plan = importlib.import_module("benchmarks.race.plan")
process = importlib.import_module("benchmarks.race.process")
readme = importlib.import_module("benchmarks.readme")
report = importlib.import_module("benchmarks.race.report")
results = importlib.import_module("benchmarks.race.results")
runner = importlib.import_module("benchmarks.race.runner")
screen = importlib.import_module("benchmarks.race.screen")
truth = importlib.import_module("benchmarks.race.truth")
whole = importlib.import_module("benchmarks.race.whole")
watch = importlib.import_module("benchmarks.race.watch")
benchmarks_main = importlib.import_module("benchmarks.__main__")

SOURCE = entrants.Source("race_standins", str(Path(__file__).resolve().parent))


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "files" / "model.safetensors"
    path.parent.mkdir()
    write_checkpoint(path, transformer_specs(300_000), lambda _: None)
    return path


def workload(name: str = "tiny", nbytes: int = 300_000) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, description="a small one", files=1, tensors=147, nbytes=nbytes, scaled=1.0,
        dtype="bf16", source="here",
    )  # fmt: skip


def who(*names: str):
    return entrants.assemble(SOURCE, "cpu", names or None, None, lambda _: None)


def race_of(file: Path, *names: str, caches=("warm",), rounds=1, **changes):
    """A race of stand-ins over one file; nothing is run yet."""
    one = workload()
    entered = who(*names)

    @contextlib.contextmanager
    def provide(_):
        path = file.parent / "truth.json"
        truth.write(truth.of([str(file)]), path)
        yield runner.Written((str(file),), str(path))

    facts = {
        "entrants": entered,
        "device": "cpu",
        "workloads": [one],
        "provide": provide,
        "planner": plan.Planner(plan.units([one], entered.running, caches, False), None, rounds),
        "seed": 7,
        "limit_s": 120.0,
        "at_once": 2,
        "watch": watch.DeviceWatch(None),
        "ceilings": False,
    }
    return runner.Race(**(facts | changes))


def found_of(race, **environment):
    args = SimpleNamespace(suite="quick")
    rest = SimpleNamespace(args=args, absent={}, end_to_end=None, environment={
        "cpu": "a CPU", "cpus": 2, "memory": 8_000_000_000, "kernel": "Linux 6", "fs": "ext4",
        "block_device": "vda", "read_ahead_kb": 128, "python": "3.11", "torch": "2",
        "safetensors": "0.8", "fastst_patch": "0.1", **environment,
    })  # fmt: skip
    return command._found(race, rest)


def states(race) -> dict[str, str]:
    return {row.loader: row.state for row in results.rows(found_of(race))}


def sample(load_s=1.0, **changes):
    made = {
        "import_s": 1.0, "context_s": 0.0, "first_s": load_s / 2, "load_s": load_s,
        "touch_s": 0.5, "tensors": 147, "bytes": 300_000, "wrong": [], "wrong_count": 0,
        "resident_before": None, "late_imports": [], "path": None, "versions": {},
        "before": {"rss": 10, "rss_anonymous": 5, "rss_file": 5, "pss": 8},
        "after": {"rss": 30, "rss_anonymous": 15, "rss_file": 15, "pss": 20, "peak_rss": 40},
        "done": {"user_s": 1.0, "system_s": 0.5, "storage_bytes": 0},
    }  # fmt: skip
    return made | changes


class FakeChild:
    """Answers at once: what `answers` says of its loader."""

    answers: ClassVar[dict[str, object]] = {}
    started: ClassVar[list[str]] = []

    def __init__(self, message, environment=None, *, copied=False):
        self.name = message["loader"]
        self.started.append(self.name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def close(self):
        pass

    def wait_ready(self, seconds):
        return {"ready": True, "import_s": 1.0, "context_s": 0.0}

    def go(self, seconds):
        return self.answers.get(self.name, sample)()


@pytest.fixture
def fake(monkeypatch):
    """Children that answer at once, and a cache that is as asked for."""
    monkeypatch.setattr(FakeChild, "answers", {})
    monkeypatch.setattr(FakeChild, "started", [])
    monkeypatch.setattr(process, "begin", FakeChild)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)

    def prepare(cache, paths):
        return residency.CacheState(cache, 0.0 if cache == "cold" else 1.0, "cachestat")

    monkeypatch.setattr(residency, "prepare", prepare)
    return FakeChild


@pytest.fixture
def found(file, fake):
    fake.answers["again"] = lambda: sample(load_s=0.25)
    race = race_of(file, "stock-mmap", "again", "not-installed", rounds=5, caches=("cold", "warm"))
    runner.race(race, screen.Screen())
    return found_of(race)
