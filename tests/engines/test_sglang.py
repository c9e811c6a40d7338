"""What only SGLang has, stood in for: see test_engines.py for the rest."""

from __future__ import annotations

import pytest
import sglang_standin

import fastst_patch


@pytest.mark.parametrize("parameters", [sglang_standin.OLD, sglang_standin.NEW])
def test_memory_that_may_be_released(tmp_path, folder, cuda, on_cuda, parameters) -> None:
    with sglang_standin.standing_in(tmp_path / "site", parameters) as sglang:
        sglang.args.args.enable_memory_saver = True
        with sglang.loading() as seen, fastst_patch.patched():
            sglang.load(folder, on_cuda)
        assert "enable_memory_saver" in seen.only.fallback_reason
        sglang.args.args = None
        with sglang.loading() as seen, fastst_patch.patched():
            sglang.load(folder, on_cuda)
        assert seen.only.fallback_reason == "ValueError: Global server args is not set yet!"
        assert seen.only.path == "stock"
    assert cuda.allocated == 0


# ---- what SGLang is told ----


@pytest.mark.parametrize("multithread", [False, True])
@pytest.mark.parametrize(
    ("told", "path"),
    [
        ({"disable_mmap": True}, "buffered"),
        ({"drop_cache_after_load": True}, "direct"),
        ({"disable_mmap": True, "drop_cache_after_load": True}, "buffered"),
        ({"prefetch": True, "prefetch_num_threads": 2}, "mmap"),
    ],
)
def test_its_options(
    sglang, folder, tensors, on_cpu, assert_same, multithread, told, path, need_o_direct
) -> None:
    if path == "direct":
        need_o_direct(str(folder / "m-1.safetensors"))
    sglang.multithread = multithread
    with sglang.loading() as seen, fastst_patch.patched():
        ours = sglang.load(folder, on_cpu, **told)
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert seen.only.path.startswith(path)
    assert sglang.utils.asked == []
    if "drop_cache_after_load" in told:
        cached = [fastst_patch.engine.residency(str(f)).resident_bytes for f in folder.iterdir()]
        assert cached == [0, 0, 0]


def test_disable_mmap_keeps_other_ways_that_map_nothing(
    sglang, folder, on_cpu, need_o_direct
) -> None:
    need_o_direct(str(folder / "m-1.safetensors"))
    with sglang.loading() as seen, fastst_patch.patched(io="direct"):
        sglang.load(folder, on_cpu, disable_mmap=True)
    assert seen.only.path == "direct"


def test_options_that_exclude_each_other_are_sglangs(sglang, folder, tensors, on_cpu) -> None:
    with sglang.loading() as seen, fastst_patch.patched(io="mmap"):
        ours = sglang.load(folder, on_cpu, drop_cache_after_load=True)
    assert set(ours) == set(tensors)
    assert seen.only.fallback_reason.startswith("io='mmap' leaves the files cached")
