"""Iterating over the tensors of files: order, arguments, the bar, early ends."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from loader_files import bits

import fastst_patch
from fastst_patch import OptionError, ParallelLoader, SafeTensorsFileLoader, SingleGroup, engine

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("queue", [-1, 0, 1, 7])
@pytest.mark.parametrize(
    "options", [{}, {"io": "direct"}, {"tensors": "owned"}, {"device_memory_budget": 0}], ids=str
)
def test_every_tensor_in_order(paths, expected, stock, watch, queue, options) -> None:
    with fastst_patch.config_context(fallback="error"), watch() as seen:
        loader = ParallelLoader(
            SingleGroup(), paths[::-1], 1, queue, False, "cpu", **options
        )  # their order of arguments
        given = list(loader.iterate_weights())
        loader.close()
    assert {name: bits(tensor) for name, tensor in given} == expected
    by_file = [name.split(".")[0] for name, _ in given]
    assert by_file == sorted(by_file, reverse=True)
    offsets = []
    for path in paths[::-1]:
        with stock.safe_open(path, "pt") as handle:
            offsets += handle.offset_keys() if hasattr(handle, "offset_keys") else []
    filled = {name for name, value in expected.items() if value[2]}  # empty ones share offsets
    if offsets:
        want = [name for name in offsets if name in filled]
        assert [name for name, _ in given if name in filled] == want
    for path in paths:
        seen.assert_fast(path)
    assert {report.call for report in seen.reports} == {"ParallelLoader"}
    assert len(seen.reports) == 3


def test_again_and_again(paths, expected) -> None:
    with ParallelLoader(None, paths, use_tqdm_on_load=False) as loader:
        for _ in range(2):
            given = {name: bits(tensor) for name, tensor in loader.iterate_weights()}
            assert given == expected
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.iterate_weights()


def test_no_files() -> None:
    assert list(ParallelLoader(None, [], use_tqdm_on_load=False).iterate_weights()) == []


@pytest.mark.parametrize("how", ["close", "del", "break"])
def test_an_early_end(paths, expected, how) -> None:
    loader = ParallelLoader(None, paths, use_tqdm_on_load=False, io="buffered")
    weights = loader.iterate_weights()
    for name, tensor in weights:
        kept = (name, tensor)
        break
    if how == "close":
        weights.close()
    del weights
    gc.collect()
    assert engine.counters()["files"] == 0
    assert bits(kept[1]) == expected[kept[0]]


def test_tensors_outlive_the_iterator(paths, expected) -> None:
    given = dict(ParallelLoader(None, paths, use_tqdm_on_load=False).iterate_weights())
    gc.collect()
    assert {name: bits(tensor) for name, tensor in given.items()} == expected


def test_filter(paths, expected) -> None:
    for options in ({}, {"all_local": True}):
        loader = ParallelLoader(
            None, paths, use_tqdm_on_load=False, tensor_filter=lambda n: ".F16." in n, **options
        )
        given = {name: bits(tensor) for name, tensor in loader.iterate_weights()}
        assert given == {name: value for name, value in expected.items() if ".F16." in name}


def test_the_bar(paths, expected, capsys) -> None:
    total = sum(len(value[2]) for value in expected.values())
    for _ in ParallelLoader(None, paths).iterate_weights():
        pass
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in shown
    assert "B/s" in shown
    for _ in ParallelLoader(None, paths, use_tqdm_on_load=False).iterate_weights():
        pass
    assert capsys.readouterr().err == ""


BAD = [
    ({"max_concurrent_producers": 2}, ValueError, "max_concurrent_producers must be 1"),
    ({"queue_size": -2}, OptionError, "queue_size=-2"),
    ({"queue_size": 1.0}, OptionError, "queue_size=1.0"),
    ({"use_tqdm_on_load": 1}, OptionError, "use_tqdm_on_load=1"),
    ({"max_batch_bytes": 0}, OptionError, "max_batch_bytes=0"),
    ({"device_memory_budget": -1}, OptionError, "device_memory_budget=-1"),
    ({"device_memory_budget": "1GiB"}, OptionError, "device_memory_budget='1GiB'"),
    ({"tensor_filter": 3}, TypeError, "tensor_filter=3"),
    ({"resident_tensor": 3}, TypeError, "resident_tensor=3"),
    ({"use_chunk_budget_as_allocation_size": True}, ValueError, "requires max_batch_bytes"),
    ({"resident_tensor": bool, "accumulate_resident": False}, ValueError, "accumulate_resident"),
    ({"borrowed_tensors": True}, ValueError, "requires accumulate_resident=False"),
    ({"broadcast_run_bytes": -1}, ValueError, "broadcast run limits"),
    ({"broadcast_run_tensors": "1"}, ValueError, "broadcast run limits"),
    ({"overlap_io": 2}, OptionError, "overlap_io=2"),
    ({"nothing": 2}, TypeError, "unexpected keyword argument 'nothing'"),
]


@pytest.mark.parametrize(("options", "kind", "text"), BAD, ids=str)
def test_bad_arguments(options, kind, text) -> None:
    with pytest.raises(kind, match=text):
        ParallelLoader(None, ["x"], **options)
    with pytest.raises(TypeError, match="hf_weights_files: expected a list of paths"):
        ParallelLoader(None, "x")


def test_accepted_together(paths, expected) -> None:
    loader = ParallelLoader(
        None, paths, use_tqdm_on_load=False, max_batch_bytes=1 << 20, overlap_io=False,
        use_chunk_budget_as_allocation_size=True, accumulate_resident=False,
        borrowed_tensors=True, broadcast_run_bytes=0, set_numa=False, io="buffered",
    )  # fmt: skip
    given = {name: bits(tensor) for name, tensor in loader.iterate_weights()}
    assert given == expected


def test_the_signatures_are_fastsafetensors() -> None:
    """Names, order and defaults of 0.5.0; our options follow, by name."""
    import inspect

    def arguments(function: Any) -> list[tuple[str, Any]]:
        return [
            (name, one.default)
            for name, one in inspect.signature(function).parameters.items()
            if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ][1:]

    assert arguments(SafeTensorsFileLoader.__init__) == [
        ("pg", None), ("device", "cpu"), ("bbuf_size_kb", 16384), ("max_threads", 16),
        ("nogds", False), ("set_numa", True), ("disable_cache", True), ("debug_log", False),
        ("framework", "pytorch"), ("use_fgds", False),
    ]  # fmt: skip
    assert arguments(SafeTensorsFileLoader.copy_files_to_device) == [
        ("dtype", None), ("use_buf_register", True), ("max_copy_block_size", 16 << 30),
        ("allow_inflight", False), ("borrowed_tensors", False),
    ]  # fmt: skip
    assert arguments(fastst_patch.fastsafe_open.__init__) == [
        ("filenames", inspect.Parameter.empty), ("framework", "pt"), ("pg", None),
        ("device", "cpu"), ("nogds", False), ("debug_log", False),
        ("max_copy_block_size", 16 << 30), ("use_fgds", False),
    ]  # fmt: skip
    assert [name for name, _ in arguments(ParallelLoader.__init__)] == [
        "pg", "hf_weights_files", "max_concurrent_producers", "queue_size", "use_tqdm_on_load",
        "device", "bbuf_size_kb", "max_threads", "nogds", "set_numa", "debug_log", "framework",
        "tensor_filter", "all_local", "max_batch_bytes", "use_chunk_budget_as_allocation_size",
        "device_memory_budget", "accumulate_resident", "resident_tensor", "use_fgds",
        "broadcast_run_bytes", "broadcast_run_tensors", "overlap_io", "borrowed_tensors",
    ]  # fmt: skip
    for name, given in (
        ("get_tensor", "tensor_name device dtype"),
        ("get_sharded", "tensor_name dim device dtype"),
        ("get_multi_cols", "tensor_names dim device dtype"),
        ("push_tensor", "tensor_name dst_rank device dtype"),
        ("as_dict", "tensor_shard_dim"),
    ):
        function = getattr(fastst_patch.FilesBufferOnDevice, name)
        assert [name for name, _ in arguments(function)] == given.split()
