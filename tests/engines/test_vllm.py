"""vLLM's loading functions, stood in for: where tensors go, and when vLLM's own loop runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm_standin
from safetensors.torch import save_file
from vllm_standin import ELEMENTS, LARGEST, Loading, Model, most_held

import fastst_patch
from fastst_patch.report_table import render

# ---- streamed ----


def test_tensors_equal_those_of_vllms_own_loop(
    vllm, folder, tensors, on_cpu, assert_same, nothing_left
) -> None:
    theirs = vllm.load(folder, on_cpu)
    vllm.utils.asked.clear()
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cpu)
    assert vllm.utils.asked == []
    assert set(ours) == set(theirs)
    assert_same({name: ours[name] for name in theirs}, theirs)
    report = seen.only
    assert (report.file, report.device) == (str(folder), "cpu")
    assert report.path.startswith("mmap")
    assert (report.tensors, report.bytes) == (9, sum(t.nbytes for t in tensors.values()))
    assert report.fallback_reason is None
    assert f"GB/s, path {report.path}" in str(report)
    del ours, theirs


def test_a_model_whose_weights_were_packed_is_streamed_again(vllm, folder, on_cpu) -> None:
    with Loading() as seen, fastst_patch.patched():
        vllm.load(folder, on_cpu)
        on_cpu._parameters = [SimpleNamespace(device=torch.device("cpu"), numel=lambda: 3)]
        vllm.load(folder, on_cpu)
        parts = vllm.load(folder, Model(3, "cpu"))  # not what another model had: see test_deferred
    first, again = seen.reports
    assert (first.tensors, again.tensors, again.fallback_reason) == (9, 9, None)
    assert len(parts) == 9


def test_one_line_and_one_report_for_a_load(vllm, folder, on_cpu, caplog) -> None:
    caplog.set_level("INFO", "fastst_patch")
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        vllm.load(folder, on_cpu)
    assert [report.call for report in seen.reports] == ["vllm"]
    lines = [r.getMessage() for r in caplog.records if r.name == "fastst_patch"]
    assert [line for line in lines if line.startswith("vllm ")] == [str(seen.reports[0])]


def test_table_rates_a_stream() -> None:
    load = fastst_patch.LoadReport("vllm", "/model", "cpu", "mmap", 3 * 10**9, 9, 2.0)
    text = render([(1, load)], 100)
    assert "1.50" in text
    assert "mapped" not in text


def test_files_come_in_their_natural_order(vllm, folder, on_cpu) -> None:
    with fastst_patch.patched():
        names = list(vllm.load(folder, on_cpu))
    assert names[-1] == "0.experts.3.weight"  # of the tenth shard


def test_goes_to_the_device_of_the_model(
    vllm, folder, tensors, cuda, fake_driver, on_cuda, assert_same
) -> None:
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cuda)
    assert seen.only.device == "cuda:0"
    assert seen.only.path == "ring"
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
        (("cuda:0",), {"enable_sleep_mode": True}, "sleep mode"),
    ],
)
def test_stays_on_the_cpu(vllm, folder, cuda, devices, model_config, reason) -> None:
    model = Model(ELEMENTS, *devices)
    with Loading() as seen, fastst_patch.patched():
        vllm.load(folder, model, model_config=model_config)
    assert seen.only.device == "cpu"
    assert cuda.allocated == 0
    found = seen.only.fallback_reason
    assert found is None if reason is None else reason in found


def test_only_local_experts_are_read(vllm, folder, on_cpu) -> None:
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cpu, local={1, 3})
    assert [name for name in ours if "experts" in name] == [
        f"0.experts.{expert}.weight" for expert in (1, 3)
    ]
    assert seen.only.tensors == 7


def test_options_bound_what_is_held_on_the_device(vllm, folder, cuda, on_cuda) -> None:
    with fastst_patch.patched(device_memory_budget=4096, tensors="dlpack"):
        most = most_held(vllm.loader(), folder, cuda, on_cuda)
    assert 0 < most <= 4096 + 2 * LARGEST  # what is given, and the next


def test_tensors_without_room_beside_the_model_stay_on_the_cpu(
    vllm, folder, tensors, cuda, little_memory, on_cuda, assert_same
) -> None:
    with Loading() as seen, fastst_patch.patched(device_memory_budget=2048):
        ours = {}
        loader = vllm.loader()
        config = SimpleNamespace(model=str(folder), prefix="")
        for name, tensor in loader.get_all_weights(config, on_cuda):
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
        assert most_held(vllm.loader(), tmp_path, cuda, Model(40 * 256, "cuda:0")) <= 4096
    assert (seen.only.device, seen.only.tensors) == ("cuda:0", 40)


def test_closing_early_lets_go(vllm, folder, on_cpu, nothing_left) -> None:
    with Loading() as seen, fastst_patch.patched():
        loader = vllm.loader()
        pairs = loader.get_all_weights(SimpleNamespace(model=str(folder), prefix=""), on_cpu)
        next(pairs)
        pairs.close()
    assert seen.only.tensors == 1


# ---- left to vLLM ----


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
        loader = vllm.loader()
        loader.local_expert_ids = options.pop("local", None)
        config = SimpleNamespace(model=str(folder), prefix="", **options)
        found = {}
        for name, tensor in loader.get_all_weights(config, model):
            if few is None or name in few:
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                found[name].data.copy_(tensor)
        return found


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_ranks_that_take_parts(vllm, folder, tensors, cuda, on_cuda, assert_same, kind) -> None:
    vllm.parallel.sizes[kind] = 2
    with Loading() as seen:
        ours = copied(vllm, folder, on_cuda)
    assert vllm.utils.asked == []
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert (seen.only.device, seen.only.path, seen.only.tensors) == ("cuda:0", "ring", len(tensors))
    assert seen.only.fallback_reason is None


def test_experts_of_other_ranks_are_not_read(vllm, folder, tensors, on_cpu, assert_same) -> None:
    vllm.parallel._EP = SimpleNamespace(world_size=2)
    few = [name for name in tensors if "experts" not in name or "experts.1." in name]
    with Loading() as seen:
        ours = copied(vllm, folder, on_cpu, few)
        copied(vllm, folder, on_cpu, local={0})
        copied(vllm, folder, on_cpu, is_moe=False)
    assert_same({name: ours[name] for name in few}, {name: tensors[name] for name in few})
    assert [report.fallback_reason for report in seen.reports] == [None] * 3
    assert [report.tensors for report in seen.reports] == [len(few), 6, 9]


def test_a_drafter_takes_little_of_the_files(
    vllm, folder, tensors, assert_same, nothing_left
) -> None:
    with Loading() as seen:
        ours = copied(vllm, folder, Model(ELEMENTS // 2, "cpu"), ["norm", "1.w"])
    assert vllm.utils.asked == []
    assert_same({"1.w": ours["1.w"]}, {"1.w": tensors["1.w"]})
    assert seen.only.bytes == tensors["1.w"].nbytes + tensors["norm"].nbytes


def test_a_name_in_two_files_is_vllms(vllm, folder, on_cpu) -> None:
    save_file({"norm": torch.zeros(3)}, folder / "m-3.safetensors")
    with Loading() as seen, fastst_patch.patched():
        ours = vllm.load(folder, on_cpu)
    assert torch.equal(ours["norm"], torch.zeros(3))
    assert seen.only.fallback_reason == "tensor 'norm' is in two of the files"


def test_a_damaged_file_is_told_by_vllm(vllm, folder, on_cpu, stock) -> None:
    (folder / "m-2.safetensors").write_bytes(b"\x01" * 40)
    errors = []
    for patched in (False, True):
        with pytest.raises(Exception) as caught:
            if patched:
                with fastst_patch.patched():
                    vllm.load(folder, on_cpu)
            else:
                vllm.load(folder, on_cpu)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_torch_modes_are_vllms(vllm, folder, on_cpu) -> None:
    with Loading() as seen, fastst_patch.patched(), torch.device("meta"):
        vllm.load(folder, on_cpu)
    assert seen.only.fallback_reason == "a torch mode or default device is in force"


def test_not_called_by_its_loader(vllm, folder) -> None:
    files = [str(path) for path in folder.iterdir()]
    with Loading() as seen, fastst_patch.patched():
        dict(vllm.utils.safetensors_weights_iterator(files, False, None))
    assert "was not called by DefaultModelLoader" in seen.only.fallback_reason
    with Loading() as seen, fastst_patch.patched():
        source = SimpleNamespace(model_or_path=str(folder), prefix="")
        dict(vllm.loader()._get_weights_iterator(source))
    assert "get_all_weights was not called" in seen.only.fallback_reason


# ---- versions ----


def test_the_signature_of_older_versions(tmp_path, folder, tensors) -> None:
    with vllm_standin.standing_in(tmp_path / "site", vllm_standin.OLD) as vllm:
        del vllm.utils._natural_sort_key
        with Loading() as seen, fastst_patch.patched():
            ours = vllm.load(folder, Model(ELEMENTS, "cpu"), safetensors_load_strategy="lazy")
    assert set(ours) == set(tensors)
    assert seen.only.path.startswith("mmap")


def test_an_unknown_parameter_is_vllms(tmp_path, folder, tensors) -> None:
    parameters = f"{vllm_standin.NEW}, mirror=None"
    with vllm_standin.standing_in(tmp_path / "site", parameters, ", mirror=1") as vllm:
        with Loading() as seen, fastst_patch.patched():
            ours = vllm.load(folder, Model(ELEMENTS, "cpu"))
        assert len(vllm.utils.asked) == 3
    assert set(ours) == set(tensors)
    assert "takes mirror" in seen.only.fallback_reason


def test_other_parameters_are_not_patched(tmp_path) -> None:
    with vllm_standin.standing_in(tmp_path / "site", "files, bar") as vllm:
        iterator = vllm.utils.safetensors_weights_iterator
        with fastst_patch.patched() as report:
            assert vllm.utils.safetensors_weights_iterator is iterator
        assert "takes (files, bar)" in report.targets["vllm.load"].reason
