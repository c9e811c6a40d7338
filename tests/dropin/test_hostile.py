"""Files made to do harm: what they cost is bounded by what they cost stock, and they run nothing.

Memory is the highest resident size of a process of its own, work the calls that it makes: no clock
decides anything here.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import fastst_patch

LIMIT = 100_000_000  # bytes of the longest header that stock reads
ROOM = 16 << 20  # what differs between two runs of one program

_MEASURE = """
import contextlib, gc, re, sys
path, side, call = sys.argv[1:]
import safetensors, safetensors.numpy, safetensors.torch, torch, numpy
import fastst_patch
from fastst_patch.dropin import eligibility
if side == "ours":
    fastst_patch.patch(small_file_bytes=0)
    eligibility.SMALL_FOR_ARRAYS = 0

def run(path):
    with contextlib.suppress(safetensors.SafetensorError):
        if call == "load_file":
            return len(safetensors.torch.load_file(path))
        with safetensors.safe_open(path, call) as handle:
            handle.metadata()
            return len(handle.keys())

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

run(path + ".small")  # imports and first uses
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak()
found = run(path)
print(peak() - before, found)
"""

_EMPTY = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
_SMALL = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


def _many(count: int, last: str = "") -> bytes:
    entries = (
        f'"{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}}' for i in range(count)
    )
    return ("{" + ",".join(entries) + last + "}").encode()


# Of a size of the header: the header, and how many bytes are behind it.
HOSTILE: dict[str, Callable[[int], tuple[bytes, int]]] = {
    "spaces": lambda size: (_SMALL.encode().ljust(size), 1),
    "zeros": lambda size: (bytes(size), 0),
    "nesting": lambda size: (b'{"a":' + b"[" * (size - 5), 0),
    "nested objects": lambda size: (b'{"a":' * (size // 5), 0),
    "a string without an end": lambda size: (b'{"' + b"x" * (size - 2), 0),
    "metadata": lambda size: (b'{"__metadata__":{"a":"' + b"x" * (size - 25) + b'"}}', 0),
    "escapes": lambda size: (b'{"__metadata__":{"' + b"\\u00e9" * (size // 6 - 10) + b'":""}}', 0),
    "tensors": lambda size: (_many(size // 100), size // 100),
    "tensors, the last of them wrong": lambda size: (_many(size // 100, ',"x":null'), size // 100),
    "tensors of one name": lambda size: (
        b"{" + b",".join([_EMPTY] * (size // 100)) + b"}",
        0,
    ),
    "dimensions": lambda size: (
        b'{"a":{"dtype":"U8","shape":[' + b"1," * (size // 2 - 40) + b'1],"data_offsets":[0,1]}}',
        1,
    ),
    "a long number": lambda size: (
        b'{"a":{"dtype":"U8","shape":[' + b"1" * (size - 60) + b'],"data_offsets":[0,1]}}',
        1,
    ),
}
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SIZES = [(name, LIMIT if LONG or name == "tensors" else LIMIT // 10) for name in HOSTILE]


def _written(folder: Path, name: str, size: int) -> Path:
    header, nbytes = HOSTILE[name](size)
    assert size // 2 < len(header) <= size
    path = folder / "hostile.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    small = len(_SMALL).to_bytes(8, "little") + _SMALL.encode() + b"\1"
    Path(f"{path}.small").write_bytes(small)
    return path


def _measured(warm_python: Any, path: Path, side: str, call: str) -> tuple[int, str]:
    done = warm_python.run(_MEASURE, path, side, call, folder=path.parent)
    assert done.returncode == 0, done.stderr
    peak, found = done.stdout.split()
    return int(peak), found


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_memory_is_bounded_by_stocks(tmp_path, warm_python, name, size) -> None:
    """No more than stock takes, or than three times the header."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the kernel does not let a process reset its highest resident size")
    path = _written(tmp_path, name, size)
    (ours, found), (theirs, expected) = (
        _measured(warm_python, path, side, "pt") for side in ("ours", "stock")
    )
    path.unlink()
    assert found == expected
    assert ours <= max(theirs, 3 * size) + ROOM


# ---- work ----

_CALLS = """
import sys
import safetensors, safetensors.torch
import fastst_patch
fastst_patch.patch(small_file_bytes=0)
counts = []
for path in sys.argv[1:]:  # the first one with what is done once
    count = 0
    def called(frame, event, argument):
        global count
        count += event in ("call", "c_call")
    sys.setprofile(called)
    with safetensors.safe_open(path, "pt") as handle:
        handle.keys()
        handle.metadata()
        handle.get_slice("0").get_shape()
    sys.setprofile(None)
    counts.append(count)
assert fastst_patch.stats()["paths"]["mmap"]["loads"] == len(counts)
print(*counts[1:])
"""


def test_opening_makes_as_many_calls_for_any_number_of_tensors(raw, warm_python, tmp_path) -> None:
    """What a header of tensors costs in Python is a handful of calls, each over all of it."""
    counts = (9, 10, 1_000, 100_000)
    paths = [raw.write(raw.pack(_many(n), bytes(n)), f"{n}.safetensors") for n in counts]
    done = warm_python.run(_CALLS, *paths, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    few, some, many = map(int, done.stdout.split())
    assert 0 < few == some == many < 300


# ---- nothing is run ----


class Harm:
    """Makes a folder, if it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def _with_handle(load: Any) -> Callable[[str], Any]:
    def read(path: str) -> Any:
        with load(path) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118

    return read


WAYS: dict[str, Callable[[Any, str], Any]] = {
    "load_file": lambda fast, path: fast.load_file(path),
    "load_model": lambda fast, path: fast.load_model(torch.nn.Linear(1, 1), path, strict=False),
    "safe_open": lambda fast, path: _with_handle(lambda p: fast.safe_open(p, "pt"))(path),
    "arrays": lambda fast, path: fast.load_arrays(path),
    "load_sharded": lambda fast, path: fastst_patch.load_sharded(path),
    "fastsafe_open": lambda fast, path: _with_handle(fastst_patch.fastsafe_open)(path),
}


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    """The folder that a pickle makes, if it is unpickled."""
    folder = tmp_path / "harm"
    pickle.loads(pickle.dumps(Harm(folder)))
    folder.rmdir()
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["pickle", "torch.save", "header", "ending"])
def test_a_pickle_is_refused_and_not_run(raw, fast, stock, agree, harm, kind, way) -> None:
    content = pickle.dumps(Harm(harm))
    if kind == "torch.save":
        torch.save({"a": Harm(harm)}, harm.with_name("saved"))
        content = harm.with_name("saved").read_bytes()
    elif kind == "header":
        content = raw.pack(content)
    elif kind == "ending":
        content = raw.pack(_SMALL, b"\1" + content)
    path = raw.write(content)
    with pytest.raises((safetensors.SafetensorError, fastst_patch.RankError)):
        WAYS[way](fast, path)
    if way in ("load_file", "safe_open", "arrays"):
        agree(lambda: WAYS[way](fast, path), lambda: WAYS[way](stock, path))
    assert not harm.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_among_the_tensors_stays_bytes(raw, fast, harm, way) -> None:
    content = pickle.dumps(Harm(harm), protocol=0)
    header = {
        "__metadata__": {"format": "pt", "pickle": content.decode("ascii")},
        "a": raw.entry("U8", [len(content)], 0, len(content)),
    }
    path = raw.write(raw.pack(header, content))
    loaded = WAYS[way](fast, path)
    if isinstance(loaded, dict):
        assert bytes(loaded["a"].tolist()) == content
    with fast.safe_open(path, "pt") as handle:
        assert handle.metadata()["pickle"] == content.decode("ascii")
    assert not harm.exists()
