"""Objects of S3 by signed URLs: when they are signed, and when obstore asks itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fault_server as faults
import pytest
from fault_server import FaultServer
from remote_state import SECRET, assert_no_secret, nothing_left_open, start_obstore

from fastst_patch.sources import signed
from fastst_patch.sources.base import (
    RemoteError,
    RemotePermissionError,
    RemoteWarning,
    Source,
    open_source,
)

pytestmark = pytest.mark.filterwarnings(f"ignore::{RemoteWarning.__module__}.RemoteWarning")

CONTENT = bytes(range(256)) * 64
HEAD = 1000


@pytest.fixture
def server() -> Iterator[FaultServer]:
    start_obstore()
    with nothing_left_open(), FaultServer({"/b/m": CONTENT}) as server:
        yield server


def options_of(server: FaultServer) -> dict[str, Any]:
    return {
        "endpoint": server.url(""),
        "allow_http": True,
        "region": "us-east-1",
        "access_key_id": "someone",
        "secret_access_key": SECRET,
        "backoff": 0.01,
    }


@pytest.fixture
def source(server: FaultServer) -> Iterator[Source]:
    source = open_source("s3://b/m", options_of(server), head_bytes=HEAD)
    yield source
    source.close()


@pytest.fixture
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a test names as its parameter."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


def signatures(server: FaultServer) -> int:
    return len({one.target for one in server.requests})


def test_a_url_is_signed_once(server: FaultServer, source: Source) -> None:
    for begin in range(HEAD, 9 * HEAD, HEAD):
        assert source.read(begin, HEAD) == CONTENT[begin : begin + HEAD]
    assert len(server.requests) == 9
    assert signatures(server) == 1
    assert all("X-Amz-Signature=" in one.target for one in server.requests)
    assert all("authorization" not in one.headers for one in server.requests)
    assert SECRET not in repr(server.requests)
    assert (source.name, source.scheme) == ("s3://b/m", "s3")


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_url_that_has_expired_is_signed_again(
    server: FaultServer, source: Source, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed, "_YOUNG_S", 0.0)
    server.faults = faults.at(len(server.requests), faults.status(status))
    assert source.read(HEAD, HEAD) == CONTENT[HEAD : 2 * HEAD]
    assert source.stats.retries == 0
    server.faults = faults.since(0, faults.status(status))
    with pytest.raises(RemoteError) as caught:
        source.read(HEAD, HEAD)
    assert caught.value.status == status
    assert_no_secret(caught.value)


def test_a_young_url_that_is_refused_is_an_error_at_once(
    server: FaultServer, source: Source
) -> None:
    server.faults = faults.since(0, faults.status(403))
    before = len(server.requests)
    with pytest.raises(RemotePermissionError):
        source.read(HEAD, HEAD)
    assert len(server.requests) == before + 1


def test_a_url_is_signed_anew_before_it_expires(
    server: FaultServer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    sign = signed.SignedTransport._sign

    def counted(self: Any, *args: Any) -> Any:
        made.append(self)
        return sign(self, *args)

    monkeypatch.setattr(signed.SignedTransport, "_sign", counted)
    source.read(HEAD, HEAD)
    assert not made
    monkeypatch.setattr(signed, "_USED_S", 0.0)
    assert source.read(HEAD, HEAD) == CONTENT[HEAD : 2 * HEAD]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, True),
        ({"aws_region": "x", "AWS_ENDPOINT": "https://h", "credential_provider": print}, {}, True),
        ({}, {"AWS_PROFILE": "me", "AWS_ALLOW_HTTP": "true", "PATH": "/"}, True),
        ({"skip_signature": True}, {}, False),
        ({"client_options": {}}, {}, False),
        ({"proxy_url": "http://p"}, {}, False),
        ({"an_option_to_come": 1}, {}, False),
        ({}, {"AWS_REQUEST_PAYER": "true"}, False),
        ({}, {"AWS_SSE_CUSTOMER_KEY_BASE64": "x"}, False),
        ({}, {"aws_proxy_url": "http://p"}, False),
    ],
    indirect=["environment"],
)
def test_what_a_signed_url_does(
    options: dict[str, object], environment: object, expected: bool
) -> None:
    assert signed.can_be_signed(options) is expected


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, False),
        ({"allow_http": True}, {}, True),
        ({"aws_allow_http": "false"}, {"AWS_ALLOW_HTTP": "true"}, False),
        ({}, {"AWS_ALLOW_HTTP": "1"}, True),
    ],
    indirect=["environment"],
)
def test_http_is_for_those_who_allow_it(
    options: dict[str, object], environment: object, expected: bool
) -> None:
    assert signed.allows_http(options) is expected


def test_what_is_left_to_obstore(server: FaultServer) -> None:
    options = {**options_of(server), "user_agent": "someone"}
    source = open_source("s3://b/m", options, head_bytes=HEAD)
    try:
        assert source.read(HEAD, HEAD) == CONTENT[HEAD : 2 * HEAD]
    finally:
        source.close()
    assert all("X-Amz-Signature" not in one.target for one in server.requests)
    assert all("authorization" in one.headers for one in server.requests)
