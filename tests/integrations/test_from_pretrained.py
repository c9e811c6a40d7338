"""``from_pretrained`` with CUDA in the device_map, over the fake driver.

What runs is transformers' own code; its few steps that need a real device (warming torch's
allocator, making buffers that no file has, hooks that move activations) are left out.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastst_patch
from fastst_patch import engine
from fastst_patch.dropin import slices
from fastst_patch.files.prefetcher import Prefetcher
from fastst_patch.integrations.prefetch import RequestPrefetcher

transformers = pytest.importorskip("transformers")
loading = pytest.importorskip(
    "transformers.core_model_loading", reason="transformers before 5 loads in another way"
)
TARGET = "transformers.from_pretrained"
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 16,
}  # fmt: skip


def _llama(**options: Any) -> Any:
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def _moe() -> Any:
    torch.manual_seed(4)
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Checkpoints: name -> (class, folder)."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "shards": (_llama().to(torch.bfloat16), "60KB"),
        "one file": (_llama(), "1GB"),
        "tied": (_llama(tie_word_embeddings=True), "100KB"),
        "experts": (_moe().to(torch.bfloat16), "100KB"),
    }
    for name, (model, size) in made.items():
        model.save_pretrained(folder / name, max_shard_size=size)
    return {name: (type(model), folder / name) for name, (model, _) in made.items()}


@pytest.fixture
def to_cuda(pretrained_to_cuda) -> Any:
    return pretrained_to_cuda


def _compare(ours: Any, theirs: Any) -> None:
    mine, yours = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert list(mine) == list(yours)
    for name, tensor in yours.items():
        found = mine[name]
        assert type(found) is type(tensor), name
        assert (found.dtype, found.shape, found.stride(), found.requires_grad) == (
            tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad
        ), name  # fmt: skip
        assert torch.equal(found, tensor), name
    tied = [[name for name in d if d[name] is d[other]] for d in (mine, yours) for other in d]
    assert tied[: len(mine)] == tied[len(mine) :]


def _reports(seen: Any) -> list[Any]:
    return [report for report in seen.reports if report.call == "from_pretrained"]


LOADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cast": {"dtype": torch.float16},
    "auto": {"dtype": "auto"},
    "larger": {"dtype": torch.float32},
}


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("name", ["shards", "one file", "tied", "experts"])
def test_equals_stock(to_cuda, saved, name, options) -> None:
    kind, folder = saved[name]
    expected = kind.from_pretrained(folder, **options)
    before = to_cuda.driver.live().blocks
    with fastst_patch.profile() as seen:
        model, info = kind.from_pretrained(
            folder, device_map={"": "cuda:0"}, output_loading_info=True, **options
        )
    _compare(model, expected)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    files = sorted(folder.glob("*.safetensors"))
    reports = _reports(seen)
    assert sorted(report.file for report in reports) == [str(path) for path in files]
    assert {(r.path, r.device, r.fallback_reason) for r in reports} == {("ring", "cuda:0", None)}
    assert sum(r.bytes for r in reports) == sum(
        sum(t.nbytes for t in fastst_patch.load_file(str(path)).values()) for path in files
    )
    del model
    gc.collect()
    assert to_cuda.driver.live().blocks == before


@pytest.mark.parametrize("tensors", ["auto", "dlpack", "owned"])
@pytest.mark.parametrize("name", ["shards", "experts"])
def test_who_owns_what(to_cuda, saved, name, tensors) -> None:
    """Parameters own their memory; only what is merged or cast shares blocks by default."""
    kind, folder = saved[name]
    expected = kind.from_pretrained(folder)
    to_cuda.allocated = 0
    with fastst_patch.config_context(tensors=tensors):
        model = kind.from_pretrained(folder, device_map={"": 0})
    _compare(model, expected)
    files = [str(path) for path in folder.glob("*.safetensors")]
    names = [name for file in files for name in fastst_patch.load_file(file)]
    merged = [name for name in names if ".experts." in name]
    assert bool(merged) == (name == "experts")
    alone = {"auto": len(names) - len(merged), "dlpack": 0, "owned": len(names)}[tensors]
    lanes = {"auto": bool(merged), "dlpack": 1 + bool(merged), "owned": 0}[tensors]
    assert alone <= to_cuda.allocated <= alone + lanes * len(files)
    engine.shutdown()
    shared = to_cuda.driver.live().blocks
    read = {name for name, _ in model.named_parameters() if "experts" not in name}
    assert (shared < len(read)) == (tensors == "dlpack")


@pytest.mark.parametrize("budget", [0, 1, 20_000, 100_000])
@pytest.mark.parametrize("name", ["shards", "experts"])
def test_budgets_make_it_wait_and_never_fail(to_cuda, saved, name, budget, monkeypatch) -> None:
    held: list[int] = []
    start = Prefetcher._start

    def watched(self: Prefetcher, *args: Any) -> bool:
        started = start(self, *args)
        held.append(self._held)
        return started

    monkeypatch.setattr(Prefetcher, "_start", watched)
    kind, folder = saved[name]
    expected = kind.from_pretrained(folder)
    with fastst_patch.config_context(device_memory_budget=budget):
        model = kind.from_pretrained(folder, device_map={"": "cuda:1"})
    _compare(model, expected)
    largest = max(t.nbytes for t in expected.state_dict().values())
    assert max(held) <= budget + 2 * largest


def test_two_devices_and_the_cpu(to_cuda, saved) -> None:
    kind, folder = saved["shards"]
    expected = kind.from_pretrained(folder)
    places = {
        "model.embed_tokens": "cuda:0", "model.layers.0": 0, "model.layers.1": "cuda:1",
        "model.layers.2": "cpu", "model.norm": torch.device("cuda", 1), "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }  # fmt: skip
    with fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map=places)
    _compare(model, expected)
    assert {report.device for report in _reports(seen)} == {"cuda:0", "cuda:1"}
    assert {r.device for r in seen.reports if r.call == "safe_open" and r.tensors} == {"cpu"}


def test_lazy_stays_lazy(to_cuda, saved, monkeypatch) -> None:
    """Without threads nothing is read before it is asked for, and nothing ahead."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    kind, folder = saved["shards"]
    expected = kind.from_pretrained(folder)

    def forbidden(*args: Any) -> None:
        raise AssertionError("read ahead")

    monkeypatch.setattr(RequestPrefetcher, "ask", forbidden)
    with fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map={"": "cuda"})
    _compare(model, expected)
    assert {report.path for report in _reports(seen)} == {"ring"}


def test_a_default_device_is_transformers_own(to_cuda, saved, monkeypatch) -> None:
    """Its threads are in no torch mode of ours: nothing may be promised and then taken singly."""
    monkeypatch.setattr(
        loading, "_materialize_copy", lambda tensor, device=None, dtype=None: tensor[...].to(dtype)
    )
    kind, folder = saved["shards"]
    expected = kind.from_pretrained(folder)
    with torch.device("cpu"), fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map={"": "cuda:0"})
    _compare(model, expected)
    assert _reports(seen) == []
    reasons = {r.fallback_reason for r in seen.reports if r.fallback_reason}
    assert reasons == {"a torch mode or default device is in force"}


def test_verify_leaves_devices_to_transformers(to_cuda, saved, monkeypatch) -> None:
    """It compares what it hands to transformers for the CPU, and says why it is not the device."""
    verified: list[str] = []
    same = slices.same

    def compared(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        verified.append(str(theirs.dtype))
        return same(ours, theirs)

    monkeypatch.setattr(slices, "same", compared)
    monkeypatch.setattr(
        loading, "_materialize_copy", lambda tensor, device=None, dtype=None: tensor[...].to(dtype)
    )
    kind, folder = saved["shards"]
    expected = kind.from_pretrained(folder)
    assert verified == []
    with fastst_patch.config_context(verify=True), fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map={"": "cuda:0"})
    _compare(model, expected)
    assert len(verified) == len(model.state_dict())
    assert _reports(seen) == []
    reasons = {r.fallback_reason for r in seen.reports}
    assert reasons == {"verify is on, and moves to a device are then stock's"}
    with fastst_patch.config_context(verify=True, fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="verify is on"):
            kind.from_pretrained(folder, device_map={"": "cuda:0"})
        kind.from_pretrained(folder, device_map={"": "cpu"})


def test_keys_that_do_not_fit(to_cuda, saved, tmp_path) -> None:
    """Missing, unexpected and mismatched keys are told as stock tells them."""
    model = _llama()
    state = model.state_dict()
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["lm_head.weight"] = torch.zeros(7, 64)
    model.save_pretrained(tmp_path, state_dict=state)
    told = []
    for options in ({}, {"device_map": {"": "cuda:0"}}):
        _, info = type(model).from_pretrained(
            tmp_path, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        told.append({key: sorted(map(str, info[key])) for key in info if key != "error_msgs"})
    assert told[0] == told[1]
    assert all(told[0][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    errors = []
    for options in ({}, {"device_map": {"": "cuda:0"}}):
        with pytest.raises(RuntimeError) as error:
            type(model).from_pretrained(tmp_path, **options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("first", [1, 2, 5])
def test_out_of_memory_goes_to_transformers(to_cuda, saved, monkeypatch, first) -> None:
    """It copies tensor by tensor, which may still fit; the reason is told."""
    kind, folder = saved["experts"]
    expected = kind.from_pretrained(folder)
    asked: list[Any] = []

    def copy_on_cpu(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        asked.append(device)
        return tensor[...].to(dtype)

    monkeypatch.setattr(loading, "_materialize_copy", copy_on_cpu)
    to_cuda.refuse_from = first
    with fastst_patch.profile() as seen, fastst_patch.config_context(device_memory_budget=30_000):
        model = kind.from_pretrained(folder, device_map={"": "cuda:0"})
    _compare(model, expected)
    assert asked
    assert any("not enough memory" in (r.fallback_reason or "") for r in _reports(seen))
    del model
    gc.collect()
    assert to_cuda.driver.live().blocks == 0


def test_a_broken_integration_steps_aside(to_cuda, saved, monkeypatch, caplog) -> None:
    from fastst_patch.integrations import transformers as integration

    def broken(*args: Any) -> None:
        raise AttributeError("renamed in this version")

    kind, folder = saved["shards"]
    expected = kind.from_pretrained(folder)
    monkeypatch.setattr(integration, "device_of", broken)
    monkeypatch.setattr(
        loading, "_materialize_copy", lambda tensor, device=None, dtype=None: tensor[...].to(dtype)
    )
    model = kind.from_pretrained(folder, device_map={"": "cuda:0"})
    _compare(model, expected)
    assert "renamed in this version" in caplog.text


def test_unreadable_bytes_raise_and_leave_nothing(to_cuda, saved) -> None:
    kind, folder = saved["shards"]
    threads = threading.active_count()
    with fastst_patch.config_context(io="buffered"), contextlib.ExitStack() as stack:
        stack.callback(engine.clear_faults)
        engine.set_fault("preadv", first=3, errno=5)
        with pytest.raises(OSError, match="offset"):
            kind.from_pretrained(folder, device_map={"": "cuda:0"})
    gc.collect()
    assert to_cuda.driver.live().blocks == 0
    assert threading.active_count() <= threads + 4  # transformers' own pool


def test_casts_are_over_when_it_returns(to_cuda, saved) -> None:
    """Stock casts on the CPU and waits for its copies: any stream may use what it returns."""
    kind, folder = saved["shards"]
    kind.from_pretrained(folder, device_map={"": "cuda:1"}, dtype=torch.bfloat16)
    assert to_cuda.settled == []
    kind.from_pretrained(folder, device_map={"": "cuda:1"}, dtype=torch.float16)
    assert to_cuda.settled == [1]


def test_fallback_error_raises(to_cuda, saved) -> None:
    kind, folder = saved["shards"]
    with fastst_patch.config_context(fallback="error", io="mmap"):
        with pytest.raises(fastst_patch.FaststError, match=r"from_pretrained of .*io='mmap'"):
            kind.from_pretrained(folder, device_map={"": "cuda:0"})


@pytest.mark.parametrize("name", ["shards", "experts"])
def test_stock_finds_room(to_cuda, saved, monkeypatch, name) -> None:
    """What was read ahead goes when transformers' own copy does not fit beside it."""
    kind, folder = saved[name]
    expected = kind.from_pretrained(folder, dtype=torch.float16)
    alive: list[int] = []

    def copy_on_cpu(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        alive.append(to_cuda.driver.live().blocks)
        if len(alive) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
        return tensor[...].to(dtype)

    monkeypatch.setattr(loading, "_materialize_copy", copy_on_cpu)
    to = torch.Tensor.to

    def cast(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options == {"dtype": torch.float16} and not alive:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
        return to(self, *args, **options)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch, fastst_patch.profile() as seen:
            patch.setattr(torch.Tensor, "to", cast)
            model = kind.from_pretrained(folder, device_map={"": 0}, dtype=torch.float16)
    finally:
        gc.enable()
    _compare(model, expected)
    assert alive[0] > 0
    assert alive[1] == 0
    reasons = {report.fallback_reason for report in _reports(seen)}
    assert any("out of memory" in str(reason) for reason in reasons)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_errors_hold_no_device_memory(to_cuda, saved, monkeypatch, error) -> None:
    """Not even while they are kept, and without the garbage collector."""
    from fastst_patch.files import cuda

    kind, folder = saved["experts"]
    take = cuda.PendingTensors.take
    taken: list[int] = []

    def broken(self: cuda.PendingTensors, i: int) -> torch.Tensor:
        taken.append(i)
        if len(taken) == 9:
            raise error(5, "unreadable")
        return take(self, i)

    monkeypatch.setattr(cuda.PendingTensors, "take", broken)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(error):
            kind.from_pretrained(folder, device_map={"": 0}, dtype=torch.float16)
        live = to_cuda.driver.live().blocks
    finally:
        gc.enable()
    assert live == 0


def test_a_promise_is_a_future(to_cuda, saved) -> None:
    """Results may be taken twice and in any order; what is not taken is not in the way."""
    _, folder = saved["one file"]
    (path,) = folder.glob("*.safetensors")
    expected = fastst_patch.load_file(str(path))
    from fastst_patch.integrations.transformers import _here, _Load

    with fastst_patch.safe_open(str(path), "pt") as handle, ThreadPoolExecutor(1) as pool:
        _here.load = load = _Load()
        try:
            names = handle.keys()
            futures = {
                name: loading.spawn_materialize(pool, handle.get_slice(name), "cuda:0", None)
                for name in names
            }
            for name in reversed(names[2:]):
                first = futures[name].result()
                assert futures[name].done()
                assert futures[name].result() is first
                assert futures[name].exception() is None
                assert torch.equal(first, expected[name])
        finally:
            _here.load = None
            load.end(failed=False)
        with pytest.raises(RuntimeError, match="over"):
            RequestPrefetcher.take(*_untaken(load, futures[names[0]]))


def _untaken(load: Any, future: Any) -> tuple[Any, Any]:
    take = future._take
    return load._prefetchers["cuda:0"], take.args[1]


def test_the_cpu_is_as_before(saved) -> None:
    kind, folder = saved["experts"]
    expected = kind.from_pretrained(folder)
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map={"": "cpu"})
    _compare(model, expected)
    assert {report.call for report in seen.reports} == {"safe_open"}
    assert {report.path.split("+")[0] for report in seen.reports} == {"mmap"}


def test_other_signatures_are_left_alone(monkeypatch) -> None:
    def spawn_materialize(pool: Any, tensor: Any) -> None:
        """Of another version."""

    monkeypatch.setattr(loading, "spawn_materialize", spawn_materialize)
    from fastst_patch.patching import patcher

    target = patcher._TARGETS[TARGET]
    fresh = type(target)(
        target.name, "", tuple(type(place)(place.hook) for place in target.places), target.tested
    )
    fresh.uses = 1
    fresh.install()
    assert fresh.missing is not None
    assert "spawn_materialize takes (pool, tensor), not (thread_pool, tensor" in fresh.missing
    assert loading.spawn_materialize is spawn_materialize
    assert loading.convert_and_load_state_dict_in_model.__module__ == loading.__name__
    assert not hasattr(loading.convert_and_load_state_dict_in_model, "__wrapped__")


def test_converters_are_not_copied_for_each_tensor(to_cuda, saved, monkeypatch) -> None:
    import copy

    kind, folder = saved["experts"]
    copied: list[Any] = []
    monkeypatch.setattr(loading.WeightConverter, "__deepcopy__", _counting(copied), raising=False)
    for options in ({}, {"device_map": {"": "cuda:0"}}):
        copied.clear()
        kind.from_pretrained(folder, **options)
        layers, converters, experts = 3, 2, 6
        # Each that is kept was copied, and the one after it; not one for every expert.
        assert 0 < len(copied) <= 2 * layers * converters < layers * converters * experts
    assert copy.deepcopy is not loading.deepcopy
    assert copy.deepcopy([1]) == [1]


def _counting(copied: list[Any]) -> Any:
    import copy

    def __deepcopy__(self: Any, memo: Any) -> Any:
        copied.append(self)
        new = object.__new__(type(self))
        memo[id(self)] = new
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if hasattr(self, name):
                    object.__setattr__(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    return __deepcopy__
