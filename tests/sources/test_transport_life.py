"""Cancelling, closing, Ctrl-C, fork, threads and exit."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fault_server as faults
import pytest
from fault_server import FaultServer
from remote_state import certificate_of, nothing_left_open, self_signed, start_obstore
from waiting import in_threads, until

from fastst_patch.sources.base import RemoteCancelledError, RemoteError, open_source

CONTENT = random.Random(7).randbytes(400_000)
SOON = 5.0
"""Seconds: it is to be one, and a busy machine takes longer. Without cancelling it would be 60."""

SLOW = {"max_tries": 3, "deadline": 60.0, "stall": 60.0}


@pytest.fixture(scope="module")
def obstore_started() -> None:
    start_obstore()


def _store(server: FaultServer) -> dict[str, Any]:
    return {"endpoint": server.url(""), "allow_http": True, "skip_signature": True, "region": "x"}


@pytest.fixture(params=["http", "s3"])
def way(request: pytest.FixtureRequest) -> Iterator[tuple[FaultServer, str, dict[str, Any]]]:
    if request.param == "s3":
        request.getfixturevalue("obstore_started")
    with nothing_left_open(), FaultServer({"/b/m": CONTENT}) as server:
        if request.param == "http":
            yield server, server.url("/b/m"), dict(SLOW)
        else:
            yield server, "s3://b/m", {**SLOW, **_store(server)}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, dict[str, Any]]:
    """A server's side of TLS on loopback, and the options that accept it."""
    path = self_signed(tmp_path_factory.mktemp("tls"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, {"root_certificate": certificate_of(path)}


class _Reader(threading.Thread):
    """A read in another thread, and what it raised."""

    def __init__(self, source: Any, offset: int, nbytes: int) -> None:
        super().__init__()
        self._ask = source, offset, nbytes
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        source, offset, nbytes = self._ask
        try:
            source.read(offset, nbytes)
        except BaseException as error:
            self.error = error


def _end_soon(end: Callable[[], None], *readers: _Reader) -> None:
    """All reads in flight end by that call, as cancelled ones."""
    begin = time.monotonic()
    end()
    for reader in readers:
        reader.join(10)
    assert time.monotonic() - begin < SOON
    assert {type(reader.error) for reader in readers} == {RemoteCancelledError}


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize(
    "fault", [faults.stalled, faults.silent, faults.dripping, faults.status(503)]
)
def test_reads_in_flight_end_soon(way: Any, fault: Any, how: str) -> None:
    server, url, options = way
    if fault.__name__ == "fault":
        options = {**options, "max_tries": 100, "backoff": 5.0}  # most of the time it waits
    source = open_source(url, options, head_bytes=10)
    server.faults = lambda _: fault
    readers = [_Reader(source, 1000 * n + 10, 1000) for n in range(4)]
    assert until(lambda: len(server.requests) >= 5)
    _end_soon(getattr(source, how), *readers)
    with pytest.raises(RemoteCancelledError):
        source.read(0, 10)
    source.close()


def test_a_connection_in_the_making_ends_soon() -> None:
    with nothing_left_open(), FaultServer({"/m": CONTENT}) as server:
        source = open_source(server.url("/m"), SLOW, head_bytes=10)
        server.drop_connections()
        server.stop_listening()
        # A queue that is full takes no connection, and refuses none.
        full = socket.socket()
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", server.port))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        reader = _Reader(source, 10, 10)
        reader.join(0.3)
        assert reader.is_alive()
        _end_soon(source.cancel, reader)
        source.close()
        for one in [full, *waiting]:
            one.close()


def test_cancelling_a_stream_without_ranges() -> None:
    with nothing_left_open(), FaultServer({"/m": CONTENT}) as server:
        server.faults = lambda _: faults.whole_file
        with pytest.warns(UserWarning, match="no ranges"):
            source = open_source(server.url("/m"), SLOW, head_bytes=10)

        def stuck(exchange: Any) -> None:
            exchange.send_head(200, Content_Range=None)
            exchange.sock.sendall(CONTENT[:100_000])
            exchange.server.stopping.wait(60)

        server.faults = lambda _: stuck
        readers = [_Reader(source, 50_000, 1000), _Reader(source, 200_000, 1000)]
        assert until(lambda: not readers[0].is_alive())
        assert until(readers[1].is_alive)
        _end_soon(source.cancel, readers[1])
        source.close()


def test_many_threads_read_one_source(way: Any) -> None:
    server, url, options = way
    server.faults = lambda request: faults.reset_mid_body if request.number % 7 == 3 else None
    source = open_source(url, {**options, "backoff": 0.01, "max_tries": 20}, head_bytes=100)
    found = bytearray(len(CONTENT))
    pieces = iter(range(0, len(CONTENT), 10_000))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                begin = next(pieces, None)
            if begin is None:
                return
            source.read_into(begin, memoryview(found)[begin : begin + 10_000])

    in_threads(work, 8)
    assert found == CONTENT
    assert source.stats.requests == len(server.requests)
    assert source.stats.retries >= 5
    source.close()


def test_many_threads_read_one_stream() -> None:
    with nothing_left_open(), FaultServer({"/m": CONTENT}) as server:
        server.faults = lambda _: faults.whole_file
        with pytest.warns(UserWarning, match="no ranges"):
            source = open_source(server.url("/m"), SLOW, head_bytes=10)
        begins = list(range(0, len(CONTENT), 20_000))
        random.Random(3).shuffle(begins)
        found = bytearray(len(CONTENT))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    begin = begins.pop() if begins else None
                if begin is None:
                    return
                source.read_into(begin, memoryview(found)[begin : begin + 20_000])

        in_threads(work, 4)
        assert found == CONTENT
        assert len(server.requests) == 2  # what one read skipped served another
        source.close()


def test_a_source_closed_twice_and_read_afterwards(way: Any) -> None:
    _, url, options = way
    source = open_source(url, options)
    source.close()
    source.close()
    source.cancel()
    with pytest.raises(RemoteCancelledError, match="cancelled"):
        source.read(0, 1)


def test_the_thread_of_an_event_loop_ends_with_the_last_source(obstore_started: None) -> None:
    def running() -> bool:
        return any(thread.name == "fastst-remote" for thread in threading.enumerate())

    with nothing_left_open(), FaultServer({"/b/m": CONTENT}) as server:
        assert not running()
        first = open_source("s3://b/m", _store(server))
        second = open_source("s3://b/m", _store(server))
        first.close()
        assert running()
        assert second.read(5, 5) == CONTENT[5:10]
        second.close()
        assert not running()
        third = open_source("s3://b/m", _store(server), head_bytes=1)
        assert third.read(5, 5) == CONTENT[5:10]
        third.close()
        assert not running()


def test_a_read_over_tls_ends_soon(tls: Any) -> None:
    context, options = tls
    with nothing_left_open(), FaultServer({"/m": CONTENT}, tls=context) as server:
        source = open_source(server.url("/m"), {**SLOW, **options}, head_bytes=10)
        assert source.read(5, 50_000) == CONTENT[5:50_005]
        server.faults = lambda _: faults.stalled
        readers = [_Reader(source, 1000 * n + 10, 1000) for n in range(4)]
        assert until(lambda: len(server.requests) >= 6)
        _end_soon(source.cancel, *readers)
        source.close()


def test_a_handshake_that_hangs_ends_soon(tls: Any) -> None:
    context, options = tls
    with nothing_left_open(), FaultServer({"/m": CONTENT}, tls=context) as server:
        source = open_source(server.url("/m"), {**SLOW, **options}, head_bytes=10)
        server.drop_connections()
        server.mute = True
        reader = _Reader(source, 10, 10)
        reader.join(0.3)
        assert reader.is_alive()
        _end_soon(source.cancel, reader)
        source.close()


# ---- fork ---------------------------------------------------------------


def _in_child(work: Any) -> str:
    """What a forked child returns."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(theirs, str(work()).encode())
        except BaseException as error:
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as told:
        answer = told.read()
    os.waitpid(pid, 0)
    return answer


def test_a_forked_child_reads_by_its_own_connections() -> None:
    with FaultServer({"/m": CONTENT}) as server:
        source = open_source(server.url("/m"), SLOW, head_bytes=10)
        source.read(10, 10)  # its connection is kept
        assert _in_child(lambda: source.read(1000, 1000) == CONTENT[1000:2000]) == "True"
        assert source.read(5000, 1000) == CONTENT[5000:6000]
        assert source.stats.retries == 0
        source.close()


def test_a_forked_child_does_not_end_its_parents_requests() -> None:
    with FaultServer({"/m": CONTENT}) as server:
        source = open_source(server.url("/m"), SLOW, head_bytes=10)
        go = threading.Event()

        def held(exchange: Any) -> None:
            exchange.send_head()
            exchange.sock.sendall(exchange.body[:500])
            go.wait(30)
            exchange.sock.sendall(exchange.body[500:])

        server.faults = faults.at(1, held)
        reader = _Reader(source, 10, 1000)
        assert until(lambda: len(server.requests) == 2)
        assert _in_child(lambda: source.cancel() or source.close() or "closed") == "closed"
        go.set()
        reader.join(10)
        assert reader.error is None
        assert source.stats.retries == 0
        source.close()


def test_a_forked_child_is_told_that_obstore_cannot_serve_it(obstore_started: None) -> None:
    with FaultServer({"/b/m": CONTENT}) as server:
        source = open_source("s3://b/m", _store(server), head_bytes=10)
        for work in (
            lambda: source.read(1000, 1000),
            lambda: open_source("s3://b/m", _store(server)),
        ):
            told = _in_child(work)
            assert told.startswith("RemoteError: b/m: ")
            assert "survive a fork" in told
            assert "spawn" in told
        assert source.read(10, 10) == CONTENT[10:20]
        source.close()


def _stream(server: FaultServer) -> Any:
    server.faults = lambda _: faults.whole_file
    with pytest.warns(UserWarning, match="no ranges"):
        return open_source(server.url("/m"), SLOW, head_bytes=10)


def _held_after(nbytes: int, go: threading.Event) -> Any:
    def fault(exchange: Any) -> None:
        exchange.send_head(200, Content_Range=None)
        exchange.sock.sendall(CONTENT[:nbytes])
        go.wait(30)
        exchange.sock.sendall(CONTENT[nbytes:])

    return fault


def test_a_signal_handler_reads_the_stream_that_it_interrupted() -> None:
    with nothing_left_open(), FaultServer({"/m": CONTENT}) as server:
        source, go, found = _stream(server), threading.Event(), []

        def handler(*_: object) -> None:
            server.faults = lambda _: faults.whole_file
            found.append(source.read(5000, 1000))
            go.set()

        server.faults = lambda _: _held_after(50_000, go)
        before = signal.signal(signal.SIGUSR1, handler)
        try:

            def strike() -> None:
                until(lambda: len(server.requests) == 2)
                os.kill(os.getpid(), signal.SIGUSR1)

            striker = threading.Thread(target=strike)
            striker.start()
            assert source.read(100, 100_000) == CONTENT[100:100_100]
            striker.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert found == [CONTENT[5000:6000]]
        source.close()


def test_a_fork_while_another_thread_reads_the_stream() -> None:
    with FaultServer({"/m": CONTENT}) as server:
        source, go = _stream(server), threading.Event()
        server.faults = lambda _: _held_after(50_000, go)
        reader = _Reader(source, 10, 100_000)
        assert until(lambda: len(server.requests) == 2)
        server.faults = lambda _: faults.whole_file
        assert _in_child(lambda: source.read(5000, 1000) == CONTENT[5000:6000]) == "True"
        go.set()
        reader.join(10)
        assert reader.error is None
        assert source.read(200_000, 5) == CONTENT[200_000:200_005]
        source.close()


# ---- Ctrl-C and exit ----------------------------------------------------

_PROGRAM = """
import signal, sys, threading, time
from fastst_patch.sources.base import open_source
url, options, how = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
source = open_source(url, options, head_bytes=10)
print("open", flush=True)
if how == "exit":
    threading.Thread(target=lambda: source.read(10, 1000)).start()
    time.sleep(0.3)
    source.cancel()
    sys.exit(0)
try:
    source.read(10, 1000)
except KeyboardInterrupt:
    source.close()
    print("interrupted", [t.name for t in threading.enumerate()], flush=True)
"""


@pytest.mark.parametrize("how", ["interrupt", "exit"])
@pytest.mark.parametrize("fault", [faults.stalled, faults.silent, faults.status(503)])
def test_ctrl_c_and_exit(way: Any, fault: Any, how: str, tmp_path: Path) -> None:
    server, url, options = way
    if fault.__name__ == "fault":
        options = {**options, "max_tries": 100, "backoff": 5.0}
    server.faults = faults.since(1, fault)
    command = [sys.executable, "-c", _PROGRAM, url, repr(options), how]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "open\n"
        assert until(lambda: len(server.requests) >= 2)
        begin = time.monotonic()
        if how == "interrupt":
            program.send_signal(2)
        told, complaints = program.communicate(timeout=10)
        assert time.monotonic() - begin < SOON
    assert program.returncode == 0, complaints
    if how == "interrupt":
        assert told == "interrupted ['MainThread']\n", complaints


def test_a_cancelled_opening_leaves_nothing() -> None:
    with nothing_left_open(), FaultServer({"/m": CONTENT}) as server:
        server.faults = lambda _: faults.silent
        with pytest.raises(RemoteError, match="no answer in time"):
            open_source(server.url("/m"), {"max_tries": 2, "stall": 0.1, "backoff": 0.01})
