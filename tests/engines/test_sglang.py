"""SGLang's loading functions, stood in for: where tensors go, and when its own loop runs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import parallel_model
import pytest
import sglang_standin
import torch
from cases_parallel import same
from parallel_model import Parallel
from safetensors.torch import save_file
from sglang_standin import Loading, Standin
from vllm_standin import ELEMENTS, LARGEST, Model

import fastst_patch
import fastst_plugins
from fastst_patch.cli.main import main
from fastst_patch.integrations import sglang as integration
from fastst_patch.patching import patcher


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[Standin]:
    with sglang_standin.standing_in(tmp_path / "site") as found:
        yield found


both_iterators = pytest.mark.parametrize("multithread", [False, True])


# ---- streamed ----


@both_iterators
def test_tensors_equal_those_of_sglangs_own_loop(
    sglang, folder, tensors, on_cpu, assert_same, nothing_left, multithread
) -> None:
    theirs = sglang.load(folder, on_cpu, multithread=multithread)
    sglang.utils.asked.clear()
    with Loading() as seen, fastst_patch.patched() as report:
        ours = sglang.load(folder, on_cpu, multithread=multithread)
    assert report.targets["sglang.load"].patched
    assert sglang.utils.asked == []
    assert_same({name: ours[name] for name in theirs}, theirs)
    assert set(ours) == set(tensors)
    assert (seen.only.file, seen.only.device) == (str(folder), "cpu")
    assert seen.only.path.startswith("mmap")
    assert (seen.only.tensors, seen.only.bytes) == (9, sum(t.nbytes for t in tensors.values()))
    assert seen.only.fallback_reason is None
    assert f"GB/s, path {seen.only.path}" in str(seen.only)
    del ours, theirs


def test_files_come_in_sglangs_order(sglang, folder, on_cpu) -> None:
    theirs = [name.partition(".")[0] for name in sglang.load(folder, on_cpu)]
    with fastst_patch.patched():
        ours = [name.partition(".")[0] for name in sglang.load(folder, on_cpu)]
    assert sorted(ours[:3]) == sorted(theirs[:3])  # of m-1, m-10, m-2
    assert sorted(ours[6:]) == sorted(theirs[6:])


@both_iterators
def test_goes_to_the_device_of_the_model(
    sglang, folder, tensors, cuda, fake_driver, on_cuda, assert_same, multithread
) -> None:
    with Loading() as seen, fastst_patch.patched():
        ours = sglang.load(folder, on_cuda, multithread=multithread)
    assert (seen.only.device, seen.only.path) == ("cuda:0", "ring")
    assert seen.only.tensors == len(tensors)
    assert_same({name: ours[name] for name in tensors}, tensors)
    del ours
    assert fake_driver.live().blocks == 0


@pytest.mark.parametrize(
    ("devices", "model_config", "reason"),
    [
        (("cuda:0", "cpu"), {}, "several devices"),
        (("cuda:0", "cuda:1"), {}, "several devices"),
        (("meta",), {}, None),
        (("cuda:0",), {"quantization": "fp8"}, "quantized"),
    ],
)
def test_stays_on_the_cpu(sglang, folder, cuda, devices, model_config, reason) -> None:
    model = Model(ELEMENTS, *devices)
    with Loading() as seen, fastst_patch.patched():
        sglang.load(folder, model, model_config=model_config)
    assert seen.only.device == "cpu"
    assert cuda.allocated == 0
    found = seen.only.fallback_reason
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("parameters", [sglang_standin.OLD, sglang_standin.NEW])
def test_memory_that_may_be_released(tmp_path, folder, cuda, on_cuda, parameters) -> None:
    with sglang_standin.standing_in(tmp_path / "site", parameters) as sglang:
        sglang.args.args.enable_memory_saver = True
        with Loading() as seen, fastst_patch.patched():
            sglang.load(folder, on_cuda)
        assert "enable_memory_saver" in seen.only.fallback_reason
        sglang.args.args = None
        with Loading() as seen, fastst_patch.patched():
            sglang.load(folder, on_cuda)
        assert seen.only.fallback_reason == "ValueError: Global server args is not set yet!"
        assert seen.only.path == "stock"
    assert cuda.allocated == 0


def test_options_bound_what_is_held_on_the_device(sglang, folder, cuda, on_cuda) -> None:
    with fastst_patch.patched(device_memory_budget=4096, tensors="dlpack"):
        pairs = sglang.pairs(folder, on_cuda)
        most = max(cuda.driver.live().block_bytes for _ in pairs)
    assert 0 < most <= 4096 + 2 * LARGEST


def test_closing_early_lets_go(sglang, folder, on_cpu, nothing_left) -> None:
    with Loading() as seen, fastst_patch.patched():
        pairs = sglang.pairs(folder, on_cpu)
        next(pairs)
        pairs.close()
    assert seen.only.tensors == 1


# ---- what SGLang is told ----


@both_iterators
@pytest.mark.parametrize(
    ("told", "path"),
    [
        ({"disable_mmap": True}, "buffered"),
        ({"drop_cache_after_load": True}, "direct"),
        ({"disable_mmap": True, "drop_cache_after_load": True}, "buffered"),
        ({"prefetch": True, "prefetch_num_threads": 2}, "mmap"),
    ],
)
def test_its_options(
    sglang, folder, tensors, on_cpu, assert_same, multithread, told, path, need_o_direct
) -> None:
    if path == "direct":
        need_o_direct(str(folder / "m-1.safetensors"))
    with Loading() as seen, fastst_patch.patched():
        ours = sglang.load(folder, on_cpu, multithread=multithread, **told)
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert seen.only.path.startswith(path)
    assert sglang.utils.asked == []
    if "drop_cache_after_load" in told:
        cached = [fastst_patch.engine.residency(str(f)).resident_bytes for f in folder.iterdir()]
        assert cached == [0, 0, 0]


def test_disable_mmap_keeps_other_ways_that_map_nothing(
    sglang, folder, on_cpu, need_o_direct
) -> None:
    need_o_direct(str(folder / "m-1.safetensors"))
    with Loading() as seen, fastst_patch.patched(io="direct"):
        sglang.load(folder, on_cpu, disable_mmap=True)
    assert seen.only.path == "direct"


def test_options_that_exclude_each_other_are_sglangs(sglang, folder, tensors, on_cpu) -> None:
    with Loading() as seen, fastst_patch.patched(io="mmap"):
        ours = sglang.load(folder, on_cpu, drop_cache_after_load=True)
    assert set(ours) == set(tensors)
    assert seen.only.fallback_reason.startswith("io='mmap' leaves the files cached")


# ---- parts ----


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_several_ranks_take_parts(sglang, tmp_path, cuda, monkeypatch, device) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    parallel_model.write(tmp_path / "llama")

    def loaded() -> tuple[Parallel, Loading]:
        model = Parallel(1, 2, device)
        with Loading() as seen:
            model.load_weights(sglang.pairs(tmp_path / "llama", model))
        return model, seen

    theirs, _ = loaded()
    with fastst_patch.patched():
        ours, seen = loaded()
    assert same(ours, theirs)
    assert sum(report.bytes for report in seen.reports) <= 1.1 * ours.nbytes
    assert "stock" not in {report.path for report in seen.reports}


def test_a_drafter_takes_little_of_the_files(sglang, folder, tensors) -> None:
    with Loading() as seen, fastst_patch.patched():
        for name, tensor in sglang.pairs(folder, Model(ELEMENTS // 2, "cpu")):
            if name == "norm":
                taken = torch.empty_like(tensor).copy_(tensor)
    assert torch.equal(taken, tensors["norm"])
    assert (seen.only.bytes, seen.only.tensors) == (taken.nbytes, 1)


# ---- left to SGLang ----


def test_a_name_in_two_files_is_sglangs(sglang, folder, on_cpu) -> None:
    save_file({"norm": torch.zeros(3)}, folder / "m-3.safetensors")
    with Loading() as seen, fastst_patch.patched():
        ours = sglang.load(folder, on_cpu)
    assert torch.equal(ours["norm"], torch.zeros(3))
    assert seen.only.fallback_reason == "tensor 'norm' is in two of the files"


def test_a_damaged_file_is_told_by_sglang(sglang, folder, on_cpu) -> None:
    (folder / "m-2.safetensors").write_bytes(b"\x01" * 40)
    errors = []
    for patched in (False, True):
        with pytest.raises(Exception) as caught:
            if patched:
                with fastst_patch.patched():
                    sglang.load(folder, on_cpu)
            else:
                sglang.load(folder, on_cpu)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_not_called_by_its_loader(sglang, folder) -> None:
    files = sorted(str(path) for path in folder.iterdir())
    with Loading() as seen, fastst_patch.patched():
        dict(sglang.utils.safetensors_weights_iterator(files))
    assert "was not called by DefaultModelLoader" in seen.only.fallback_reason
    with Loading() as seen, fastst_patch.patched():
        loader = sglang.loader.DefaultModelLoader(SimpleNamespace(multithread=True, options={}))
        dict(loader._get_weights_iterator(SimpleNamespace(model_or_path=str(folder), prefix="")))
    assert "_get_all_weights was not called before" in seen.only.fallback_reason


def test_obeys_the_switch(sglang, folder, tensors, on_cpu, monkeypatch) -> None:
    with Loading() as seen, fastst_patch.patched():
        monkeypatch.setenv("FASTST_ENABLED", "0")
        assert set(sglang.load(folder, on_cpu)) == set(tensors)
        monkeypatch.delenv("FASTST_ENABLED")
    assert seen.only.fallback_reason == "FASTST_ENABLED is 0"


# ---- versions ----


def test_the_signature_of_older_versions(tmp_path, folder, tensors, on_cpu) -> None:
    with sglang_standin.standing_in(tmp_path / "site", sglang_standin.OLD) as sglang:
        with Loading() as seen, fastst_patch.patched():
            ours = sglang.load(folder, on_cpu, disable_mmap=True)
    assert set(ours) == set(tensors)
    assert seen.only.path == "buffered"


def test_an_unknown_parameter_is_sglangs(tmp_path, folder, tensors, on_cpu) -> None:
    parameters = f"{sglang_standin.NEW}, mirror=None"
    with sglang_standin.standing_in(tmp_path / "site", parameters) as sglang:
        with Loading() as seen, fastst_patch.patched():
            ours = sglang.load(folder, on_cpu)
        assert len(sglang.utils.asked) == 3
    assert set(ours) == set(tensors)
    assert "takes mirror" in seen.only.fallback_reason


# ---- the plug-in ----


def test_entry_point_is_found() -> None:
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="fastst")
    assert found.load() is fastst_plugins.register_sglang


REGISTERED = """
from importlib.metadata import entry_points
(found,) = entry_points(group="sglang.srt.plugins", name="fastst")
found.load()()
found.load()()
import sys
heavy = sorted({"torch", "sglang", "fastst_patch"} & set(sys.modules))
import sglang.srt.model_loader.loader
import fastst_patch
import fastst_plugins
print(heavy, fastst_patch.is_patched(), fastst_patch.is_patched("sglang.load"))
"""


@pytest.mark.parametrize("enabled", [None, "1", "0"])
def test_entry_point_in_a_process_of_sglangs(tmp_path, monkeypatch, enabled) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    if enabled is not None:
        monkeypatch.setenv("FASTST_ENABLED", enabled)
    sglang_standin.write(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{REGISTERED}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    heavy = [] if enabled is None else ["fastst_patch"]
    assert done.stdout.strip() == f"{heavy} {enabled == '1'} {enabled == '1'}"
    assert done.stderr == ""


@pytest.fixture
def unsaid() -> Iterator[None]:
    patcher._say_once.cache_clear()
    yield
    patcher._say_once.cache_clear()


def test_patch_says_that_sglang_loads_elsewhere(sglang, unsaid, monkeypatch) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    with pytest.warns(fastst_patch.FallbackWarning, match="FASTST_ENABLED=1") as caught:
        fastst_patch.patch()
    assert [one.filename for one in caught] == [__file__]
    fastst_patch.unpatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastst_patch.patch()  # once in a process


@pytest.mark.parametrize("case", ["reached", "another target"])
def test_nothing_is_said(sglang, unsaid, monkeypatch, case) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    if case == "reached":
        monkeypatch.setenv("FASTST_ENABLED", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastst_patch.patch(None if case == "reached" else "safetensors.safe_open")


@pytest.mark.parametrize("enabled", [False, True])
def test_doctor_says_it(sglang, monkeypatch, capsys, tmp_path, enabled) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    if enabled:
        monkeypatch.setenv("FASTST_ENABLED", "1")
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor", str(tmp_path)]) == 0
    told = f"! {integration.NOT_REACHED}" in capsys.readouterr().out
    assert told is not enabled
