"""diffusers with CUDA in the device_map, over the fake driver.

What runs is diffusers' own loop over the state dict; setting a tensor on its device, which needs
a real one, is told the CPU.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastst_patch
from fastst_patch.integrations.uploads import Uploads

loading = pytest.importorskip(
    "diffusers.models.model_loading_utils", reason="needs diffusers (extra: integrations)"
)
accelerate = pytest.importorskip("accelerate")

from fastst_patch.integrations import diffusers as integration  # noqa: E402

TARGET = "diffusers.from_pretrained"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = torch.nn.Conv2d(3, 40, 5)
        self.norm = torch.nn.GroupNorm(4, 40)
        self.back = torch.nn.Linear(300, 70)
        self.register_buffer("steps", torch.arange(1000))


@pytest.fixture
def files(raw) -> str:
    torch.manual_seed(7)
    state = Net().state_dict()
    state["unexpected"] = torch.ones(5)
    return str(raw.tensors(state))


@pytest.fixture
def to_cuda(monkeypatch, cuda) -> Any:
    original = accelerate.utils.set_module_tensor_to_device

    def on_cpu(module: Any, name: str, device: Any, value: Any, **options: Any) -> None:
        asked.append((name, str(device), value.data_ptr(), value.dtype))
        original(module, name, "cpu", value=value, **options)

    asked: list[Any] = []
    monkeypatch.setattr(loading, "set_module_tensor_to_device", on_cpu)
    monkeypatch.setattr(integration, "worth_it", lambda nbytes: True)
    cuda.asked = asked
    with fastst_patch.patched(chunk_bytes=65536):
        yield cuda


def _load(path: str, **options: Any) -> tuple[Net, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        model = Net()
    state = loading.load_state_dict(path)
    loading.load_model_dict_into_meta(model, state, **options)
    return model, state


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("keep", [None, ["norm"]])
def test_equals_stock(to_cuda, files, dtype, keep) -> None:
    options = {"dtype": dtype, "keep_in_fp32_modules": keep}
    with fastst_patch.patched("safetensors.safe_open"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "device_of", lambda named: None)
        expected, _ = _load(files, device_map={"": "cuda:0"}, **options)
    with fastst_patch.profile() as seen:
        model, state = _load(files, device_map={"": "cuda:0"}, **options)
    places = {t.data_ptr() for t in state.values()}
    mine, yours = model.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    assert list(mine) == list(yours)
    for name, tensor in yours.items():
        assert type(mine[name]) is type(tensor), name
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
        assert mine[name].data_ptr() not in places, name
    (report,) = [found for found in seen.reports if found.call == "diffusers"]
    assert (report.path, report.device, report.fallback_reason) == ("upload", "cuda:0", None)
    assert report.tensors == len(yours)
    del model, mine, seen
    gc.collect()
    assert to_cuda.driver.live().blocks == 0


def test_several_devices(to_cuda, files) -> None:
    with fastst_patch.profile() as seen:
        _load(files, device_map={"front": 0, "norm": "cuda:1", "back": "cpu", "steps": "cuda"})
    moved = {found.device: found.tensors for found in seen.reports if found.call == "diffusers"}
    assert moved == {"cuda:0": 3, "cuda:1": 2}


@pytest.mark.parametrize(
    "options",
    [{"device_map": None}, {"device_map": {"": "cpu"}}, {"device_map": {"": "cpu"}, "dtype": None}],
)
def test_left_to_diffusers(to_cuda, files, options) -> None:
    with fastst_patch.profile() as seen:
        _load(files, **options)
    assert [found for found in seen.reports if found.call == "diffusers"] == []


@pytest.mark.parametrize("first", [1, 2])
def test_out_of_memory_goes_to_diffusers(to_cuda, files, first) -> None:
    to_cuda.refuse_from = first
    with fastst_patch.profile() as seen:
        model, state = _load(files, device_map={"": "cuda:0"})
    (report,) = [found for found in seen.reports if found.call == "diffusers"]
    assert "not enough memory" in str(report.fallback_reason)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.fixture
def full(to_cuda, monkeypatch) -> Any:
    """Tensors on the device do not fit there a second time, cast, from some number of casts on."""
    to = torch.Tensor.to
    ours: set[int] = set()
    place = Uploads.moved

    def moved(self: Uploads, t: torch.Tensor) -> torch.Tensor | None:
        found = place(self, t)
        ours.update(() if found is None else (found.data_ptr(),))
        return found

    def cast(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args == (torch.float16,) and self.dtype != torch.float16:
            full.casts += 1
            if full.casts == full.refused_from and self.data_ptr() in ours:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
            if full.casts > full.refused_from:
                full.alive.append(to_cuda.driver.live().blocks)
                if full.casts == full.refused_again:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory (stock's)")
        return to(self, *args, **options)

    full = SimpleNamespace(casts=0, alive=[], refused_from=0, refused_again=0)
    monkeypatch.setattr(Uploads, "moved", moved)
    monkeypatch.setattr(torch.Tensor, "to", cast)
    gc.collect()
    gc.disable()
    yield full
    gc.enable()


@pytest.mark.parametrize("places", [{"": 0}, {"front": 0, "norm": 1, "back": 0, "steps": 1}])
@pytest.mark.parametrize("refused", range(1, 7))
def test_a_cast_that_does_not_fit_is_diffusers_own(to_cuda, files, full, places, refused) -> None:
    """It casts on the CPU and then copies. Nothing that was moved ahead is in its way."""
    expected = loading.load_state_dict(files)
    del expected["unexpected"]
    full.refused_from = refused
    with fastst_patch.profile() as seen:
        model, _ = _load(files, device_map=places, dtype=torch.float16)
    assert full.casts == 6 + 1  # of seven tensors one is of whole numbers
    steps = list(expected).index("steps") < refused + 1  # which is then there, and stays
    assert set(full.alive) <= {0, int(steps)}
    assert [name for name, *_ in to_cuda.asked] == list(expected)
    found = model.state_dict()
    for name, tensor in expected.items():
        wanted = tensor.half() if tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name
    reports = [found for found in seen.reports if found.call == "diffusers"]
    assert {report.device for report in reports} == {f"cuda:{n}" for n in places.values()}
    for report in reports:
        assert report.fallback_reason == f"not enough memory on {report.device} beside it"
    assert 0 < sum(report.tensors for report in reports) <= refused + 1
    del model, found
    assert to_cuda.driver.live().blocks == 0


def test_no_room_for_diffusers_either(to_cuda, files, full) -> None:
    """Its own exception, and nothing of the first in it."""
    full.refused_from, full.refused_again = 2, 3
    with pytest.raises(torch.cuda.OutOfMemoryError, match="stock's") as error:
        _load(files, device_map={"": 0}, dtype=torch.float16)
    assert error.value.__context__ is None
    del error
    assert to_cuda.driver.live().blocks == 0


def test_verify_leaves_it_to_diffusers(to_cuda, files) -> None:
    with fastst_patch.config_context(verify=True), fastst_patch.profile() as seen:
        model, state = _load(files, device_map={"": "cuda:0"})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    (report,) = [found for found in seen.reports if found.call == "diffusers"]
    assert (report.path, report.tensors) == ("stock", 0)
    assert report.fallback_reason == "verify is on, and moves to a device are then stock's"


def test_errors_are_diffusers_own(to_cuda, files, raw) -> None:
    state = Net().state_dict() | {"back.weight": torch.zeros(2, 2)}
    path = str(raw.tensors(state))
    errors = []
    for device_map in (None, {"": "cuda:0"}):
        with pytest.raises(ValueError, match=r"back\.weight expected shape") as error:
            _load(path, device_map=device_map)
        errors.append(str(error.value))
    del error  # its frames hold what was being placed, as with stock
    assert errors[0] == errors[1]
    gc.collect()
    assert to_cuda.driver.live().blocks == 0


def test_it_is_in_place(to_cuda) -> None:
    assert fastst_patch.patch_map()[TARGET].patched
    assert fastst_patch.get_original(TARGET) is not loading.load_model_dict_into_meta
