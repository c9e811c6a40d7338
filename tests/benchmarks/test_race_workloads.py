"""The race's workloads are the published checkpoints in everything but their bytes."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections import Counter
from math import prod

import pytest
from places import ROOT

from fastst_patch.bench.checkpoint_files import describe
from fastst_patch.bench.failures import BenchError, UsageError

if not (ROOT / "benchmarks" / "race").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the checkout may hold no built module

workloads = importlib.import_module("benchmarks.race.workloads")

GB = 10**9
HUGE = 10**15

# As published: tensors, parameters, and bytes of each file (its header included).
PUBLISHED = {
    "gpt2-medium": (316, 354_823_168 + 24 * 1024**2, [1_519_984_962]),  # + the masks
    "qwen2.5-7b": (339, 7_615_616_512, None),
    "llama-3-8b": (
        291,
        8_030_261_248,
        [4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808],
    ),
    "qwen3-30b-a3b": (18_867, 30_532_122_624, None),
    "sdxl-unet": (1680, 2_567_463_684, None),
    "llama-3-8b-lora": (128, 3_407_872, None),
    "llama-3-8b-fp8": (291 + 2 * 7 * 32, 8_030_261_248 + 2 * 7 * 32, None),
}
FILES = {"qwen2.5-7b": 4, "llama-3-8b": 4, "qwen3-30b-a3b": 16, "llama-3-8b-fp8": 2}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_true_size_is_what_was_published(name):
    tensors, parameters, sizes = PUBLISHED[name]
    workload = workloads.fit(name, HUGE)
    shards = workloads.specs_of(workload)
    specs = [spec for shard in shards for spec in shard]
    assert workload.scaled == 1.0
    assert workload.tensors == len(specs) == len({spec.name for spec in specs}) == tensors
    assert sum(prod(spec.shape) for spec in specs) == parameters
    assert workload.nbytes == sum(spec.nbytes for spec in specs)
    assert workload.files == len(shards) == FILES.get(name, 1)
    for shard, size in zip(shards, sizes or (), strict=sizes is not None):
        # What is not tensors is a header, of about 100 bytes for each.
        header = size - sum(spec.nbytes for spec in shard)
        assert 80 * len(shard) < header < 130 * len(shard)


def test_one_file_has_the_tensors_of_four():
    four, one = workloads.fit("llama-3-8b", HUGE), workloads.fit("llama-3-8b-one-file", HUGE)
    assert (four.files, one.files, four.nbytes, four.tensors) == (4, 1, one.nbytes, one.tensors)


def test_fp8_is_mostly_fp8():
    shards = workloads.specs_of(workloads.fit("llama-3-8b-fp8", HUGE))
    counts = Counter(spec.dtype for shard in shards for spec in shard)
    assert counts == {"F8_E4M3": 224, "F32": 448, "BF16": 67}
    assert workloads.fit("llama-3-8b-fp8", HUGE).dtype == "fp8"


def test_the_unet_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            in_channels=4,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            block_out_channels=[320, 640, 1280],
            cross_attention_dim=2048,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    (specs,) = workloads.specs_of(workloads.fit("sdxl-unet", HUGE))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {spec.name: spec.shape for spec in specs} == theirs


@pytest.mark.parametrize("name", workloads.MODELS)
def test_scaled_down_it_keeps_its_tensors_and_their_files(name):
    true = workloads.fit(name, HUGE)
    small = workloads.fit(name, true.nbytes // 40)
    assert 0.3 * true.nbytes / 40 < small.nbytes <= true.nbytes // 40
    assert small.scaled == small.nbytes / true.nbytes
    assert (small.tensors, small.files, small.dtypes) == (true.tensors, true.files, true.dtypes)
    for before, after in zip(workloads.specs_of(true), workloads.specs_of(small), strict=True):
        assert [spec.name for spec in before] == [spec.name for spec in after]
        assert [len(spec.shape) for spec in before] == [len(spec.shape) for spec in after]
        assert all(min(spec.shape, default=1) > 0 for spec in after)


def test_too_small_is_refused():
    with pytest.raises(UsageError, match="18867 tensors"):
        workloads.fit("qwen3-30b-a3b", 10**6)


# ---- suites -------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_quick_is_all_of_them_and_not_large(device):
    quick = workloads.suite("quick", device, 75 * GB, 24 * GB)
    full = workloads.suite("full", device, 75 * GB, 24 * GB)
    assert {workload.name for workload in quick} == {workload.name for workload in full}
    assert [workload.name for workload in quick[:2]] == ["qwen2.5-7b", "qwen3-30b-a3b"]
    assert sum(workload.nbytes for workload in quick) <= 7 * GB
    assert all(workload.nbytes <= 1.7 * GB for workload in quick)
    assert all(workload.nbytes >= 0.2 * GB for workload in quick[:2])


def test_full_is_of_true_size_where_there_is_room():
    full = workloads.suite("full", "cuda", 10_000 * GB, 500 * GB)
    assert {workload.scaled for workload in full} == {1.0}
    assert {workload.dtype for workload in full} >= {"bf16", "fp16", "fp8"}
    assert {workload.files > 1 for workload in full} == {False, True}
    expected = set(workloads.MODELS) | ({"minilm"} - set(workloads.absent()))
    assert {workload.name for workload in full} == expected


@pytest.mark.parametrize(("free_disk", "memory"), [(9 * GB, 500 * GB), (500 * GB, 9 * GB)])
def test_nothing_exceeds_a_third_of_memory_or_disk(free_disk, memory):
    for name in ("quick", "full"):
        for workload in workloads.suite(name, "cpu", free_disk, memory):
            assert workload.nbytes <= 3 * GB
            assert (workload.scaled < 1.0) or workload.nbytes < 2 * GB


def test_no_such_suite():
    with pytest.raises(UsageError, match="not among quick, full"):
        workloads.suite("most", "cpu", HUGE, HUGE)


def test_without_its_package_minilm_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(workloads, "_MINILM_PACKAGE", "no_such_package_here")
    names = [workload.name for workload in workloads.suite("full", "cpu", HUGE, HUGE)]
    assert "minilm" not in names
    assert "not installed" in workloads.absent()["minilm"]


# ---- files --------------------------------------------------------------


def written(workload, folder):
    counted: list[int] = []
    paths = workloads.write(workload, folder, counted.append)
    assert sum(counted) >= workload.nbytes
    assert sorted(paths) == sorted(folder.iterdir())
    return paths


def digests(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3-8b-fp8", "sdxl-unet"])
def test_files_hold_what_was_promised(name, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    workload = workloads.fit(name, 12_000_000)
    paths = written(workload, tmp_path / "a")
    assert len(paths) == workload.files
    assert [path.name for path in paths] == sorted(path.name for path in paths)
    tensors = {}
    for path, specs in zip(paths, workloads.specs_of(workload), strict=True):
        assert describe(path).tensor_bytes == sum(spec.nbytes for spec in specs)
        loaded = load_file(path)
        assert {key: tuple(tensor.shape) for key, tensor in loaded.items()} == {
            spec.name: spec.shape for spec in specs
        }
        tensors |= loaded
    assert len(tensors) == workload.tensors
    assert sum(tensor.nbytes for tensor in tensors.values()) == workload.nbytes
    large = [tensor for tensor in tensors.values() if tensor.nbytes > 4096]
    for tensor in large:  # not zeros, and nearly every byte value occurs
        assert tensor.reshape(-1).view(torch.uint8)[:4096].unique().numel() > 200


def test_files_are_ordered_as_safetensors_orders_them(tmp_path):
    from safetensors.torch import load_file, save_file

    paths = written(workloads.fit("llama-3-8b-fp8", 12_000_000), tmp_path / "a")
    again = tmp_path / "again.safetensors"
    save_file(load_file(paths[0]), again, metadata={"format": "pt"})
    assert describe(paths[0]).order == describe(again).order


def test_the_same_bytes_every_time_and_other_ones_in_every_file(tmp_path):
    workload = workloads.fit("qwen3-30b-a3b", 12_000_000)
    once = digests(written(workload, tmp_path / "a"))
    assert digests(written(workload, tmp_path / "b")) == once
    assert len(set(once)) == workload.files
    bodies = set()
    for path in sorted((tmp_path / "a").iterdir())[1:15]:
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        bodies.add(data[begin : begin + 4096])
        json.loads(data[8:begin])
    assert len(bodies) == 14, "two files begin with the same tensors"


def test_minilm_is_the_real_file(tmp_path):
    if workloads.absent():
        pytest.skip(workloads.absent()["minilm"])
    workload = workloads.suite("quick", "cpu", HUGE, HUGE)[2]
    (path,) = written(workload, tmp_path / "a")
    assert (workload.name, workload.tensors) == ("minilm", len(describe(path).order))
    assert digests([path]) == digests([workloads.minilm_file()])
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    assert {entry["dtype"] for entry in entries.values()} == set(workload.dtypes)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    workload = workloads.fit("llama-3-8b-lora", HUGE)
    workloads.write(workload, tmp_path)
    with pytest.raises(BenchError, match="writing llama-3-8b-lora"):
        workloads.write(workload, tmp_path)
