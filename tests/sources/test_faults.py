"""Whatever a network does: the bytes are right, or one clear error says what went wrong.

Each fault is tried at each position of a load: once, so that the load has to recover or to refuse,
and for good, so that it has to give up in time.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from typing import Any

import fault_server as faults
import pytest
from fault_server import FaultServer
from remote_state import SECRET, assert_no_secret, nothing_left_open, start_obstore

from fastst_patch.sources.base import (
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
    RemotePermissionError,
    RemoteWarning,
    Source,
    open_source,
)

pytestmark = pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning")

PIECE, COUNT, HEAD = 32768, 8, 4096
CONTENT = random.Random(5).randbytes(PIECE * COUNT)
POSITIONS = {"first": 0, "header": 1, "middle": 4, "last": COUNT}
"""Numbers of requests: the one that opens the file, and those that read it piece by piece."""

LIMITS = {"max_tries": 3, "deadline": 20.0, "stall": 10.0, "backoff": 0.01}
IMPATIENT = {"stall": 0.3}
"""For bodies that stall. Elsewhere a busy machine must not look like a stalled server."""
STALLING = ("stalled body", "silence")


@dataclasses.dataclass(frozen=True)
class Way:
    """How the same server is reached."""

    server: FaultServer
    url: str
    options: dict[str, Any]
    host: str
    path: str


@pytest.fixture(scope="module")
def obstore_started() -> None:
    start_obstore()


@pytest.fixture(params=["http", "s3", "store"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """By HTTP, by a signed URL, and by obstore's own requests."""
    if request.param != "http":
        request.getfixturevalue("obstore_started")
    with nothing_left_open(), FaultServer({"/bucket/dir/model.bin": CONTENT}) as server:
        if request.param == "http":
            url = f"http://user:{SECRET}@{server.netloc}/bucket/dir/model.bin?sig={SECRET}"
            yield Way(server, url, dict(LIMITS), server.netloc, "/bucket/dir/model.bin")
        else:
            options = {
                **LIMITS,
                "endpoint": server.url(""),
                "allow_http": True,
                "region": "us-east-1",
                "access_key_id": "someone",
                "secret_access_key": SECRET,
                "session_token": SECRET,
            }
            if request.param == "store":
                options["user_agent"] = "someone"  # no signed URL does that
            yield Way(server, "s3://bucket/dir/model.bin", options, "bucket", "/dir/model.bin")


@pytest.fixture(params=list(POSITIONS))
def position(request: pytest.FixtureRequest) -> int:
    return POSITIONS[request.param]


def load(way: Way) -> tuple[bytes, Source]:
    """The whole file, piece by piece."""
    source = open_source(way.url, way.options, head_bytes=HEAD)
    try:
        found = bytearray(source.size)
        for begin in range(0, source.size, PIECE):
            source.read_into(begin, memoryview(found)[begin : begin + PIECE])
        return bytes(found), source
    finally:
        source.close()


def failed(way: Way) -> RemoteError:
    """The error of a load that has to fail, in time, and without a secret."""
    begin = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        load(way)
    assert time.monotonic() - begin < LIMITS["deadline"]
    error = caught.value
    assert_no_secret(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert (error.host, error.path) == (way.host, way.path)
    assert str(error).startswith(f"{way.host}{way.path}: ")
    assert 1 <= error.tries <= LIMITS["max_tries"]
    assert f"{error.tries} tr" in str(error)
    assert error.offset is not None
    assert f"at byte {error.offset}" in str(error)
    assert error.status is None or f"status {error.status}" in str(error)
    return error


def check_offset(error: RemoteError, position: int) -> None:
    """The error names a byte of the piece that could not be read."""
    assert error.offset is not None
    begin = max(0, (position - 1) * PIECE)
    assert begin <= error.offset <= begin + PIECE


# ---- faults after which the same request may succeed --------------------

TRANSIENT = {
    "reset mid-body": faults.reset_mid_body,
    "reset": faults.reset_at_once,
    "no answer": faults.hang_up,
    "truncated body": faults.truncated,
    "stalled body": faults.stalled,
    "silence": faults.silent,
    "wrong Content-Range": faults.other_range,
    "no Content-Range": faults.no_content_range,
    "shorter than it says": faults.shorter,
    "longer than it says": faults.longer,
    "broken chunks": faults.chunked_broken,
    "not HTTP": faults.garbage,
    "408": faults.status(408),
    "429": faults.status(429),
    "500": faults.status(500),
    "502": faults.status(502),
    "503": faults.status(503),
}
STATUS = {"408": 408, "429": 429, "500": 500, "502": 502, "503": 503}


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_passing_fault_is_got_over(way: Way, position: int, name: str) -> None:
    way.server.faults = faults.at(position, TRANSIENT[name])
    if name in STALLING:
        way.options.update(IMPATIENT)
    found, source = load(way)
    assert found == CONTENT
    # The fault came, and was answered by another request.
    if name in STALLING:
        assert len(way.server.requests) >= COUNT + 2
    else:
        assert len(way.server.requests) == COUNT + 2
    assert not source.sequential


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_lasting_fault_is_one_error(way: Way, position: int, name: str) -> None:
    way.server.faults = faults.since(position, TRANSIENT[name])
    if name in STALLING:
        way.options.update(IMPATIENT)
    error = failed(way)
    check_offset(error, position)
    assert type(error) is RemoteError
    if name in STATUS:
        assert error.status == STATUS[name]
        assert error.tries == LIMITS["max_tries"]


def test_a_burst_of_errors_is_got_over(way: Way) -> None:
    way.server.faults = lambda request: faults.status(500) if request.number % 3 else None
    assert load(way)[0] == CONTENT


# ---- faults that no other try can mend ----------------------------------

FINAL: dict[str, tuple[Any, type[RemoteError], int | None, str]] = {
    "400": (faults.status(400), RemoteError, 400, "refused the request"),
    "401": (faults.status(401), RemotePermissionError, 401, "access denied"),
    "403": (faults.status(403), RemotePermissionError, 403, "access denied"),
    "404": (faults.status(404), RemoteNotFoundError, 404, "no such file"),
    "410": (faults.status(410), RemoteNotFoundError, 410, "no such file"),
    "412": (faults.status(412), RemoteChangedError, 412, "changed while it was read"),
    "501": (faults.status(501), RemoteError, 501, "the server failed"),
    "gzip": (faults.gzipped_part, RemoteError, None, "compressed"),
}


@pytest.mark.parametrize("name", FINAL)
def test_a_final_answer_is_an_error_at_once(way: Way, position: int, name: str) -> None:
    fault, kind, status, text = FINAL[name]
    way.server.faults = faults.at(position, fault)
    error = failed(way)
    check_offset(error, position)
    assert type(error) is kind
    assert error.tries == 1
    assert text in str(error)
    assert error.remedy
    if status is not None:
        assert error.status == status
    assert len(way.server.requests) == position + 1


@pytest.mark.parametrize("way", ["http"], indirect=True)
def test_a_file_that_comes_compressed_is_refused(way: Way, position: int) -> None:
    """obstore sees 200 in place of 206, and asks again."""
    way.server.faults = faults.at(position, faults.gzipped)
    error = failed(way)
    check_offset(error, position)
    assert (error.tries, error.status) == (1, 200)
    assert "compressed (gzip)" in str(error)


def test_a_refused_range_of_a_file_that_has_it(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.status(416))
    if position == 0:  # the file is asked for as a whole, which shows that it is not empty
        assert load(way)[0] == CONTENT
        return
    error = failed(way)
    check_offset(error, position)
    assert error.status == 416
    assert "shorter" in error.remedy


# ---- the file changes ---------------------------------------------------


@pytest.mark.parametrize("fault", [faults.replaced, faults.cut])
@pytest.mark.parametrize(
    "offers", ["all", "no If-Match", "no ETag", "only Last-Modified, no If-Match"]
)
def test_a_file_that_changes_is_never_mixed(
    way: Way, position: int, fault: Any, offers: str
) -> None:
    server = way.server
    server.if_match = "no If-Match" not in offers
    server.etags = offers in ("all", "no If-Match")
    server.faults = faults.at(position, fault)
    if position == 0:  # before the first byte was read: all are of the new one
        found, _ = load(way)
        assert found == server.files["/bucket/dir/model.bin"].content
        return
    error = failed(way)
    check_offset(error, position)
    assert type(error) is RemoteChangedError
    assert "changed while it was read" in str(error)
    assert error.tries == 1


def test_every_part_carries_if_match(way: Way) -> None:
    load(way)
    etag = way.server.files["/bucket/dir/model.bin"].etag
    sent = [request.headers.get("if-match") for request in way.server.requests]
    assert sent == [None, *[etag] * COUNT]


def test_a_weak_etag_is_compared_and_not_sent(way: Way) -> None:
    weak = {"ETag": 'W/"1"'}
    way.server.faults = lambda _: (
        lambda exchange: (exchange.headers.update(weak), exchange.answer())
    )
    assert load(way)[0] == CONTENT
    assert all("if-match" not in request.headers for request in way.server.requests)

    def other(exchange: Any) -> None:
        exchange.headers["ETag"] = 'W/"2"' if exchange.request.number > 3 else 'W/"1"'
        exchange.answer()

    way.server.requests.clear()
    way.server.faults = lambda _: other
    assert type(failed(way)) is RemoteChangedError


# ---- a server that goes away, or is not there ---------------------------


def test_a_server_that_goes_away(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.vanishing)
    error = failed(way)
    check_offset(error, position)
    assert "refused" in str(error)
    assert error.tries == LIMITS["max_tries"]


def test_nobody_listens(way: Way) -> None:
    way.server.stop_listening()
    error = failed(way)
    assert "refused" in str(error)
    assert error.offset == 0


# ---- slow bodies --------------------------------------------------------


def test_a_slow_body_is_no_fault(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.slow)
    assert load(way)[0] == CONTENT
    assert len(way.server.requests) == COUNT + 1


def test_a_body_that_drips_is_given_up(way: Way, position: int) -> None:
    way.server.faults = faults.since(position, faults.dripping)
    if "user_agent" in way.options:
        # obstore hands over what it has collected, so a body that drips is a stalled one to us.
        way.options.update(IMPATIENT)
        assert "stalled" in str(failed(way))
    else:
        way.options.update(deadline=1.0)
        assert "too slow" in str(failed(way))


def test_a_head_that_drips_is_given_up(way: Way, position: int) -> None:
    way.server.faults = faults.since(position, faults.dripping_head)
    way.options.update(IMPATIENT)
    assert "no answer in time" in str(failed(way))


# ---- no ranges ----------------------------------------------------------


def test_a_server_without_ranges_is_read_in_one_stream(way: Way) -> None:
    way.server.faults = lambda _: faults.whole_file
    with pytest.warns(RemoteWarning, match="no ranges"):
        source = open_source(way.url, way.options, head_bytes=HEAD)
    try:
        assert source.sequential
        for begin in (0, PIECE, 3 * PIECE, 2 * PIECE, 5 * PIECE, 1):
            assert source.read(begin, PIECE) == CONTENT[begin : begin + PIECE]
        # One more for the stream. What a read skipped was kept, and reading byte 1 goes back.
        assert len(way.server.requests) in (3, 4, 5)
    finally:
        source.close()


@pytest.mark.parametrize("name", ["reset mid-body", "truncated body", "stalled body", "500"])
def test_a_stream_that_breaks_starts_again(way: Way, name: str) -> None:
    way.server.faults = lambda request: (
        TRANSIENT[name] if request.number == 1 else faults.whole_file
    )
    if name in STALLING:
        way.options.update(IMPATIENT)
    found, source = load(way)
    assert found == CONTENT
    assert source.sequential


def test_ranges_that_come_only_sometimes(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.whole_file)
    found, source = load(way)
    assert found == CONTENT
    assert source.sequential == (position == 0)


@pytest.mark.parametrize("position", ["header", "middle", "last"], indirect=True)
def test_ranges_that_stop(way: Way, position: int) -> None:
    way.server.faults = faults.since(position, faults.whole_file)
    error = failed(way)
    check_offset(error, position)
    assert error.status == 200
    assert "whole file" in str(error)


# ---- what is allowed ----------------------------------------------------


# obstore takes no body without Content-Length, which S3 always sends, and hides Retry-After.
by_http = pytest.mark.parametrize("way", ["http", "s3"], indirect=True)


@by_http
@pytest.mark.parametrize("fault", [faults.chunked, faults.until_closed])
def test_forms_of_a_body(way: Way, fault: Any) -> None:
    way.server.faults = lambda _: fault
    assert load(way)[0] == CONTENT


@by_http
def test_a_body_in_chunks_may_not_be_longer(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.chunked_longer)
    found, _ = load(way)
    assert found == CONTENT
    assert len(way.server.requests) == COUNT + 2


def test_head_is_never_sent(way: Way) -> None:
    load(way)
    assert {request.method for request in way.server.requests} == {"GET"}
    assert len(way.server.requests) == COUNT + 1


def test_an_empty_file(way: Way) -> None:
    way.server.files["/bucket/dir/model.bin"] = faults.Remote(b"")
    found, source = load(way)
    assert found == b""
    assert source.size == 0


def test_a_file_shorter_than_the_first_request(way: Way) -> None:
    way.server.files["/bucket/dir/model.bin"] = faults.Remote(b"short")
    found, _ = load(way)
    assert found == b"short"
    assert len(way.server.requests) == 1


# ---- Retry-After --------------------------------------------------------


@by_http
@pytest.mark.parametrize(
    ("position", "status"),
    [("first", 429), ("header", 503), ("middle", 503), ("last", 429)],
    indirect=["position"],
)
def test_retry_after_is_waited_for(way: Way, position: int, status: int) -> None:
    way.server.faults = faults.at(position, faults.status(status, Retry_After="1"))
    begin = time.monotonic()
    found, source = load(way)
    assert found == CONTENT
    assert time.monotonic() - begin >= 1.0
    assert source.stats.waited >= 1.0
    assert source.stats.retries == 1


@by_http
def test_a_wait_beyond_the_deadline_is_an_error_at_once(way: Way, position: int) -> None:
    way.server.faults = faults.at(position, faults.status(503, Retry_After="120"))
    begin = time.monotonic()
    error = failed(way)
    assert time.monotonic() - begin < LIMITS["stall"]
    assert "asks to wait for 120 s" in str(error)
