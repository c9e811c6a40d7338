"""Programs that read safetensors, patched: tensors that behave as stock's in all they do next.

Most of these fail, some silently, when tensors are views of one big buffer: see "Why tensors must
own their storage" in the design notes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import fastst_patch

COUNT = 21


@pytest.fixture
def weights(raw) -> str:
    torch.manual_seed(0)
    return raw.tensors({f"layer.{i:02}.weight": torch.randn(8, 4 + i) for i in range(COUNT)})


@pytest.fixture
def loaded(weights, fast, watch) -> dict[str, torch.Tensor]:
    with watch() as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = safetensors.torch.load_file(weights)
    seen.assert_fast(weights)
    return tensors


class Layers(nn.Module):
    """Has the state dict of `weights`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({name.split(".")[1]: nn.Module() for name in tensors})
        for name, tensor in tensors.items():
            self.layer[name.split(".")[1]].weight = nn.Parameter(tensor)


# ---------------------------------------------------------------- storages


def test_each_tensor_owns_its_storage(loaded, stock, weights, fast) -> None:
    with fast.safe_open(weights, "pt") as handle:
        one_by_one = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        whole = {name: handle.get_slice(name)[...] for name in one_by_one}
    for tensors in (loaded, one_by_one, whole):
        ends = []
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            assert storage.nbytes() == tensor.nbytes
            assert storage.data_ptr() == tensor.data_ptr()
            assert tensor.storage_offset() == 0
            ends.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        ends.sort()
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))


def test_accelerate_keeps_every_tensor(loaded, assert_same, watch, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.utils.other import clean_state_dict_for_safetensors, id_tensor_storage

    assert len({id_tensor_storage(tensor) for tensor in loaded.values()}) == COUNT
    kept = clean_state_dict_for_safetensors(dict(loaded))
    assert_same(dict(kept), loaded)
    model = Layers(loaded)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved", max_shard_size="1KB")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    with watch() as seen:
        again: dict[str, torch.Tensor] = {}
        for file in files:
            again |= safetensors.torch.load_file(file)
    for file in files:
        seen.assert_fast(file)
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], loaded[name]) for name in again)


def test_accelerate_loads_and_offloads(weights, loaded, assert_same, watch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate import load_checkpoint_in_model
    from accelerate.utils import OffloadedWeightsLoader
    from accelerate.utils.modeling import load_state_dict

    with watch() as seen:
        assert_same(load_state_dict(weights), loaded)
        assert_same(load_state_dict(weights, device_map={"": "cpu"}), loaded)
        model = Layers({name: torch.zeros_like(t) for name, t in loaded.items()})
        load_checkpoint_in_model(model, weights)
        assert all(torch.equal(t, loaded[name]) for name, t in model.state_dict().items())
        index = {
            name: {"safetensors_file": weights, "weight_name": name, "dtype": "float32"}
            for name in loaded
        }
        offloaded = OffloadedWeightsLoader(index=index)
        for _ in range(3):  # reopens the file per weight, on every forward
            for name, tensor in loaded.items():
                assert torch.equal(offloaded[name], tensor)
    seen.assert_fast(weights, count=3 + 3 * COUNT)


def test_safetensors_save_model(loaded, raw, fast, stock, assert_same, tmp_path) -> None:
    path = str(tmp_path / "saved.safetensors")
    safetensors.torch.save_model(Layers(loaded), path)
    assert_same(stock.load_file(path), loaded)
    model = Layers({name: torch.zeros_like(tensor) for name, tensor in loaded.items()})
    assert not any(fast.load_model(model, path))  # nothing missing, nothing unexpected
    assert all(torch.equal(t, loaded[name]) for name, t in model.state_dict().items())
    safetensors.torch.save_file(loaded, path)
    assert_same(stock.load_file(path), loaded)


def test_hub_serialization(loaded, weights, stock, tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    ours = hub.split_torch_state_dict_into_shards(loaded, max_shard_size=1000)
    theirs = hub.split_torch_state_dict_into_shards(stock.load_file(weights), max_shard_size=1000)
    assert len(ours.filename_to_tensors) > 3
    assert ours == theirs
    (tmp_path / "model").mkdir()
    hub.save_torch_state_dict(loaded, tmp_path, max_shard_size=1000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(ours.filename_to_tensors)
    hub.save_torch_model(Layers(loaded), tmp_path / "model")
    assert len(stock.load_file(str(tmp_path / "model" / "model.safetensors"))) == COUNT


def test_saved_sizes(loaded, weights, stock, tmp_path) -> None:
    """torch.save, pickle, deepcopy and share_memory_ take a tensor, not the file it came from."""
    theirs = stock.load_file(weights)
    for name, tensor in loaded.items():
        sizes = []
        for one in (tensor, theirs[name]):
            buffer = io.BytesIO()
            torch.save(one, buffer)
            sizes.append((len(buffer.getvalue()), len(pickle.dumps(one))))
            buffer.seek(0)
            assert torch.equal(torch.load(buffer), one)
            assert torch.equal(pickle.loads(pickle.dumps(one)), one)
            twin = copy.deepcopy(one)
            assert twin.untyped_storage().nbytes() == one.nbytes
            assert twin.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()
        # A storage is named by its address, as text: of 8 to 14 digits in the heap, 15 elsewhere.
        assert all(abs(ours - other) <= 3 * 7 for ours, other in zip(*sizes, strict=True)), sizes
        shared = tensor.share_memory_()
        assert shared.is_shared()
        assert shared.untyped_storage().nbytes() == shared.nbytes
        assert torch.equal(shared, theirs[name])


def test_mutation_is_private(loaded, weights, fast, stock, watch) -> None:
    """Seen by the handle that gave the tensor out; by no sibling, no other load, not the file."""
    content = Path(weights).read_bytes()
    with watch() as seen, fast.safe_open(weights, "pt") as ours, fast.safe_open(weights, "pt") as b:
        for name, tensor in loaded.items():
            tensor.fill_(float(name.split(".")[1]))
            assert ours.get_tensor(name).ne(tensor).any()
        first, slice_ = ours.get_tensor("layer.03.weight"), ours.get_slice("layer.03.weight")
        first.zero_()
        assert not ours.get_tensor("layer.03.weight").any()
        assert not slice_[2:].any()
        assert not fast.all_tensors(ours)["layer.03.weight"].any()
        for mode in (torch.inference_mode(), torch.device("cpu")):
            with mode:
                assert not ours.get_tensor("layer.03.weight").any()
        slice_[1].fill_(5)
        assert first[1].eq(5).all()
        untouched = stock.load_file(weights)["layer.03.weight"]
        assert torch.equal(b.get_tensor("layer.03.weight"), untouched)
        assert ours.get_tensor("layer.02.weight").any()
        assert first.numpy().flags.writeable
    for number in range(COUNT):
        assert loaded[f"layer.{number:02}.weight"].eq(number).all()
    assert Path(weights).read_bytes() == content
    seen.assert_fast(weights, count=2)


def test_autograd(loaded) -> None:
    """Siblings share no version counter: one may change in place before the other's backward."""
    first, second = loaded["layer.00.weight"], loaded["layer.01.weight"]
    weight = torch.ones(4, 8, requires_grad=True)
    product = (weight * first.T).sum()
    second.add_(1)
    product.backward()
    assert torch.equal(weight.grad, first.T)
    parameter = nn.Parameter(second)
    (parameter**2).sum().backward()
    assert torch.equal(parameter.grad, 2 * second)
    torch.optim.SGD([parameter], lr=0.5).step()
    assert not second.any()
    leaf = loaded["layer.02.weight"].requires_grad_()
    assert leaf.is_leaf


def test_what_else_tensors_do(loaded, weights, stock, agree) -> None:
    theirs = stock.load_file(weights)["layer.05.weight"]
    ours = loaded["layer.05.weight"]
    for use in (
        lambda t: t.resize_(1000),
        lambda t: t.resize_(3, 2).clone(),
        lambda t: t.untyped_storage().resize_(10**6),
        lambda t: t.numpy().copy(),
        lambda t: np.from_dlpack(t).copy(),
        lambda t: torch.from_dlpack(t).clone(),
        lambda t: t.view(torch.uint8).clone(),
        lambda t: t.view(torch.float64),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.to("cpu") is t,
        lambda t: t.to("meta"),
        lambda t: t.half(),
        lambda t: t.contiguous() is t,
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.set_().shape,
        lambda t: t.tolist(),
        repr,
        lambda t: t.__reduce_ex__(4)[0].__name__,
        lambda t: t.data_ptr() % 8,
    ):
        agree(functools.partial(use, ours), functools.partial(use, theirs))


# ---------------------------------------------------------------- load_model


class Tied(nn.Module):
    def __init__(self, tie: bool, extra: int = 0) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        for i in range(extra):
            setattr(self, f"extra{i}", nn.Linear(2, 3))
        if tie:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("saved", [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("target", [(True, 0), (False, 0), (True, 1), (False, 2)])
def test_load_model(fast, stock, agree, assert_same, watch, tmp_path, strict, saved, target):
    """Tied weights, missing and unexpected keys: what is loaded, returned and raised."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(Tied(*saved), str(path))
    models = [torch.manual_seed(3) and Tied(*target) for _ in range(2)]
    with watch() as seen:
        agree(
            lambda: fast.load_model(models[0], path, strict=strict),
            lambda: stock.load_model(models[1], path, strict=strict),
        )
    seen.assert_fast(path)
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))


def test_load_model_arguments(fast, stock, agree, tmp_path) -> None:
    good, other = tmp_path / "good", tmp_path / "other"
    safetensors.torch.save_model(Tied(True), str(good))
    safetensors.torch.save_file({"a.weight": torch.ones(3, 3), "x": torch.ones(1)}, other)
    for args, kwargs in (
        ((good,), {}),
        ((str(good), True), {}),
        ((good, False, "cpu"), {}),
        ((good,), {"device": "cpu", "backend": "mmap", "strict": True}),
        ((good,), {"backend": "pread"}),
        ((good,), {"backend": "no"}),
        ((good,), {"device": "cuda:x"}),
        ((good,), {"device": None}),
        ((good,), {"filename": good}),
        ((good, True, "cpu", "mmap"), {}),
        ((good,), {"assign": True}),
        ((), {}),
        ((other,), {}),
        ((other, False), {}),
        ((tmp_path / "missing",), {}),
        ((3,), {}),
    ):
        models = Tied(True), Tied(True)
        agree(
            lambda a=args, k=kwargs, m=models[0]: fast.load_model(m, *a, **k),
            lambda a=args, k=kwargs, m=models[1]: stock.load_model(m, *a, **k),
        )
    agree(lambda: fast.load_model(None, good), lambda: stock.load_model(None, good))


# ---------------------------------------------------------------- torch's modes, threads, fork


@pytest.mark.parametrize("when", ["throughout", "after opening"])
@pytest.mark.parametrize(
    "mode",
    ["meta", "cpu", "inference", "no_grad", "fake", "default float64", "default device", "filled"],
)
def test_torch_modes(sample, stock, fast, agree, mode, when) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    late = when == "after opening"
    modes: dict[str, Callable[[], Any]] = {
        "meta": lambda: torch.device("meta"),
        "cpu": lambda: torch.device("cpu"),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "fake": FakeTensorMode,
    }

    def run(loaders: Any, use: Callable[[Any], Any]) -> Any:
        early = loaders.safe_open(sample, "pt")
        with contextlib.ExitStack() as stack:
            if mode in modes:
                stack.enter_context(modes[mode]())
            elif mode == "default float64":
                torch.set_default_dtype(torch.float64)
                stack.callback(torch.set_default_dtype, torch.float32)
            elif mode == "default device":
                torch.set_default_device("meta")
                stack.callback(torch.set_default_device, None)
            else:
                torch.use_deterministic_algorithms(True)
                stack.callback(torch.use_deterministic_algorithms, False)
            return use(early if late else loaders.safe_open(sample, "pt"))

    for use in (
        lambda h: h.get_tensor("w"),
        lambda h: h.get_tensor("h"),
        lambda h: h.get_tensors(),
        lambda h: h.get_slice("w")[3:5],
        lambda h: h.get_slice("w")[[1, 2]],
    ):
        agree(functools.partial(run, fast, use), functools.partial(run, stock, use))
    agree(
        lambda: run(fast, lambda _: fast.load_file(sample)),
        lambda: run(stock, lambda _: stock.load_file(sample)),
    )


def test_threads(weights, fast, stock, assert_same, watch) -> None:
    """transformers' way: one handle, slices cut by a pool, closed before they are done."""
    expected = stock.load_file(weights)
    names = sorted(expected) * 10
    with watch() as seen, ThreadPoolExecutor(4) as pool:
        with fast.safe_open(weights, "pt") as handle:
            slices = list(pool.map(handle.get_slice, names))
            whole = list(pool.map(handle.get_tensor, names))
            many = list(pool.map(lambda _: fast.all_tensors(handle), range(8)))
        cut = list(pool.map(lambda s: s[1:, ::2], slices))
        files = list(pool.map(fast.load_file, [weights] * 8))
    for name, tensor, part in zip(names, whole, cut, strict=True):
        assert_same(tensor, expected[name])
        assert_same(part, expected[name][1:, ::2])
    for tensors in (*many, *files):
        assert_same(tensors, expected)
    seen.assert_fast(weights, count=9)
    for _ in range(50):  # closed under their hands: a tensor, or the proper error
        with ThreadPoolExecutor(3) as pool:
            handle = fast.safe_open(weights, "pt")
            busy = [pool.submit(handle.get_tensor, name) for name in names[:6]]
            pool.submit(handle.__exit__, None, None, None).result()
        errors = {str(job.exception()) for job in busy if job.exception()}
        assert errors <= {"File is closed"}


_EXIT = """
import os, sys, fastst_patch
fastst_patch.patch(small_file_bytes=0)
from safetensors import safe_open
from safetensors.torch import load_file
def keep(path):
    handle = safe_open(path, "pt")
    return handle, handle.get_slice("w"), handle.get_tensor("w"), load_file(path)
alive = keep(sys.argv[1])
sys.modules["safetensors"].alive = alive
child = os.fork()
if child == 0:
    same = all((load_file(sys.argv[1])[k] == v).all() for k, v in alive[3].items())
    os._exit(0 if same and (alive[1][...] == alive[2]).all() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_fork_and_interpreter_exit(sample, tmp_path, warm_python) -> None:
    """Everything still open and alive at exit; a forked child reads old and new tensors."""
    done = warm_python.run(_EXIT, sample, folder=tmp_path, quiet=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- transformers, a real model


@pytest.fixture
def llama(consumer) -> Any:
    transformers = consumer("transformers")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.LlamaConfig(**heads, **sizes, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_transformers_from_pretrained(llama, assert_same, watch, tmp_path, shards, dtype) -> None:
    llama.save_pretrained(tmp_path / "saved", max_shard_size=shards)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "20KB")

    options = {"dtype" if hasattr(llama.config, "dtype") else "torch_dtype": dtype}

    def load() -> Any:
        saved = tmp_path / "saved"
        return type(llama).from_pretrained(saved, local_files_only=True, **options).eval()

    with watch() as seen, fastst_patch.patched(small_file_bytes=0):
        ours = load()
    for file in files:
        seen.assert_fast(file)
    with watch() as seen:
        theirs = load()
    assert not seen.reports
    mine, other = dict(ours.state_dict()), dict(theirs.state_dict())
    assert list(mine) == list(other)
    assert_same(mine, other)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    # Saved again: nothing taken for shared, nothing dropped, the same bytes.
    for which, again in (("ours", ours), ("theirs", theirs)):
        again.save_pretrained(tmp_path / which, max_shard_size=shards)
    for file in sorted((tmp_path / "theirs").glob("model*")):
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()


def test_a_real_file(minilm, fast, stock, assert_same, watch) -> None:
    path = minilm / "model.safetensors"
    with watch() as seen, fast.safe_open(path, framework="pt") as ours:
        loaded = fast.load_file(path)
        with stock.safe_open(path, framework="pt") as theirs:
            assert (ours.keys(), ours.metadata()) == (theirs.keys(), theirs.metadata())
            order = "offset_keys" if hasattr(theirs, "offset_keys") else "keys"
            assert getattr(ours, order)() == getattr(theirs, order)() == list(loaded)
            for name in loaded:
                expected = theirs.get_tensor(name)
                assert_same(ours.get_tensor(name), expected)
                assert_same(loaded[name], expected)
                assert_same(ours.get_slice(name)[1:], theirs.get_slice(name)[1:])
                assert ours.get_slice(name).get_shape() == list(expected.shape)
    seen.assert_fast(path, count=2)
    assert sum(t.nbytes for t in loaded.values()) > 80e6


def test_a_real_model(minilm, watch, consumer) -> None:
    transformers = consumer("transformers")
    with watch() as seen, fastst_patch.patched():
        ours = transformers.AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    seen.assert_fast(minilm / "model.safetensors")
    theirs = transformers.AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    tokens = torch.arange(1000, 1016).view(2, 8)
    with torch.no_grad():
        assert torch.equal(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_cuda(sample, fast, stock, assert_same, device) -> None:
    assert_same(fast.load_file(sample, device=device), stock.load_file(sample, device=device))
    ours, theirs = (x.safe_open(sample, "pt", device=device) for x in (fast, stock))
    assert_same(ours.get_tensor("w"), theirs.get_tensor("w"))
    assert_same(ours.get_slice("h")[3:], theirs.get_slice("h")[3:])
