"""benchmarks/race must not lie: wrong loaders, wrong caches, slow and hanging ones are caught."""

# ruff: noqa: F401, F811 - fixtures come from race_harness
from __future__ import annotations

import contextlib
import importlib
import json
import platform
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from race_harness import (
    FakeChild,
    benchmarks_main,
    ceilings,
    entrants,
    fake,
    file,
    found_of,
    plan,
    process,
    race_of,
    report,
    results,
    runner,
    sample,
    screen,
    states,
    truth,
    who,
    workload,
)

from fastst_patch import engine
from fastst_patch.bench import hardware, residency
from fastst_patch.bench.failures import UsageError

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


def test_wrong_and_crashing_loaders_are_listed_and_the_race_goes_on(file, monkeypatch) -> None:
    begin = process.begin

    def some_copied(message, environment=None, *, copied=False):
        # Copies are as wrong as fresh processes (test_race_process.py), and sooner ready.
        return begin(message, environment, copied=message["loader"] not in RIGHT)

    monkeypatch.setattr(process, "begin", some_copied)
    race = race_of(file, *WRONG, *CRASHING, *RIGHT, rounds=2)
    runner.race(race, screen.Screen())
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
    runner.race(race, screen.Screen())
    assert [run["outcome"] for run in race.runs] == ["time limit"]
    assert "1 s passed while loading" in race.runs[0]["detail"]
    assert states(race) == {"hangs": "time limit"}


def test_cold_load_and_a_second_one_in_a_new_process(file, on_disk) -> None:
    race = race_of(file, "stock-mmap", caches=("cold",), ceilings=True)
    runner.race(race, screen.Screen())
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


def test_slow_loader_shows_as_slow(file, fake) -> None:
    fake.answers["chatters"] = lambda: sample(load_s=2.5)  # of 3 s with reading, against 1.5
    race = race_of(file, "stock-mmap", "chatters", "again", rounds=5)
    fake.answers["again"] = lambda: sample(load_s=0.25)
    runner.race(race, screen.Screen())
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
    runner.race(race, screen.Screen())
    row = next(r for r in results.rows(found_of(race), "tiny", "warm") if r.loader == "again")
    assert (row.to_stock.low, row.to_stock.median, row.to_stock.high) == (0.25, 0.25, 0.25)


def test_warm_run_called_cold_is_caught(file, on_disk, monkeypatch) -> None:
    monkeypatch.setattr(process, "begin", FakeChild)
    monkeypatch.setattr(FakeChild, "answers", {})
    monkeypatch.setattr(FakeChild, "started", [])
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    monkeypatch.setattr(residency, "evict", residency.warm)
    race = race_of(file, "stock-mmap", caches=("cold",), rounds=5)
    runner.race(race, screen.Screen())
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
    runner.race(race, screen.Screen())
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
        runner.race(race, screen.Screen())
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
        yield runner.Written((str(file),), str(path), {"again": "does not know the dtype BF16"})

    race.provide = provide
    runner.race(race, screen.Screen())
    assert {run["loader"] for run in race.runs} == {"stock-mmap"}
    assert "- again: not run here: does not know the dtype BF16." in report.markdown(
        [found_of(race)]
    )


# ---- who is there -------------------------------------------------------


def test_missing_loaders_are_listed_with_the_reason(file, fake) -> None:
    race = race_of(file, "stock-mmap", "not-installed", "gpu-only", "beside")
    runner.race(race, screen.Screen())
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
    sums = child.touched(tensors, entries)
    assert truth.differences(entries, tensors, sums, "cpu") == []
    assert truth.dtypes([str(file)]) == ["BF16"]
    name = entries[5].name
    changed = tensors | {name: tensors[name].t() if tensors[name].dim() == 2 else tensors[name]}
    if tensors[name].dim() == 2:
        assert truth.differences(entries, changed, child.touched(changed, entries), "cpu")
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


@pytest.mark.parametrize(
    ("start_s", "seconds"), [(plan.START_S, 1.0), (plan.COPY_START_S, 0.3 + 0.7 / 4)]
)
def test_a_quarter_of_the_bytes_takes_less_of_what_is_no_start(start_s, seconds) -> None:
    big, small = unit("a", ["x", "y"], nbytes=400), unit("b", ["x"], nbytes=100)
    planner = plan.Planner([big, small], budget_s=None, rounds=5, start_s=start_s)
    planner.took(big.cell, 2.0)
    assert planner.predicted(small) == pytest.approx(seconds)


def test_rounds_are_never_fewer(file, fake) -> None:
    race = race_of(file, "stock-mmap", "again", rounds=5)
    race.planner.budget_s = 0.0
    runner.race(race, screen.Screen())
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
