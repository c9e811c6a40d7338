"""Redirects, proxies, TLS, addresses and connections of the HTTP source."""

from __future__ import annotations

import base64
import random
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_server as faults
import pytest
from fault_server import FaultServer
from remote_state import (
    SECRET,
    assert_no_secret,
    certificate_of,
    nothing_left_open,
    self_signed,
    start_obstore,
)

from fastst_patch.sources import web
from fastst_patch.sources.base import (
    RemoteError,
    RemotePermissionError,
    RemoteWarning,
    list_files,
    open_source,
)
from fastst_patch.sources.dial import tls_context

CONTENT = random.Random(6).randbytes(100_000)
QUICK = {"max_tries": 3, "deadline": 20.0, "stall": 10.0, "backoff": 0.01}


@pytest.fixture(scope="module")
def obstore_started() -> None:
    start_obstore()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with nothing_left_open(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RemoteWarning)
        yield


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/m": CONTENT}) as server:
        yield server


@pytest.fixture
def other() -> Iterator[FaultServer]:
    with FaultServer({"/m": CONTENT}) as server:
        yield server


def read(url: str, **options: Any) -> bytes:
    source = open_source(url, {**QUICK, **options}, head_bytes=10)
    try:
        return bytes(source.read(0, source.size // 2)) + bytes(
            source.read(source.size // 2, source.size - source.size // 2)
        )
    finally:
        source.close()


# ---- redirects ----------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_credentials_are_not_sent_to_another_host(
    server: FaultServer, other: FaultServer, code: int
) -> None:
    server.faults = lambda _: faults.redirect(code, other.url("/m?here=1"))
    url = f"http://user:{SECRET}@{server.netloc}/m?sig={SECRET}"
    headers = {"X-Token": SECRET, "Cookie": SECRET}
    assert read(url, default_headers=headers) == CONTENT
    assert server.requests[0].headers["authorization"].startswith("Basic ")
    assert server.requests[0].headers["x-token"] == SECRET
    for request in other.requests:
        assert SECRET not in repr(request)
        assert not {"authorization", "cookie", "referer", "x-token"} & set(request.headers)
    # Where it led is remembered: one request for the address, and all others there.
    assert len(server.requests) == 1
    assert len(other.requests) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_redirect_in_the_middle_keeps_credentials_too(
    server: FaultServer, other: FaultServer, number: int
) -> None:
    server.faults = faults.since(number, faults.redirect(307, other.url("/m")))
    assert read(f"http://user:{SECRET}@{server.netloc}/m?sig={SECRET}") == CONTENT
    assert other.requests
    assert SECRET not in repr(other.requests)


def test_a_redirect_on_the_same_host_keeps_credentials(server: FaultServer) -> None:
    server.files["/new"] = server.files["/m"]
    moved = faults.redirect(301, "/new")
    server.faults = lambda request: moved if request.path == "/m" else None
    assert read(server.url("/m"), default_headers={"X-Token": SECRET}) == CONTENT
    assert all(request.headers["x-token"] == SECRET for request in server.requests)


def test_a_signed_address_that_expires_is_asked_for_again(
    server: FaultServer, other: FaultServer
) -> None:
    count = iter(range(100))
    server.faults = lambda _: faults.redirect(302, other.url(f"/m?sig={SECRET}{next(count)}"))
    other.faults = lambda request: (
        faults.status(403) if request.number == 1 else None
    )  # the second request comes too late
    assert read(server.url("/m")) == CONTENT
    assert len(server.requests) == 2
    assert other.requests[-1].target.endswith(f"{SECRET}1")


def test_an_expired_signature_of_the_url_itself_is_an_error(server: FaultServer) -> None:
    server.faults = faults.since(1, faults.status(403))
    with pytest.raises(RemotePermissionError, match="expired") as caught:
        read(server.url(f"/m?X-Amz-Signature={SECRET}"))
    assert_no_secret(caught.value)


@pytest.mark.parametrize("location", ["/m", "http://", "ftp://host/m", f"http://[{SECRET}/m", ""])
def test_redirects_that_lead_nowhere(server: FaultServer, location: str) -> None:
    server.faults = lambda _: faults.redirect(302, location)
    with pytest.raises(RemoteError, match="redirected") as caught:
        read(server.url("/m"))
    assert_no_secret(caught.value)
    assert len(server.requests) <= 11


def test_redirects_that_take_too_long(server: FaultServer) -> None:
    """Each is quick enough, and all together take longer than the deadline."""

    def slow_redirect(exchange: Any) -> None:
        time.sleep(0.3)
        faults.redirect(302, "/m")(exchange)

    server.faults = lambda _: slow_redirect
    with pytest.raises(RemoteError, match=r"redirected too slowly|no answer in time"):
        read(server.url("/m"), deadline=1.0)
    assert len(server.requests) <= 4


def test_another_file_behind_a_redirect_is_noticed(server: FaultServer, other: FaultServer) -> None:
    other.files["/m"] = faults.Remote(CONTENT[::-1])
    server.faults = faults.at(1, faults.redirect(302, other.url("/m")))
    with pytest.raises(RemoteError) as caught:
        read(server.url("/m"))
    assert "changed while it was read" in str(caught.value)


AWS_KEYS = {"access_key_id": "someone", "secret_access_key": SECRET}
LEAKS = pytest.mark.xfail(strict=True, reason="obstore 0.12: see docs/remote.md, limits")


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("s3", {"region": "x", "session_token": SECRET, **AWS_KEYS}),
        ("s3", {"region": "x", "user_agent": "me", **AWS_KEYS}),
        ("az", {"account_name": "someone", "account_key": base64.b64encode(b"key").decode()}),
        ("az", {"account_name": "someone", "token": SECRET}),
        ("gs", {"bearer_token": SECRET}),
        pytest.param(
            "s3",
            {"region": "x", "user_agent": "me", "session_token": SECRET, **AWS_KEYS},
            marks=LEAKS,
        ),
        pytest.param("az", {"account_name": "someone", "sas_key": f"sig={SECRET}"}, marks=LEAKS),
    ],
    ids=["s3 signed URL", "s3", "az key", "az token", "gs", "s3 session token", "az SAS"],
)
def test_obstore_sends_no_credentials_to_another_host(
    obstore_started: None, server: FaultServer, other: FaultServer, scheme: str, given: Any
) -> None:
    server.files["/b/m"] = other.files["/b/m"] = faults.Remote(CONTENT)
    server.faults = lambda _: faults.redirect(307, other.url("/b/m"))
    name = "base_url" if scheme == "gs" else "endpoint"
    assert read(f"{scheme}://b/m", allow_http=True, **{name: server.url("")}, **given) == CONTENT
    sent = server.requests[0]
    assert "authorization" in sent.headers or "sig" in sent.target.lower()
    assert other.requests
    assert all("authorization" not in request.headers for request in other.requests)
    assert SECRET not in repr(other.requests)


# ---- proxies ------------------------------------------------------------


def test_a_proxy_for_http(
    server: FaultServer, other: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    proxy = f"http://me:{SECRET}@{other.netloc}"
    assert read("http://files.invalid/m", proxy_url=proxy) == CONTENT
    assert other.requests[0].target == "http://files.invalid/m"
    assert other.requests[0].headers["host"] == "files.invalid"
    assert other.requests[0].headers["proxy-authorization"].startswith("Basic ")
    monkeypatch.setenv("http_proxy", proxy)
    assert read("http://files.invalid/m") == CONTENT
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(server.url("/m")) == CONTENT
    assert len(server.requests) == 3
    assert read(server.url("/m"), proxy_url=proxy, proxy_excludes="127.0.0.1") == CONTENT
    assert len(server.requests) == 6


def test_a_proxy_that_is_not_there(server: FaultServer, other: FaultServer) -> None:
    other.stop_listening()
    with pytest.raises(RemoteError, match="refused") as caught:
        read("http://files.invalid/m", proxy_url=f"http://u:{SECRET}@{other.netloc}")
    assert_no_secret(caught.value)


# ---- TLS ----------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[FaultServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FaultServer({"/m": CONTENT}, tls=context) as server:
        yield server


def test_an_unknown_authority_is_an_error_at_once(tls_server: FaultServer) -> None:
    with pytest.raises(RemoteError, match="certificate is not accepted") as caught:
        read(tls_server.url("/m"))
    assert caught.value.tries == 1
    assert "SSL_CERT_FILE" in str(caught.value)


def test_an_authority_of_ones_own(
    tls_server: FaultServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = certificate_of(certificate)
    assert read(tls_server.url("/m"), root_certificate=pem) == CONTENT
    assert read(tls_server.url("/m"), root_certificate=pem.encode()) == CONTENT
    assert read(tls_server.url("/m"), allow_invalid_certificates=True) == CONTENT
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "certificate"))
    tls_context.cache_clear()
    try:
        assert read(tls_server.url("/m")) == CONTENT
    finally:
        tls_context.cache_clear()


def test_a_certificate_for_another_host(tls_server: FaultServer, certificate: Path) -> None:
    pem = certificate_of(certificate)
    url = f"https://localhost:{tls_server.port}/m"
    with pytest.raises(RemoteError, match="certificate is not accepted"):
        read(url, root_certificate=pem)


def test_tls_through_a_proxy(
    tls_server: FaultServer, certificate: Path, server: FaultServer
) -> None:
    pem = certificate_of(certificate)
    proxy = f"http://me:{SECRET}@{server.netloc}"
    assert read(tls_server.url("/m"), root_certificate=pem, proxy_url=proxy) == CONTENT
    assert server.requests[0].method == "CONNECT"
    assert SECRET not in repr(tls_server.requests)


def test_https_to_a_server_of_http(server: FaultServer) -> None:
    with pytest.raises(RemoteError, match="TLS failed"):
        read(f"https://{server.netloc}/m")


def test_a_redirect_from_https_to_http_is_refused(
    tls_server: FaultServer, server: FaultServer, certificate: Path
) -> None:
    tls_server.faults = lambda _: faults.redirect(302, server.url("/m"))
    with pytest.raises(RemoteError, match="from https to http"):
        read(tls_server.url("/m"), root_certificate=certificate_of(certificate))
    assert server.requests == []


@pytest.mark.parametrize("fault", [faults.reset_mid_body, faults.truncated, faults.stalled])
def test_faults_over_tls(tls_server: FaultServer, certificate: Path, fault: Any) -> None:
    tls_server.faults = faults.at(1, fault)
    pem = certificate_of(certificate)
    stall = 0.3 if fault is faults.stalled else 10.0
    assert read(tls_server.url("/m"), root_certificate=pem, stall=stall) == CONTENT


# ---- addresses and connections ------------------------------------------


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this system has no IPv6")
    try:
        server = FaultServer({"/m": CONTENT}, host="::1")
    except OSError as error:
        pytest.skip(f"loopback has no IPv6 address here: {error}")
    with server:
        assert read(server.url("/m")) == CONTENT
        assert server.requests[0].headers["host"] == f"[::1]:{server.port}"
        server.faults = lambda _: faults.status(404)
        with pytest.raises(RemoteError, match=r"^\[::1\]:"):
            read(server.url("/m"))


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(RemoteError, match="cannot be resolved"):
        read(f"http://no-such-host.invalid/m?sig={SECRET}")


def test_a_connection_serves_many_requests(server: FaultServer) -> None:
    source = open_source(server.url("/m"), QUICK, head_bytes=10)
    for begin in range(10, 1010, 10):
        source.read(begin, 10)
    assert len(server._threads) == 2  # the one that accepts, and one connection
    source.close()


def test_a_kept_connection_that_was_closed_is_no_fault(server: FaultServer) -> None:
    source = open_source(server.url("/m"), QUICK, head_bytes=10)
    for begin in (100, 200, 300):
        server.drop_connections()
        assert source.read(begin, 10) == CONTENT[begin : begin + 10]
    assert source.stats.retries == 0
    source.close()


def test_credentials_over_http_warn_once(server: FaultServer) -> None:
    web._warned.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            open_source(f"http://u:{SECRET}@{server.netloc}/m").close()
        assert [one.category for one in told] == [RemoteWarning]
        assert_no_secret(str(told[0].message))
        assert told[0].filename == __file__
        web._warned.clear()
        open_source(server.url("/m")).close()
        open_source(server.url("/m?page=1")).close()
    assert len(told) == 1


def test_what_is_shown_of_a_source(server: FaultServer) -> None:
    source = open_source(f"http://u:{SECRET}@{server.netloc}/m?sig={SECRET}", QUICK)
    try:
        assert source.name == server.url("/m")
        assert source.scheme == "http"
        assert_no_secret(source, source.name, source.identity, source.stats)
        with pytest.raises(ValueError, match="not within its") as caught:
            source.read(0, source.size + 1)
        assert_no_secret(caught.value)
    finally:
        source.close()


def test_equal_identities_mean_equal_bytes(server: FaultServer) -> None:
    def identity() -> Any:
        source = open_source(server.url("/m"), QUICK, head_bytes=1)
        source.close()
        return source.identity

    first = identity()
    assert identity() == first
    hash(first)
    server.files["/m"] = faults.Remote(CONTENT[::-1])
    assert identity() != first
    server.etags = False
    second = identity()
    assert second == identity() != first
    server.files["/m"] = faults.Remote(CONTENT[::-1], faults.LAST_MODIFIED + 1)
    assert identity() != second


def test_reads_within_the_first_request_make_no_other(server: FaultServer) -> None:
    source = open_source(server.url("/m"), QUICK, head_bytes=1000)
    assert source.read(0, 1000) == CONTENT[:1000]
    assert source.read(999, 1) == CONTENT[999:1000]
    assert source.read(0, 0) == b""
    assert len(server.requests) == 1
    assert source.read(990, 20) == CONTENT[990:1010]
    assert server.requests[1].headers["range"] == "bytes=1000-1009"
    source.close()


@pytest.mark.parametrize("fault", [faults.dripping, faults.dripping_chunks])
def test_a_page_that_drips_is_given_up(server: FaultServer, fault: Any) -> None:
    """Each byte comes in time, so that nothing stalls."""
    server.faults = lambda _: fault
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="too slow") as caught:
        web.read_page(server.url("/m"), {**QUICK, "deadline": 1.0}, 1 << 20)
    assert time.monotonic() - begin < QUICK["deadline"]
    assert caught.value.tries == 1


def test_a_page_that_breaks_off_is_read_again(server: FaultServer) -> None:
    server.faults = faults.at(0, faults.reset_mid_body)
    assert web.read_page(server.url("/m"), QUICK, 1 << 20) == CONTENT
    assert web.read_page(server.url("/m"), QUICK, 1000) == CONTENT[:1000]


def test_folders_cannot_be_listed(server: FaultServer) -> None:
    with pytest.raises(RemoteError, match="do not list"):
        list_files(server.url("/"))
    assert server.requests == []
