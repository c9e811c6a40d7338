"""Models on a real device, through the integrations, against stock's.

Run by ``pytest -m cuda`` where torch sees a GPU, and skipped elsewhere; the tests of
integrations prove the logic over the fake driver.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastst_patch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def _everything_is_worth_it(monkeypatch) -> None:
    from fastst_patch.integrations import diffusers, torch_module

    for module in (diffusers, torch_module):
        monkeypatch.setattr(module, "worth_it", lambda nbytes: True)


def _same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, yours = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert list(mine) == list(yours)
    for name, tensor in yours.items():
        found = mine[name]
        assert type(found) is type(tensor), name
        assert (found.device, found.dtype, found.shape, found.stride()) == (
            tensor.device, tensor.dtype, tensor.shape, tensor.stride()
        ), name  # fmt: skip
        assert (found.requires_grad, found.is_leaf) == (tensor.requires_grad, tensor.is_leaf)
        assert torch.equal(found, tensor), name
        assert found.untyped_storage().nbytes() == tensor.untyped_storage().nbytes(), name


def _net() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Linear(513, 1025), nn.LSTM(64, 128), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
    )
    net.tied = nn.Linear(513, 1025)
    net.tied.weight = net[0].weight
    return net


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda net: net.to("cuda"),
    "to half": lambda net: net.to("cuda", torch.float16),
    "to double, non-blocking": lambda net: net.to("cuda:0", torch.float64, non_blocking=True),
    "to channels last": lambda net: net.to("cuda", memory_format=torch.channels_last),
    "cuda": lambda net: net.cuda(),
    "cuda number": lambda net: net.cuda(0),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_modules_move_as_stocks(move) -> None:
    ours, theirs = _net(), _net()
    kept = list(ours.parameters())
    expected = move(theirs)
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        result = move(ours)
    (report,) = seen.reports
    assert (report.call, report.path, report.fallback_reason) == ("Module.to", "upload", None)
    assert result is ours
    assert all(a is b for a, b in zip(kept, ours.parameters(), strict=True))
    _same(ours, expected)
    assert ours.tied.weight is ours[0].weight
    # A second move finds nothing to do.
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        ours.to("cuda")
    assert seen.reports == []


def test_training_goes_on(tmp_path) -> None:
    def steps(net: nn.Module) -> nn.Module:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.to("cuda")
        for _ in range(3):
            optimizer.zero_grad()
            net[0](torch.ones(2, 513, device="cuda")).sum().backward()
            optimizer.step()
        return net

    torch.use_deterministic_algorithms(False)
    expected = steps(_net())
    with fastst_patch.patched():
        ours = steps(_net())
    _same(ours, expected)
    torch.save(ours.state_dict(), tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt")
    assert all(torch.equal(again[name], t) for name, t in expected.state_dict().items())
    _same(copy.deepcopy(ours), expected)


def test_memory_returns_to_the_start() -> None:
    torch.ones(1, device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    with fastst_patch.patched():
        for _ in range(3):
            net = _net().to("cuda")
            peak = torch.cuda.memory_allocated() - before
            del net
            gc.collect()
    assert torch.cuda.memory_allocated() == before
    needed = sum(-(-t.nbytes // 512) * 512 for t in _net().state_dict().values())
    assert peak <= needed + (1 << 20)


def test_out_of_memory_is_torchs_own() -> None:
    free, _ = torch.cuda.mem_get_info()
    big = nn.ParameterList([torch.empty(0) for _ in range(2)])
    big[0] = nn.Parameter(torch.empty(1).expand(free), requires_grad=False)  # stock's: no bytes
    big[1] = nn.Parameter(torch.ones(1000), requires_grad=False)
    with fastst_patch.patched(), pytest.raises(torch.cuda.OutOfMemoryError):
        big.to("cuda")


def _folders(tmp_path: Any) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "head_dim": 32,
    }  # fmt: skip
    torch.manual_seed(5)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    experts = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=64)
    )
    found = {}
    for name, model in (("dense", dense), ("experts", experts)):
        model.save_pretrained(tmp_path / name, max_shard_size="300KB")
        found[name] = (type(model), tmp_path / name)
    return found


@pytest.mark.parametrize("tensors", ["auto", "dlpack", "owned"])
@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, "auto", {"": torch.device("cuda")}])
def test_from_pretrained(tmp_path, device_map, dtype, tensors) -> None:
    for name, (kind, folder) in _folders(tmp_path).items():
        expected = kind.from_pretrained(folder, device_map=device_map, dtype=dtype)
        with fastst_patch.patched(tensors=tensors), fastst_patch.profile() as seen:
            model = kind.from_pretrained(folder, device_map=device_map, dtype=dtype)
        loads = [report for report in seen.reports if report.call == "from_pretrained"]
        assert {(r.path, r.device, r.fallback_reason) for r in loads} == {("ring", "cuda:0", None)}
        assert sorted(r.file for r in loads) == sorted(map(str, folder.glob("*.safetensors")))
        _same(model, expected)
        tokens = torch.arange(8, device="cuda")[None]
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, expected(tokens).logits), name


def test_offload_stays_lazy(tmp_path) -> None:
    kind, folder = _folders(tmp_path)["dense"]
    places = {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu",
        "model.layers.2": "disk", "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0,
    }  # fmt: skip
    tokens = torch.arange(8, device="cuda")[None]
    logits = []
    for options in ({"targets": []}, {}):
        with fastst_patch.patched(**options):
            model = kind.from_pretrained(
                folder, device_map=places, offload_folder=str(tmp_path / "offload")
            )
            with torch.no_grad():
                logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_diffusers_model(tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: integrations)")
    torch.manual_seed(6)
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float16):
        options = {"device_map": {"": "cuda:0"}, "torch_dtype": dtype}
        expected = diffusers.UNet2DModel.from_pretrained(tmp_path, **options)
        with fastst_patch.patched(), fastst_patch.profile() as seen:
            ours = diffusers.UNet2DModel.from_pretrained(tmp_path, **options)
        assert [r.path for r in seen.reports if r.call == "diffusers"] == ["upload"]
        _same(ours, expected)
