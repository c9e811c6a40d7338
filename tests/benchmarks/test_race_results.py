"""Results of the race: merged, drawn, put into the README; and the command that makes them."""

# ruff: noqa: F401, F811 - fixtures come from race_harness
from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from race_harness import (
    ROOT,
    SOURCE,
    benchmarks_main,
    ceilings,
    charts,
    command,
    fake,
    file,
    found,
    found_of,
    process,
    race_of,
    readme,
    report,
    results,
    runner,
    sample,
    screen,
    watch,
    whole,
    workload,
)

from fastst_patch.bench import guarded
from fastst_patch.bench.checkpoint import transformer_specs, write_checkpoint
from fastst_patch.bench.failures import UsageError

# ---- results, reports, charts -------------------------------------------


def test_results_are_read_back_and_drawn_again(found, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    results.save(found, tmp_path)
    assert results.read(tmp_path) == json.loads(json.dumps(found))
    assert benchmarks_main.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| 1 | again |" in page
    assert "(summary.png)" in page
    assert within_limits(tmp_path / "summary.png")


def within_limits(path: Path) -> bool:
    """A PNG of at most 1,600 x 1,200 pixels, as its header tells."""
    head = path.read_bytes()[:24]
    assert head[:4] == b"\x89PNG"
    width, height = struct.unpack(">II", head[16:])
    return bool(width <= 1600 and height <= 1200)


def test_committed_results_are_small() -> None:
    files = [path for path in readme.RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    charts = [path for path in files if path.suffix == ".png"]
    assert charts
    assert all(map(within_limits, charts))


def test_chart_has_a_bar_for_each_family(found, tmp_path) -> None:
    rows = results.rows(found)
    (panel, *_), families = charts.panels(rows), {row.family for row in rows}
    bars = charts.bars(rows, panel)
    assert [bar.family for bar in bars] == sorted(families, key=[b.family for b in bars].index)
    assert bars[0].value == 1.0  # nobody is ours here: the fastest is the measure
    assert panel.measure(rows[-1]) == pytest.approx(2.0)


def test_page_and_readme_are_the_same_from_the_summary(found, tmp_path) -> None:
    thirds = json.loads(json.dumps(found))
    for number, run in enumerate(thirds["runs"]):
        run["sample"]["load_s"] += number / 3e4
    results.save_summary(thirds, tmp_path)
    summary = results.read(tmp_path)
    assert "runs" not in summary
    assert report.markdown([summary]) == report.markdown([thirds])
    assert readme.matrix(summary) == readme.matrix(thirds)
    results.save_summary(summary, tmp_path)
    assert results.read(tmp_path) == summary
    with pytest.raises(UsageError, match="no rounds to put together"):
        results.merge([thirds, summary])


def test_whole_calls_are_told(found) -> None:
    runs = [{"total_s": seconds, "memory": {"peak_rss": 7_000_000}} for seconds in (1.0, 3.0)]
    row = {"title": "a call", "cache": "cold", "contender": "patched", "runs": runs,
           "time / stock": {"median": 0.5}, "import s": {"median": 4.0}}  # fmt: skip
    found["end_to_end"] = {"results": [row], "skipped": {"x": "no"}, "errors": {"y": "bad\nluck"}}
    page = report.markdown([found])
    assert "| a call | cold | patched | 2.000 | 0.50 | 4.00 | 7 | 2 |" in page
    assert "- x: skipped: no." in page
    assert "- **y: FAILED**: bad luck" in page


def test_committed_report_is_that_of_its_summary() -> None:
    for folder in readme.folders():
        page = report.markdown([results.read(folder)], [[readme.CHART]])
        assert (folder / "report.md").read_text(encoding="utf-8") == page


def test_rounds_of_one_machine_are_added_up(found) -> None:
    (merged,) = results.merge([found, json.loads(json.dumps(found))])
    rows = results.rows(merged, "tiny", "warm")
    assert {row.rounds for row in rows} == {10}
    assert merged["seed"] == [7, 7]
    assert rows[0].to_stock.median == 0.5
    assert found["runs"] != merged["runs"]
    assert len(found["runs"]) * 2 == len(merged["runs"])
    (thrice,) = results.merge([merged, found])
    assert {row.rounds for row in results.rows(thrice, "tiny", "warm")} == {15}


def test_what_another_race_had_time_for_was_not_left_out(found) -> None:
    first = json.loads(json.dumps(found))
    first["dropped"] = {"tiny, warm: again": "no time", "tiny, cold: fastst": "no time"}
    first["runs"] = [run for run in first["runs"] if run["cache"] == "cold"]
    (merged,) = results.merge([first, found])
    assert list(merged["dropped"]) == ["tiny, cold: fastst"]


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
    assert len(results.read(tmp_path / "c")["runs"]) == 2 * len(found["runs"])


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
    runner.race(race, screen.Screen())
    found = found_of(race)
    row = next(one for one in results.rows(found, "tiny", "warm") if one.loader == "again")
    assert (row.state, row.rank, row.total_s, row.gb_per_s) == ("wrong", None, None, None)
    assert "and 3 more" in row.detail
    assert charts.draw(found, tmp_path) == ["summary.png"]
    assert "| 1 | stock-mmap |" in report.markdown([found])
    assert readme.matrix(found)[2:] == ["| tiny, 0.3 MB, warm | **1.50 s** (mmap) |  |"]
    alone = race_of(file, "again", rounds=5)
    runner.race(alone, screen.Screen())
    assert readme.matrix(found_of(alone))[2:] == ["| tiny, 0.3 MB, warm | wrong |  |"]


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
    assert charts.own_gb(row) == pytest.approx(0.2)
    copy = SimpleNamespace(memory={"peak": 3e9, "anonymous": 2e9, "file": 0.0, "pinned": 1e9})
    assert charts.own_gb(copy) == pytest.approx(4.0)


def test_peak_that_could_not_be_reset_is_no_number(found) -> None:
    assert results.rows(found, "tiny", "warm")[0].memory["peak"] == 30
    for run in found["runs"]:
        run["sample"] = run["sample"] | {"before": run["sample"]["before"] | {"peak_rss": 10**9}}
    row = results.rows(found, "tiny", "warm")[0]
    assert row.memory["peak"] is None
    assert row.memory["anonymous"] == 10


# ---- the README ---------------------------------------------------------


def test_pages_are_current() -> None:
    assert readme.main(check=True) == 0


def test_a_changed_number_is_found_and_mended(tmp_path, monkeypatch) -> None:
    text = readme.README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("| **0.", "| **1.", 1), encoding="utf-8")
    monkeypatch.setattr(readme, "README", copy)
    assert readme.main(check=True) == 1
    assert readme.main(check=False) == 0
    assert copy.read_text(encoding="utf-8") == text


def test_race_is_written_from_the_results(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    page, (begin, end) = tmp_path / "page.md", readme.markers("race")
    monkeypatch.setattr(readme, "PAGE", page)
    monkeypatch.setattr(readme, "parts", lambda: [(page, "race", readme.race)])
    folder = tmp_path / "results" / "here" / "race"
    folder.mkdir(parents=True)
    results.save_summary(found, folder)
    before = f"# x\n{begin}\nold\n{end}\ny\n"
    page.write_text(before)
    assert readme.main(check=True) == 1
    assert page.read_text() == before
    assert readme.main(check=False) == 0
    text = page.read_text()
    assert "| tiny, 0.3 MB, cold | **0.75 s** (again) |  |" in text
    assert "| tiny, 0.3 MB, warm | **0.75 s** (again) |  |" in text
    assert "(results/here/race/summary.png)" in text
    assert text.endswith(f"{end}\ny\n")
    assert readme.main(check=True) == 0
    page.write_text("no markers")
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

    suite = [workload(), workload("other")]
    monkeypatch.setattr(command.workloads, "suite", lambda name, device, disk, memory: suite)
    absent = {"real": "it is not installed"}
    monkeypatch.setattr(command.workloads, "absent", lambda: absent)
    monkeypatch.setattr(command.workloads, "write", write)
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
    suite = [workload()]
    monkeypatch.setattr(command.workloads, "suite", lambda *args: suite)
    monkeypatch.setattr(
        command.workloads, "write",
        lambda given, folder, progress: folder.mkdir() or [Path(shutil.copy(file, folder))],
    )  # fmt: skip
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


def test_who_the_others_are_compared_with_races() -> None:
    loaders = importlib.import_module("benchmarks.race.loaders")
    names = [loader.name for loader in loaders.LOADERS]
    assert len(set(names)) == len(names)
    assert {results.STOCK, results.OURS} <= set(names)
