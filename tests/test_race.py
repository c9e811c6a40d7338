"""benchmarks/race must not lie: wrong loaders, wrong caches, slow and hanging ones are caught."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import platform
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import race_standins
import torch

from fastst_patch import engine
from fastst_patch.bench import guarded, machine, residency
from fastst_patch.bench.checkpoint import transformer_specs, write_checkpoint
from fastst_patch.bench.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent

if engine.native_error() is not None:
    pytest.skip("no native extension", allow_module_level=True)
if not (ROOT / "benchmarks" / "race").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
sys.path.append(str(ROOT))  # last: what is installed is tested, and not the checkout

ceilings = importlib.import_module("benchmarks.race.ceilings")
charts = importlib.import_module("benchmarks.race.charts")
command = importlib.import_module("benchmarks.race.command")
entrants = importlib.import_module("benchmarks.race.entrants")
plan = importlib.import_module("benchmarks.race.plan")
process = importlib.import_module("benchmarks.race.process")
readme = importlib.import_module("benchmarks.race.readme")
report = importlib.import_module("benchmarks.race.report")
results = importlib.import_module("benchmarks.race.results")
runner = importlib.import_module("benchmarks.race.runner")
truth = importlib.import_module("benchmarks.race.truth")
whole = importlib.import_module("benchmarks.race.whole")
watch = importlib.import_module("benchmarks.race.watch")
benchmarks_main = importlib.import_module("benchmarks.__main__")

SOURCE = entrants.Source("race_standins", str(Path(__file__).resolve().parent))


@pytest.fixture
def on_disk(tmp_path):
    if machine.filesystem(tmp_path).in_memory:
        pytest.skip("the temporary directory is in memory, which is never cold")


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
        yield runner.Written((str(file),), file.stat().st_size, str(path))

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
    found = found_of(race)
    return {
        row.loader: row.state for cell in results.cells(found) for row in results.rows(found, *cell)
    }


# ---- with processes: who is wrong, and who fails ------------------------

WRONG = {
    "swaps-bytes": "its bytes are not the file's",
    "swaps-tensors": "its bytes are not the file's",
    "forgets-one": "missing",
    "adds-one": "another: in no file",
    "wrong-dtype": "not bfloat16",
    "borrows": "its bytes are not the file's",
}
CRASHING = {"raises": "ValueError: no good in file.bin", "dies": "SIGABRT"}
RIGHT = ("stock-mmap", "chatters")


def test_wrong_and_crashing_loaders_are_listed_and_the_race_goes_on(file) -> None:
    race = race_of(file, *WRONG, *CRASHING, *RIGHT, rounds=2)
    runner.race(race, runner.Shown())
    outcomes = {(run["loader"], run["round"]): run for run in race.runs}
    for name, text in WRONG.items():
        assert outcomes[name, 1]["outcome"] == "wrong"
        assert text in outcomes[name, 1]["detail"]
    for name, text in CRASHING.items():
        assert outcomes[name, 1]["outcome"] == "crashed"
        assert text in outcomes[name, 1]["detail"]
        assert outcomes[name, 1]["sample"] is None
    assert {name for name, number in outcomes if number == 2} == set(RIGHT)  # the others are out
    for name in RIGHT:
        for number in (1, 2):
            sample = outcomes[name, number]["sample"]
            assert outcomes[name, number]["outcome"] == "ok"
            assert sample["tensors"] == 147
            assert sample["touch_s"] > 0
            assert 0 < sample["first_s"] <= sample["load_s"]
            assert sample["import_s"] > 0
            assert sample["after"]["peak_rss"] >= sample["after"]["rss"] // 2
            assert sample["versions"]["safetensors"]
    found = found_of(race)
    assert {row.loader: row.state for row in results.rows(found, "tiny", "warm")} == (
        dict.fromkeys(WRONG, "wrong") | dict.fromkeys(CRASHING, "crashed")
        | dict.fromkeys(RIGHT, "few rounds")
    )  # fmt: skip
    page = report.markdown([found])
    for name, text in {**WRONG, **CRASHING}.items():
        assert f"**{name}: " in page
        assert text in page
    # Nothing that tells whose machine this is.
    text = json.dumps(found)
    for secret in (str(file.parent), str(Path.home()) + "/", platform.node()):
        assert len(secret) < 4 or secret not in text


def test_hanging_loader_is_ended_and_listed(file) -> None:
    race = race_of(file, "hangs", limit_s=1.0)
    runner.race(race, runner.Shown())
    assert [run["outcome"] for run in race.runs] == ["time limit"]
    assert "1 s passed while loading" in race.runs[0]["detail"]
    assert states(race) == {"hangs": "time limit"}


def test_cold_load_and_a_second_one_in_a_new_process(file, on_disk) -> None:
    race = race_of(file, "stock-mmap", caches=("cold",), ceilings=True)
    runner.race(race, runner.Shown())
    first, second = race.runs
    if first["verified"] is None:
        pytest.skip("this kernel does not tell what is cached")
    assert (first["outcome"], first["again"], second["again"]) == ("ok", False, True)
    assert first["sample"]["resident_before"] == 0
    assert second["sample"]["resident_before"] > 0.5
    assert first["resident_after"] > 0.5
    names = {one["name"]: one for one in race.boards["tiny"].to_json("tiny")}
    assert names[ceilings.TOUCH]["gb_per_s"] > 0
    assert set(names[ceilings.MEMCPY]["tried"]) >= {"1 thread"}
    assert names["cold buffered read"]["gb_per_s"] > 0
    assert set(race.orders[0]["order"]) == {
        "stock-mmap", "O_DIRECT read", "cold buffered read", "memory read, one core and memcpy",
    }  # fmt: skip


# ---- without processes: caches, slowness, order -------------------------


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

    def __init__(self, message, environment=None):
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
    monkeypatch.setattr(process, "Child", FakeChild)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)

    def prepare(cache, paths):
        return residency.CacheState(cache, 0.0 if cache == "cold" else 1.0, "cachestat")

    monkeypatch.setattr(residency, "prepare", prepare)
    return FakeChild


def test_slow_loader_shows_as_slow(file, fake) -> None:
    fake.answers["chatters"] = lambda: sample(load_s=2.5)  # of 3 s with reading, against 1.5
    race = race_of(file, "stock-mmap", "chatters", "again", rounds=5)
    fake.answers["again"] = lambda: sample(load_s=0.25)
    runner.race(race, runner.Shown())
    rows = results.rows(found_of(race), "tiny", "warm")
    assert [(row.loader, row.rank) for row in rows] == [
        ("again", 1), ("stock-mmap", 2), ("chatters", 3),
    ]  # fmt: skip
    assert [row.to_stock.median for row in rows] == [0.5, 1.0, 2.0]
    assert rows[2].gb_per_s == pytest.approx(300_000 / 3.0 / 1e9)
    assert rows[2].state == "ok"
    assert rows[2].memory["peak"] == 30
    assert rows[2].memory["anonymous"] == 10


def test_ratios_are_paired_by_round(file, fake) -> None:
    """A machine that gets slower from round to round changes no ratio."""
    factor = iter(2.0**n for n in range(100))
    times: dict[int, float] = {}

    def drifting(share):
        def answer():
            number = len(fake.started)
            times.setdefault((number - 1) // 2, next(factor))
            return sample(load_s=share * times[(number - 1) // 2], touch_s=0.0)

        return answer

    fake.answers |= {"stock-mmap": drifting(1.0), "again": drifting(0.25)}
    race = race_of(file, "stock-mmap", "again", rounds=6, at_once=1)
    runner.race(race, runner.Shown())
    row = next(r for r in results.rows(found_of(race), "tiny", "warm") if r.loader == "again")
    assert (row.to_stock.low, row.to_stock.median, row.to_stock.high) == (0.25, 0.25, 0.25)


def test_warm_run_called_cold_is_caught(file, on_disk, monkeypatch) -> None:
    monkeypatch.setattr(process, "Child", FakeChild)
    monkeypatch.setattr(FakeChild, "answers", {})
    monkeypatch.setattr(FakeChild, "started", [])
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    monkeypatch.setattr(residency, "evict", residency.warm)
    race = race_of(file, "stock-mmap", caches=("cold",), rounds=5)
    runner.race(race, runner.Shown())
    if race.runs[0]["verified"] is None:
        pytest.skip("this kernel does not tell what is cached")
    assert {run["outcome"] for run in race.runs} == {"cache"}
    assert {run["tries"] for run in race.runs} == {runner.TRIES}
    assert "to be cold, but 100.0% of the bytes were in the page cache" in race.runs[0]["detail"]
    rows = results.rows(found_of(race), "tiny", "cold")
    assert [(row.state, row.rank, row.total_s) for row in rows] == [("cache", None, None)]
    assert "page cache not as it should be" in report.markdown([found_of(race)])


def test_file_warmed_behind_our_back_is_caught(file, fake) -> None:
    """The state is looked at again by the timed process, just before its clock starts."""
    resident = iter([0.7, 0.0])
    fake.answers["stock-mmap"] = lambda: sample(resident_before=next(resident))
    race = race_of(file, "stock-mmap", caches=("cold",), planner=None)
    one = workload()
    unit = plan.Unit(plan.Cell("tiny", "cold"), ("stock-mmap",), 300_000, again=False)
    race.planner = plan.Planner([unit], None, 1)
    race.workloads = [one]
    runner.race(race, runner.Shown())
    assert [(run["outcome"], run["tries"]) for run in race.runs] == [("ok", 2)]


def test_stock_under_our_name_is_no_result() -> None:
    path = {"bytes": {"stock": 5}, "fallbacks": {"framework": 1}}
    state = residency.CacheState("warm", 1.0, "cachestat")
    judged = runner.judge("warm", state, sample(path=path))
    assert judged["outcome"] == "crashed"
    assert "no result under our name: framework" in judged["detail"]
    assert (
        runner.judge("warm", state, sample(path={"bytes": {"mmap": 5}, "fallbacks": {}}))["outcome"]
        == "ok"
    )


def test_order_is_random_noted_and_comes_back_with_the_seed(file, fake) -> None:
    def orders(seed):
        race = race_of(file, "stock-mmap", "again", "chatters", "borrows", rounds=6, seed=seed)
        runner.race(race, runner.Shown())
        return [one["order"] for one in race.orders]

    one = orders(1)
    assert orders(1) == one
    assert len({tuple(order) for order in one}) > 1
    assert all(set(order) == {"stock-mmap", "again", "chatters", "borrows"} for order in one)


def test_refused_workload_is_listed(file, fake) -> None:
    race = race_of(file, "stock-mmap", "again")

    @contextlib.contextmanager
    def provide(_):
        path = file.parent / "truth.json"
        truth.write(truth.of([str(file)]), path)
        yield runner.Written((str(file),), 1, str(path), {"again": "does not know the dtype BF16"})

    race.provide = provide
    runner.race(race, runner.Shown())
    assert {run["loader"] for run in race.runs} == {"stock-mmap"}
    assert "- again: not run here: does not know the dtype BF16." in report.markdown(
        [found_of(race)]
    )


# ---- who is there -------------------------------------------------------


def test_missing_loaders_are_listed_with_the_reason(file, fake) -> None:
    race = race_of(file, "stock-mmap", "not-installed", "gpu-only", "beside")
    runner.race(race, runner.Shown())
    found = found_of(race)
    assert found["missing"] == {
        "not-installed": "nowhere to be found: pip install nowhere",
        "gpu-only": "does not load to cpu",
        "beside": "pip could not install other==1.0: no network",
    }
    page = report.markdown([found])
    for name, reason in found["missing"].items():
        assert f"| {name} | {reason} |" in page
    assert {one["name"] for one in found["loaders"]} == {"stock-mmap", *found["missing"]}


def test_unknown_loader_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--loaders: nobody: not among"):
        who("nobody")


def test_reasons_tell_no_folders() -> None:
    text = 'File "/home/someone/venv/lib/x.py", line 3\n  in a/b: 3 GB/s at /data/models/m.bin'
    assert entrants.scrub(text) == 'File "x.py", line 3 in a/b: 3 GB/s at m.bin'


def test_children_are_not_patched_by_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("FASTST_ENABLED", "1")
    monkeypatch.setenv("FASTST_RACE_ENVIRONMENTS", "/somewhere")
    variables = process.environment_variables()
    assert "FASTST_ENABLED" not in variables
    assert variables["FASTST_RACE_ENVIRONMENTS"] == "/somewhere"


# ---- the truth ----------------------------------------------------------


def test_truth_is_what_stock_loads(file) -> None:
    import safetensors.torch

    tensors = safetensors.torch.load_file(file)
    entries = truth.of([str(file)])
    child = importlib.import_module("benchmarks.race.child")
    sums = child.touch(tensors, entries)
    assert truth.differences(entries, tensors, sums, "cpu") == []
    assert truth.dtypes([str(file)]) == ["BF16"]
    name = entries[5].name
    changed = tensors | {name: tensors[name].t() if tensors[name].dim() == 2 else tensors[name]}
    if tensors[name].dim() == 2:
        assert truth.differences(entries, changed, child.touch(changed, entries), "cpu")
    assert "on cpu, not on cuda" in truth.differences(entries, tensors, sums, "cuda")[0]


def test_one_name_in_two_files_is_refused(file) -> None:
    with pytest.raises(Exception, match="stands in two files"):
        truth.of([str(file), str(file)])


def test_checksum_sees_one_swapped_pair_of_bytes_wherever_it_is() -> None:
    chance = random.Random(3)
    tensor = torch.randint(0, 256, (10_007,), dtype=torch.uint8)
    before = engine.touch(tensor.data_ptr(), tensor.nbytes)
    for _ in range(200):
        one, other = chance.sample(range(tensor.numel()), 2)
        if tensor[one] == tensor[other]:
            continue
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        assert engine.touch(swapped.data_ptr(), swapped.nbytes) != before


# ---- the plan -----------------------------------------------------------


def unit(name, loaders, cache="warm", again=False, nbytes=10**9):
    return plan.Unit(plan.Cell(name, cache), tuple(loaders), nbytes, again)


def test_first_workload_goes_first_then_families_then_the_rest() -> None:
    loaders = [SimpleNamespace(name=name, family=name[0]) for name in ("a1", "a2", "b1", "b2")]
    made = plan.units([workload("big"), workload("small")], loaders, ("cold", "warm"), False)
    assert [(one.cell.workload, one.cell.cache, one.loaders, one.again) for one in made] == [
        ("big", "cold", ("a1", "b1"), True),
        ("big", "warm", ("a1", "b1"), False),
        ("big", "cold", ("a2", "b2"), False),
        ("big", "warm", ("a2", "b2"), False),
        ("small", "cold", ("a1", "b1"), False),
        ("small", "warm", ("a1", "b1"), False),
        ("small", "cold", ("a2", "b2"), False),
        ("small", "warm", ("a2", "b2"), False),
    ]


def test_what_does_not_fit_is_dropped_from_the_end_and_named() -> None:
    units = [unit("a", ["x"]), unit("a", ["y"]), unit("b", ["x"]), unit("b", ["y"])]
    planner = plan.Planner(units, budget_s=100.0, rounds=5, write_s=0.0)
    planner.passed.add("a")
    planner.took(plan.Cell("a", "warm"), 10.0)  # both units of a: 5 s a round each
    planner.fit(elapsed_s=10.0)
    # 40 s are left for a's rounds; b's unit takes 5 rounds of 5 s: 25 s each, so both fit in 90.
    assert [str(one) for one in planner.units] == [
        "a, warm: x", "a, warm: y", "b, warm: x", "b, warm: y",
    ]  # fmt: skip
    planner.fit(elapsed_s=11.0)
    assert [str(one) for one in planner.units] == ["a, warm: x", "a, warm: y", "b, warm: x"]
    assert list(planner.dropped) == ["b, warm: y"]
    planner.fit(elapsed_s=10.0)
    assert not planner.dropped  # b's turn has not come: there is time again
    planner.passed.add("b")
    planner.fit(elapsed_s=11.0)
    planner.fit(elapsed_s=10.0)
    assert list(planner.dropped) == ["b, warm: y"]  # it has: its rounds would be too few
    planner.fit(elapsed_s=1000.0)  # begun units go last, and one stays whatever it takes
    assert [str(one) for one in planner.units] == ["a, warm: x"]
    assert "after 1 rounds" in planner.dropped["a, warm: y"]


def test_rounds_are_never_fewer(file, fake) -> None:
    race = race_of(file, "stock-mmap", "again", rounds=5)
    race.planner.budget_s = 0.0
    runner.race(race, runner.Shown())
    counts = {name: sum(run["loader"] == name for run in race.runs) for name in ("stock-mmap",)}
    assert counts == {"stock-mmap": 5}


def test_no_budget_drops_nothing() -> None:
    planner = plan.Planner([unit("a", ["x"]), unit("b", ["x"])], budget_s=None, rounds=5)
    planner.fit(elapsed_s=1e9)
    assert len(planner.units) == 2


# ---- ceilings -----------------------------------------------------------


def test_binding_ceiling_is_the_narrowest_that_nobody_can_avoid() -> None:
    speeds = {
        "O_DIRECT read": 3.0, "cold buffered read": 2.0, "page-cache read": 9.0,
        ceilings.TOUCH: 20.0, ceilings.PINNED: 12.0, ceilings.PAGEABLE: 6.0,
    }  # fmt: skip
    assert ceilings.binding("cold", "cpu", speeds) == "O_DIRECT read"
    assert ceilings.binding("warm", "cpu", speeds) == ceilings.TOUCH
    assert ceilings.binding("cold", "cuda", speeds) == "O_DIRECT read"
    assert ceilings.binding("warm", "cuda", speeds) == "page-cache read"
    assert ceilings.binding("warm", "cuda", speeds | {"page-cache read": 99.0}) == ceilings.PINNED
    assert ceilings.binding("cold", "cpu", {ceilings.TOUCH: 20.0}) is None


def test_ceilings_of_small_workloads_are_those_of_the_first() -> None:
    entries = [{"workload": "big", "name": "x", "gb_per_s": 2.0},
               {"workload": "big", "name": "y", "gb_per_s": None}]  # fmt: skip
    assert ceilings.speeds_of(entries, "small") == {"x": 2.0}
    assert ceilings.speeds_of([], "small") == {}


def test_ceilings_alone(file, capsys, tmp_path) -> None:
    written = tmp_path / "ceilings.json"
    arguments = ["ceilings", "--file", str(file), "--rounds", "1", "--json", str(written)]
    assert benchmarks_main.main(arguments) == 0
    found = json.loads(written.read_text())
    assert {"memcpy", "memory read, one core"} <= {one["name"] for one in found["ceilings"]}
    assert "memcpy" in capsys.readouterr().out
    assert str(file.parent) not in written.read_text()


def test_ceilings_of_no_file_is_a_usage_error(tmp_path, capsys) -> None:
    assert benchmarks_main.main(["ceilings", "--file", str(tmp_path / "absent")]) == 2
    assert "no such file" in capsys.readouterr().err


# ---- results, reports, charts -------------------------------------------


@pytest.fixture
def found(file, fake):
    fake.answers["again"] = lambda: sample(load_s=0.25)
    race = race_of(file, "stock-mmap", "again", "not-installed", rounds=5, caches=("cold", "warm"))
    runner.race(race, runner.Shown())
    return found_of(race)


def test_results_are_read_back_and_drawn_again(found, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    results.save(found, tmp_path)
    assert results.read(tmp_path) == json.loads(json.dumps(found))
    assert benchmarks_main.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| 1 | again |" in page
    for name in ("speed.png", "first-tensor.png", "memory.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_rounds_of_one_machine_are_added_up(found) -> None:
    (merged,) = results.merge([found, json.loads(json.dumps(found))])
    rows = results.rows(merged, "tiny", "warm")
    assert {row.rounds for row in rows} == {10}
    assert merged["seed"] == [7, 7]
    assert rows[0].to_stock.median == 0.5
    assert found["runs"] != merged["runs"]
    assert len(found["runs"]) * 2 == len(merged["runs"])


def test_another_machine_or_version_is_another_section(found) -> None:
    other = json.loads(json.dumps(found))
    other["environment"]["cpu"] = "another CPU"
    newer = json.loads(json.dumps(found))
    newer["loaders"][0]["version"] = "99"
    larger = json.loads(json.dumps(found))
    larger["workloads"][0]["nbytes"] += 1
    assert len(results.merge([found, other])) == 2
    assert len(results.merge([found, newer])) == 2
    assert len(results.merge([found, larger])) == 2
    page = report.markdown(results.merge([found, other]))
    assert page.count("### tiny, warm") == 2
    assert "another CPU" in page


def test_a_loader_missing_in_one_race_but_not_the_other(found) -> None:
    other = json.loads(json.dumps(found))
    other["missing"]["again"] = "not this time"
    other["runs"] = [run for run in other["runs"] if run["loader"] != "again"]
    (merged,) = results.merge([other, found])
    assert merged["missing"] == found["missing"]
    rounds = {row.loader: row.rounds for row in results.rows(merged, "tiny", "warm")}
    assert rounds == {"again": 5, "stock-mmap": 10}


def test_several_results_need_a_place(found, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        results.save(found, tmp_path / name)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert benchmarks_main.main(["report", *folders]) == 2
    assert "--out" in capsys.readouterr().err
    assert benchmarks_main.main(["report", *folders, "--out", str(tmp_path / "c")]) == 0
    assert "Medians of 10 rounds" in (tmp_path / "c" / "report.md").read_text()


def test_what_is_no_result_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        results.read(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="not results of"):
        results.read(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        results.read(tmp_path)


def test_wrong_loader_has_no_time_and_no_bar(file, fake, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    fake.answers["again"] = lambda: sample(wrong=["x: its bytes are not the file's"],
                                           wrong_count=4)  # fmt: skip
    race = race_of(file, "stock-mmap", "again", rounds=5)
    runner.race(race, runner.Shown())
    found = found_of(race)
    row = next(one for one in results.rows(found, "tiny", "warm") if one.loader == "again")
    assert (row.state, row.rank, row.total_s, row.gb_per_s) == ("wrong", None, None, None)
    assert "and 3 more" in row.detail
    assert charts.draw(found, tmp_path) == ["speed.png", "first-tensor.png", "memory.png"]
    assert "| 1 | stock-mmap |" in report.markdown([found])
    assert "| again | wrong |" in "\n".join(readme.matrix(found))


def test_our_own_failure_is_the_exit_status(found) -> None:
    assert command.verdict(found) == 0
    ours = json.loads(json.dumps(found))
    ours["loaders"][1]["family"] = "fastst"
    for run in ours["runs"]:
        if run["loader"] == ours["loaders"][1]["name"]:
            run["outcome"] = "crashed"
    assert command.verdict(ours) == 1


def test_memory_of_a_map_is_told_from_a_copy() -> None:
    row = SimpleNamespace(memory={"peak": 2e9, "anonymous": 0.1e9, "file": 1.8e9})
    assert charts.own_and_whole(row) == pytest.approx((0.2, 2.0))
    copy = SimpleNamespace(memory={"peak": 3e9, "anonymous": 2e9, "file": 0.0, "pinned": 1e9})
    assert charts.own_and_whole(copy) == pytest.approx((4.0, 4.0))


def test_peak_that_could_not_be_reset_is_no_number(found) -> None:
    assert results.rows(found, "tiny", "warm")[0].memory["peak"] == 30
    for run in found["runs"]:
        run["sample"] = run["sample"] | {"before": run["sample"]["before"] | {"peak_rss": 10**9}}
    row = results.rows(found, "tiny", "warm")[0]
    assert row.memory["peak"] is None
    assert row.memory["anonymous"] == 10


# ---- the README ---------------------------------------------------------


def test_readme_is_current() -> None:
    assert readme.main(check=True) == 0


def test_readme_is_written_from_the_results(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    folder = tmp_path / "results" / "here" / "race"
    folder.mkdir(parents=True)
    results.save(found, folder)
    before = f"# x\n{readme.BEGIN}\nold\n{readme.END}\ny\n"
    (tmp_path / "README.md").write_text(before)
    assert readme.main(check=True) == 1
    assert (tmp_path / "README.md").read_text() == before
    assert readme.main(check=False) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| loader | tiny, 0.3 MB, cold | tiny, 0.3 MB, warm |" in text
    assert "| again | **0.75 s** | **0.75 s** |" in text
    assert "(results/here/race/speed.png)" in text
    assert text.endswith(f"{readme.END}\ny\n")
    assert readme.main(check=True) == 0
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UsageError, match="expected one line"):
        readme.main(check=True)


# ---- the command --------------------------------------------------------


def test_whole_command(file, fake, tmp_path, monkeypatch, capsys, on_disk) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")

    def write(one, folder, progress):
        folder.mkdir(parents=True)
        path = folder / "model.safetensors"
        write_checkpoint(path, transformer_specs(one.nbytes), progress)
        return [path]

    module = SimpleNamespace(
        suite=lambda name, device, disk, memory: [workload(), workload("other")],
        absent=lambda suite: {"real": "it is not installed"},
        write=write,
    )
    monkeypatch.setitem(sys.modules, command._WORKLOADS, module)
    parse = benchmarks_main.parser().parse_args
    out = tmp_path / "out"
    common = ["race", "--out", str(out), "--dir", str(tmp_path), "--no-end-to-end", "--seed", "3"]

    def run(*arguments):
        args = parse([*common, *arguments])
        args.rounds = 1
        monkeypatch.setattr(command, "board", None, raising=False)
        return guarded("race", lambda: command.race(args, SOURCE))

    monkeypatch.setattr(runner, "board", lambda device, caches, files: ceilings.Board((), {}, []))
    assert run("--loaders", "stock-mmap,again,gpu-only", "--workloads", "tiny,real") == 0
    printed = capsys.readouterr()
    found = results.read(out)
    assert found["seed"] == 3
    assert {run["workload"] for run in found["runs"]} == {"tiny"}
    assert found["missing"] == {"gpu-only": "does not load to cpu"}
    assert found["absent"] == {"real": "it is not installed"}
    assert "real: no such workload here: it is not installed." in printed.out
    assert "No rank, for fewer than 5 rounds" in printed.out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("fastst-bench-")]
    text = json.dumps(found)
    assert str(tmp_path) not in text
    assert os.fspath(Path.home()) + "/" not in text
    assert run("--workloads", "none") == 2
    assert run("--workloads", "real") == 2
    assert "it is not installed" in capsys.readouterr().err


def test_no_device_is_a_usage_error(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    monkeypatch.setattr(process, "ask", lambda message: {"gpu": None, "reason": "no driver"})
    arguments = ["race", "--device", "cuda", "--out", str(tmp_path / "out")]
    assert benchmarks_main.main(arguments) == 2
    assert "--device cuda: no driver" in capsys.readouterr().err


def test_what_an_interruption_leaves_can_be_drawn(
    file, fake, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    one = workload()
    module = SimpleNamespace(
        suite=lambda *args: [one],
        write=lambda given, folder, progress: folder.mkdir() or [Path(shutil.copy(file, folder))],
    )
    monkeypatch.setitem(sys.modules, command._WORKLOADS, module)
    monkeypatch.setattr(runner, "board", lambda *args: ceilings.Board((), {}, []))

    def interrupted():
        if len(fake.started) > 4:
            raise KeyboardInterrupt
        return sample()

    fake.answers["stock-mmap"] = interrupted
    out = tmp_path / "out"
    arguments = ["race", "--out", str(out), "--dir", str(tmp_path), "--no-end-to-end",
                 "--loaders", "stock-mmap"]  # fmt: skip
    args = benchmarks_main.parser().parse_args(arguments)
    assert guarded("race", lambda: command.race(args, SOURCE)) == 130
    assert "python -m benchmarks report" in capsys.readouterr().err
    assert not list(tmp_path.glob("fastst-bench-*"))
    assert benchmarks_main.main(["report", str(out)]) == 0
    assert "tiny, warm" in capsys.readouterr().out


def test_the_installed_package_comes_first(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "elsewhere", str(ROOT), "packages"])
    benchmarks_main.installed_first()
    assert sys.path == ["elsewhere", "packages", str(ROOT)]


def test_end_to_end_that_fails_is_told_and_no_reason_to_stop(tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    monkeypatch.setattr(whole, "SCRIPT", script)
    script.write_text("raise SystemExit(3)")
    failed = whole.measure("cpu", "quick", tmp_path, 5, 60.0)
    assert failed["errors"] == {"all rows": "end_to_end.py ended with exit status 3"}
    script.write_text(
        "import json, sys\n"
        "target = sys.argv[sys.argv.index('--json') + 1]\n"
        "found = {'results': [], 'skipped': {'a': 'no'}, 'errors': {'b': 'in /x/y/z.py\\nbad'}}\n"
        "json.dump(found | {'given': sys.argv[1:]}, open(target, 'w'))\n"
    )
    found = whole.measure("cpu", "quick", tmp_path, 5, 60.0)
    assert found["errors"] == {"b": "in z.py bad"}
    assert "--offers" in found["given"]
    assert found["given"][found["given"].index("--max-seconds") + 1] == "30"
    assert not list(tmp_path.glob("end-to-end-*"))


def test_rows_of_end_to_end_exist() -> None:
    names = {
        name for rows in (whole.ROWS, whole.QUICK_ROWS) for row in rows.values() for name in row
    }
    text = (ROOT / "benchmarks" / "_rows.py").read_text(encoding="utf-8")
    assert all(f'@row("{name}"' in text for name in names)


def test_watch_without_nvml_says_nothing() -> None:
    blind = watch.DeviceWatch(None)
    with blind.peak() as risen:
        pass
    assert blind.used() is None
    assert risen == []


def test_watch_finds_the_peak(monkeypatch) -> None:
    seen = iter([100, 150, 400, 120])
    looking = watch.DeviceWatch(None)
    last = [100]

    def used():
        last[0] = next(seen, last[0])
        return last[0]

    monkeypatch.setattr(looking, "used", used)
    monkeypatch.setattr(watch, "_EVERY_S", 0.001)
    with looking.peak() as risen:
        while last[0] != 120:
            pass
    assert risen == [300]


def test_interface_of_loaders_is_what_stand_ins_have() -> None:
    loader = race_standins.LOADERS[0]
    names = {field.name for field in dataclasses.fields(loader)}
    wanted = {"name", "family", "devices", "package", "environment", "note"}
    assert wanted <= names
    for method in ("missing", "load", "warm_imports"):
        assert callable(getattr(loader, method))
