"""Ranks of vLLM, stood in for, in one process: predictions, stages, and what goes another way."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import parallel_model
import pytest
import torch
from cases_parallel import load, same
from parallel_model import LAYERS, Parallel

import fastst_patch
from fastst_patch import engine
from fastst_patch.integrations import parts as integration
from fastst_patch.integrations.deferred import DeferredTensor

pytestmark = pytest.mark.usefixtures("all_deferred")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    parallel_model.write(folder)
    return str(folder)


@pytest.fixture
def rank_of_two(registered):
    registered.parallel.sizes["tensor"] = 2
    registered.parallel.rank = 1
    return registered


@pytest.fixture
def jobs(monkeypatch):
    """How many parts each job moved."""
    found = []
    moving = integration.Parts._moving

    def watched(self, file, device, items):
        found.append(len(items))
        return moving(self, file, device, items)

    monkeypatch.setattr(integration.Parts, "_moving", watched)
    return found


def both(vllm, folder, device="cpu", patched=None, **arguments):
    """Stock's load and ours, which must be equal; our model and reports."""
    theirs = Parallel(1, 2, device, **arguments)
    load(vllm, folder, theirs)
    ours = Parallel(1, 2, device, **arguments)
    before = engine.counters()["bytes_copied"]
    with fastst_patch.patched(**(patched or {})):
        reports = load(vllm, folder, ours)
    assert same(ours, theirs)
    return ours, reports, engine.counters()["bytes_copied"] - before


def test_parts_of_later_layers_are_on_their_way(rank_of_two, llama, cuda, jobs) -> None:
    both(rank_of_two, llama, "cuda:0")
    first_of_their_kind = 1 + 9 + 9 + 2  # embedding, a layer of each kind, norm and head
    assert sum(jobs) == 1 + 3 * 9 + 2 * (6 + 9) + 2
    assert jobs.count(1) <= first_of_their_kind + 1


def test_a_stage_reads_its_layers(rank_of_two, llama, cuda, nothing_left) -> None:
    for stage in (range(2), range(2, LAYERS)):
        ours, reports, copied = both(
            rank_of_two, llama, "cuda:0", {"device_memory_budget": 1 << 18}, stage=stage
        )
        assert copied <= 1.1 * ours.nbytes + (1 << 19)
        assert sum(report.bytes for report in reports) <= 1.1 * ours.nbytes


def test_stages_alone(rank_of_two, llama, cuda) -> None:
    rank_of_two.parallel.sizes.update(tensor=1, pipeline=2)
    rank_of_two.parallel.rank = 0
    theirs, ours = (Parallel(0, 1, "cuda:0", range(1, 3)) for _ in range(2))
    load(rank_of_two, llama, theirs)
    with fastst_patch.patched():
        reports = load(rank_of_two, llama, ours)
    assert same(ours, theirs)
    assert sum(report.bytes for report in reports) <= 1.1 * ours.nbytes


def test_cold_parts_are_read_ahead_on_the_cpu(rank_of_two, llama, evict, on_disk) -> None:
    rank_of_two.parallel.sizes["tensor"] = 4
    for path in Path(llama).iterdir():
        evict(path)
    theirs, ours = (Parallel(1, 4) for _ in range(2))
    before = engine.counters()["bytes_prefetched"]
    with fastst_patch.patched(chunk_bytes=65536):
        reports = load(rank_of_two, llama, ours)
    engine.shutdown()
    read = engine.counters()["bytes_prefetched"] - before
    load(rank_of_two, llama, theirs)
    assert same(ours, theirs)
    assert [report.path for report in reports] == ["mmap+readahead"]
    assert read <= sum(path.stat().st_size for path in Path(llama).iterdir())


def test_another_dtype_is_cast_by_torch(rank_of_two, llama, cuda) -> None:
    _, reports, copied = both(rank_of_two, llama, "cuda:0", dtype=torch.float32)
    assert copied < 1000  # the scales
    assert {report.device for report in reports} <= {"cpu", "cuda:0"}


def test_quantized_models_too(rank_of_two, llama, cuda) -> None:
    ours, theirs = (Parallel(1, 2, "cuda:0") for _ in range(2))
    load(rank_of_two, llama, theirs)
    with fastst_patch.patched():
        reports = load(rank_of_two, llama, ours, model_config={"quantization": "fp8"})
    assert same(ours, theirs)
    assert {report.device for report in reports} == {"cuda:0", "cpu"}


def test_out_of_memory_copies_from_the_map(rank_of_two, llama, cuda) -> None:
    cuda.refuse_from = 40
    ours, reports, copied = both(rank_of_two, llama, "cuda:0")
    assert 0 < copied < ours.nbytes
    (rest,) = [report for report in reports if report.device == "cpu"]
    assert "not enough memory on cuda:0" in rest.fallback_reason
    assert cuda.driver.live().blocks == 0
    told = pytest.raises(fastst_patch.FaststError, match="not enough memory on cuda:0")
    cuda.refuse_from = cuda.allocated + 40
    with fastst_patch.patched(fallback="error"), told:
        load(rank_of_two, llama, ours)


def test_a_part_without_room_is_copied_from_the_map(rank_of_two, llama, cuda) -> None:
    cuda.driver.lib.fake_device_bytes((1 << 18) + (1 << 17))
    try:
        _, reports, _ = both(rank_of_two, llama, "cuda:0", {"device_memory_budget": 1 << 18})
    finally:
        cuda.driver.lib.fake_device_bytes(16 << 30)
    (rest,) = [report for report in reports if report.device == "cpu"]
    assert "do not fit beside the model" in rest.fallback_reason


def test_a_load_that_fails_leaves_nothing(rank_of_two, llama, cuda, nothing_left) -> None:
    model = Parallel(1, 2, "cuda:0")
    del model.params["model.layers.2.mlp.gate_up_proj.weight"]
    with pytest.raises(KeyError), fastst_patch.patched():
        load(rank_of_two, llama, model)
    assert cuda.driver.live().blocks == 0


def test_a_read_that_fails_is_raised(rank_of_two, llama, cuda, nothing_left) -> None:
    with fastst_patch.patched(), pytest.raises(OSError, match="could not be loaded") as caught:
        engine.set_fault("preadv", first=20, errno=5)
        try:
            load(rank_of_two, llama, Parallel(1, 2, "cuda:0"))
        finally:
            engine.clear_faults()
    del caught
    assert cuda.driver.live().blocks == 0


def test_tensors_that_are_kept_become_plain(rank_of_two, llama) -> None:
    with fastst_patch.patched():
        kept = rank_of_two.load(llama, Parallel(1, 2))
    assert {type(tensor) for tensor in kept.values()} == {torch.Tensor}
    theirs = parallel_model.tensors()
    assert kept.keys() == theirs.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in theirs.items())


def test_weights_used_after_all_were_given(rank_of_two, llama, cuda) -> None:
    theirs, ours = (Parallel(1, 2, "cuda:0") for _ in range(2))
    load(rank_of_two, llama, theirs)

    def all_but_the_end(pairs):
        pairs = iter(pairs)
        found = [next(pairs) for _ in parallel_model.tensors()]
        yield from found

    with fastst_patch.patched():
        ours.load_weights(all_but_the_end(rank_of_two.pairs(llama, ours)))
    assert same(ours, theirs)
    assert cuda.driver.live().blocks == 0


def test_a_mode_that_begins_later(rank_of_two, llama, cuda) -> None:
    theirs, ours = (Parallel(1, 2, "cuda:0") for _ in range(2))
    load(rank_of_two, llama, theirs)
    with fastst_patch.patched():
        pairs = rank_of_two.pairs(llama, ours)
        ours.load_weights([next(pairs)])
        with torch.inference_mode():
            kept = [next(pairs) for _ in range(9)]
            ours.load_weights(kept[:5])
        ours.load_weights(kept[5:])
        ours.load_weights(pairs)
    assert same(ours, theirs)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_copies_in_threads_of_the_engine(rank_of_two, llama, cuda, device) -> None:
    """As SGLang's DeepSeek does it: some copies are done when all tensors were given."""
    theirs, ours = (Parallel(1, 2, device) for _ in range(2))
    load(rank_of_two, llama, theirs)
    with fastst_patch.patched(), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            pairs = rank_of_two.pairs(llama, ours)
            done = [pool.submit(ours.load_weights, [one]) for one in pairs]
            assert [future.result() for future in done] == [None] * len(done)
    assert same(ours, theirs)
    assert cuda.driver.live().blocks == 0


def test_gradients_as_stocks(rank_of_two, llama, cuda) -> None:
    with fastst_patch.patched():
        pairs = rank_of_two.pairs(llama, Parallel(1, 2, "cuda:0"))
        _, tensor = next(pairs)
        assert type(tensor) is DeferredTensor
        into = torch.zeros(tensor.shape, dtype=tensor.dtype)
        assert into.copy_(tensor.requires_grad_()).requires_grad
        pairs.close()


@pytest.mark.parametrize("case", ["verify", "buffered", "mode"])
def test_left_to_vllm(rank_of_two, llama, case) -> None:
    options = {"verify": {"verify": True}, "buffered": {"io": "buffered"}}.get(case, {})
    ours, theirs = (Parallel(1, 2) for _ in range(2))
    load(rank_of_two, llama, theirs)
    with fastst_patch.patched(**options):
        mode = torch.inference_mode() if case == "mode" else contextlib.nullcontext()
        with mode:
            reports = load(rank_of_two, llama, ours)
    assert same(ours, theirs)
    words = {"verify": "verify is on", "buffered": "excludes maps", "mode": "torch mode"}
    (report,) = [report for report in reports if report.call == "vllm"]
    assert report.path == "stock"
    assert words[case] in report.fallback_reason


@pytest.mark.parametrize("group", ["dp", 1, ["tp"], True])
def test_other_groups_are_refused(registered, group) -> None:
    with pytest.raises(fastst_patch.OptionError, match="group="):
        registered.loader("fastst", model_loader_extra_config={"group": group})


def test_group_is_no_option_of_patch() -> None:
    with pytest.raises(fastst_patch.OptionError, match="unknown option 'group'"):
        fastst_patch.patch(group="tp")


def test_a_filter_of_experts_excludes_the_group(rank_of_two, folder, on_cpu, tensors) -> None:
    rank_of_two.parallel.group = None  # which would raise
    extra = {"group": "tp"}
    with fastst_patch.profile() as seen:
        ours = rank_of_two.load(
            folder, on_cpu, "fastst", local={1}, model_loader_extra_config=extra
        )
    assert [name for name in ours if "experts" in name] == ["0.experts.1.weight"]
    assert seen.reports == []  # nothing was copied
