"""benchmarks/end_to_end.py must not lie: wrong bytes, wrong caches and idle patches are caught."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import BENCHMARKS
from race_harness import results as race_results
from warm_python import WarmPython

import fastst_patch
from fastst_patch import engine
from fastst_patch.bench import guarded, hardware, process, residency
from fastst_patch.bench.failures import UsageError
from fastst_patch.config import undecided_environment
from fastst_patch.report import LoadReport

if engine.native_error() is not None:
    pytest.skip("no native extension", allow_module_level=True)


def _transformers() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


timed_version = pytest.mark.skipif(
    not (_transformers() or "").startswith("5."),
    reason=f"the bench times transformers 5.x; here is {_transformers()}",
)


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; beside its own folder nothing needs to be importable."""
    if not BENCHMARKS.is_dir():
        pytest.skip("no benchmarks beside these tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(residency, "_PAUSE_S", 0)
    return importlib.import_module("end_to_end")


@pytest.fixture
def rows(bench):
    return importlib.import_module("_rows")


@pytest.fixture(scope="module")
def warm_transformers():
    """Forks of a process that has imported the model's code, which takes the most of a run."""
    started = WarmPython("transformers.models.llama.modeling_llama")
    yield started
    started.close()


@pytest.fixture
def forked(bench, warm_transformers, monkeypatch) -> None:
    """Runs are forks, which import nothing slow; `test_two_rows` starts them as users do."""

    def ask(script, message, label, gate=None):
        def start(errors):
            return warm_transformers.start(
                Path(script).absolute(), ["--child"], folder=BENCHMARKS, stderr=errors,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, environment=undecided_environment(),
            )  # fmt: skip

        return SimpleNamespace(**process.ask(start, message, label, gate))

    monkeypatch.setattr(bench.scenario, "fresh", ask)


@pytest.fixture
def run(bench, tmp_path, on_disk):
    """Run it on a model of 3 MB, one round; returns the exit status and the JSON."""

    def call(*arguments):
        report = tmp_path / "report.json"
        common = ["--gb", "0.003", "--repeat", "1", "--dir", str(tmp_path), "--json", str(report)]
        status = guarded("end_to_end", lambda: bench.main([*common, *arguments]))
        return status, json.loads(report.read_text()) if report.exists() else None

    yield call
    left = [path.name for path in tmp_path.iterdir() if path.name != "report.json"]
    assert not left, "models were not removed"


# ---- everything together ------------------------------------------------


@timed_version
def test_two_rows(run, capsys) -> None:
    status, found = run("--rows", "cpu-warm,cpu-cold,cuda-to")
    text = capsys.readouterr()
    assert status == 0, text.err + text.out
    assert not found["errors"]
    assert found["environment"]["transformers"] == _transformers()
    rows = [one for one in found["results"] if one["row"] != "cuda-to"]
    told = "" if rows[0]["runs"][0]["verified"] else "?"
    assert [(one["row"], one["contender"], one["cache"]) for one in rows] == [
        ("cpu-warm", "stock", "warm" + told),
        ("cpu-warm", "patched", "warm" + told),
        ("cpu-cold", "stock", "cold" + told),
        ("cpu-cold", "patched", "cold" + told),
    ]
    assert len({one["runs"][0]["digest"] for one in rows}) == 1
    for one in rows:
        (run_,) = one["runs"]
        assert run_["verified"] in (True, None)
        assert one["tensors"] == 147
        assert run_["tensors"] > 147  # also buffers that no file holds
        assert 0 < one["weights s"]["median"] < one["whole s"]["median"] == run_["whole_s"]
        assert (run_["touch_s"] > 0) == (one["touch s"] is not None) == (one["row"] == "cpu-cold")
        assert run_["total_s"] == run_["whole_s"] + run_["touch_s"]
        assert run_["import_s"] > 0
        if one["contender"] == "stock":
            assert (one["path"], run_["accelerated_bytes"]) == ("stock", 0)
            assert one["time / stock"]["median"] == one["weights / stock"]["median"] == 1
        else:
            assert one["path"].startswith("mmap")
            assert run_["accelerated_bytes"] > 2_000_000
    told = race_results._call_of(rows[1])  # as the race tells it
    assert told["total_ratio_to_stock"] == rows[1]["time / stock"]["median"]
    assert (told["total_s"], told["rounds"]) == (rows[1]["runs"][0]["total_s"], 1)
    if not torch.cuda.is_available():
        assert found["skipped"] == {"cuda-to": "no CUDA device"}
        assert "skipped: no CUDA device" in text.out
    assert os.fspath(Path.home()) not in json.dumps(found)


@timed_version
@pytest.mark.usefixtures("forked")
def test_wrong_byte_is_caught(run, bench, monkeypatch, capsys) -> None:
    run_proven = bench.run_proven

    def spoiled(made, row, model, loader, reserve):
        if loader == "patched":  # only now: stock has seen the file as it was
            with open(model.files[0], "r+b") as file:
                file.seek(model.file_bytes // 2)
                byte = file.read(1)
                file.seek(model.file_bytes // 2)
                file.write(bytes([byte[0] ^ 1]))
        return run_proven(made, row, model, loader, reserve)

    monkeypatch.setattr(bench, "run_proven", spoiled)
    status, found = run("--rows", "cpu-warm")
    assert status == 1
    assert not found["results"]
    assert "differ from those of the first run" in found["errors"]["cpu-warm"]
    assert "FAILED" in capsys.readouterr().out


@timed_version
@pytest.mark.usefixtures("forked")
def test_warm_run_called_cold_is_refused(run, bench, monkeypatch) -> None:
    monkeypatch.setattr(residency, "evict", residency.warm)
    monkeypatch.setattr(bench.harness, "TRIES", 1)
    status, found = run("--rows", "cpu-cold")
    if not found["errors"]:
        assert all(run_["verified"] is None for one in found["results"] for run_ in one["runs"])
        pytest.skip("this kernel does not tell what is cached")
    assert status == 1
    assert not found["results"]
    assert "were to be cold" in found["errors"]["cpu-cold"]


@timed_version
@pytest.mark.usefixtures("forked")
def test_patch_without_effect_is_an_error(run) -> None:
    """A small file left to stock stands for all ways in which nothing is accelerated."""
    status, found = run("--rows", "cpu-warm", "-o", "small_file_bytes=1000000000")
    assert status == 1
    assert not found["results"]
    assert "nothing was accelerated" in found["errors"]["cpu-warm"]


@timed_version
@pytest.mark.usefixtures("forked")
def test_what_the_library_offers_itself_races_too(run, rows) -> None:
    status, found = run("--rows", "cpu-warm", "--offers")
    assert status == 0
    offered = [name for name in rows.ROWS["cpu-warm"].offers if rows.OFFERS[name].there()]
    assert [one["contender"] for one in found["results"]] == ["stock", "patched", *offered]
    assert len({one["runs"][0]["digest"] for one in found["results"]}) == 1
    for one in found["results"][2:]:
        assert (one["path"], one["runs"][0]["accelerated_bytes"]) == ("stock", 0)
        assert one["time / stock"]["median"] > 0


def test_an_offer_sets_what_it_names(rows, monkeypatch) -> None:
    """Its argument reaches from_pretrained, and its variable the process."""
    given = {}
    architecture = SimpleNamespace(from_pretrained=lambda folder, **named: given.update(named))
    monkeypatch.setattr(rows, "_architecture", lambda folder: architecture)
    offer = rows.OFFERS["transformers, disable_mmap=True"]
    job = rows.Job("cpu-warm", offer.name, "x", (), "cpu", arguments=offer.arguments)
    rows.ROWS["cpu-warm"].start(job).run()
    assert given == {"disable_mmap": True}
    rows.ROWS["cuda-device-map"].start(job).run()
    assert given == {"disable_mmap": True, "device_map": {"": "cpu"}}


# ---- parts --------------------------------------------------------------


def test_only_bytes_that_reached_the_device_count(rows) -> None:
    def report(path, device, nbytes=1):
        return LoadReport("safe_open", "x", device, path, nbytes, 1, 1.0)

    to_cpu = SimpleNamespace(device="cpu", rehearse=False)
    to_gpu = SimpleNamespace(device="cuda:0", rehearse=False)
    mapped, copied, left = report("mmap", "cpu"), report("ring", "cuda:0"), report("stock", "cpu")
    assert rows._accelerated(to_cpu, [left, mapped]) == [mapped]
    assert rows._accelerated(to_gpu, [left, mapped, copied]) == [copied]
    for job, reports in (
        (to_cpu, [left]),
        (to_gpu, [mapped]),
        (to_cpu, [report("mmap", "cpu", 0)]),
    ):
        with pytest.raises(SystemExit, match="nothing was accelerated"):
            rows._accelerated(job, reports)


def test_streamed_models_have_the_tensors_that_transformers_expects(rows, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Qwen3MoeForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen3-MoE")
    models = importlib.import_module("_models")
    made = {"dense": models.dense(tmp_path / "dense", 1_000_000),
            "moe": models.mixture(tmp_path / "moe", 400)}  # fmt: skip
    for name, model in made.items():
        assert sum(Path(file).stat().st_size for file in model.files) == model.file_bytes
        with fastst_patch.patched():
            _, info = rows._architecture(model.folder).from_pretrained(
                model.folder, output_loading_info=True
            )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), (name, info)


def test_shards_lose_nothing(rows, tmp_path, monkeypatch) -> None:
    models = importlib.import_module("_models")
    monkeypatch.setattr(models, "SHARD_BYTES", 300_000)
    model = models.dense(tmp_path / "model", 1_000_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(model.files) > 2
    assert {Path(file).name for file in model.files} == set(index["weight_map"].values())
    assert len(index["weight_map"]) == 147


def test_read_ahead_is_put_back(bench, tmp_path, monkeypatch) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    monkeypatch.setattr(hardware, "read_ahead_file", lambda path: setting)
    with pytest.raises(ZeroDivisionError), bench.scenario.read_ahead(tmp_path, 128):
        assert setting.read_text() == "128\n"
        raise ZeroDivisionError
    assert setting.read_text() == "8192\n"
    monkeypatch.setattr(hardware, "read_ahead_file", lambda path: tmp_path)  # cannot be written
    with pytest.raises(UsageError, match="takes root"), bench.scenario.read_ahead(tmp_path, 128):
        pass
    monkeypatch.setattr(hardware, "read_ahead_file", lambda path: None)
    with (
        pytest.raises(UsageError, match="no read-ahead setting"),
        bench.scenario.read_ahead(tmp_path, 128),
    ):
        pass


def test_bad_arguments_exit_with_usage(bench, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--rows", "cpu-warm,cpu-lukewarm"])
    assert caught.value.code == 2
    assert "cpu-lukewarm" in capsys.readouterr().err
    assert guarded("end_to_end", lambda: bench.main(["--repeat", "0"])) == 2
    absent = str(tmp_path / "absent" / "x.json")
    assert guarded("end_to_end", lambda: bench.main(["--json", absent])) == 2
