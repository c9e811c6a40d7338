"""The bench must not lie: wrong loaders, wrong cache states and bad files are caught."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from fastst_patch import cli, engine
from fastst_patch.bench import (
    ceilings,
    child,
    files,
    job,
    machine,
    plot,
    residency,
    results,
    runner,
    settle,
    stats,
    table,
)
from fastst_patch.bench.errors import BenchError, UsageError

native = pytest.mark.skipif(engine.native_error() is not None, reason="no native extension")


@pytest.fixture
def on_disk(tmp_path):
    if machine.filesystem(tmp_path).in_memory:
        pytest.skip("the temporary directory is in memory, which is never cold")


def run_cli(*arguments):
    return cli.main([str(argument) for argument in arguments])


def sample(loader="stock", digests=("same",), **changes):
    made = job.Sample(
        load_s=0.5,
        touch_s=0.5,
        digests=digests,
        tensors=147,
        bytes=10**9,
        path="stock" if loader == "stock" else "mmap+readahead",
        fallbacks=(),
        resident_before=None,
        memory={"peak_rss": 1},
        memory_before={"peak_rss": 1},
        versions={"torch": "2", "safetensors": "0.8"},
        device_name="cpu",
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def fake_runs(monkeypatch):
    """Children that answer at once; each job handed to them, and an answer to override."""
    jobs, answers = [], {}

    def run_load(one, gate):
        jobs.append(one)
        with gate:
            pass
        return answers.get(one.loader, sample)(one.loader)

    monkeypatch.setattr(runner, "run_load", run_load)
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    return jobs, answers


# ---- cache state --------------------------------------------------------


def test_weakest_verdict_counts():
    assert residency.weakest([True, True]) is True
    assert residency.weakest([True, None]) is None
    assert residency.weakest([None, False, True]) is False


@native
def test_prepare_makes_and_proves_both_states(transformer, on_disk):
    for cache in ("cold", "warm", "cold"):
        state = residency.prepare(cache, [str(transformer)])
        if state.fraction is None:
            pytest.skip("this kernel does not tell what is cached")
        assert state.verified, state


@native
def test_warm_run_called_cold_is_caught(
    transformer, on_disk, monkeypatch, fake_runs, capsys, tmp_path
):
    monkeypatch.setattr(residency, "evict", residency.warm)
    report = tmp_path / "report.json"
    status = run_cli("bench", transformer, "--cache", "cold", "--repeat", 1, "--json", report)
    written = json.loads(report.read_text())
    if written["verified"] is None:
        pytest.skip("this kernel does not tell what is cached")
    assert status == 1
    assert [row["verified"] for row in written["results"]] == [False, False]
    captured = capsys.readouterr()
    assert "cold!" in captured.out
    assert "page cache" in captured.err


def test_file_warmed_behind_our_back_is_caught():
    prepared = residency.CacheState("cold", 0.0, "cachestat")
    assert runner.Run(sample(resident_before=0.0), prepared).verified is True
    assert runner.Run(sample(resident_before=0.5), prepared).verified is False
    assert runner.Run(sample(resident_before=None), prepared).verified is True


def test_unknown_residency_is_no_failure(monkeypatch):
    unknown = engine.Residency(0, 100, "none")
    monkeypatch.setattr(engine, "residency", lambda path: unknown)
    assert residency.resident_fraction(["x"]) == (None, "unknown")
    assert residency.CacheState("cold", None, "unknown").verified is None


def test_cold_file_in_memory_is_refused(transformer, monkeypatch, capsys):
    in_memory = machine.Filesystem("/", "tmpfs", "tmpfs")
    monkeypatch.setattr(machine, "filesystem", lambda path: in_memory)
    monkeypatch.setattr(engine, "native_error", lambda: None)
    assert run_cli("bench", transformer) == 2
    assert "never cold" in capsys.readouterr().err


# ---- races --------------------------------------------------------------


@native
def test_wrong_loader_is_caught(transformer, fake_runs, capsys):
    _, answers = fake_runs
    answers["patched"] = lambda loader: sample(loader, digests=("other",))
    assert run_cli("bench", transformer, "--cache", "warm", "--repeat", 1) == 1
    assert str(transformer) in capsys.readouterr().err


@native
def test_loaders_alternate_and_only_patched_gets_options(transformer, fake_runs):
    jobs, _ = fake_runs
    arguments = ("--cache", "warm", "--repeat", 3, "--io", "direct", "-o", "threads=3")
    assert run_cli("bench", transformer, *arguments) == 0
    loaders = [one.loader for one in jobs]
    assert loaders == ["stock", "patched", "patched", "stock", "stock", "patched"]
    assert {one.loader: one.options for one in jobs} == {
        "stock": {},
        "patched": {"io": "direct", "threads": "3"},
    }


@native
def test_time_cap_leaves_one_round_and_says_so(transformer, fake_runs, capsys):
    jobs, _ = fake_runs
    assert run_cli("bench", transformer, "--cache", "warm", "--max-seconds", 0) == 0
    assert len(jobs) == 2
    assert "1 of 5 rounds" in capsys.readouterr().out


@native
def test_ceilings_read_every_byte(transformer):
    size = transformer.stat().st_size
    for direct in (False, True):
        try:
            read, seconds = engine.read_ceiling(
                str(transformer), direct=direct, threads=3, chunk_bytes=1 << 16
            )
        except OSError:
            assert direct  # not every file system has O_DIRECT
            continue
        assert read == size
        assert seconds > 0


@native
def test_missing_o_direct_is_no_failure(monkeypatch, transformer):
    def refuse(path, **_):
        raise OSError(22, "O_DIRECT: Invalid argument")

    monkeypatch.setattr(engine, "read_ceiling", refuse)
    direct = ceilings.Ceiling(ceilings.DIRECT, "warm", [ceilings.Variant(True, 8, 1 << 20)])
    reserve = settle.Reserve(0)
    direct.measure([str(transformer)], reserve)
    assert "Invalid argument" in direct.unavailable
    buffered = ceilings.Ceiling(ceilings.PAGE_CACHE, "warm", [ceilings.Variant(False, 1, 1 << 20)])
    with pytest.raises(BenchError, match="page-cache read"):
        buffered.measure([str(transformer)], reserve)


def test_failed_child_shows_its_last_words():
    with pytest.raises(BenchError, match=r"(?s)stock loader.*exit code 1.*last words"):
        job.run_json(["-c", "raise SystemExit('last words')"], {}, "stock loader")
    with pytest.raises(BenchError, match="signal 9"):
        job.run_json(["-c", "import os; os.kill(os.getpid(), 9)"], {}, "stock loader")
    with pytest.raises(BenchError, match="no JSON"):
        job.run_json(["-c", "print('hello')"], {}, "stock loader")


def test_gate_is_passed_when_the_child_is_ready(tmp_path):
    told = tmp_path / "told"
    child = ("import json, pathlib, sys\n"
             "message = json.loads(sys.stdin.readline())\n"
             "print('ready', flush=True)\n"
             "sys.stdin.readline()\n"
             "print(json.dumps({'told': pathlib.Path(message['path']).read_text()}))")  # fmt: skip

    @contextlib.contextmanager
    def gate():
        told.write_text("before")
        yield
        told.write_text("after")

    answer = job.run_json(["-c", child], {"path": str(told)}, "stock loader", gate())
    assert (answer, told.read_text()) == ({"told": "before"}, "after")
    with pytest.raises(BenchError, match="last words"):
        job.run_json(["-c", "raise SystemExit('last words')"], {}, "stock loader", gate())


def test_interrupted_gate_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    child = ("import json, os, pathlib, sys\n"
             "path = json.loads(sys.stdin.readline())['path']\n"
             "pathlib.Path(path).write_text(str(os.getpid()))\n"
             "print('ready', flush=True)\n"
             "sys.stdin.readline()\n")  # fmt: skip

    @contextlib.contextmanager
    def gate():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        job.run_json(["-c", child], {"path": str(pid)}, "stock loader", gate())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# ---- digests ------------------------------------------------------------


def checksum(tensors, order):
    return child._digest(tensors, order, child._touch([tensors], [order])[0])


@native
def test_digest_sees_what_a_caller_can_see():
    base = {"a": torch.arange(64, dtype=torch.int16).view(8, 8), "b": torch.ones(3)}
    order = ("a", "b")
    swapped = base["a"].clone()
    swapped.view(-1)[[3, 40]] = swapped.view(-1)[[40, 3]]
    variants = [
        base,
        {**base, "a": swapped},
        {**base, "a": base["a"].view(torch.float16)},
        {**base, "a": base["a"].view(16, 4)},
        {**base, "c": torch.ones(1)},
        {"b": base["b"], "a": base["a"]},
        {"a": base["a"]},
        {"a": base["a"], "b": torch.ones(4)},
    ]
    assert len({checksum(tensors, order) for tensors in variants}) == len(variants)
    copies = {name: tensor.clone() for name, tensor in base.items()}
    assert checksum(copies, order) == checksum(base, order)


@native
def test_touch_depends_on_every_byte_its_place_and_the_length():
    data = bytes(range(1, 201))
    seen = set()

    def touch(content, offset=0):
        buffer = ctypes.create_string_buffer(bytes(offset) + content)
        return engine.touch(ctypes.addressof(buffer) + offset, len(content))

    whole = touch(data)
    assert all(touch(data, offset) == whole for offset in range(1, 17))
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        seen.add(touch(bytes(changed)))
        swapped = bytearray(data)
        swapped[place], swapped[place - 1] = swapped[place - 1], swapped[place]
        seen.add(touch(bytes(swapped)))
        seen.add(touch(data[:place]))
    assert len(seen) == 3 * len(data)
    assert len({touch(bytes(length)) for length in range(200)}) == 200


# ---- presentation -------------------------------------------------------


def outcome(rounds=3):
    described = files.CheckpointFile("/home/someone/model.safetensors", 10**9, 10**9, ())
    runs = {
        (cache, loader): [
            runner.Run(sample(loader), residency.CacheState(cache, fraction, "cachestat"))
        ]
        * rounds
        for cache, fraction in (("cold", 0.0), ("warm", 1.0))
        for loader in runner.LOADERS
    }
    made = runner.Outcome(runner.Plan([described]), runs, [], rounds)
    for group in ceilings.plan(("cold", "warm"), "cpu", False).values():
        for ceiling in group:
            ceiling.seconds, ceiling.bytes, ceiling.chosen = [0.5] * rounds, 10**9, "8 x 4 MiB"
            made.ceilings.append(ceiling)
    return made


def environment():
    return machine.environment(Path(__file__))


def test_summary_and_paired_ratio():
    assert stats.summarize([2.0]) == stats.Summary(2.0, None)
    assert stats.summarize([1.0, 2.0, 3.0, 4.0, 5.0]) == stats.Summary(3.0, 1.0)
    # A machine that slows down fourfold half-way changes no ratio.
    assert stats.paired_ratio([1.0, 4.0], [2.0, 8.0]) == stats.Summary(0.5, 0.0)


@pytest.mark.parametrize(
    ("cache", "path", "name"),
    [
        ("cold", "mmap+readahead", ceilings.COLD_BUFFERED),
        ("cold", "stock", ceilings.COLD_BUFFERED),
        ("cold", "direct", ceilings.DIRECT),
        ("warm", "mmap", ceilings.PAGE_CACHE),
        ("warm", "ring+direct", ceilings.DIRECT),
        ("cold", "gds (compatibility mode)", ceilings.DIRECT),
    ],
)
def test_binding_ceiling_follows_the_path(cache, path, name):
    speeds = {ceilings.DIRECT: 3.0, ceilings.COLD_BUFFERED: 2.0, ceilings.PAGE_CACHE: 20.0}
    assert results.binding_ceiling(cache, path, "cpu", speeds) == name
    assert results.binding_ceiling(cache, path, "cpu", {}) is None
    with_bus = {**speeds, ceilings.HOST_TO_DEVICE: 1.0}
    assert results.binding_ceiling(cache, path, "cuda", with_bus) == ceilings.HOST_TO_DEVICE


def test_table_fits_a_terminal_and_tells_the_conditions():
    text = table.render(outcome(), environment())
    assert max(map(len, text.splitlines())) <= 125
    assert "50% cold buffered" in text
    assert "read-ahead" in text
    assert stats.SPREAD in text


def test_memory_of_a_device_is_told():
    made = outcome()
    memory = {"peak_rss": 9 * 10**8, "pinned": 64 * 10**6, "device_used": 3 * 10**9}
    for runs in made.runs.values():
        for run in runs:
            changed = dataclasses.replace(
                run.sample,
                memory=memory,
                memory_before={"device_used": 10**9},
                parts={"pinning": 1},
            )
            object.__setattr__(run, "sample", changed)
    made.plan = dataclasses.replace(made.plan, device="cuda")
    text = table.render(made, environment())
    assert "2000               0         64               900" in text
    assert max(map(len, text.splitlines())) <= 125
    row = results.to_json(made, environment())["results"][0]
    assert row["memory"]["device_used"] == 2 * 10**9
    assert row["parts"] == {"pinning": 1}


def test_without_ceilings(fake_runs, monkeypatch):
    monkeypatch.setattr(
        residency, "prepare", lambda cache, _: residency.CacheState(cache, None, "")
    )
    described = files.CheckpointFile(__file__, 10**9, 10**9, ())
    made = runner.race(runner.Plan([described], rounds=1, ceilings=False))
    assert made.ceilings == []
    assert "ceilings" not in table.render(made, environment())


def test_json_schema():
    report = json.loads(json.dumps(results.to_json(outcome(), environment())))
    assert {"cpu", "kernel", "fs", "read_ahead_kb", "python", "torch", "safetensors",
            "fastst_patch", "cpus", "memory"} <= set(report["environment"])  # fmt: skip
    assert report["ceilings"][ceilings.DIRECT]["gb_per_s"] == 2.0
    assert report["ceilings"][ceilings.DIRECT]["seconds"] == [0.5] * 3
    assert [(row["cache"], row["loader"]) for row in report["results"]] == [
        ("cold", "stock"), ("cold", "patched"), ("warm", "stock"), ("warm", "patched"),
    ]  # fmt: skip
    row = report["results"][1]
    assert (row["device"], row["files"], row["tensors"], row["bytes"]) == ("cpu", 1, 147, 10**9)
    assert row["seconds"] == [1.0] * 3
    assert (row["median_s"], row["load_s"], row["gb_per_s"]) == (1.0, 0.5, 1.0)
    assert (row["ceiling"], row["ceiling_fraction"]) == (ceilings.COLD_BUFFERED, 0.5)
    assert (row["path"], row["verified"]) == ("mmap+readahead", True)
    assert "/home" not in json.dumps(report)


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "chart.png"
    plot.draw(outcome(), environment(), str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write"):
        plot.draw(outcome(), environment(), str(tmp_path / "chart.nonsense"))


# ---- command line -------------------------------------------------------


def test_missing_native_extension_is_told(monkeypatch, capsys):
    monkeypatch.setattr(engine, "native_error", lambda: "no compiler was found")
    assert run_cli("bench") == 1
    assert "no compiler was found" in capsys.readouterr().err


@native
def test_unusable_cuda_is_told(monkeypatch, capsys, transformer):
    answer = {"usable": False, "reason": "Torch not compiled with CUDA enabled"}
    monkeypatch.setattr(job, "run_json", lambda *_: answer)
    assert run_cli("bench", transformer, "--device", "cuda:0") == 2
    assert "not compiled with CUDA" in capsys.readouterr().err


@native
def test_bad_option_is_told_before_measuring(fake_runs, capsys, transformer):
    jobs, _ = fake_runs
    assert run_cli("bench", transformer, "--io", "bogus") == 2
    assert "bogus" in capsys.readouterr().err
    assert not jobs


@native
def test_outputs_are_checked_before_measuring(fake_runs, capsys, transformer, tmp_path):
    jobs, _ = fake_runs
    assert run_cli("bench", transformer, "--json", tmp_path / "absent" / "x.json") == 2
    assert "folder does not exist" in capsys.readouterr().err
    assert not jobs


@pytest.mark.parametrize(
    "arguments",
    [["--device", "tpu"], ["--repeat", "0"], ["-o", "threads"], ["--cache", "tepid"]],
)
def test_bad_arguments_exit_with_usage(arguments):
    with pytest.raises(SystemExit) as caught:
        run_cli("bench", *arguments)
    assert caught.value.code == 2


def test_mounts_are_told_apart():
    assert machine.filesystem("/proc/self/status").type == "proc"
    assert machine.filesystem(os.curdir).type != "unknown"


# ---- everything together ------------------------------------------------


def _bench(arguments, capsys):
    """Run the command; what it wrote as JSON, which must be complete and verified."""
    report = arguments[0]
    status = run_cli("bench", *arguments[1:], "--json", report)
    written = json.loads(report.read_text())
    assert status == 0, capsys.readouterr().err
    assert all(row["verified"] is not False for row in written["results"])
    assert len({tuple(row["digests"]) for row in written["results"]}) == 1
    assert {row["path"] for row in written["results"] if row["loader"] == "stock"} == {"stock"}
    patched = [row["path"] for row in written["results"] if row["loader"] == "patched"]
    assert all(path.startswith("mmap") for path in patched), patched
    return written


@native
@pytest.mark.parametrize("enabled", [None, "0", "1"])  # what bench decides for itself
def test_bench_end_to_end(transformer, on_disk, tmp_path, capsys, monkeypatch, enabled):
    if enabled is not None:
        monkeypatch.setenv("FASTST_ENABLED", enabled)
    caches = () if enabled is None else ("--cache", "warm", "--no-ceilings")
    arguments = (transformer, "--repeat", 1, "-o", "small_file_bytes=0", *caches)
    written = _bench((tmp_path / "report.json", *arguments), capsys)
    assert all(row["peak_rss"] > row["bytes"] for row in written["results"])


@native
def test_bench_of_a_real_model(minilm, tmp_path, capsys):
    if machine.filesystem(minilm).in_memory:
        pytest.skip("the installed model is in memory, which is never cold")
    written = _bench((tmp_path / "report.json", minilm, "--repeat", 1), capsys)
    assert [(row["cache"], row["loader"]) for row in written["results"]] == [
        ("cold", "stock"), ("cold", "patched"), ("warm", "stock"), ("warm", "patched"),
    ]  # fmt: skip
    for row in written["results"]:
        assert (row["device"], row["files"]) == ("cpu", 1)
        assert row["tensors"] > 100
        assert row["bytes"] > 80e6
        assert row["seconds"] == [row["median_s"]]
        assert row["median_s"] == pytest.approx(row["load_s"] + row["touch_s"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        speed = written["ceilings"][row["ceiling"]]["gb_per_s"]
        assert row["ceiling_fraction"] == pytest.approx(row["gb_per_s"] / speed)
