"""When ``Module.to`` is left to torch, how that is told, and what the patched methods look like."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastst_patch
from fastst_patch import engine
from fastst_patch.integrations import torch_module, uploads

TARGET = "torch.nn.Module.to"
STOCK_TO, STOCK_APPLY = nn.Module.to, nn.Module._apply


def test_a_second_move_finds_nothing_to_do(moving) -> None:
    module = nn.Linear(64, 64)
    module.to("cuda")
    calls = moving.driver.calls("cuMemcpyHtoDAsync_v2")
    # The fake's tensors are the CPU's; real ones are on the device, as these pretend.
    with pytest.MonkeyPatch.context() as patch, fastst_patch.profile() as seen:
        patch.setattr(torch_module, "ordinary", lambda candidates: [])
        module.to("cuda")
    assert seen.reports == []
    assert moving.driver.calls("cuMemcpyHtoDAsync_v2") == calls


def test_meta_and_bad_arguments_are_stocks(moving) -> None:
    with pytest.raises(TypeError, match="floating point or complex"):
        nn.Linear(2, 2).to("cuda", torch.int32)
    with pytest.raises(RuntimeError):
        nn.Linear(2, 2).to("nonsense")
    assert nn.Linear(2, 2).to().weight.device.type == "cpu"


@pytest.mark.parametrize("budget", [0, 4096, 1 << 20, None])
def test_budgets(moving, budget) -> None:
    module = nn.Sequential(*(nn.Linear(70, 70) for _ in range(12)))
    expected = copy.deepcopy(module).half().state_dict()
    with fastst_patch.config_context(device_memory_budget=budget):
        module.to("cuda", torch.float16)
    for name, t in module.state_dict().items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("first", range(1, 8))
def test_out_of_memory_goes_to_stock(moving, first) -> None:
    module = nn.Sequential(*(nn.Linear(70, 70) for _ in range(4)))
    expected = copy.deepcopy(module).state_dict()
    moving.refuse_from = first
    with fastst_patch.config_context(device_memory_budget=30000):
        with fastst_patch.profile() as seen:
            module.to("cuda")
    (report,) = seen.reports
    assert report.fallback_reason is not None
    assert "not enough memory" in report.fallback_reason
    for name, t in module.state_dict().items():
        assert torch.equal(t, expected[name]), name
    del module, t
    assert moving.driver.live().blocks == 0


@pytest.mark.parametrize(
    "name", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuStreamWaitEvent", "cuMemHostRegister_v2"]
)
@pytest.mark.parametrize("first", [1, 3])
def test_failing_drivers(moving, name, first) -> None:
    engine.shutdown()
    module = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
    expected = copy.deepcopy(module).state_dict()
    moving.driver.fail(name, first=first, count=1 << 30)
    module.to("cuda")
    moving.driver.clear()
    for key, t in module.state_dict().items():
        assert torch.equal(t, expected[key]), key


def test_fallback_is_told(moving) -> None:
    moving.refuse_from = 1
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match=r"Module\.to of Linear .* not enough"):
            nn.Linear(70, 70).to("cuda")


def test_what_is_left_to_stock_is_told(moving) -> None:
    with fastst_patch.profile() as seen, fastst_patch.config_context(verify=True):
        nn.Linear(70, 70).to("cuda")
    (report,) = seen.reports
    assert (report.call, report.file, report.path) == ("Module.to", "Linear", "stock")
    assert "verify is on" in str(report.fallback_reason)


def test_wrong_bytes_are_noticed(moving, monkeypatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    module = nn.Linear(70, 70)
    with fastst_patch.profile() as seen:
        module.to("cuda")
    monkeypatch.undo()
    assert "differed" in str(seen.reports[0].fallback_reason)
    assert seen.reports[0].tensors == 0


def test_small_modules_are_left_alone(monkeypatch, moving) -> None:
    monkeypatch.setattr(torch_module, "worth_it", uploads.worth_it)
    with fastst_patch.profile() as seen:
        nn.Linear(70, 70).to("cuda")
    assert seen.reports == []
    assert uploads.FEWEST_BYTES < uploads.FEWEST_BYTES_AT_FIRST


def test_other_moves_are_not_looked_at(moving) -> None:
    module = nn.Linear(70, 70)
    with fastst_patch.profile() as seen:
        module.to("cpu").to(torch.float16).half().float().to("meta")
    assert seen.reports == []
    assert module.weight.is_meta


def test_methods_stay_methods() -> None:
    with fastst_patch.patched(TARGET):
        assert nn.Module.to is not STOCK_TO
        assert fastst_patch.is_patched(TARGET)
        assert inspect.signature(nn.Module.to) == inspect.signature(STOCK_TO)
        assert (nn.Module.to.__qualname__, nn.Module.to.__doc__) == (
            STOCK_TO.__qualname__, STOCK_TO.__doc__
        )  # fmt: skip
        assert fastst_patch.get_original(TARGET) is STOCK_TO
        module = nn.Linear(2, 2)
        kept = module.to
        again = pickle.loads(pickle.dumps(kept))
        assert torch.equal(again.__self__.weight, module.weight)
        compiled = torch.compile(lambda x: module.to("cpu")(x + 0), backend="eager")
        assert torch.equal(compiled(torch.ones(1, 2)), module(torch.ones(1, 2)))
    assert nn.Module.to is STOCK_TO
    assert nn.Module._apply is STOCK_APPLY
    assert kept("cpu") is module


def test_left_out_of_the_targets() -> None:
    with fastst_patch.patched("safetensors.torch.load_file"):
        assert nn.Module.to is STOCK_TO
    with fastst_patch.patched():
        assert nn.Module.to is not STOCK_TO


LATE = """
import sys
import fastst_patch
fastst_patch.patch()
assert "torch" not in sys.modules
reason = fastst_patch.patch_map()["torch.nn.Module.to"].reason
assert "not imported yet" in reason, reason
import torch
assert fastst_patch.is_patched("torch.nn.Module.to")
assert torch.nn.Linear(2, 2).to("cpu").weight.device.type == "cpu"
fastst_patch.unpatch()
assert not hasattr(torch.nn.Module.to, "__wrapped__")
"""


def test_patched_before_torch_is_imported(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", LATE], check=True, cwd=tmp_path)


def test_real_runtime_without_a_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a device: tests/device/test_real.py")
    module = nn.Linear(3, 3)
    with pytest.raises((AssertionError, RuntimeError)) as stock_error:
        STOCK_TO(copy.deepcopy(module), "cuda")
    with fastst_patch.patched(TARGET), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_module, "worth_it", lambda nbytes: True)
        with pytest.raises((AssertionError, RuntimeError)) as our_error:
            module.to("cuda")
    assert (type(our_error.value), str(our_error.value)) == (
        type(stock_error.value), str(stock_error.value)
    )  # fmt: skip
