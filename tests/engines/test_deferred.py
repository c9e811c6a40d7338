"""Deferred tensors behave as the tensors that they stand for, whatever is done to them."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastst_patch.files.parts import Part
from fastst_patch.integrations.deferred import DeferredTensor, plain


class Parts:
    """A source that gives parts of what the file has, as a device would.

    Attributes:
        given: the parts.
        read: the parts that were read in another way.
    """

    over = False

    def __init__(self, content: torch.Tensor) -> None:
        self.content = content.clone()
        self.tensor = content.clone()
        self.storage = self.tensor.untyped_storage()._cdata
        self.alive: Any = weakref.WeakValueDictionary()
        self.given: list[Part] = []
        self.read: list[Part] = []
        self.settled = False

    def part(self, view: torch.Tensor, into: torch.Tensor) -> torch.Tensor | None:
        assert type(view) is torch.Tensor
        part = Part.of(view)
        if self.settled or view._version or view.dtype != self.content.dtype or not part.is_box():
            return None
        self.given.append(part)
        flat = self.content.view(-1)
        runs = [
            flat[part.offset + start : part.offset + start + part.run] for start in part.starts()
        ]
        return part.shaped(torch.cat(runs).view(part.sorted_shape()))

    def used(self, view: torch.Tensor) -> None:
        assert type(view) is torch.Tensor
        self.read.append(Part.of(view))

    def settle(self, view: torch.Tensor) -> None:
        assert type(view) in (torch.Tensor, torch.nn.Parameter)
        self.settled = True


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor, Parts]:
    """A deferred tensor, the tensor that it stands for, and the source."""
    content = torch.arange(int(np.prod(shape))).view(shape).to(dtype)
    source = Parts(content)
    return DeferredTensor.over(source.tensor, source), content.clone(), source


def copied(tensor: Any) -> torch.Tensor:
    return torch.full(tensor.shape, -1, dtype=tensor.dtype).copy_(tensor)


def assert_alike(ours: Any, theirs: torch.Tensor) -> None:
    assert isinstance(ours, torch.Tensor)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.device == theirs.device
    assert ours.stride() == theirs.stride()
    assert ours.storage_offset() == theirs.storage_offset()
    assert ours.is_contiguous() == theirs.is_contiguous()
    assert ours.numel() == theirs.numel()
    assert torch.equal(copied(ours), theirs)


# ---- chains of operations ----

STEPS: dict[str, Any] = {
    "narrow": lambda t, a, b: t.narrow(a % t.dim(), b % t.shape[a % t.dim()], 1 + b % 2),
    "[a:b]": lambda t, a, b: t[a : a + b + 1],
    "[..., a:b]": lambda t, a, b: t[..., a : a + b + 1],
    "[::2]": lambda t, a, b: t[:: 1 + a % 3],
    "[i]": lambda t, a, b: t[a],
    "[list]": lambda t, a, b: t[[0, a % t.shape[0]]],
    "[mask]": lambda t, a, b: t[t > a],
    "[None]": lambda t, a, b: t[None],
    "t": lambda t, a, b: t.t(),
    "T": lambda t, a, b: t.mT,
    "transpose": lambda t, a, b: t.transpose(a % t.dim(), b % t.dim()),
    "permute": lambda t, a, b: t.permute(*reversed(range(t.dim()))),
    "view": lambda t, a, b: t.view(-1),
    "view dtype": lambda t, a, b: t.view(torch.int32),
    "reshape": lambda t, a, b: t.reshape(-1, t.shape[-1]),
    "chunk": lambda t, a, b: t.chunk(2, a % t.dim())[0],
    "split": lambda t, a, b: t.split(2, a % t.dim())[-1],
    "unbind": lambda t, a, b: t.unbind(a % t.dim())[0],
    "squeeze": lambda t, a, b: t.squeeze(),
    "unsqueeze": lambda t, a, b: t.unsqueeze(a % (t.dim() + 1)),
    "expand": lambda t, a, b: t.unsqueeze(0).expand(2, *t.shape),
    "detach": lambda t, a, b: t.detach(),
    "data": lambda t, a, b: t.data,
    "contiguous": lambda t, a, b: t.contiguous(),
    "clone": lambda t, a, b: t.clone(),
    "to": lambda t, a, b: t.to(torch.float64),
    "float": lambda t, a, b: t.float(),
    "cat": lambda t, a, b: torch.cat([t, t]),
    "+": lambda t, a, b: t + 1,
    "matmul": lambda t, a, b: t @ t.mT,
    "sum": lambda t, a, b: t.sum(a % t.dim()),
    "add_": lambda t, a, b: t.add_(1),
    "mul_": lambda t, a, b: t.data.mul_(2),
    "zero_": lambda t, a, b: t[a : a + 1].zero_(),
    "setitem": lambda t, a, b: t.__setitem__(a, 5),
    "copy_": lambda t, a, b: t.copy_(torch.full_like(t, 3)),
    "t_": lambda t, a, b: t.t_(),
    "empty_like": lambda t, a, b: torch.empty_like(t).fill_(1),
    "new_zeros": lambda t, a, b: t.new_zeros(2, 3),
    "as_strided": lambda t, a, b: t.as_strided((2,), (1,), a),
    "deepcopy": lambda t, a, b: copy.deepcopy(t),
    # Clones, since ``set_`` frees the memory below what numpy and DLPack got of a tensor.
    "numpy": lambda t, a, b: torch.from_numpy(t.numpy()).clone(),
    "tolist": lambda t, a, b: torch.tensor(t.tolist()),
    "item": lambda t, a, b: torch.tensor(t.flatten()[0].item()),
    "iter": lambda t, a, b: list(t)[-1],
    "where": lambda t, a, b: torch.where(t > 3, t, -t),
    "dlpack": lambda t, a, b: torch.from_dlpack(t).clone(),
    "out": lambda t, a, b: torch.add(t, 1, out=t),
    "set_": lambda t, a, b: t.set_(torch.arange(6.0)),
    "requires_grad_": lambda t, a, b: t.requires_grad_(False),
}


@settings(max_examples=3 * settings.default.max_examples)  # 5 ms an example
@given(st.data())
def test_any_chain_of_operations(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(4, 6), (1, 5), (5, 1), (2, 3, 4), (7,), (3, 2, 1, 2)]))
    first, real, _ = pair(*shape)
    ours: list[Any] = [first]
    theirs: list[torch.Tensor] = [real]
    for _ in range(data.draw(st.integers(1, 7))):
        at = data.draw(st.integers(0, len(ours) - 1))
        step = STEPS[data.draw(st.sampled_from(sorted(STEPS)))]
        a, b = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))
        found = []
        for tensor in (theirs[at], ours[at]):
            try:
                found.append(step(tensor, a, b))
            except Exception as error:
                found.append(error)
        expected, result = found
        if isinstance(expected, Exception):
            assert type(result) is type(expected)
            assert str(result) == str(expected)
        elif expected is not None:
            assert not isinstance(result, Exception), result
            assert (result is ours[at]) == (expected is theirs[at])
            ours.append(result)
            theirs.append(expected)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)


# ---- one by one ----


def test_only_the_part_is_given() -> None:
    ours, theirs, source = pair(8, 6)
    into = torch.zeros(2, 3)
    into.copy_(ours.narrow(0, 2, 4).narrow(1, 3, 3)[1:3])
    assert torch.equal(into, theirs[3:5, 3:6])
    assert source.given == [Part(21, (2, 3), (6, 1))]
    into[:1] = ours[:1, :3]
    assert source.given[1:] == [Part(0, (1, 3), (6, 1))]
    assert torch.equal(into[0], theirs[0, :3])


@pytest.mark.parametrize("views", ["chunk", "transpose", "select", "unbind"])
def test_views_of_fused_experts(views) -> None:
    ours, theirs, source = pair(3, 4, 6)
    step = {
        "chunk": lambda t: t[1].chunk(2, dim=-1)[1],
        "transpose": lambda t: t.transpose(-1, -2)[2].narrow(0, 2, 2),
        "select": lambda t: t.select(0, 1),
        "unbind": lambda t: t.unbind(0)[2],
    }[views]
    part = step(ours)
    assert type(part) is DeferredTensor
    assert_alike(part, step(theirs))
    assert len(source.given) == 1
    assert not source.settled


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_as_a_plain_tensor(protocol) -> None:
    ours, theirs, _ = pair(4, 6)
    sizes = [len(pickle.dumps(one, protocol)) for one in (ours, theirs)]
    assert abs(sizes[0] - sizes[1]) <= 3 * 7  # addresses of 8 to 15 digits
    ours, theirs, _ = pair(4, 6)
    loaded = pickle.loads(pickle.dumps(ours[1:3], protocol))
    assert type(loaded) is torch.Tensor
    assert_alike(loaded, theirs[1:3])


def test_saved_and_loaded() -> None:
    ours, theirs, _ = pair(4, 6)
    file = io.BytesIO()
    torch.save({"a": ours, "b": ours[2:]}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert_alike(found["a"], theirs)
    assert found["a"].data_ptr() + 48 == found["b"].data_ptr()


def test_deepcopy_keeps_what_is_shared() -> None:
    ours, theirs, _ = pair(4, 6)
    first, second = copy.deepcopy([ours, ours])
    assert first is second
    assert type(first) is torch.Tensor
    assert_alike(first, theirs)


def test_a_parameter_made_of_one() -> None:
    ours, theirs, source = pair(4, 6)
    parameter = torch.nn.Parameter(ours, requires_grad=False)
    assert isinstance(parameter, torch.nn.Parameter)
    module = torch.nn.Module()
    module.weight = parameter
    assert list(module.state_dict()) == ["weight"]
    for one in list(source.alive.values()):
        plain(one)
    assert type(module.weight) is torch.nn.Parameter
    assert torch.equal(module.weight, theirs)


def test_data_of_another_tensor() -> None:
    ours, theirs, _ = pair(4, 6)
    other = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    other.data = ours
    assert_alike(other.data, theirs)


def test_shown_as_a_plain_tensor() -> None:
    ours, theirs, _ = pair(2, 2)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("way", ["operator", "view", "data", "numpy", "setitem", "out"])
def test_a_changed_tensor_is_copied_as_it_is(way) -> None:
    ours, theirs, source = pair(4, 6)
    view, real = ours[1:3], theirs[1:3]
    for tensor in (ours, theirs):
        if way == "operator":
            tensor.__iadd__(1)
        elif way == "view":
            tensor[2].add_(1)
        elif way == "data":
            tensor.data.add_(1)
        elif way == "numpy":
            tensor.numpy()[:] = 9
        elif way == "setitem":
            tensor[2] = 5
        else:
            torch.neg(tensor, out=tensor)
    assert_alike(view, real)
    assert source.given == []


@pytest.mark.parametrize("default", [torch.nn.Parameter, torch.Tensor])
def test_subclasses_of_parameters_do_their_own(default) -> None:
    called = []

    class Ours(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            called.append(func)
            return default.__torch_function__.__func__(cls, func, types, args, kwargs or {})

    if default is torch.nn.Parameter:  # as vLLM's: torch's function runs without subclasses
        del Ours.__torch_function__
        Ours.__torch_function__ = torch._C._disabled_torch_function_impl
    ours, theirs, source = pair(4, 6)
    into = Ours(torch.zeros(2, 6), requires_grad=False)
    into.copy_(ours[1:3])
    assert torch.equal(into.data, theirs[1:3])
    into.data.copy_(ours[:2])
    assert torch.equal(into.data, theirs[:2])
    assert source.given
    assert type(into + ours[:2]) is type(into + theirs[:2])
    assert bool(called) == (default is torch.Tensor)


WAYS_TO_READ = {
    "cast": lambda t: t.to(torch.float64),
    "contiguous": lambda t: t.t().contiguous(),
    "reshape": lambda t: t.t().reshape(-1),
    "list": lambda t: t[[0, 2]],
}


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_what_is_read_is_told_and_the_rest_stays_deferred(way) -> None:
    ours, theirs, source = pair(4, 6)
    read = WAYS_TO_READ[way](ours)
    assert type(read) is torch.Tensor
    assert_alike(read, WAYS_TO_READ[way](theirs))
    assert [part.numel for part in source.read] == [24]
    assert_alike(ours[1:3], theirs[1:3])
    assert [part.numel for part in source.given] == [12]
    assert ours.to(torch.float32) is ours
    assert len(source.read) == 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("way", ["narrow", "copy_", "add", "settled"])
def test_another_thread_makes_it_plain(way, half) -> None:
    """Between the look at the tensors' classes and our function, or in the middle of it."""
    ours, theirs, _ = pair(4, 6)
    into = torch.zeros(4, 6)
    calls: dict[str, Any] = {
        "narrow": (torch.Tensor.narrow, (ours, 0, 1, 2), theirs[1:3]),
        "copy_": (torch.Tensor.copy_, (into, ours), theirs),
        "add": (torch.add, (ours, 1), theirs + 1),
        "settled": (torch.Tensor.float, (ours,), theirs),
    }
    function, arguments, expected = calls[way]
    if half:
        del vars(ours)["_source"]
    else:
        plain(ours)
    found = DeferredTensor.__torch_function__(function, (DeferredTensor,), arguments)
    assert torch.equal(found, expected)
    assert type(found) is torch.Tensor


def test_a_parameter_that_two_threads_make_plain() -> None:
    parameter = torch.nn.Parameter(pair(4, 6)[0], requires_grad=False)
    source = parameter._source
    assert plain(parameter) is source
    assert plain(parameter) is None
    assert type(parameter) is torch.nn.Parameter


def test_views_are_plain_once_the_load_is_over() -> None:
    ours, theirs, source = pair(4, 6)
    source.over = True
    view = ours[1:3]
    assert type(view) is torch.Tensor
    assert vars(view) == {}
    assert_alike(view, theirs[1:3])


def test_complex_and_conjugates() -> None:
    ours, theirs, _ = pair(3, 2, dtype=torch.complex64)
    for tensor in (ours, theirs):
        tensor.add_(1j)
    assert torch.equal(copied(ours.conj()[1]), theirs.conj()[1])
    assert torch.equal(copied(ours.T), theirs.T)


def test_numbers_of_parts() -> None:
    whole = torch.arange(60.0).view(3, 4, 5)
    for view in (
        whole,
        whole[1],
        whole[:, 1:3],
        whole[..., 2:4],
        whole.mT,
        whole[:, :, 3],
        whole[::2],
    ):
        part = Part.of(view)
        assert part.is_box()
        flat = whole.view(-1)
        runs = [flat[part.offset + at :][: part.run] for at in part.starts()]
        assert torch.equal(part.shaped(torch.cat(runs).view(part.sorted_shape())), view)
        assert torch.equal(part.shaped(part.sorted_view(whole)), view)
        assert part.dense == (part.span == view.numel())
    assert not Part.of(whole[0, 0].expand(2, 5)).is_box()
    assert not Part.of(whole.view(-1).unfold(0, 4, 2)).is_box()
    assert not Part.of(whole[:0]).is_box()
