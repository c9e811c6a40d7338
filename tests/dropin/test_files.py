"""Files as they occur: names, links, special and huge ones; and how long what they gave lives."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_path import FakePath

import fastst_patch
from fastst_patch import engine
from fastst_patch.errors import Fallback

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


PROGRAM = """
import faulthandler, os, socket, sys, threading
faulthandler.dump_traceback_later(60, exit=True)
import safetensors, safetensors.torch, fastst_patch

kind = sys.argv[1]

def made(name):
    if kind == "directory":
        os.mkdir(name)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(name)
        server.listen(1)
        keep.append(server)
    elif kind == "device":
        return "/dev/null"
    else:
        os.mkfifo(name)
        writer = lambda: os.close(os.open(name, os.O_WRONLY))
        threading.Thread(target=writer, daemon=True).start()
    return name

def outcome(load, name):
    try:
        return repr(load(made(name)))
    except Exception as error:
        return f"{type(error)} {error}".replace(name, "PATH")

keep = []
LOADS = {
    "load_file": lambda path: safetensors.torch.load_file(path),
    "safe_open": lambda path: safetensors.safe_open(path, "pt"),
}
for call, load in LOADS.items():
    stock = outcome(load, f"{call}.stock")
    with fastst_patch.patched(small_file_bytes=0):
        ours = outcome(load, f"{call}.ours")
    print(stock)
    print(ours)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["directory", "socket", "device", "pipe"])
def test_stocks_exception_at_once(kind: str, tmp_path: Path, warm_python: Any) -> None:
    """A pipe's writer waits for its reader: stock's open frees it, and nobody's before that."""
    done = warm_python.run(PROGRAM, kind, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    stock, ours, stock_handle, our_handle = done.stdout.splitlines()
    assert (ours, our_handle) == (stock, stock_handle)
    assert "Error" in stock


def test_a_pipes_writer_goes_on_waiting(tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    opened: list[int] = []
    writer = threading.Thread(target=lambda: opened.append(os.open(path, os.O_WRONLY)))
    writer.start()
    for _ in range(200):  # some of them find it waiting
        with pytest.raises(Fallback, match="not a regular file"):
            engine.open_file(path)
        writer.join(0.001)
    assert writer.is_alive()
    reader = os.open(path, os.O_RDONLY)
    writer.join()
    assert os.write(opened[0], b"x") == 1
    os.close(opened[0])
    os.close(reader)


def test_neither_is_a_socket_opened(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(Fallback, match="not a regular file"):
            engine.open_file(str(tmp_path / "socket"))


def test_a_failing_stat_is_stocks(fast: Any, stock: Any, sample: str) -> None:
    expected = stock.load_file(sample)
    try:
        engine.set_fault("stat", errno=13)
        assert list(fast.load_file(sample)) == list(expected)
    finally:
        engine.clear_faults()
