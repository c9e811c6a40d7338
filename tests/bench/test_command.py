"""The bench must not lie: wrong loaders, wrong cache states and bad files are caught."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_samples import sample

from fastst_patch import engine
from fastst_patch.bench import (
    ceilings,
    checkpoint_files,
    child,
    device_use,
    hardware,
    harness,
    job,
    process,
    residency,
    runner,
    settle,
    stopping,
    table,
)
from fastst_patch.bench.failures import BenchError
from fastst_patch.cli.main import main

native = pytest.mark.skipif(engine.native_error() is not None, reason="no native extension")


def run_cli(*arguments):
    return main([str(argument) for argument in arguments])


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
    assert [row["verified"] for row in written["results"]] == [False] * 4
    captured = capsys.readouterr()
    assert "cold!" in captured.out
    assert "page cache" in captured.err


def test_file_warmed_behind_our_back_is_caught():
    prepared = residency.CacheState("cold", 0.0, "cachestat")
    assert harness.Run(sample(resident_before=0.0), prepared).verified is True
    assert harness.Run(sample(resident_before=0.5), prepared).verified is False
    assert harness.Run(sample(resident_before=None), prepared).verified is True


def test_unknown_residency_is_no_failure(monkeypatch):
    unknown = engine.Residency(0, 100, "none")
    monkeypatch.setattr(engine, "residency", lambda path: unknown)
    assert residency.resident_fraction(["x"]) == (None, "unknown")
    assert residency.CacheState("cold", None, "unknown").verified is None


def test_cold_file_in_memory_is_refused(transformer, monkeypatch, capsys):
    in_memory = hardware.Filesystem("/", "tmpfs", "tmpfs")
    monkeypatch.setattr(hardware, "filesystem", lambda path: in_memory)
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
    with pytest.raises(BenchError, match=r"(?s)stock loader.*exit status 1.*last words"):
        process.run_json(["-c", "raise SystemExit('last words')"], {}, "stock loader")
    with pytest.raises(BenchError, match="SIGKILL"):
        process.run_json(["-c", "import os; os.kill(os.getpid(), 9)"], {}, "stock loader")
    with pytest.raises(BenchError, match="no JSON"):
        process.run_json(["-c", "print('hello')"], {}, "stock loader")


def test_gate_is_passed_when_the_child_is_ready(tmp_path):
    told = tmp_path / "told"
    child = ("import json, pathlib, sys\n"
             "message = json.loads(sys.stdin.readline())\n"
             "print('{}', flush=True)\n"
             "sys.stdin.readline()\n"
             "print(json.dumps({'told': pathlib.Path(message['path']).read_text()}))")  # fmt: skip

    @contextlib.contextmanager
    def gate():
        told.write_text("before")
        yield
        told.write_text("after")

    answer = process.run_json(["-c", child], {"path": str(told)}, "stock loader", gate())
    assert (answer, told.read_text()) == ({"told": "before"}, "after")
    with pytest.raises(BenchError, match="last words"):
        process.run_json(["-c", "raise SystemExit('last words')"], {}, "stock loader", gate())


def test_interrupted_gate_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    child = ("import json, os, pathlib, sys\n"
             "path = json.loads(sys.stdin.readline())['path']\n"
             "pathlib.Path(path).write_text(str(os.getpid()))\n"
             "print('{}', flush=True)\n"
             "sys.stdin.readline()\n")  # fmt: skip

    @contextlib.contextmanager
    def gate():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        process.run_json(["-c", child], {"path": str(pid)}, "stock loader", gate())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# ---- digests ------------------------------------------------------------


def checksum(tensors, order):
    return device_use.digest(tensors, child._touch([tensors], [order])[0])


@native
def test_digest_sees_what_a_caller_can_see():
    base = {"a": torch.arange(64, dtype=torch.int16).view(8, 8), "b": torch.ones(3)}
    order = ("a", "b")
    swapped = base["a"].clone()
    swapped.view(-1)[[3, 40]] = swapped.view(-1)[[40, 3]]
    variants = [
        base,
        {**base, "a": swapped},
        {**base, "a": base["a"].t()},
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


def test_without_ceilings(fake_runs, monkeypatch):
    monkeypatch.setattr(
        residency, "prepare", lambda cache, _: residency.CacheState(cache, None, "")
    )
    described = checkpoint_files.CheckpointFile(__file__, 10**9, 10**9, ())
    made = runner.race(runner.Plan([described], rounds=1, ceilings=False))
    assert made.ceilings == []
    assert "ceilings" not in table.render(made, hardware.environment(Path(__file__)))


# ---- command line -------------------------------------------------------


def test_missing_native_extension_is_told(monkeypatch, capsys):
    monkeypatch.setattr(engine, "native_error", lambda: "no compiler was found")
    assert run_cli("bench") == 1
    assert "no compiler was found" in capsys.readouterr().err


@native
def test_unusable_cuda_is_told(monkeypatch, capsys, transformer):
    answer = {"usable": False, "reason": "Torch not compiled with CUDA enabled"}
    monkeypatch.setattr(process, "run_json", lambda *_: answer)
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
    for option, output in (
        ("--json", tmp_path),  # a folder
        ("--json", "/proc/new.json"),
        ("--plot", tmp_path / "x.xyz"),
        ("--plot", "/proc/new.png"),
    ):
        assert run_cli("bench", transformer, option, output) == 2
        assert "cannot write" in capsys.readouterr().err
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(transformer.read_bytes()[:-1])
    assert run_cli("bench", bad, "--json", kept) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "truncated" in line
    assert kept.read_text() == "old"
    assert not jobs


@native
def test_json_to_standard_output(fake_runs, capsys, transformer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--cache", "warm", "--repeat", 1, "--no-ceilings", "--json", "-")
    assert run_cli("bench", transformer, *arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"]
    assert "Too few rounds for a verdict" in captured.err
    assert not (tmp_path / "-").exists()


@native
@pytest.mark.parametrize(("load_s", "status", "word"), [(0.5, 0, "passed"), (5.0, 1, "failed")])
def test_gate_decides_the_exit_status(fake_runs, capsys, transformer, load_s, status, word):
    fake_runs[1]["patched"] = lambda loader: sample(loader, load_s=load_s)
    assert run_cli("bench", transformer, "--cache", "warm", "--repeat", 3, "--gate") == status
    assert capsys.readouterr().out.startswith(f"Gate {word}: ")
    assert run_cli("bench", transformer, "--cache", "warm", "--repeat", 3) == 0


@native
def test_the_machine_is_named_before_measuring(fake_runs, capsys, transformer, monkeypatch):
    said = []
    monkeypatch.setattr(runner, "race", lambda _: said.append(capsys.readouterr().err) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("bench", transformer, "--max-seconds", 77)
    assert hardware.cpu_model().split()[0] in said[0]
    assert "none begins that would end after 77 s" in said[0]


STUCK = """
import sys, time
from pathlib import Path
from fastst_patch.bench import checkpoint, guarded, stopping

def run():
    with checkpoint.temporary_checkpoint(Path(sys.argv[1]), checkpoint.moe_specs(1)):
        print("ready", flush=True)
        try:
            time.sleep(60)
        finally:
            time.sleep(60)  # as waiting for memory

with stopping.stopping_soon("bench"):
    sys.exit(guarded("bench", run))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_at_once_and_ends_it_soon(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        process.send_signal(number)
        told = process.stderr.readline() + process.stderr.readline()
        assert told == "\nbench: stopping...\n"
        process.wait()
        assert time.monotonic() - begin < 10 * stopping.PATIENCE_S  # other tests run beside
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_causes_is_one_line_of_the_child(tmp_path):
    absent = str(tmp_path / "absent.safetensors")
    one = job.LoadJob("stock", "cpu", (absent,), ((),))
    with pytest.raises(BenchError) as caught:
        process.run_json(job.CHILD, {"kind": "load", **dataclasses.asdict(one)}, "stock loader",
                     contextlib.nullcontext())  # fmt: skip
    (line,) = str(caught.value).splitlines()
    assert absent in line
    assert "FileNotFoundError" in line


@pytest.mark.parametrize(
    "arguments",
    [["--device", "tpu"], ["--repeat", "0"], ["-o", "threads"], ["--cache", "tepid"]],
)
def test_bad_arguments_exit_with_usage(arguments):
    with pytest.raises(SystemExit) as caught:
        run_cli("bench", *arguments)
    assert caught.value.code == 2


def test_mounts_are_told_apart():
    assert hardware.filesystem("/proc/self/status").type == "proc"
    assert hardware.filesystem(os.curdir).type != "unknown"


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


@pytest.fixture
def forked(warm_python, monkeypatch):
    """Loads run in forks, which have torch already; the test before starts them as users do."""

    def interpreter(arguments, environment, folder):
        flag, module = arguments
        assert flag == "-m"
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return lambda errors: warm_python.start(
            code, folder=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            environment=environment,
        )  # fmt: skip

    monkeypatch.setattr(process, "interpreter", interpreter)


@native
@pytest.mark.usefixtures("forked")
def test_bench_of_a_real_model(minilm, tmp_path, capsys):
    if hardware.filesystem(minilm).in_memory:
        pytest.skip("the installed model is in memory, which is never cold")
    written = _bench((tmp_path / "report.json", minilm, "--repeat", 1), capsys)
    assert [(row["cache"], row["loader"]) for row in written["results"]] == [
        (cache, loader)
        for cache in ("cold", residency.SMALL_PAGES, "warm")
        for loader in ("stock", "patched")
    ]
    for row in written["results"]:
        assert (row["device"], row["files"]) == ("cpu", 1)
        assert row["tensors"] > 100
        assert row["bytes"] > 80e6
        assert row["seconds"] == [row["median_s"]]
        assert row["median_s"] == pytest.approx(row["load_s"] + row["touch_s"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        speed = written["ceilings"][row["ceiling"]]["gb_per_s"]
        assert row["ceiling_fraction"] == pytest.approx(row["gb_per_s"] / speed)
