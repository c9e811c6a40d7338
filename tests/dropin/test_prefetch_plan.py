"""Plans and arguments of ``handle.prefetch()`` that are refused: type and text of the exception.

Where the installed safetensors has ``prefetch``, they are compared with its own: it checks a plan
before a device is needed. Elsewhere the texts written down here stand for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import torch
from generated_files import File, files
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import SafetensorError

UPSTREAM = hasattr(safetensors.safe_open, "prefetch")


def _said(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


_bounds = st.one_of(st.none(), st.integers(-3, 9), st.sampled_from([True, "a", 1.5, 1 << 70]))
_slices = st.builds(slice, _bounds, _bounds, st.sampled_from([None, None, None, 1, 2, -1, 0, "a"]))
NO_RUNTIME = (
    "SafetensorError",
    "no CUDA runtime is loaded in this process; import a CUDA-enabled framework (torch) before"
    " calling prefetch()",
)
ROWS = "for w is out of range for 32 rows"
# What safetensors 0.9.0rc1 says. The sample's w has 32 rows, and s is a scalar.
PLANS: list[tuple[Any, str, str]] = [
    ({}, "SafetensorError", "prefetch plan selects no tensors"),
    ([("w", None)], "TypeError", "'list' object is not an instance of 'dict'"),
    ("w", "TypeError", "'str' object is not an instance of 'dict'"),
    ({"no": None}, "SafetensorError", "File does not contain tensor no"),
    ({3: None}, "SafetensorError", "prefetch plan keys must be tensor names"),
    ({"w": None, "no": 3}, "SafetensorError", "File does not contain tensor no"),
    ({"w": 3}, "SafetensorError",
     "prefetch plan values must be None or a slice, got <class 'int'> for w"),
    ({"w": [slice(0, 1)]}, "SafetensorError",
     "prefetch plan values must be None or a slice, got <class 'list'> for w"),
    ({"s": slice(0, 1)}, "SafetensorError", "cannot slice rows of the 0-d tensor s"),
    ({"s": slice("a", 1, 0)}, "SafetensorError", "cannot slice rows of the 0-d tensor s"),
    ({"w": slice(0, 33)}, "SafetensorError", f"prefetch plan slice stop 33 {ROWS}"),
    ({"w": slice(-33, 99, 2)}, "SafetensorError", f"prefetch plan slice start -33 {ROWS}"),
    ({"w": slice(0, 9, 2)}, "SafetensorError",
     "prefetch plan slices must have step 1, got 2 for w"),
    ({"w": slice(0, 9, 0)}, "SafetensorError",
     "invalid prefetch plan slice for w: ValueError: slice step cannot be zero"),
    ({"w": slice("a", 99)}, "SafetensorError",
     "prefetch plan slice bounds for w must be integers or None"),
    ({"w": slice(0, 1 << 70)}, "SafetensorError",
     "prefetch plan slice bounds for w must be integers or None"),
    ({"w": slice(0, 9), "b": None}, "", ""),
]  # fmt: skip


@pytest.fixture
def scalar(raw: Any) -> str:
    torch.manual_seed(3)
    return raw.tensors({"w": torch.randn(32, 48), "b": torch.arange(48), "s": torch.tensor(1.5)})


@pytest.mark.parametrize(("plan", "error", "text"), PLANS, ids=lambda value: repr(value)[:60])
def test_plans_that_are_refused(fast, stock, scalar, plan, error, text) -> None:
    with fast.safe_open(scalar, "pt") as handle:
        assert _said(lambda: handle.prefetch(plan)) == (error, text)
        ours = _said(lambda: handle.prefetch(plan, device="cuda"))
        if not torch.cuda.is_available():
            assert ours == ((error, text) if error else NO_RUNTIME)
        if UPSTREAM:
            with stock.safe_open(scalar, "pt") as theirs:
                assert ours == _said(lambda: theirs.prefetch(plan, device="cuda"))


_values = st.one_of(st.none(), _slices, st.integers(0, 3), st.text(max_size=1))


@pytest.mark.skipif(not UPSTREAM, reason="this safetensors has no prefetch to compare with")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a plan that is right would be loaded")
@given(file=files(), values=st.lists(_values, min_size=8, max_size=8), drop=st.integers(0, 9))
def test_plans_are_refused_as_stock_does(raw, fast, stock, file: File, values, drop) -> None:
    assume(not file.odd)  # else the handle is stock's
    path = raw.write(file.content)
    plan = dict(zip(sorted(file.tensors)[drop % 3 :], values, strict=False))
    try:
        theirs = stock.safe_open(path, "pt", "cuda")
    except Exception:
        assume(False)
    said = _said(lambda: theirs.prefetch(plan))
    with fast.safe_open(path, "pt") as handle:
        # To the CPU, which stock refuses before it looks at the plan, a right plan is loaded.
        assert _said(lambda: handle.prefetch(plan)) == (("", "") if said == NO_RUNTIME else said)


TUPLES: list[tuple[Any, str]] = [
    ((slice(0, 2), 3), "prefetch plan values must be None or a slice, got <class 'int'> for w"),
    ((slice(0, 2),) * 3, "prefetch plan has 3 slices for w, which has 2 dimensions"),
    ((slice(0, 2), slice(0, 49)),
     "prefetch plan slice stop 49 for w is out of range for dimension 1 of 48"),
    ((slice(0, 2), slice(0, 9, 3)), "prefetch plan slices must have step 1, got 3 for w"),
    ((slice(0, 2), slice("a")), "prefetch plan slice bounds for w must be integers or None"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), TUPLES, ids=lambda value: repr(value)[:40])
def test_tuples_that_are_refused(fast, scalar, value, text) -> None:
    with fast.safe_open(scalar, "pt") as handle:
        assert _said(lambda: handle.prefetch({"w": value})) == ("SafetensorError", text)


ARGUMENTS: list[dict[str, Any]] = [
    *({"device": device} for device in ("foo", "CPU", "cuda:x", -1, 1.5, b"cuda", "cpu:0")),
    *({"device": device} for device in ("mps", "xpu", "npu:1", "cuda:9999", 70)),
    *({"threads": threads} for threads in ("8", 1.5, None, -1, 1 << 70)),
    {"no": 1},
    {"plan": 3, "device": "foo"},
    {"plan": {"no": None}, "device": "foo"},
    {"plan": {"no": None}, "device": "cuda"},
    {"plan": {"no": None}, "device": "xpu"},
]
CUDA_NOT = "prefetch loads to cuda devices, not "


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these devices exist")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_arguments_that_are_refused(fast, stock, scalar, arguments) -> None:
    with fast.safe_open(scalar, "pt") as handle, stock.safe_open(scalar, "pt") as theirs:
        ours = _said(lambda: handle.prefetch(**arguments))
        if UPSTREAM:
            assert ours == _said(lambda: theirs.prefetch(**{"device": "cuda", **arguments}))
        assert ours != ("", "")
        expected = {
            "foo": "device foo is invalid", "mps": CUDA_NOT + "mps", "xpu": CUDA_NOT + "xpu:0",
            "npu:1": CUDA_NOT + "npu:1", "cuda:9999": NO_RUNTIME[1], "8": "",
        }  # fmt: skip
        device = arguments.get("device")
        if device in expected and "plan" not in arguments:
            assert ours[1] == expected[device]


def test_positional_arguments(fast, stock, scalar) -> None:
    with fast.safe_open(scalar, "pt") as handle:
        assert _said(lambda: handle.prefetch(None, "cpu")) == (
            "TypeError",
            "safe_open.prefetch() takes from 0 to 1 positional arguments but 2 were given",
        )  # fmt: skip
        assert handle.prefetch(plan={"w": None}, device="cpu", threads=0).names() == ["w"]


def test_dtypes_that_torch_lacks(raw, fast, stock) -> None:
    path = raw.write(raw.pack({"x": raw.entry("F6_E2M3", [4], 0, 3)}, bytes(3)))
    try:
        handle = fast.safe_open(path, "pt")
    except SafetensorError as error:
        pytest.skip(f"this safetensors has no F6: {error}")
    assert _said(handle.prefetch)[1] == (
        "prefetch cannot hand out dtype F6_E2M3: torch has no matching dtype"
    )
    assert _said(lambda: handle.prefetch({"x": slice(0, 4)}))[1] == (
        "cannot slice rows of x: a row is not a whole number of bytes"
    )


def test_a_handle_of_stock_keeps_stocks_own(fast, stock, scalar) -> None:
    fallback, theirs = fast.safe_open(scalar, "np"), stock.safe_open(scalar, "np")
    assert hasattr(fallback, "prefetch") == UPSTREAM
    if UPSTREAM:
        assert _said(fallback.prefetch) == _said(theirs.prefetch)


@pytest.mark.parametrize("arguments", [{}, {"device": "foo"}, {"plan": 3}, {"no": 1}], ids=str)
def test_a_closed_handle(fast, stock, sample, arguments) -> None:
    handle = fast.safe_open(sample, "pt")
    handle.__exit__(None, None, None)
    said = _said(lambda: handle.prefetch(**arguments))
    assert UPSTREAM or said == ("SafetensorError", "File is closed")
    if UPSTREAM:
        theirs = stock.safe_open(sample, "pt")
        theirs.__exit__(None, None, None)
        assert said == _said(lambda: theirs.prefetch(**arguments))
