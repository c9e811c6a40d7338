"""Paths of what is no regular file, and metadata that nobody asks for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastst_patch import engine
from fastst_patch.errors import Fallback

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

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
def test_stocks_exception_at_once(kind: str, tmp_path: Path) -> None:
    """A pipe's writer waits for its reader: stock's open frees it, and nobody's before that."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
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


# ---- metadata ----


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


def test_metadata_outlives_its_file(raw: Any) -> None:
    header = {"__metadata__": {"a": "b"}, "x": raw.entry("U8", [1], 0, 1)}
    layout = engine.read_layout(engine.open_file(raw.write(raw.pack(header, b"\7"))))
    assert layout.metadata == {"a": "b"}
