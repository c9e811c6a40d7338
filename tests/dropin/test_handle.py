"""Handles: the interface and protocols of stock's, closing, and how long what they gave lives."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from lifetimes import ORDERS, end, owners_of
from safetensors import SafetensorError

import fastst_patch
from fastst_patch import stock


def _descriptors(path: str) -> int:
    """How many of this process's descriptors are open on the file."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(os.path.realpath(path))
        except FileNotFoundError:
            continue
    return count


def _mapped(path: str) -> bool:
    return os.path.realpath(path) in Path("/proc/self/maps").read_text()


PROTOCOLS: dict[str, Callable[[Any], Any]] = {
    **{f.__name__: f for f in (len, list, next, bool, callable, int, float, dict, vars)},
    **{f"pickle {i}": functools.partial(lambda i, h: pickle.dumps(h, i), i) for i in (0, 2, 5)},
    "iter": lambda h: type(iter(h)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "reversed": reversed,
    "weak reference": weakref.ref,
    "subscript": lambda h: h["w"],
    "in": lambda h: "w" in h,
    "less": lambda h: h < h,
    "add": lambda h: h + h,
    "equal": lambda h: (h == h, h != h, h == 1),
    "hash": lambda h: (isinstance(hash(h), int), {h: 1}[h], h in {h}),
    "call": lambda h: h(),
    "set attribute": lambda h: setattr(h, "x", 1),
    "set method": lambda h: setattr(h, "keys", 1),
    "delete method": lambda h: delattr(h, "keys"),
    "class": lambda h: (h.__class__.__name__, h.__class__.__module__, h.__class__.__doc__),
    "dir": lambda h: [a for a in dir(h) if not a.startswith("_")],
    "repr": lambda h: repr(h).split(" at 0x")[0],
    "str": lambda h: f"{h}".split(" at 0x")[0],
}


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("what", ["handle", "slice", "closed"])
def test_protocols(sample, stock, fast, agree, name, what) -> None:
    """Hashable, truthy, equal to itself only; nothing else that containers or pickles are.

    Types of exceptions only: the interpreter words these, after the name of the class.
    """
    ours, theirs = fast.safe_open(sample, "pt"), stock.safe_open(sample, "pt")
    if what == "slice":
        ours, theirs = ours.get_slice("w"), theirs.get_slice("w")
    elif what == "closed":
        ours.__exit__(None, None, None)
        theirs.__exit__(None, None, None)
    use = PROTOCOLS[name]
    agree(lambda: use(ours), lambda: use(theirs), text=False)


def test_isinstance(sample, stock, fast) -> None:
    handle = getattr(safetensors, "_safe_open_handle", ())
    for opened in (fast.safe_open(sample, "pt"), stock.safe_open(sample, "pt")):
        assert isinstance(opened, safetensors.safe_open)
        assert not isinstance(opened, handle)
    for not_one in (1, "x", None, fast.safe_open(sample, "pt").get_slice("w")):
        assert not isinstance(not_one, safetensors.safe_open)
    with open(sample, "rb") as file:
        assert stock.handle is None or isinstance(fast.handle(file, "pt"), handle)


def test_closing(sample, fast, stock, agree, outcome) -> None:
    """Closed is closed, any number of times, and says so; wrong arguments are noticed first."""
    ours, theirs = fast.safe_open(sample, "pt"), stock.safe_open(sample, "pt")
    for step in (
        lambda h: h.__enter__() is h,
        lambda h: h.__exit__(None, None, None),
        lambda h: h.__exit__(None, None, None),
        lambda h: h.__exit__(ValueError, ValueError("x"), None),
        lambda h: h.offset_keys(),
        lambda h: h.metadata(),
        lambda h: h.get_tensors(),
        lambda h: h.get_tensor("w"),
        lambda h: h.get_tensor("missing"),
        lambda h: h.get_tensor(3),
        lambda h: h.get_slice("w"),
        lambda h: h.__enter__() is h,
        lambda h: h.keys(),
        bool,
    ):
        agree(lambda s=step: s(ours), lambda s=step: s(theirs))
    assert outcome(ours.keys).error is SafetensorError
    assert outcome(ours.keys).text == "File is closed"
    with pytest.raises(KeyError, match="seen outside"), fast.safe_open(sample, "pt"):
        raise KeyError("seen outside")


def test_descriptors_and_maps_are_given_back(sample, fast, watch) -> None:
    """A handle nobody closes costs nothing once it is collected; tensors need no descriptor."""
    with watch() as seen:
        handles = [fast.safe_open(sample, "pt") for _ in range(50)]
        tensors = [handle.get_tensor("w") for handle in handles[:3]]
        cycle: list[Any] = [fast.safe_open(sample, "pt")]
        cycle.append(cycle)
        del handles, cycle
        gc.collect()
        assert _descriptors(sample) == 0
        assert float(tensors[2].sum()) == float(tensors[0].sum())
        loaded = fast.load_file(sample)
        assert _descriptors(sample) == 0
        with fast.safe_open(sample, "pt") as handle:
            piece = handle.get_slice("b")
            whole = fast.all_tensors(handle)
        assert piece[1:3].tolist() == [1, 2]
        del piece
        assert _descriptors(sample) == 0
    assert len(seen.paths(sample)) == 53
    del tensors, handle, loaded, whole
    gc.collect()
    assert not _mapped(sample)


_LIMIT = """
import resource, sys, fastst_patch, safetensors
if sys.argv[2] == "ours":
    fastst_patch.patch(small_file_bytes=0)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
handles = []
try:
    while len(handles) < 200:
        handles.append(safetensors.safe_open(sys.argv[1], "pt"))
except (OSError, RuntimeError) as error:
    assert "Too many open files" in str(error)
    handles.pop()  # for what slices need
slices = [handle.get_slice("b") for handle in handles]
assert all(piece[1:3].tolist() == [1, 2] for piece in slices)
print(len(handles))
"""


def test_more_handles_than_descriptors(sample, tmp_path, warm_python) -> None:
    """Before 0.9 stock's handles and slices hold a map and no descriptor: as many fit of ours."""
    opened = {}
    for whose in ("stock", "ours"):
        done = warm_python.run(_LIMIT, sample, whose, folder=tmp_path, quiet=True)
        assert done.returncode == 0, done.stderr
        opened[whose] = int(done.stdout)
    assert opened["ours"] >= opened["stock"] - 4  # what fastst_patch itself has open


@given(order=ORDERS)
def test_alive_in_any_order(raw, fast, stock, assert_same, order) -> None:
    source = {"w": torch.arange(5000.0).view(50, 100), "v": torch.ones(7, dtype=torch.bool)}
    path = raw.tensors(source, "alive")
    expected = stock.load_file(path)
    owners = owners_of(fast, path)
    kept = [owners["handle"].get_tensor("w"), owners["loaded"]["w"], owners["siblings"]["w"]]
    views = [owners["slice"][10:20, ::3], kept[0][-1], kept[1].T]
    wanted = [expected["w"][10:20, ::3], expected["w"][-1], expected["w"].T]
    for step in order:
        end(owners, step, path)
        if "slice" in owners:
            assert_same(owners["slice"][3], expected["w"][3])
        assert_same(kept, [expected["w"]] * 3)
        assert_same(views, wanted)
    del kept
    assert_same(views, wanted)


def test_metadata_is_decoded_when_asked_for(
    fast: Any, stock: Any, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {f"key {i}": "value" * 100_000 for i in range(100)}  # 50 MB
    entries = {"__metadata__": metadata, "x": raw.entry("U8", [1], 0, 1)}
    path = raw.write(raw.pack(entries, b"\7"))
    decoded: list[int] = []
    loads: Callable[..., Any] = json.loads

    def spied(text: bytes, *args: Any, **kwargs: Any) -> Any:
        decoded.append(len(text))
        return loads(text, *args, **kwargs)

    monkeypatch.setattr(json, "loads", spied)
    with fast.safe_open(path, "pt") as handle:
        assert handle.keys() == ["x"]
        assert handle.get_tensor("x").tolist() == [7]
        assert decoded == []
        first = handle.metadata()
        assert len(decoded) == 1
        first["key 0"] = "changed"  # the caller's own
        assert handle.metadata() == metadata
        assert len(decoded) == 1
    with stock.safe_open(path, "pt") as handle:
        assert handle.metadata() == metadata


ODD = [
    '{"a":"1","a":"2"}',
    r'{"a":"\u00e9\ud83d\ude00\n\/\"","\u0061\t":""}',
    r'{"a":"\ud83d"}',
    r'{"a":"\ude00"}',
    r'{"a":"\u0000"}',
    r'{"a":"\x"}',
    '{"a":"\t"}',
    '{"a":1}',
    '{"a":null}',
    '{"a":{"b":"c"}}',
    '{"a":["b"]}',
    "[]",
    "{}",
    "null",
    '""',
    '{"a":"b",}',
    '{"\u2028":"\u00e9\U0001f600"}',
    ' { "a" : "b" } ',
]


@pytest.mark.parametrize("text", ODD)
def test_odd_metadata(fast: Any, stock: Any, raw: Any, text: str) -> None:
    header = f'{{"__metadata__":{text},"x":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'
    path = raw.write(raw.pack(header, b"\7"))
    got = []
    for loaders in (stock, fast):
        try:
            with loaders.safe_open(path, "pt") as handle:
                got.append(("opened", handle.metadata()))
        except Exception as error:
            got.append((type(error).__name__, str(error)))
    assert got[0] == got[1]


def test_verify_on_handles(checkpoint: Path) -> None:
    with fastst_patch.config_context(verify=True):
        with fastst_patch.safe_open(checkpoint, "pt") as f:
            if hasattr(stock.safe_open, "get_tensors"):
                assert set(f.get_tensors()) == set(f.keys())
            assert f.get_tensor("w1").shape == (1024, 1024)
