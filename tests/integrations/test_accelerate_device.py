"""accelerate with CUDA among its devices, over the fake driver.

What runs is accelerate's own reading of checkpoints; setting a tensor on its device, which needs
a real one, is told the CPU.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from twice import data_bytes, tensor_bytes, weights_in

import fastst_patch

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.utils import OffloadedWeightsLoader, modeling  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 40)
        self.a = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
        self.b = nn.Linear(40, 40)
        self.head = nn.Linear(40, 64, bias=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(2)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(Net(), folder / "one")
    accelerator.save_model(Net(), folder / "shards", max_shard_size="8KB")
    assert len(weights_in(folder / "shards")) > 2
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def to_cuda(monkeypatch, cuda) -> Any:
    original = modeling.set_module_tensor_to_device

    def on_cpu(module: Any, name: str, device: Any, value: Any = None, **options: Any) -> None:
        original(module, name, device if device == "meta" else "cpu", value=value, **options)

    monkeypatch.setattr(modeling, "set_module_tensor_to_device", on_cpu)
    with fastst_patch.patched(chunk_bytes=65536):
        yield cuda


MAPS: dict[str, dict[str, Any]] = {
    "one device": {"": 0},
    "by name": {"": "cuda:1"},
    "two": {"embed": 0, "a": 0, "b": 1, "head": 1},
    "and the cpu": {"embed": "cuda:0", "a": 1, "b": "cpu", "head": "cpu"},
    "and the disk": {"embed": 0, "a": "cpu", "b": "disk", "head": "disk"},
}


def _device(name: str, places: dict[str, Any]) -> str:
    place = next(places[part] for part in places if name.startswith(part))
    return f"cuda:{place}" if type(place) is int else str(place)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("how", MAPS)
@pytest.mark.parametrize("which", ["one", "shards"])
def test_load_checkpoint_in_model(to_cuda, checkpoints, tmp_path, which, how, dtype) -> None:
    """Each tensor comes by the engine to the device that the map names, once."""
    places, folder = MAPS[how], checkpoints[which]
    expected: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for file in weights_in(folder):
        expected |= safetensors.torch.load(file.read_bytes())
        sizes |= tensor_bytes(file)
    with accelerate.init_empty_weights():
        model = Net()
    with fastst_patch.profile() as seen:
        modeling.load_checkpoint_in_model(
            model, str(folder), device_map=places, dtype=dtype, offload_folder=str(tmp_path)
        )
    wanted: dict[str, int] = {}
    for name, size in sizes.items():
        device = _device(name, places)
        device = "cpu" if device == "disk" else device  # read there, and written elsewhere
        wanted[device] = wanted.get(device, 0) + size
    found: dict[str, int] = {}
    for report in seen.reports:
        assert report.fallback_reason is None
        assert report.path == "ring" if report.device != "cpu" else report.path != "stock"
        found[report.device] = found.get(report.device, 0) + report.bytes
    assert {device: n for device, n in found.items() if n} == wanted
    for name, tensor in model.state_dict().items():
        if tensor.device.type == "meta":
            assert _device(name, places) == "disk"
            continue
        cast = dtype is not None and expected[name].is_floating_point()
        assert torch.equal(tensor, expected[name].to(dtype) if cast else expected[name]), name
    del model, tensor
    gc.collect()
    assert to_cuda.driver.live().blocks == 0


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_disk_offload(to_cuda, checkpoints, monkeypatch, device) -> None:
    """Every weight of every forward is read straight to the device of execution, and then freed."""
    to = torch.Tensor.to

    def stay(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self if args == (device,) else to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    (file,) = weights_in(checkpoints["one"])
    sizes = tensor_bytes(file)
    expected = safetensors.torch.load(file.read_bytes())
    index = {name: {"safetensors_file": str(file), "weight_name": name} for name in sizes}
    loader = OffloadedWeightsLoader(index=index, device=device)
    forwards = 3
    with fastst_patch.profile() as seen:
        for _ in range(forwards):
            for name in sizes:
                tensor = loader[name]
                assert torch.equal(tensor, expected[name]), name
                assert to_cuda.driver.live().blocks == 1
                del tensor
    assert to_cuda.driver.live().blocks == 0
    assert len(seen.reports) == forwards * len(sizes)
    assert {(r.call, r.path, r.device, r.tensors) for r in seen.reports} == {
        ("safe_open", "ring", device, 1)
    }
    assert sum(report.bytes for report in seen.reports) == forwards * data_bytes(file)
