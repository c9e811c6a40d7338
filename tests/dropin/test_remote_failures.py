"""URLs whose reads fail, wait or are stopped: exceptions, and nothing that is left."""

from __future__ import annotations

import _thread
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from memory_source import Store
from remote_model import (
    MIB,
    SECRET,
    URL,
    data_begin,
    failing_from,
    in_thread,
    wait_for,
)

import fastst_patch
from fastst_patch import engine
from fastst_patch.sources.base import (
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
)

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


# ---- failures ----


def test_errors_of_the_source_are_raised(fast, bucket, twin) -> None:
    bucket.before = failing_from(data_begin(twin))
    with pytest.raises(RemoteError, match="it broke") as caught:
        fast.load_file(URL)
    assert (caught.value.status, caught.value.errno) == (503, errno.EIO)
    bucket.before = lambda at, nbytes: None
    fast.load_file(URL)


def test_no_such_file(fast, bucket) -> None:
    with pytest.raises(RemoteNotFoundError):
        fast.load_file("memory://here/nothing.safetensors")
    with pytest.raises(FileNotFoundError):
        fast.safe_open("memory://here/nothing.safetensors", "pt")


def test_an_error_does_not_spoil_the_others(stock, fast, bucket, twin) -> None:
    """What was read ahead together fails together; each tensor is tried alone."""
    theirs = stock.load_file(twin)
    with fastst_patch.config_context(chunk_bytes=64 << 10), fast.safe_open(URL, "pt") as handle:
        names = sorted(theirs)
        bad = names[10]
        begin, end = (data_begin(twin) + x for x in handle.get_tensor_meta(bad).data_offsets)

        def before(at: int, nbytes: int) -> None:
            if at < end and at + nbytes > begin:
                raise RemoteError("here", "x", "it broke")

        bucket.before = before
        for name in names:
            if name == bad:
                with pytest.raises(RemoteError):
                    handle.get_tensor(name)
            else:
                assert torch.equal(handle.get_tensor(name), theirs[name])
        bucket.before = lambda at, nbytes: None
        assert torch.equal(handle.get_tensor(bad), theirs[bad])


def test_secrets_are_nowhere(fast, bucket, twin, caplog) -> None:
    caplog.set_level("DEBUG", "fastst_patch")
    texts = []
    with fastst_patch.profile() as seen:
        fast.load_file(SECRET)
        with fast.safe_open(SECRET, "pt") as handle:
            handle.get_tensor("half")
        for call in (
            lambda: fast.load_file(SECRET, device="xpu:0"),
            lambda: fast.load_file(SECRET, 1, 2, 3),
            lambda: fast.load_file(SECRET.replace("model", "nothing")),
        ):
            with pytest.raises(Exception) as caught:
                call()
            texts.append(str(caught.value))
    texts += [str(report) for report in seen.reports] + [caplog.text, repr(seen.reports)]
    assert len(seen.reports) == 2
    for text in texts:
        assert "SECRET" not in text
        assert "pass" not in text


# ---- stopping ----


def interrupt_when(bucket: Store, inside: int) -> threading.Thread:
    def strike() -> None:
        bucket.wait(inside)
        _thread.interrupt_main()

    return in_thread(strike)


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_ctrl_c_in_load_file(fast, bucket, tensors) -> None:
    fast.load_file(URL)
    before = len(bucket.opened)
    with fastst_patch.config_context(chunk_bytes=64 << 10, tensors=tensors):
        opening = lambda at, nbytes: bucket.gate.clear() if at > MIB // 64 else None  # noqa: E731
        bucket.before = opening
        thread = interrupt_when(bucket, 2)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fast.load_file(URL)
    assert time.monotonic() - started < 10
    thread.join()
    wait_for(lambda: bucket.inside == 0)
    assert all(source.cancelled for source in bucket.opened[before:])


def test_a_handle_survives_ctrl_c(stock, fast, bucket, twin) -> None:
    with fast.safe_open(URL, "pt") as handle:
        bucket.gate.clear()
        thread = interrupt_when(bucket, 1)
        with pytest.raises(KeyboardInterrupt):
            handle.get_tensor("big")
        thread.join()
        wait_for(lambda: bucket.inside == 0)
        bucket.gate.set()
        assert torch.equal(handle.get_tensor("big"), stock.load_file(twin)["big"])
        assert len(bucket.opened) == 2


def test_another_file_after_ctrl_c_is_refused(fast, bucket) -> None:
    with fast.safe_open(URL, "pt") as handle:
        bucket.gate.clear()
        thread = interrupt_when(bucket, 1)
        with pytest.raises(KeyboardInterrupt):
            handle.get_tensor("big")
        thread.join()
        bucket.gate.set()
        bucket.versions[URL] = 2
        with pytest.raises(RemoteChangedError):
            handle.get_tensor("half")


def test_closing_a_handle_cancels_read_ahead(fast, bucket) -> None:
    with fastst_patch.config_context(chunk_bytes=64 << 10):
        with fast.safe_open(URL, "pt") as handle:
            names = sorted(handle.keys())
            handle.get_tensor(names[4])
            bucket.gate.clear()
            thread = in_thread(handle.get_tensor, names[5])
            bucket.wait(2)
            bucket.gate.set()
            thread.join()
            bucket.gate.clear()
            started = time.monotonic()
        assert time.monotonic() - started < 10
        wait_for(lambda: bucket.inside == 0)  # with the gate closed
        wait_for(lambda: engine.counters()["fed_files"] == 0)


# ---- processes ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork(stock, fast, bucket, twin) -> None:
    """The child opens the source anew; the parent's read goes on."""
    theirs = stock.load_file(twin)
    with fast.safe_open(URL, "pt") as handle:
        handle.get_tensor("half")
        bucket.gate.clear()
        thread = in_thread(handle.get_tensor, "big")
        bucket.wait(1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                bucket.gate.set()
                if torch.equal(handle.get_tensor("layer.3.w"), theirs["layer.3.w"]):
                    code = 0 if len(bucket.opened) == 2 else 3
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        bucket.gate.set()
        thread.join()


SCRIPT = """
import sys, threading, time
sys.path[:0] = {path!r}
import fastst_patch, safetensors, torch
from memory_source import served
content = open({twin!r}, "rb").read()
url = "memory://here/x.safetensors"
context = served({{url: content}})
bucket = context.__enter__()
fastst_patch.patch(chunk_bytes=65536)
handle = safetensors.safe_open(url, "pt")
names = sorted(handle.keys())
handle.get_tensor(names[4])
bucket.gate.clear()
threading.Thread(target=handle.get_tensor, args=(names[5],), daemon=True).start()
bucket.wait(2)
{end}
"""


@pytest.mark.parametrize(
    "end", ["print('end')", "del handle; print('end')", "print('end'); sys.exit()"]
)
def test_exit_while_reads_wait(twin, end, tmp_path) -> None:
    code = SCRIPT.format(path=[str(Path(__file__).parents[1] / "support")], twin=twin, end=end)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert done.stderr == ""


LATE = """
import atexit, sys
sys.path[:0] = {path!r}
import fastst_patch, safetensors, torch
from memory_source import served
from fastst_patch.sources.base import RemoteCancelledError

def read():
    opened = len(bucket.opened)
    try:
        handle.get_tensor("half")
    except RemoteCancelledError as error:
        print("Python ends" in str(error), len(bucket.opened) == opened)

url = "memory://here/x.safetensors"
context = served({{url: open({twin!r}, "rb").read()}})
bucket = context.__enter__()
fastst_patch.patch()
atexit.register(read)  # called after the handlers that loading registers
handle = safetensors.safe_open(url, "pt")
handle.get_tensor("scalar")
"""


def test_no_source_is_opened_once_python_ends(twin, tmp_path) -> None:
    """A thread whose read-ahead was cancelled reads again: that read would end no more."""
    code = LATE.format(path=[str(Path(__file__).parents[1] / "support")], twin=twin)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")
