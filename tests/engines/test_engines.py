"""vLLM's and SGLang's loading functions, stood in for: where tensors go, and who loads them."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import parallel_model
import pytest
import sglang_standin
import torch
import vllm_standin
from cases_parallel import same
from engine_standin import ELEMENTS, LARGEST, Loading, Model, Standin, most_held
from parallel_model import Parallel
from safetensors.torch import save_file

import fastst_patch
import fastst_plugins
from fastst_patch.cli.main import main
from fastst_patch.integrations import own_processes
from fastst_patch.patching import notices

of_both = pytest.mark.parametrize("standins", [vllm_standin, sglang_standin])
of_each = pytest.mark.parametrize("engine", ["vllm", "sglang"], indirect=True)

# ---- streamed ----


def test_tensors_equal_those_of_the_engines_own_loop(
    engine, folder, tensors, on_cpu, assert_same, nothing_left
) -> None:
    theirs = engine.load(folder, on_cpu)
    engine.utils.asked.clear()
    with engine.loading() as seen, fastst_patch.patched() as report:
        ours = engine.load(folder, on_cpu)
    assert report.targets[f"{engine.name}.load"].patched
    assert engine.utils.asked == []
    assert set(ours) == set(theirs) == set(tensors)
    assert_same({name: ours[name] for name in theirs}, theirs)
    assert (seen.only.file, seen.only.device) == (str(folder), "cpu")
    assert seen.only.path.startswith("mmap")
    assert (seen.only.tensors, seen.only.bytes) == (9, sum(t.nbytes for t in tensors.values()))
    assert seen.only.fallback_reason is None
    assert f"GB/s, path {seen.only.path}" in str(seen.only)
    del ours, theirs


def test_one_line_and_one_report_for_a_load(engine, folder, on_cpu, caplog) -> None:
    caplog.set_level("INFO", "fastst_patch")
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        engine.load(folder, on_cpu)
    assert [report.call for report in seen.reports] == [engine.name]
    lines = [r.getMessage() for r in caplog.records if r.name == "fastst_patch"]
    told = [line for line in lines if line.startswith(f"{engine.name} ")]
    assert told == [str(seen.reports[0])]


def test_files_come_in_the_engines_order(engine, folder, on_cpu) -> None:
    theirs = list(engine.load(folder, on_cpu))
    with fastst_patch.patched():
        ours = list(engine.load(folder, on_cpu))
    for first in (0, 3, 6):  # three tensors in each file
        assert sorted(ours[first : first + 3]) == sorted(theirs[first : first + 3])


def test_goes_to_the_device_of_the_model(
    engine, folder, tensors, cuda, fake_driver, on_cuda, assert_same
) -> None:
    with engine.loading() as seen, fastst_patch.patched():
        ours = engine.load(folder, on_cuda)
    assert (seen.only.device, seen.only.path) == ("cuda:0", "ring")
    assert seen.only.tensors == len(tensors)
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert fake_driver.live().blocks > 0
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
def test_stays_on_the_cpu(engine, folder, cuda, devices, model_config, reason) -> None:
    model = Model(ELEMENTS, *devices)
    with engine.loading() as seen, fastst_patch.patched():
        engine.load(folder, model, model_config=model_config)
    assert seen.only.device == "cpu"
    assert cuda.allocated == 0
    found = seen.only.fallback_reason
    assert found is None if reason is None else reason in found


def test_options_bound_what_is_held_on_the_device(engine, folder, cuda, on_cuda) -> None:
    with fastst_patch.patched(device_memory_budget=4096, tensors="dlpack"):
        most = most_held(cuda, engine.pairs(folder, on_cuda))
    assert 0 < most <= 4096 + 2 * LARGEST  # what is given, and the next


def test_closing_early_lets_go(engine, folder, on_cpu, nothing_left) -> None:
    with engine.loading() as seen, fastst_patch.patched():
        pairs = engine.pairs(folder, on_cpu)
        next(pairs)
        pairs.close()
    assert seen.only.tensors == 1


# ---- parts ----


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_several_ranks_take_parts(
    engine, tmp_path, cuda, monkeypatch, device, all_deferred
) -> None:
    engine.share(monkeypatch, 1, 2)
    parallel_model.write(tmp_path / "llama")

    def loaded() -> tuple[Parallel, Loading]:
        model = Parallel(1, 2, device)
        with engine.loading() as seen:
            model.load_weights(engine.pairs(tmp_path / "llama", model))
        return model, seen

    theirs, _ = loaded()
    with fastst_patch.patched():
        ours, seen = loaded()
    assert same(ours, theirs)
    assert 0 < sum(report.bytes for report in seen.reports) <= 1.1 * ours.nbytes
    assert "stock" not in {report.path for report in seen.reports}


def test_a_drafter_takes_little_of_the_files(
    engine, folder, tensors, all_deferred, nothing_left
) -> None:
    with engine.loading() as seen, fastst_patch.patched():
        for name, tensor in engine.pairs(folder, Model(ELEMENTS // 2, "cpu")):
            if name == "1.w":
                taken = torch.empty(tensor.shape, dtype=tensor.dtype)
                taken.data.copy_(tensor)
    assert engine.utils.asked == []
    assert torch.equal(taken, tensors["1.w"])
    assert (seen.only.bytes, seen.only.tensors) == (taken.nbytes, 1)


# ---- left to the engine ----


def test_a_name_in_two_files_is_the_engines(engine, folder, on_cpu) -> None:
    save_file({"norm": torch.zeros(3)}, folder / "m-3.safetensors")
    with engine.loading() as seen, fastst_patch.patched():
        ours = engine.load(folder, on_cpu)
    assert torch.equal(ours["norm"], torch.zeros(3))
    assert seen.only.fallback_reason == "tensor 'norm' is in two of the files"


@pytest.mark.parametrize("fallback", ["auto", "error"])
def test_a_damaged_file_is_told_by_the_engine(engine, folder, on_cpu, fallback) -> None:
    (folder / "m-2.safetensors").write_bytes(b"\x01" * 40)
    errors = []
    with pytest.raises(Exception) as caught:
        engine.load(folder, on_cpu)
    errors.append((type(caught.value), str(caught.value)))
    with fastst_patch.patched(fallback=fallback), pytest.raises(Exception) as caught:
        engine.load(folder, on_cpu)
    errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@of_each
def test_torch_modes_are_the_engines(engine, folder, on_cpu) -> None:
    with engine.loading() as seen, fastst_patch.patched(), torch.device("meta"):
        engine.load(folder, on_cpu)
    assert seen.only.fallback_reason == "a torch mode or default device is in force"


@of_each
def test_not_called_by_its_loader(engine, folder) -> None:
    reasons = []
    with fastst_patch.patched():
        for pairs in engine.unnoted(folder):
            with engine.loading() as seen:
                assert len(dict(pairs)) == 9
            reasons.append(seen.only.fallback_reason)
    assert "was not called by DefaultModelLoader" in reasons[0]
    assert "get_all_weights was not called before" in reasons[1]


def test_obeys_the_switch(engine, folder, tensors, on_cpu, monkeypatch) -> None:
    with engine.loading() as seen, fastst_patch.patched(fallback="error"):
        monkeypatch.setenv("FASTST_ENABLED", "0")
        assert set(engine.load(folder, on_cpu)) == set(tensors)
        monkeypatch.delenv("FASTST_ENABLED")
    assert seen.only.fallback_reason == "FASTST_ENABLED is 0"


def test_the_option_fallback(engine, folder, tensors, on_cpu, nothing_left) -> None:
    save_file({"norm": torch.zeros(3)}, folder / "m-3.safetensors")
    told = f"{engine.name} of {folder} was left to stock safetensors: tensor 'norm' is in two"
    with fastst_patch.patched(fallback="warn"):
        with pytest.warns(fastst_patch.FallbackWarning) as caught:
            ours = engine.load(folder, on_cpu)
        assert [str(one.message).startswith(told) for one in caught] == [True]
        assert set(ours) == set(tensors)
    with fastst_patch.patched(fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="left to stock"):
            engine.load(folder, on_cpu)
    with warnings.catch_warnings(), fastst_patch.patched(fallback="error"):
        warnings.simplefilter("error")
        (folder / "m-3.safetensors").unlink()
        assert set(engine.load(folder, on_cpu)) == set(tensors)


# ---- versions ----


@pytest.mark.parametrize(
    ("standins", "options", "path"),
    [
        (vllm_standin, {"safetensors_load_strategy": "lazy"}, "mmap"),
        (sglang_standin, {"disable_mmap": True}, "buffered"),
    ],
)
def test_the_signature_of_older_versions(
    standins, tmp_path, folder, tensors, on_cpu, options, path
) -> None:
    with standins.standing_in(tmp_path / "site", standins.OLD) as engine:
        if standins is vllm_standin:
            del engine.utils._natural_sort_key
        with engine.loading() as seen, fastst_patch.patched():
            ours = engine.load(folder, on_cpu, **options)
    assert set(ours) == set(tensors)
    assert seen.only.path.startswith(path)


@of_both
def test_an_unknown_parameter_is_the_engines(standins, tmp_path, folder, tensors, on_cpu) -> None:
    parameters = f"{standins.NEW}, mirror=None"
    with standins.standing_in(tmp_path / "site", parameters, ", mirror=1") as engine:
        with engine.loading() as seen, fastst_patch.patched():
            ours = engine.load(folder, on_cpu)
        assert len(engine.utils.asked) == 3
    assert set(ours) == set(tensors)
    assert "takes mirror" in seen.only.fallback_reason


# ---- the plug-ins ----

ENTRY_POINTS = [
    ("vllm.general_plugins", fastst_plugins.register_vllm),
    ("sglang.srt.plugins", fastst_plugins.register_sglang),
]


@pytest.mark.parametrize(("group", "register"), ENTRY_POINTS)
def test_entry_point_is_found(group, register) -> None:
    (found,) = importlib.metadata.entry_points(group=group, name="fastst")
    assert found.load() is register


REGISTERED = """
from importlib.metadata import entry_points
(found,) = entry_points(group="GROUP", name="fastst")
found.load()()
found.load()()
import sys
heavy = sorted({"torch", "vllm", "sglang", "fastst_patch"} & set(sys.modules))
import MODULE as loaders
late = "fastst_patch" in sys.modules
import fastst_patch
patched = fastst_patch.is_patched(), fastst_patch.is_patched("NAME.load")
print(heavy, late, list(getattr(loaders, "formats", ())), *patched)
"""


@of_both
@pytest.mark.parametrize("enabled", [None, "1", "0"])
def test_entry_point_in_a_process_of_the_engines(
    standins: ModuleType, tmp_path, monkeypatch, enabled
) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    if enabled is not None:
        monkeypatch.setenv("FASTST_ENABLED", enabled)
    standins.write(tmp_path)
    engine: type[Standin] = standins.Standin
    text = REGISTERED.replace("GROUP", engine.group).replace("MODULE", engine.module)
    text = text.replace("NAME", engine.name)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{text}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    heavy = [] if enabled is None else ["fastst_patch"]
    formats = ["auto", "fastst"] if engine.name == "vllm" else []
    patched = enabled == "1"
    assert done.stdout.strip() == f"{heavy} {bool(heavy)} {formats} {patched} {patched}"
    assert done.stderr == ""


# ---- processes that are not reached ----


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    notices.say_once.cache_clear()
    yield
    notices.say_once.cache_clear()


@of_each
def test_patch_says_that_the_engine_loads_elsewhere(engine, unsaid) -> None:
    with pytest.warns(fastst_patch.FallbackWarning, match="FASTST_ENABLED=1") as caught:
        fastst_patch.patch()
    assert [one.filename for one in caught] == [__file__]
    fastst_patch.unpatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastst_patch.patch()  # once in a process


@of_each
@pytest.mark.parametrize("case", ["reached", "another target"])
def test_nothing_is_said(engine, unsaid, monkeypatch, case) -> None:
    if case == "reached":
        monkeypatch.setenv("FASTST_ENABLED", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastst_patch.patch(None if case == "reached" else "safetensors.safe_open")


@of_each
@pytest.mark.parametrize("enabled", [False, True])
def test_doctor_says_it(engine, unsaid, monkeypatch, capsys, tmp_path, enabled) -> None:
    if enabled:
        monkeypatch.setenv("FASTST_ENABLED", "1")
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor", str(tmp_path)]) == 0
    told = f"! {own_processes.TOLD[engine.name]}" in capsys.readouterr().out
    assert told is not enabled
