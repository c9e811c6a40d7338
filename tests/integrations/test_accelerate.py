"""accelerate, patched: checkpoints dispatched, offloaded and saved as with stock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from twice import Failed, data_bytes, weights_in

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)  # buffers, one of them a whole number
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + self.frozen


class Net(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.a = Block()
        self.b = Block()
        self.head = nn.Linear(8, 16, bias=False)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(self.embed(x)))) * self.scale


TOKENS = torch.arange(5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file and several with an index, written by accelerate and by safetensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(2)
    model = Net().eval()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(model, folder / "shards", max_shard_size=600)
    accelerator.save_model(model, folder / "one")
    (folder / "bare").mkdir()
    half = {key: t.half() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    safetensors.torch.save_file(half, folder / "bare" / "model.safetensors")
    (folder / "tied").mkdir()
    tied = str(folder / "tied" / "model.safetensors")
    safetensors.torch.save_model(Net(tie=True), tied, {"format": "pt"})
    assert len(weights_in(folder / "shards")) > 3
    return {path.name: path for path in folder.iterdir()}


def _run(model: nn.Module, times: int = 1) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(TOKENS) for _ in range(times)]


CPU = {"": "cpu"}
SOME_DISK = {"embed": "cpu", "a": "disk", "b": "cpu", "head": "disk", "scale": "cpu"}
ALL_DISK = {"embed": "disk", "a": "disk", "b": "disk", "head": "disk", "scale": "cpu"}

MAPS: dict[str, dict[str, Any]] = {
    "no map": {},
    "cpu": {"device_map": CPU},
    "cpu by parts": {"device_map": dict.fromkeys(("embed", "a", "b", "head", "scale"), "cpu")},
    "auto": {"device_map": "auto"},
    "sequential": {"device_map": "sequential", "no_split_module_classes": ["Block"]},
    "float16": {"device_map": CPU, "dtype": torch.float16},
    "dtype by name": {"device_map": CPU, "dtype": "bfloat16"},
    "strict": {"device_map": CPU, "strict": True},
    "some disk": {"device_map": SOME_DISK},
    "all disk": {"device_map": ALL_DISK},
    "disk and buffers": {"device_map": SOME_DISK, "offload_buffers": True},
    "hooks": {"device_map": CPU, "force_hooks": True},
}


@pytest.mark.parametrize("how", MAPS)
def test_load_checkpoint_and_dispatch(checkpoints, same, how) -> None:
    options = MAPS[how]

    def load(folder: Path) -> Callable[[Path], Any]:
        def call(scratch: Path) -> Any:
            if "device_map" in options:
                with accelerate.init_empty_weights():
                    model = Net().eval()
                model.scale = torch.full((1,), 2.0)
            else:
                model = Net().eval()
            offload = {"offload_folder": scratch / "offload"} if "disk" in str(options) else {}
            accelerate.load_checkpoint_and_dispatch(model, folder, **options, **offload)
            try:
                return model, _run(model, 3)
            except RuntimeError as error:  # float16 weights among float32 buffers
                return model, str(error)

        return call

    folders = [checkpoints[which] for which in ("one", "shards", "bare")]
    ours, theirs = same({folder.name: load(folder) for folder in folders})
    assert all(isinstance(value, tuple) for value in theirs.value.values()), theirs.value
    assert any("does not contain metadata" in text for _, _, text in theirs.said)
    ours.assert_fast(file for folder in folders for file in weights_in(folder))


@pytest.mark.parametrize("offload_state_dict", [False, True])
def test_load_checkpoint_in_model(checkpoints, same, offload_state_dict) -> None:
    """A file, a folder, an index, tied weights; and devices that do not exist."""
    one, shards, tied = (checkpoints[name] for name in ("one", "shards", "tied"))
    file, index = str(one / "model.safetensors"), str(shards / "model.safetensors.index.json")

    def load(checkpoint: Any, **options: Any) -> Callable[[Path], Any]:
        def call(scratch: Path) -> Any:
            model = Net(tie=checkpoint == tied)
            if "disk" in str(options):
                options["offload_folder"] = scratch
            options.setdefault("offload_state_dict", offload_state_dict)
            accelerate.load_checkpoint_in_model(model, checkpoint, **options)
            return model

        return call

    good = {
        f"{place} {device_map}": load(place, device_map=device_map)
        for place in (file, one, index, shards, tied)
        for device_map in (None, CPU)
    }
    good["cast"] = load(one, keep_in_fp32_modules=["a"], dtype="float16", device_map=CPU)
    ours, theirs = same(good)
    assert all(isinstance(value, Net) for value in theirs.value.values()), theirs.value
    read = [*weights_in(one) * 5, *weights_in(shards) * 4, *weights_in(tied) * 2]
    ours.assert_fast(read)
    bad: tuple[dict[str, Any], ...] = (
        {"": torch.device("cpu")},
        {"": "disk"},
        {"": "nowhere"},
        {"": "cuda:x"},
        {"a": "cpu"},
        {},
    )
    _, theirs = same({str(x): load(one, device_map=x) for x in bad})
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value


def test_names_that_do_not_fit(checkpoints, same, tmp_path) -> None:
    files = {name: str(tmp_path / f"{name}.safetensors") for name in (
        "odd", "tensorflow", "other", "short", "none", "extra")}  # fmt: skip
    one = {"embed.weight": torch.ones(3, 8), "nobody.asked": torch.ones(2)}
    safetensors.torch.save_file(one, files["odd"], {"format": "pt"})
    safetensors.torch.save_file({"x": torch.ones(2)}, files["tensorflow"], {"format": "tf"})
    safetensors.torch.save_file({"x": torch.ones(2)}, files["other"], {"format": "np"})
    Path(files["short"]).write_bytes(Path(files["odd"]).read_bytes()[:-3])
    safetensors.torch.save_file({"nobody.asked": torch.ones(2)}, files["extra"], {"format": "pt"})

    def load(file: str, options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            model = Net()
            accelerate.load_checkpoint_in_model(model, file, **options)
            return model

        return call

    styles: tuple[dict[str, Any], ...] = ({}, {"device_map": CPU}, {"device_map": CPU, "strict": 1})
    _, theirs = same(
        {f"{name} {x}": load(files[name], x) for name in files for x in styles if name != "extra"}
    )
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    ours, theirs = same(load(files["extra"], {"device_map": CPU}))
    assert any("were not used" in text for _, _, text in theirs.said)
    ours.assert_fast([files["extra"]])


# ---------------------------------------------------------------- offload


def _index(folder: Path) -> dict[str, dict[str, str]]:
    found = {}
    for file in weights_in(folder):
        with safetensors.safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                found[name] = {"safetensors_file": str(file), "weight_name": name}
    return found


@pytest.mark.parametrize("which", ["one", "shards"])
def test_offloaded_to_the_checkpoint(checkpoints, same, which) -> None:
    """dispatch_model over the checkpoint itself: one open per weight, on every forward."""
    forwards = 4

    def load(dtype: str | None) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            index = _index(checkpoints[which])
            model = Net().eval()
            accelerate.load_checkpoint_in_model(model, checkpoints[which])
            if dtype is not None:
                model.to(getattr(torch, dtype))
                for name, entry in index.items():
                    if "num_batches" not in name:
                        entry["dtype"] = dtype
            accelerate.dispatch_model(model, ALL_DISK, main_device="cpu", offload_index=index)
            return model, _run(model, forwards), dict(model.state_dict())

        return call

    dtypes = [None, "float16", "float64"]
    ours, theirs = same({str(dtype): load(dtype) for dtype in dtypes})
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    for _, outputs, _ in ours.value.values():
        assert all(torch.equal(one, outputs[0]) for one in outputs)
    parameters = list(Net().parameters())
    opened = [r for r in ours.reports if r.call == "safe_open" and r.tensors == 1]
    assert len(opened) == len(dtypes) * forwards * len(parameters)
    moved = forwards * sum(t.nbytes for t in parameters)
    files = weights_in(checkpoints[which])
    ours.assert_fast(files, len(dtypes) * (moved + sum(map(data_bytes, files))))


def test_offload_functions(checkpoints, same) -> None:
    """cpu_offload and disk_offload of a model that was loaded patched."""

    def load(scratch: Path) -> Any:
        outputs = []
        for offload in (
            lambda m: accelerate.cpu_offload(m, torch.device("cpu")),
            lambda m: accelerate.cpu_offload(m, torch.device("cpu"), offload_buffers=True),
            lambda m: accelerate.disk_offload(m, scratch / "disk", torch.device("cpu")),
            lambda m: accelerate.cpu_offload_with_hook(m, torch.device("cpu"))[0],
        ):
            model = Net().eval()
            accelerate.load_checkpoint_in_model(model, checkpoints["shards"])
            model = offload(model)
            outputs.extend(_run(model, 2))
            accelerate.hooks.remove_hook_from_module(model, recurse=True)
        return outputs

    ours, theirs = same(load)
    assert theirs.error is None
    files = weights_in(checkpoints["shards"])
    ours.assert_fast(files, 4 * sum(map(data_bytes, files)))
    assert all(torch.equal(out, ours.value[0]) for out in ours.value)


def test_errors_of_an_offload_index(checkpoints, same, tmp_path) -> None:
    """Files that go away or shrink between two forwards."""
    from accelerate.utils import OffloadedWeightsLoader

    file = weights_in(checkpoints["one"])[0]

    def read(device: Any) -> Callable[[Path], Any]:
        def call(scratch: Path) -> Any:
            copy = scratch / "copy.safetensors"
            copy.write_bytes(file.read_bytes())
            entry = {"safetensors_file": str(copy), "weight_name": "head.weight"}
            loader = OffloadedWeightsLoader(
                index={"w": entry, "x": {**entry, "weight_name": "none"}, "y": entry},
                device=device,
            )
            answers: list[Any] = [list(loader), len(loader)]
            for key, change in (
                ("w", None),
                ("x", None),
                ("z", None),
                ("w", copy.unlink),
                ("w", lambda: copy.write_bytes(file.read_bytes()[:-1])),
                ("w", lambda: (copy.unlink(), copy.write_bytes(file.read_bytes()))),
            ):
                if change is not None:
                    change()
                try:
                    answers.append(loader[key])
                except Exception as error:
                    text = str(error).replace(str(scratch), "")
                    answers.append((type(error), text))
            return answers

        return call

    devices = (None, "cpu", "cuda:99", "nowhere", torch.device("cpu"))
    _, theirs = same({repr(device): read(device) for device in devices})
    answers = theirs.value["'cpu'"]
    assert isinstance(answers[2], torch.Tensor)
    assert isinstance(answers[-1], torch.Tensor)
    assert all(isinstance(answer, tuple) for answer in answers[3:-1])


# ---------------------------------------------------------------- Accelerator


def test_save_model(checkpoints, same, tmp_path) -> None:
    """Shared tensors found, shards cut and files written as with stock; offloaded models too."""

    def load(scratch: Path) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        model = Net(tie=True).eval()
        accelerate.load_checkpoint_in_model(model, checkpoints["tied"])
        accelerator.save_model(model, scratch / "tied", max_shard_size=600)
        model = Net().eval()
        accelerate.load_checkpoint_in_model(model, checkpoints["one"])
        accelerator.save_model(model, scratch / "whole")
        accelerate.dispatch_model(
            model, ALL_DISK, main_device="cpu", offload_index=_index(checkpoints["one"])
        )
        accelerator.save_model(model, scratch / "offloaded", max_shard_size=600)
        files = sorted(p for p in scratch.rglob("*") if p.is_file())
        return [(str(p.relative_to(scratch)), p.read_bytes()) for p in files]

    ours, theirs = same(load)
    assert theirs.error is None
    assert len(ours.value) > 8
    assert json.loads(dict(ours.value)["tied/model.safetensors.index.json"])["metadata"]
    used = [*weights_in(checkpoints["one"]), *weights_in(checkpoints["tied"])]
    offloaded = sum(parameter.nbytes for parameter in Net().parameters())  # read to be saved
    ours.assert_fast(used, sum(map(data_bytes, used)) + offloaded)


def test_save_and_load_state(same) -> None:
    """A run goes on from its checkpoint: weights, optimizer and random numbers."""

    def step(accelerator: Any, model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        accelerator.backward(model(torch.randint(0, 16, (5,))).square().mean())
        optimizer.step()

    def load(scratch: Path) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        model = Net(tie=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        step(accelerator, model, optimizer)
        accelerator.save_state(str(scratch / "state"))
        step(accelerator, model, optimizer)
        went = [(name, t.clone()) for name, t in model.state_dict().items()]
        accelerator.load_state(str(scratch / "state"))
        step(accelerator, model, optimizer)
        accelerator.free_memory()
        again = model.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in went)
        return model, optimizer.state_dict()

    ours, theirs = same(load)
    assert theirs.error is None
    assert [Path(r.file).name for r in ours.reports] == ["model.safetensors"]
    assert ours.reports[0].path in {"mmap", "mmap+readahead"}
    assert ours.reports[0].bytes > 0
