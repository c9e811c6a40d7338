"""Files as they occur: names, links, special and huge ones; and how long what they gave lives."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import io
import os
import pickle
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

import fastst_patch


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


class FakePath:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __fspath__(self) -> Any:
        return self.answer


# ---------------------------------------------------------------- arguments

# Positional and keyword arguments after the file name.
ARGUMENTS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    *(((), {}), (("pt",), {}), (("torch",), {}), (("pytorch",), {}), ((), {"framework": "pt"})),
    *((("np",), {}), (("numpy",), {}), (("tf",), {}), (("tensorflow",), {}), (("jax",), {})),
    *((("flax",), {}), (("mlx",), {}), (("paddle",), {}), (("PT",), {}), (("",), {})),
    *(((3,), {}), ((None,), {}), ((b"pt",), {}), (("xx", "bad"), {}), (("pt", "cpu", "mmap"), {})),
    *((("pt", "cpu"), {}), (("pt", None), {}), (("pt",), {"device": "cpu"})),
    *((("pt",), {"device": None}), (("pt", "cpu"), {"device": "cpu"}), (("pt",), {"foo": 1})),
    *((("pt",), {"foo": 1, "device": "bad"}), (("xx",), {"foo": 1}), (("pt",), {"filename": "x"})),
    *(
        (("pt", device), {})
        for device in (
            *("cpu:0", "CPU", "", " cpu", "gpu", "meta", "disk", "cuda", "cuda:0", "cuda:1"),
            *("cuda:x", "cuda:", "cuda:-1", "cuda:0:1", "cuda:99999999999999999999", "cuda0"),
            *("mps", "mps:0", "mps:1", "mps:x", "npu", "npu:0", "xpu", "xpu:1", "xla", "xla:0"),
            *("mlu", "musa", "hpu", "hpu:y", "vulkan", "privateuseone", "cpu\0", "cuda:+1"),
            *(0, 1, -1, 2**63, 2**64, True, False, 1.0, b"cpu", [], (), {}, object, "cuda: 0"),
            *(torch.device("cpu"), torch.device("cuda", 0), torch.float32, FakePath("cpu")),
        )
    ),
    *((("np", device), {}) for device in ("cpu", None, "cuda", "cuda:1", "mps", 0, 1, "bad")),
    *(
        (("pt", *device), {"backend": backend})
        for device in ((), ("cpu",), ("cuda",), ("bad",))
        for backend in ("mmap", "pread", "foo", "", None, 1, "MMAP", b"mmap")
    ),
)


@pytest.mark.parametrize("entry", ["safe_open", "handle", "load_file"])
@pytest.mark.parametrize("exists", [True, False])
def test_arguments(sample, stock, fast, agree, tmp_path, entry, exists) -> None:
    """Every accepted form gives the same answers, every other one the same exception."""
    path = sample if exists else str(tmp_path / "missing")
    if entry == "handle" and stock.handle is None:
        pytest.skip(f"safetensors {safetensors.__version__} has no _safe_open_handle")

    def call(loaders: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if entry == "load_file":
            return loaders.load_file(path, *args[1:], **kwargs)
        if entry == "handle":
            with open(sample, "rb") as file:
                return loaders.handle(file, *args, **kwargs)
        return loaders.safe_open(path, *args, **kwargs)

    uses: tuple[Callable[[Any], Any], ...] = (
        lambda h: h.keys(),
        lambda h: h.offset_keys(),
        lambda h: h.metadata(),
        lambda h: h.get_slice("w").get_shape(),
        lambda h: h.get_tensor("w"),
        lambda h: h.get_tensor("h"),
        lambda h: h.get_slice("w")[2:4, :7],
        lambda h: h.get_slice("w")[-1],
        lambda h: h.get_tensors(),
        lambda h: h.__exit__(None, None, None),
        lambda h: h.keys(),
    )
    for args, kwargs in ARGUMENTS:
        ours, theirs = agree(*(functools.partial(call, x, args, kwargs) for x in (fast, stock)))
        if theirs is not None and entry != "load_file":
            for use in uses:
                agree(functools.partial(use, ours), functools.partial(use, theirs))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((), {"framework": "pt"}),
        ((), {"filename": "x"}),
        ((), {"filename": "{path}", "framework": "pt"}),
        ((), {"framework": "pt", "device": "cpu", "filename": "{path}", "backend": "mmap"}),
        (("{path}", "pt", "cpu", "mmap", 1), {}),
    ],
)
def test_argument_counts(sample, stock, fast, agree, args, kwargs) -> None:
    args = tuple(sample if a == "{path}" else a for a in args)
    kwargs = {k: sample if v == "{path}" else v for k, v in kwargs.items()}
    agree(lambda: fast.safe_open(*args, **kwargs), lambda: stock.safe_open(*args, **kwargs))
    kwargs.pop("framework", None)
    agree(lambda: fast.load_file(*args, **kwargs), lambda: stock.load_file(*args, **kwargs))


def test_what_goes_to_stock_says_so(sample, stock, fast, watch) -> None:
    newer = hasattr(stock.safe_open, "get_tensors")  # backend came with it, in 0.8
    pread, mapped = ({"backend": "pread"}, {"backend": "mmap"}) if newer else ({"device": 0}, {})
    for args, kwargs in ((("np",), {}), (("pt",), pread), (("pt", "cuda"), {})):
        with watch() as seen, fast.safe_open(sample, *args, **kwargs) as handle:
            handle.keys()
        seen.assert_stock(sample)
    for args, kwargs in ((("pt",), {}), (("torch", "cpu"), mapped), (("pt", None), {})):
        with watch() as seen, fast.safe_open(sample, *args, **kwargs) as handle:
            handle.get_tensor("w")
        seen.assert_fast(sample)


# ---------------------------------------------------------------- paths


def _names(folder: Path) -> Iterator[tuple[str, Any]]:
    """Ways to write a path that stock may or may not accept, files made where possible."""
    for name in ("plain", "with space", "ünï", "🦙", "new\nline", "-d", "%41", "a" * 255, "*?[x]"):
        yield name[:20], folder / name
    (folder / "sub").mkdir()
    yield "dots", f"{folder}/sub/../plain"
    yield "double slash", f"{folder}//plain"
    yield "trailing slash", f"{folder}/plain/"
    yield "through a file", f"{folder}/plain/x"
    yield "pathlike of str", FakePath(str(folder / "plain"))
    yield "pathlike of bytes", FakePath(os.fsencode(folder / "plain"))
    yield "pathlike of int", FakePath(3)
    yield "bytes", os.fsencode(folder / "plain")
    yield "bytearray", bytearray(os.fsencode(folder / "plain"))
    yield "memoryview", memoryview(os.fsencode(folder / "plain"))
    yield "nul", f"{folder}/pl\0ain"
    yield "lone surrogate", f"{folder}/\ud800"
    yield "undecodable", os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")
    yield "undecodable Path", Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe"))
    yield "undecodable, missing", os.fsdecode(os.fsencode(folder) + b"/\xfe\xff")
    yield "too long", f"{folder}/{'a' * 256}"
    yield "far too long", f"{folder}/" + "a/" * 3000
    yield from (("empty", ""), ("None", None), ("int", 3), ("descriptor 0", 0), ("float", 1.5))
    yield "str subclass", type("Str", (str,), {})(folder / "plain")
    yield "file object", io.BytesIO(b"")
    yield "list", [str(folder / "plain")]
    yield "folder", folder
    yield "folder with slash", f"{folder}/"
    for special in ("/dev/null", "/dev/zero", "/proc/version", "/proc/self/mem", "/sys"):
        yield special, special


def test_paths(sample, stock, fast, agree, tmp_path) -> None:
    content = Path(sample).read_bytes()
    folder = tmp_path / "paths"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(content)
    for label, path in _names(folder):
        if isinstance(path, Path) and path.parent == folder and not path.exists():
            path.write_bytes(content)
        for how in (lambda x, p: x.all_tensors(x.safe_open(p, "pt")), lambda x, p: x.load_file(p)):
            try:
                agree(functools.partial(how, fast, path), functools.partial(how, stock, path))
            except AssertionError as error:
                raise AssertionError(f"path: {label}") from error


def test_links(sample, stock, fast, agree, assert_same, watch, tmp_path) -> None:
    good, chain, broken, loop = (tmp_path / n for n in ("good", "chain", "broken", "loop"))
    good.symlink_to(sample)
    chain.symlink_to(good.name)
    broken.symlink_to("nowhere")
    loop.symlink_to(loop.name)
    (tmp_path / "folder").symlink_to(tmp_path)
    os.link(sample, tmp_path / "hard")
    for path in (good, chain, broken, loop, tmp_path / "folder" / "good", tmp_path / "hard"):
        with watch() as seen:
            ours, _ = agree(lambda p=path: fast.load_file(p), lambda p=path: stock.load_file(p))
        if ours is not None:
            seen.assert_fast(path)


def test_relative_paths(sample, stock, fast, agree, assert_same, monkeypatch, tmp_path) -> None:
    """Opened before chdir, used after: nothing is looked up by name again."""
    expected = stock.load_file(sample)
    monkeypatch.chdir(tmp_path)
    name = os.path.basename(sample)
    ours = fast.safe_open(name, "pt")
    loaded = fast.load_file(name)
    monkeypatch.chdir("/")
    assert_same(ours.get_tensor("w"), expected["w"])
    assert_same(fast.all_tensors(ours), expected)
    assert_same(loaded, expected)
    agree(lambda: fast.load_file(name), lambda: stock.load_file(name))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(sample, stock, fast, agree) -> None:
    os.chmod(sample, 0)
    agree(lambda: fast.load_file(sample), lambda: stock.load_file(sample))


def test_read_only(sample, fast, watch) -> None:
    """Tensors are writable whatever the file's mode; the file is not written."""
    digest = hashlib.sha256(Path(sample).read_bytes()).digest()
    os.chmod(sample, stat.S_IRUSR)
    with watch() as seen:
        tensors = fast.load_file(sample)
    for tensor in tensors.values():
        tensor.zero_()
    seen.assert_fast(sample)
    assert hashlib.sha256(Path(sample).read_bytes()).digest() == digest


# ---------------------------------------------------------------- files that change


def test_deleted_and_replaced(raw, sample, stock, fast, assert_same, agree, watch) -> None:
    """What was opened stays what it was; what is opened next is what is there now."""
    before = stock.load_file(sample)
    content = Path(sample).read_bytes()
    for change in ("delete", "replace"):
        Path(sample).write_bytes(content)
        with watch() as seen:
            handle, loaded = fast.safe_open(sample, "pt"), fast.load_file(sample)
            piece = handle.get_slice("w")
            if change == "delete":
                os.unlink(sample)
            else:
                os.replace(raw.tensors({"w": torch.zeros(5)}, "other"), sample)
            assert_same(handle.get_tensor("h"), before["h"])
            assert_same(piece[5:, ::2], before["w"][5:, ::2])
            assert_same(fast.all_tensors(handle), before)
            handle.__exit__(None, None, None)
            assert_same(piece[...], before["w"])
            assert_same(loaded, before)
        seen.assert_fast(sample, count=2)
        agree(lambda: fast.load_file(sample), lambda: stock.load_file(sample))
        agree(
            lambda: fast.safe_open(sample, "pt").keys(),
            lambda: stock.safe_open(sample, "pt").keys(),
        )


@pytest.mark.parametrize("way", ["in place", "rename", "delete and create"])
def test_rewritten_with_the_same_size_and_time(raw, sample, fast, way) -> None:
    """A remembered header never outlives the file: equal size and mtime prove nothing."""
    versions = []
    for i in range(2):
        header = {f"name{i}": raw.entry("I32", [2], 0, 8), "z": raw.entry("U8", [8], 8, 16)}
        versions.append(raw.pack(header, bytes([i]) * 16))
    for turn in range(100):
        which = turn % 2
        if way == "rename":
            other = raw.write(versions[which], "other")
            os.utime(other, ns=(10**18, 10**18))
            os.replace(other, sample)
        else:
            if way == "delete and create":
                os.unlink(sample)
            with open(sample, "r+b" if way == "in place" else "wb") as file:
                file.write(versions[which])
                file.truncate()
            os.utime(sample, ns=(10**18, 10**18))
        loaded = fast.load_file(sample)
        assert loaded[f"name{which}"].tolist() == [which * 0x01010101] * 2
        with fast.safe_open(sample, "pt") as handle:
            assert handle.keys() == [f"name{which}", "z"]
            assert handle.get_tensor("z").tolist() == [which] * 8


def test_over_4_gib(raw, stock, fast, assert_same, watch) -> None:
    """Sizes and offsets are 64-bit: a hole of 4 GiB and more, something written at its ends."""
    big, tail = 2**32 + 8192, 4096
    header = {
        "a_big": raw.entry("U8", [big // 4096, 4096], 0, big),
        "b_tail": raw.entry("F32", [tail // 4], big, big + tail),
        "c_end": raw.entry("I64", [2], big + tail, big + tail + 16),
    }
    start = raw.pack(header)
    path = raw.write(start)
    with open(path, "r+b") as file:
        file.truncate(len(start) + big + tail + 16)
        for at in (0, 2**32 - 3, 2**32, big - 1, big, big + tail - 4, big + tail):
            file.seek(len(start) + at)
            file.write(b"\x3f\x80\x01\x02"[: 1 if at == big - 1 else 4])
    if os.stat(path).st_blocks * 512 > 2**30:
        pytest.skip("this file system has no sparse files")
    rows = (0, 1, 2**20 - 1, -3, -2, -1, slice(None, 2), slice(-2, None), (slice(-3, None), 4095))
    # Mapped only: reading ahead through a hole would fill memory with zeros for nothing.
    with watch() as seen, fastst_patch.config_context(io="mmap"):
        with fast.safe_open(path, "pt") as ours, stock.safe_open(path, "pt") as theirs:
            mine, other = ours.get_slice("a_big"), theirs.get_slice("a_big")
            for row in rows:
                got, expected = mine[row], other[row]
                assert got.storage_offset() == expected.storage_offset()
                assert got.untyped_storage().nbytes() == big
                assert got.stride() == expected.stride()
                assert torch.equal(got, expected)
            assert int(mine[-1, -1]) == 0x3F
            for name in ("b_tail", "c_end"):
                assert_same(ours.get_tensor(name), theirs.get_tensor(name))
            whole, expected = ours.get_tensor("a_big"), theirs.get_tensor("a_big")
            assert whole.shape == expected.shape
            assert torch.equal(whole[-2:], expected[-2:])
        loaded = fast.load_file(path)
        assert loaded["c_end"].tolist() == stock.load_file(path)["c_end"].tolist()
        assert loaded["b_tail"][0] != 0
        assert torch.equal(loaded["a_big"][-1], whole[-1])
    seen.assert_fast(path, count=2)


# ---------------------------------------------------------------- what a handle is


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


# ---------------------------------------------------------------- who keeps what alive


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
fastst_patch.patch(small_file_bytes=0)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
handles = [safetensors.safe_open(sys.argv[1], "pt") for _ in range(200)]
slices = [handle.get_slice("b") for handle in handles]
assert all(piece[1:3].tolist() == [1, 2] for piece in slices)
"""


def test_more_handles_than_descriptors(sample, tmp_path) -> None:
    """Stock's handles and slices hold a map and no descriptor; nor may ours need one each."""
    command = [sys.executable, "-c", _LIMIT, sample]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@given(order=st.permutations(["close", "handle", "slice", "file", "gc", "siblings", "loaded"]))
def test_alive_in_any_order(raw, fast, stock, assert_same, order) -> None:
    source = {"w": torch.arange(5000.0).view(50, 100), "v": torch.ones(7, dtype=torch.bool)}
    path = raw.tensors(source, "alive")
    expected = stock.load_file(path)
    owners: dict[str, Any] = {"handle": fast.safe_open(path, "pt"), "loaded": fast.load_file(path)}
    owners["slice"] = owners["handle"].get_slice("w")
    owners["siblings"] = fast.all_tensors(owners["handle"])
    kept = [owners["handle"].get_tensor("w"), owners["loaded"]["w"], owners["siblings"]["w"]]
    views = [owners["slice"][10:20, ::3], kept[0][-1], kept[1].T]
    wanted = [expected["w"][10:20, ::3], expected["w"][-1], expected["w"].T]
    for step in order:
        if step == "close" and "handle" in owners:
            owners["handle"].__exit__(None, None, None)
        elif step == "file":
            os.unlink(path)
        elif step == "gc":
            gc.collect(0)
        owners.pop(step, None)
        if "slice" in owners:
            assert_same(owners["slice"][3], expected["w"][3])
        assert_same(kept, [expected["w"]] * 3)
        assert_same(views, wanted)
    del kept
    assert_same(views, wanted)
