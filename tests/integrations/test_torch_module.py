"""``Module.to`` and ``.cuda`` over the fake driver: what comes out, what moved, what was left.

No torch here has a device, so stock's own conversion is told the CPU where a program says CUDA:
given the moved copy it then does what it does on the device, a cast or nothing.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastst_patch
from fastst_patch.errors import Fallback
from fastst_patch.integrations import torch_module, uploads

TARGET = "torch.nn.Module.to"
STOCK_TO, STOCK_APPLY = nn.Module.to, nn.Module._apply


class Everything(nn.Module):
    """Whatever a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.front = nn.Sequential(nn.Linear(130, 257), nn.LayerNorm(257), nn.Linear(257, 130))
        self.rnn = nn.LSTM(33, 65, num_layers=2)
        self.tied = nn.Linear(130, 257)
        self.tied.weight = self.front[0].weight
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.randn(77), requires_grad=False)
        self.brief = nn.Parameter(torch.randn(5, 7, dtype=torch.bfloat16))
        self.imaginary = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.none = None
        self.register_parameter("nothing", None)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.rand(300) > 0.5)
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("across", torch.randn(40, 50).t())
        self.register_buffer("sparse", torch.eye(4).to_sparse())
        self.register_buffer("again", self.mask)
        self.register_buffer("part", self.frozen.detach()[10:20])
        self.register_buffer("hidden", torch.randn(11), persistent=False)
        (self.front(torch.randn(2, 130)).sum() + self.scalar).backward()


def _state(module: nn.Module) -> dict[str, Any]:
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    found: dict[str, Any] = {}
    for name, t in named:
        for what, tensor in ((name, t), (f"{name}.grad", t.grad)):
            if tensor is not None:
                found[what] = tensor
    return found


def _same(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = _state(ours), _state(theirs)
    assert list(a) == list(b)
    for name, mine in a.items():
        yours = b[name]
        assert type(mine) is type(yours), name
        assert (mine.dtype, mine.shape, mine.layout) == (yours.dtype, yours.shape, yours.layout)
        assert (mine.requires_grad, mine.is_leaf) == (yours.requires_grad, yours.is_leaf), name
        if mine.layout is torch.strided:
            assert mine.stride() == yours.stride(), name
            assert torch.equal(mine, yours), name
        else:
            assert torch.equal(mine.to_dense(), yours.to_dense()), name
    for one, other in (("front.0.weight", "tied.weight"),):
        assert (a[one] is a[other]) == (b[one] is b[other])


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda module: module.to("cuda"),
    "to number": lambda module: module.to("cuda:1"),
    "to device and dtype": lambda module: module.to(torch.device("cuda"), torch.float16),
    "to keywords": lambda module: module.to(device="cuda", dtype=torch.float64, non_blocking=True),
    "to like": lambda module: module.to("cuda", memory_format=torch.channels_last),
    "cuda": lambda module: module.cuda(),
    "cuda number": lambda module: module.cuda(1),
}


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_comes_out_as_stocks(moving, move) -> None:
    ours = Everything()
    theirs = Everything()  # a deep copy has no gradients
    before = _state(ours)
    places = {name: t.data_ptr() for name, t in before.items() if t.layout is torch.strided}
    with fastst_patch.profile() as seen:
        result = move(ours)
    (report,) = seen.reports
    assert (report.call, report.path, report.fallback_reason) == ("Module.to", "upload", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", STOCK_APPLY)
        move(theirs)
    assert result is ours
    _same(ours, theirs)
    after = _state(ours)
    for name, t in before.items():
        if isinstance(t, nn.Parameter):
            assert after[name] is t, name  # the identity that optimizers hold
    # Moved: all but what is not contiguous, not strided, empty, or part of another.
    left = {"empty", "across", "sparse", "conv.weight", "part"}
    for name, place in places.items():
        if name not in left and name != "again":
            assert after[name].data_ptr() != place, name
    assert report.tensors > 20


def test_bytes_come_from_memory(moving, model, fast) -> None:
    """In-place changes made before are carried over; the file is not looked at."""
    loaded = fast.load_file(model)
    module = nn.ParameterDict(
        {name.replace(".", "_"): nn.Parameter(t, requires_grad=False)
         for name, t in loaded.items() if t.is_floating_point()}
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.values():
            parameter.mul_(2)
    expected = {name: t.detach().clone() for name, t in module.items()}
    with fastst_patch.profile() as seen:
        module.to("cuda")
    assert [report.path for report in seen.reports if report.call == "Module.to"] == ["upload"]
    for name, t in expected.items():
        assert torch.equal(module[name], t), name


def test_hooks_subclasses_and_overrides(moving) -> None:
    class Counting(nn.Linear):
        applied = 0

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.applied += 1
            return super()._apply(fn, recurse)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return super().to(*args, **kwargs)

    class Special(torch.Tensor):
        pass

    module = nn.Sequential(Counting(64, 64), nn.Linear(8, 8))
    module[1].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Special))
    weight = module[0].weight.detach().clone()
    with fastst_patch.profile() as seen:
        module[0].to("cuda")
        module.to("cuda")
    assert module[0].applied == 2
    assert torch.equal(module[0].weight, weight)
    assert isinstance(module[1].weight, Special)
    assert seen.reports[0].tensors == 2


class Helped(nn.Linear):
    """Keeps a module that nobody else sees, and does something to it on every ``_apply``."""

    def __init__(self, act: Callable[[nn.Module], Any]) -> None:
        super().__init__(64, 64)
        self.__dict__["helper"] = nn.Linear(8, 8)
        self.act = act

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.act(self.helper)
        return super()._apply(fn, recurse)


@pytest.mark.parametrize(
    "act", [lambda m: m.half(), lambda m: m.to("cpu"), lambda m: m.to(torch.float16)],
    ids=["half", "to cpu", "to dtype"],
)  # fmt: skip
def test_only_its_own_conversion_is_wrapped(moving, act) -> None:
    """What an ``_apply`` does to others on the way to ours is none of the move's business."""
    module = Helped(act)
    place = module.helper.weight.data_ptr()
    weight = module.weight.data_ptr()
    with fastst_patch.profile() as seen:
        module.to("cuda")
    assert [(report.path, report.tensors) for report in seen.reports] == [("upload", 2)]
    assert module.weight.data_ptr() != weight
    assert (module.helper.weight.data_ptr() == place) == (module.helper.weight.dtype != torch.half)


def test_an_apply_below_may_change_what_it_holds(moving) -> None:
    """Through ``.data``, which no version counter tells of, or by other memory."""

    class Doubling(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.weight.data.mul_(2)
            self.bias.data = torch.ones(64)
            return super()._apply(fn, recurse)

    module = nn.Sequential(nn.Linear(64, 64), nn.Sequential(Doubling(64, 64)), nn.LSTM(3, 5))
    expected = copy.deepcopy(module).state_dict()
    expected["1.0.weight"] *= 2
    expected["1.0.bias"][:] = 1
    with fastst_patch.profile() as seen:
        module.to("cuda")
    for name, t in module.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert seen.reports[0].tensors == 6  # of the first layer and the recurrent one


def test_a_thread_that_exchanges_memory(moving, monkeypatch) -> None:
    """What was announced is held until it was read, and is not mistaken for what came after."""
    module = nn.Module()
    gone: list[bool] = []
    memory = np.ones(5000, np.float32)
    weakref.finalize(memory, gone.append, True)
    module.weight = nn.Parameter(torch.from_numpy(memory))
    del memory
    upload = uploads.engine.upload

    def exchange(*args: Any, **options: Any) -> Any:
        module.weight.data = torch.zeros(5000)  # as another thread's ``to`` would just now
        gc.collect()
        assert not gone
        return upload(*args, **options)

    monkeypatch.setattr(uploads.engine, "upload", exchange)
    with fastst_patch.config_context(device_memory_budget=30):
        module.to("cuda")
    gc.collect()
    assert gone
    assert not module.weight.any()


def test_threads_that_move_one_module(moving) -> None:
    for _ in range(5):
        module = nn.Sequential(*(nn.Linear(200, 200) for _ in range(20)))
        expected = copy.deepcopy(module).state_dict()
        threads = [threading.Thread(target=module.to, args=("cuda",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, t in module.state_dict().items():
            assert torch.equal(t, expected[name]), name


def test_strides_of_one_by_one_convolutions(moving) -> None:
    """``channels_last`` shows only in strides that ``is_contiguous`` does not look at."""
    ours, theirs = (nn.Conv2d(64, 32, 1).to(memory_format=torch.channels_last) for _ in range(2))
    assert ours.weight.is_contiguous()
    ours.to("cuda")
    STOCK_TO(theirs, "cuda")
    assert ours.weight.stride() == theirs.weight.stride() == (64, 1, 64, 64)


def test_a_parameter_among_the_buffers(moving) -> None:
    """Stock moves buffers where autograd sees it."""
    ours, theirs = nn.Module(), nn.Module()
    for module in (ours, theirs):
        module.register_buffer("b", nn.Parameter(torch.ones(5, 5)))
        module.register_buffer("c", torch.ones(5, 5))
    ours.to("cuda", torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", STOCK_APPLY)
        theirs.to("cuda", torch.float64)
    assert (ours.b.requires_grad, ours.b.is_leaf) == (theirs.b.requires_grad, theirs.b.is_leaf)
    assert (ours.c.requires_grad, ours.c.is_leaf) == (theirs.c.requires_grad, theirs.c.is_leaf)


def test_a_storage_without_bytes_is_stocks(moving) -> None:
    module = nn.Linear(64, 64)
    module.weight.untyped_storage().resize_(0)
    assert uploads.ordinary(module.parameters()) == [module.bias]


@pytest.mark.parametrize("flag", ["swap_module_params_on_conversion",
                                  "overwrite_module_params_on_conversion"])  # fmt: skip
def test_flags_of_torchs_future(moving, monkeypatch, flag) -> None:
    ours, theirs = Everything(), Everything()
    for module in (ours, theirs):
        del module.conv, module.part, module.across  # compare what is moved
    before = _state(ours)
    same = {}

    def of_floats(t: torch.Tensor) -> bool:  # the others are not cast, and the fake is the CPU
        return t.is_floating_point()

    getattr(torch.__future__, f"set_{flag}")(True)
    try:
        with fastst_patch.profile() as seen:
            ours.to("cuda", torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "_apply", STOCK_APPLY)
            old = _state(theirs)
            theirs.to("cuda", torch.float64)
            same = {name: _state(theirs)[name] is t for name, t in old.items() if of_floats(t)}
    finally:
        getattr(torch.__future__, f"set_{flag}")(False)
    assert [report.path for report in seen.reports] == ["upload"]
    _same(ours, theirs)
    assert {name: _state(ours)[name] is t for name, t in before.items() if of_floats(t)} == same


def test_casts_are_over_when_it_returns(moving) -> None:
    """Stock waits for its copies: whatever stream uses the module next may do so at once."""
    nn.Linear(64, 64).to("cuda:1")
    assert moving.settled == []
    nn.Linear(64, 64).to("cuda:1", torch.float16)
    assert moving.settled == [1]


@pytest.mark.parametrize("refused", [1, 3])
def test_a_cast_that_does_not_fit_is_stocks(moving, refused) -> None:
    """Stock casts before it copies, and needs less. Nothing that was moved ahead is in its way."""
    module = nn.Sequential(*(nn.Linear(70, 70) for _ in range(4)))
    expected = copy.deepcopy(module).half().state_dict()
    casts = 0
    to = torch.Tensor.to
    gc.collect()  # of what tests before have left to it
    before = moving.driver.live().blocks
    alive: list[int] = []

    def cast(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal casts
        casts += 1
        if casts == refused:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
        if casts == refused + 1:
            alive.append(moving.driver.live().blocks)
        return to(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, fastst_patch.profile() as seen:
        patch.setattr(torch.Tensor, "to", cast)
        module.to("cuda", torch.float16)
    for name, t in module.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert alive == [before]
    assert [report.tensors for report in seen.reports] == [refused]
    assert "not enough memory" in str(seen.reports[0].fallback_reason)


def test_exceptions_are_stocks_alone(moving, monkeypatch) -> None:
    """Nothing of ours is in their context, and ``fallback="error"`` does not replace them."""

    def conversion(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    def refused(named: Any) -> None:
        raise Fallback("refused")

    monkeypatch.setattr(torch.Tensor, "to", conversion)
    moving.refuse_from = 1
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(KeyboardInterrupt):
            nn.Linear(70, 70).to("cuda")
        monkeypatch.setattr(torch_module, "device_of", refused)
        with pytest.raises(KeyboardInterrupt) as error:
            nn.Linear(70, 70).to("cuda")
    assert error.value.__context__ is None


def test_host_memory_goes_as_it_is_moved(moving) -> None:
    """Buffers are replaced: the old ones are not kept until the end."""
    module = nn.Module()
    gone: list[int] = []
    for i in range(4):
        memory = np.ones(40_000, np.uint8)
        weakref.finalize(memory, gone.append, i)
        module.register_buffer(f"b{i}", torch.from_numpy(memory))
    del memory
    seen: list[int] = []

    class Watching(nn.Module):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            seen.append(len(gone))
            return super()._apply(fn, recurse)

    whole = nn.Sequential(module, Watching())
    with fastst_patch.config_context(device_memory_budget=90_000):
        whole.to("cuda")
    assert seen == [4]
