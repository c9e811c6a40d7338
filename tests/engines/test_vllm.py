"""vLLM's loading functions, stood in for: what they alone have, and bounds of device memory.

See test_engines.py for the rest.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
import vllm_standin
from engine_standin import Loading, Model, most_held
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine
from fastst_patch.integrations.engines import TakesLittle, Wanted, Weights
from fastst_patch.report_table import render

# ---- streamed ----


def test_a_model_whose_weights_were_packed_is_streamed_again(
    vllm, folder, on_cpu, all_deferred
) -> None:
    with Loading() as seen, fastst_patch.patched():
        vllm.load(folder, on_cpu)
        on_cpu._parameters = [SimpleNamespace(device=torch.device("cpu"), numel=lambda: 3)]
        vllm.load(folder, on_cpu)
        parts = vllm.load(folder, Model(3, "cpu"))  # not what another model had: see test_deferred
    first, again = seen.reports
    assert (first.tensors, again.tensors, again.fallback_reason) == (9, 9, None)
    assert len(parts) == 9


def test_table_rates_a_stream() -> None:
    load = fastst_patch.LoadReport("vllm", "/model", "cpu", "mmap", 3 * 10**9, 9, 2.0)
    text = render([(1, load)], 100)
    assert "1.50" in text
    assert "mapped" not in text


def test_with_sleep_mode_tensors_stay_on_the_cpu(vllm, folder, cuda, on_cuda) -> None:
    with Loading() as seen, fastst_patch.patched():
        vllm.load(folder, on_cuda, model_config={"enable_sleep_mode": True})
    assert seen.only.device == "cpu"
    assert cuda.allocated == 0
    assert "sleep mode" in seen.only.fallback_reason


def test_only_local_experts_are_read(vllm, folder, on_cpu) -> None:
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cpu, local={1, 3})
    assert [name for name in ours if "experts" in name] == [
        f"0.experts.{expert}.weight" for expert in (1, 3)
    ]
    assert seen.only.tensors == 7


def test_tensors_without_room_beside_the_model_stay_on_the_cpu(
    vllm, folder, tensors, cuda, little_memory, on_cuda, assert_same
) -> None:
    with Loading() as seen, fastst_patch.patched(device_memory_budget=2048):
        ours = {}
        for name, tensor in vllm.pairs(folder, on_cuda):
            ours[name] = tensor.clone()
            del tensor
    assert_same({name: ours[name] for name in tensors}, tensors)
    large = [name for name, tensor in tensors.items() if tensor.nbytes > 6 << 10]
    assert large == ["0.w", "1.w"]
    counts = {report.device: report.tensors for report in seen.reports}
    assert counts == {"cuda:0": 7, "cpu": 2}
    reasons = {report.device: report.fallback_reason for report in seen.reports}
    assert reasons["cuda:0"] is None
    assert "beside the model" in reasons["cpu"]


def test_out_of_memory_sends_the_rest_to_the_cpu(
    vllm, folder, tensors, cuda, monkeypatch, fake_driver, on_cuda, assert_same
) -> None:
    import fake_device

    stock = fake_device.StockOnCpu(monkeypatch, fake_driver)
    stock.error = torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
    cuda.refuse_from = 4
    with Loading() as seen, fastst_patch.patched(device_memory_budget=4096):
        ours = vllm.load(folder, on_cuda)
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert {report.device for report in seen.reports} == {"cuda:0", "cpu"}
    assert sum(report.tensors for report in seen.reports) == len(tensors)
    (rest,) = [report for report in seen.reports if report.device == "cpu"]
    assert rest.fallback_reason == "cuda:0 is out of memory: the rest stays on the CPU"
    del ours
    assert fake_driver.live().blocks == 0


def test_a_model_that_keeps_the_tensors_gets_the_rest_on_the_cpu(
    vllm, tmp_path, cuda, fake_driver, assert_same
) -> None:
    tensors = {f"{i:02}": torch.full((256,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Loading() as seen, fastst_patch.patched(device_memory_budget=2048):
        ours = vllm.load(tmp_path, Model(40 * 256, "cuda:0"))  # a dict
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert fake_driver.live().block_bytes <= 2 * (2048 + 1024) + 4096
    rest, there = sorted(seen.reports, key=lambda report: report.device)
    assert (rest.device, there.device) == ("cpu", "cuda:0")
    assert rest.tensors + there.tensors == 40
    assert rest.tensors > 25
    assert rest.fallback_reason == "tensors on cuda:0 are not let go of"
    del ours
    assert fake_driver.live().blocks == 0


def test_a_model_that_copies_the_tensors_gets_all_on_the_device(vllm, tmp_path, cuda) -> None:
    tensors = {f"{i:02}": torch.full((256,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Loading() as seen, fastst_patch.patched(device_memory_budget=2048):
        assert most_held(cuda, vllm.pairs(tmp_path, Model(40 * 256, "cuda:0"))) <= 4096
    assert (seen.only.device, seen.only.tensors) == ("cuda:0", 40)


# ---- left to vLLM ----


def test_files_that_go_another_way_are_closed(folder) -> None:
    """A model may have more of them than half of the descriptors that are allowed."""
    files = sorted(map(str, folder.iterdir()))
    before = engine.counters()["files"]
    gc.disable()
    try:
        with pytest.raises(TakesLittle):
            Weights(Wanted("vllm", files, elements=1))
        assert engine.counters()["files"] == before
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", ["eager", "torchao", "anything"])
def test_other_strategies_are_vllms(vllm, folder, tensors, on_cpu, strategy) -> None:
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cpu, safetensors_load_strategy=strategy)
    assert set(ours) == set(tensors)
    assert len(vllm.utils.asked) == 3
    assert seen.only.path == "stock"
    assert seen.only.fallback_reason == f"safetensors_load_strategy is {strategy!r}"


@pytest.mark.parametrize("strategy", [None, "lazy", "prefetch"])
def test_these_strategies_are_ours(vllm, folder, on_cpu, strategy) -> None:
    with fastst_patch.patched():
        vllm.load(folder, on_cpu, safetensors_load_strategy=strategy)
    assert vllm.utils.asked == []


def copied(vllm, folder, model, few=None, **options):
    """Copies of what a model takes of the weights that it is given."""
    with fastst_patch.patched():
        found = {}
        for name, tensor in vllm.pairs(folder, model, **options):
            if few is None or name in few:
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                found[name].data.copy_(tensor)
        return found


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_ranks_that_take_parts(
    vllm, folder, tensors, cuda, on_cuda, assert_same, all_deferred, kind
) -> None:
    vllm.parallel.sizes[kind] = 2
    with Loading() as seen:
        ours = copied(vllm, folder, on_cuda)
    assert vllm.utils.asked == []
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert (seen.only.device, seen.only.path, seen.only.tensors) == ("cuda:0", "ring", len(tensors))
    assert seen.only.fallback_reason is None


def test_experts_of_other_ranks_are_not_read(
    vllm, folder, tensors, on_cpu, assert_same, all_deferred
) -> None:
    vllm.parallel._EP = SimpleNamespace(world_size=2)
    few = [name for name in tensors if "experts" not in name or "experts.1." in name]
    with Loading() as seen:
        ours = copied(vllm, folder, on_cpu, few)
        copied(vllm, folder, on_cpu, local={0})
        copied(vllm, folder, on_cpu, model_config={"is_moe": False})
    assert_same({name: ours[name] for name in few}, {name: tensors[name] for name in few})
    assert [report.fallback_reason for report in seen.reports] == [None] * 3
    assert [report.tensors for report in seen.reports] == [len(few), 6, 9]


# ---- versions ----


def test_other_parameters_are_not_patched(tmp_path) -> None:
    with vllm_standin.standing_in(tmp_path / "site", "files, bar") as vllm:
        iterator = vllm.utils.safetensors_weights_iterator
        with fastst_patch.patched() as report:
            assert vllm.utils.safetensors_weights_iterator is iterator
        assert "takes (files, bar)" in report.targets["vllm.load"].reason
