"""URLs and options: what is taken, what is refused, and what is shown of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer
from remote_state import SECRET, assert_no_secret

from fastst_patch.errors import OptionError
from fastst_patch.sources.base import (
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
    RemotePermissionError,
    UnknownSchemeError,
    list_files,
    local_path,
    looks_remote,
    open_source,
)
from fastst_patch.sources.urls import parse_http

pytestmark = pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning")


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/key", True),
        ("HTTPS://host/x", True),
        ("ftp://host/x", True),
        ("file:///x", True),
        ("/local/path", False),
        ("relative", False),
        ("c:/windows", False),
        ("s3:/one-slash", False),
        ("://x", False),
        ("", False),
        (b"s3://bytes", False),
        (Path("/x"), False),
        (None, False),
    ],
)
def test_what_looks_remote(path: Any, remote: bool) -> None:
    assert looks_remote(path) is remote


@pytest.mark.parametrize(
    ("url", "name", "target"),
    [
        ("http://Host/a/b", "http://host/a/b", "/a/b"),
        ("https://host:8443/a?x=1", "https://host:8443/a", "/a?x=1"),
        ("https://host:443/a", "https://host/a", "/a"),
        ("http://u:p@host/a", "http://host/a", "/a"),
        ("http://host", "http://host/", "/"),
        ("http://host/a b/ü", "http://host/a%20b/%C3%BC", "/a%20b/%C3%BC"),
        ("http://host/a%2Fb+c?s=%2B+&t", "http://host/a%2Fb+c", "/a%2Fb+c?s=%2B+&t"),
        ("http://host/a#part", "http://host/a", "/a"),
        ("http://[::1]:80/a", "http://[::1]/a", "/a"),
        ("http://bücher.example/a", "http://xn--bcher-kva.example/a", "/a"),
    ],
)
def test_http_urls(url: str, name: str, target: str) -> None:
    found = parse_http(url)
    assert (found.name, found.target) == (name, target)


@pytest.mark.parametrize(
    "url",
    [
        f"http://?{SECRET}",
        f"http://u:{SECRET}@",
        f"http://u:{SECRET}@host:port/x?{SECRET}",
        f"http://host:99999999/x?{SECRET}",
        f"http://[::1/x?{SECRET}",
        "s3:///key",
        "s3://bucket",
        "s3://bucket/",
        "gs://",
        "az:///x",
        "hf://org",
        "hf://org/repo",
        "hf://org/repo@/x",
        "hf://org/../x",
        "hf://org/repo/../x",
        "file://elsewhere/x",
        f"ftp://u:{SECRET}@host/x?{SECRET}",
    ],
)
def test_malformed_urls_are_refused_without_a_request(url: str) -> None:
    with pytest.raises(RemoteError) as caught:
        local_path(url)
        open_source(url)
    assert_no_secret(caught.value)
    assert caught.value.remedy
    assert caught.value.tries == 0


def test_an_unknown_scheme_is_a_missing_file_as_for_stock() -> None:
    with pytest.raises(FileNotFoundError, match="ftp://") as caught:
        open_source("ftp://host/x")
    assert isinstance(caught.value, UnknownSchemeError)
    assert "https://" in str(caught.value)


def test_a_file_url_is_a_path() -> None:
    assert local_path("file:///tmp/a%20b") == "/tmp/a b"
    assert local_path("file://localhost/tmp/a") == "/tmp/a"
    assert local_path("http://host/x") is None
    assert local_path("s3://bucket/x") is None
    with pytest.raises(RemoteError, match="by its path"):
        open_source("file:///tmp/x")


def test_a_local_folder_is_listed(tmp_path: Path) -> None:
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "sub dir" / "a").write_bytes(b"1")
    found = list_files(f"file://{tmp_path}")
    assert [(one.name, one.size) for one in found] == [("b", 3), ("sub dir/a", 1)]
    assert [local_path(one.url) for one in found] == [
        str(tmp_path / "b"),
        str(tmp_path / "sub dir" / "a"),
    ]


def test_errors_survive_pickling() -> None:
    error = RemoteNotFoundError("h", "/p", "no such file", offset=3, status=404, remedy="look")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is RemoteNotFoundError
    assert str(found) == str(error) == "h/p: no such file (at byte 3, status 404, 1 try); look"
    assert (found.errno, found.offset, found.tries) == (2, 3, 1)
    assert isinstance(found, FileNotFoundError)
    assert not isinstance(RemoteChangedError("h", "/p", "x"), FileNotFoundError)


# ---- options ------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_tries": 0},
        {"max_tries": 1.5},
        {"max_tries": True},
        {"deadline": "soon"},
        {"deadline": -1},
        {"stall": None},
        {"no_such_option": 1},
        {"client_options": 3},
        {"default_headers": {"A b": "x"}},
        {"default_headers": {"A": f"{SECRET}\r\nB: c"}},
        {"default_headers": {"Range": "bytes=0-1"}},
        {"default_headers": {"A": 3}},
        {"root_certificate": SECRET},
        {"root_certificate": 3},
        {"user_agent": "a\nb"},
        {"proxy_url": 3},
        {"allow_http": "perhaps"},
        {"allow_http": False},
    ],
    ids=str,
)
def test_bad_options_of_http_are_named(options: dict[str, Any]) -> None:
    with FaultServer({"/x": b"x"}) as server:
        with pytest.raises(OptionError) as caught:
            open_source(server.url("/x"), options)
        assert server.requests == []
    assert_no_secret(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_options_are_not_changed() -> None:
    options = {"max_tries": 2, "default_headers": {"X-A": "b"}}
    kept = dict(options)
    with FaultServer({"/x": b"x"}) as server:
        open_source(server.url("/x"), options).close()
        assert server.requests[0].headers["x-a"] == "b"
    assert options == kept


def test_opening_one_scheme_imports_nothing_of_another(tmp_path: Path) -> None:
    code = """
import sys
import fastst_patch
before = set(sys.modules)
from fastst_patch.sources import base
assert base.looks_remote("s3://bucket/key")
names = {"obstore", "huggingface_hub", "http.client", "ssl", "asyncio", "numpy", "torch"} - before
assert not names & set(sys.modules), names & set(sys.modules)
try:
    base.open_source("http://127.0.0.1:9/x", {"max_tries": 1})
except base.RemoteError as error:
    assert "refused" in str(error)
names -= {"http.client", "ssl"}
assert not names & set(sys.modules), names & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("url", "package"), [("s3://b/k", "obstore"), ("hf://o/r/f", "huggingface_hub")]
)
def test_a_missing_library_is_named(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'fastst-patch\[remote\]'") as caught:
        local_path(url)
        open_source(url)
    assert caught.value.name == package


def test_bad_options_of_a_store_are_named_without_their_values() -> None:
    pytest.importorskip("obstore", reason="the package obstore is missing: install '.[remote]'")
    for options in (
        {"no_such_key": SECRET},
        {"client_options": {"no_such_key": SECRET}},
        {"secret_access_key": 3.5j},
        {"retry_config": {"max_retries": -1}},
    ):
        with pytest.raises(OptionError) as caught:
            open_source("s3://bucket/key", options)
        assert_no_secret(caught.value)


def test_missing_credentials_are_what_is_missing() -> None:
    pytest.importorskip("obstore", reason="the package obstore is missing: install '.[remote]'")
    options = {"metadata_endpoint": "http://127.0.0.1:9", "region": "x", "max_tries": 2}
    with pytest.raises(RemotePermissionError, match="no credentials were found") as caught:
        open_source("s3://bucket/key", {**options, "allow_http": True})
    assert "skip_signature" in caught.value.remedy
