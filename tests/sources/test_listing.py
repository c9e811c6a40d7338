"""Which files a remote model has: by listings, by pages of links, by names that libraries use."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from remote_bucket import Bucket

from fastst_patch.sources import base, web
from fastst_patch.sources.listing import list_model, place_of, weight_files

WEIGHTS = safetensors.numpy.save({"w": np.ones(4, np.float32)})
INDEX = json.dumps(
    {
        "metadata": {"total_size": 32},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
).encode()


@pytest.fixture
def bucket(monkeypatch) -> Bucket:
    made = Bucket({})
    monkeypatch.setattr(base, "open_source", made.open_source)
    monkeypatch.setattr(base, "list_files", made.list_files)
    monkeypatch.setattr(web, "read_page", made.read_page)
    return made


def names(url: str) -> list[str]:
    return [one.name for one in list_model(url)]


def test_a_bucket_lists_itself(bucket) -> None:
    bucket.files = {"s3://b/m/config.json": b"{}", "s3://b/m/x/w.safetensors": WEIGHTS,
                    "s3://b/model2/config.json": b"{}"}  # fmt: skip
    found = list_model("s3://b/m")
    assert [one.name for one in found] == ["config.json", "x/w.safetensors"]
    assert found[1].size == len(WEIGHTS)
    assert found[1].identity is not None
    assert found[1].url == "s3://b/m/x/w.safetensors"


def test_an_empty_folder(bucket) -> None:
    with pytest.raises(FileNotFoundError, match=r"b/m: nothing is in this folder"):
        list_model("s3://b/m")


@pytest.mark.parametrize("name", ["../up", "a/../../up", "a//b", "a\\b"])
def test_a_listing_with_names_that_lead_out(bucket, name) -> None:
    bucket.files = {f"s3://b/m/{name}": b"", "s3://b/m/config.json": b"{}"}
    with pytest.raises(base.RemoteError, match="leads out of the folder"):
        list_model("s3://b/m")


# ---- pages of links

NGINX = b"""<html>
<head><title>Index of /m/</title></head>
<body><h1>Index of /m/</h1><hr><pre><a href="../">../</a>
<a href="1_Pooling/">1_Pooling/</a>            01-Jan-2026 00:00       -
<a href="config.json">config.json</a>          01-Jan-2026 00:00      99
<a href="a%20b.safetensors">a b.safetensors</a>     01-Jan-2026 00:00      99
</pre><hr></body></html>"""
APACHE = b"""<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN"><html><body>
<table><tr><th><a href="?C=N;O=D">Name</a></th></tr>
<tr><td><a href="/">Parent Directory</a></td></tr>
<tr><td><a href="/m/1_Pooling/">1_Pooling/</a></td></tr>
<tr><td><a href="/m/config.json">config.json</a></td></tr>
<tr><td><a href="a%20b.safetensors">a b</a></td></tr>
<tr><td><a href="https://elsewhere/m/evil.json">x</a></td></tr>
<tr><td><a href="..%2f..%2fetc/passwd">x</a></td></tr>
<tr><td><a>no target</a><a href="http://[bad">x</a></td></tr></table></body></html>"""
POOLING = b'<html><body><a href="../">up</a><a href="config.json">config.json</a></body></html>'


@pytest.mark.parametrize("page", [NGINX, APACHE], ids=["nginx", "apache"])
@pytest.mark.parametrize("url", ["http://host/m", "http://host/m/"])
def test_the_page_for_a_folder(bucket, page, url) -> None:
    bucket.files = {"http://host/m/": page, "http://host/m/1_Pooling/": POOLING}
    found = list_model(url)
    assert [one.name for one in found] == ["1_Pooling/config.json", "a b.safetensors",
                                           "config.json"]  # fmt: skip
    assert found[1].url == "http://host/m/a%20b.safetensors"


def test_pages_that_lead_in_circles_end(bucket) -> None:
    page = b'<a href="deeper/">x</a><a href="config.json">x</a>'
    bucket.files = {f"http://host/m/{'deeper/' * depth}": page for depth in range(50)}
    assert "config.json" in names("http://host/m")
    assert len(bucket.opened) < 10


# ---- names that libraries use


def test_names_are_tried_where_there_is_no_page(bucket) -> None:
    bucket.files = {
        f"https://host/m/{name}": content
        for name, content in {
            "config.json": b"{}",
            "tokenizer.json": b"{}",
            "merges.txt": b"a b",
            "model.safetensors.index.json": INDEX,
            "model-00001-of-00002.safetensors": WEIGHTS,
            "model-00002-of-00002.safetensors": WEIGHTS,
        }.items()
    }
    found = list_model("https://host/m?sig=secret")
    assert [one.name for one in found] == [
        "config.json", "merges.txt", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert found[0].url == "https://host/m/config.json?sig=secret"
    assert "secret" not in repr(found)


def test_folders_of_sentence_transformers_and_diffusers(bucket) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../up"}]
    pipeline = {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"], "gone": [None, None]}
    bucket.files = {
        f"https://host/m/{name}": content
        for name, content in {
            "modules.json": json.dumps(modules).encode(),
            "model_index.json": json.dumps(pipeline).encode(),
            "1_Pooling/config.json": b"{}",
            "2_Dense/config.json": b"{}",
            "2_Dense/model.safetensors": WEIGHTS,
            "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
        }.items()
    }
    assert names("https://host/m") == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
        "model_index.json", "modules.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_server_that_answers_everything_with_a_page(bucket, monkeypatch) -> None:
    real = bucket.open_source

    def anything(url: str, options: object = None, *, head_bytes: int = 1) -> object:
        bucket.files.setdefault(url, b"<html>Welcome</html>")
        return real(url, options)

    monkeypatch.setattr(base, "open_source", anything)
    bucket.files = {"http://host/m/config.json": b"{}"}
    assert "model.safetensors" not in names("http://host/m")


def test_a_server_that_refuses(bucket, monkeypatch) -> None:
    def refuses(url: str, options: object = None, *, head_bytes: int = 1) -> object:
        raise base.RemotePermissionError("host", "/m", "forbidden", status=403)

    monkeypatch.setattr(base, "open_source", refuses)
    monkeypatch.setattr(web, "read_page", lambda url, *_: refuses(url))
    with pytest.raises(PermissionError, match="forbidden"):
        list_model("http://host/m")


def test_a_server_that_says_403_for_what_is_not_there(bucket, monkeypatch) -> None:
    bucket.files = {"http://host/m/config.json": b"{}"}
    real = bucket.open_source

    def refuses(url: str, options: object = None, *, head_bytes: int = 1) -> object:
        if url not in bucket.files:
            raise base.RemotePermissionError("host", "/m", "forbidden", status=403)
        return real(url, options)

    monkeypatch.setattr(base, "open_source", refuses)
    assert names("http://host/m") == ["config.json"]


def test_a_server_that_is_down(bucket, monkeypatch) -> None:
    def down(url: str, options: object, most: int) -> bytes:
        raise base.RemoteError("host", "/m", "connection refused")

    monkeypatch.setattr(web, "read_page", down)
    monkeypatch.setattr(base, "open_source", lambda *_, **__: pytest.fail("asked again"))
    with pytest.raises(base.RemoteError, match="connection refused"):
        list_model("http://host/m")


# ---- indexes


def test_files_of_an_index() -> None:
    found = weight_files(INDEX, "unet/m.safetensors.index.json", "s3://b/m")
    assert found == ["unet/model-00001-of-00002.safetensors",
                     "unet/model-00002-of-00002.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "a\\b"])
def test_an_index_that_names_files_outside(name) -> None:
    index = json.dumps({"weight_map": {"a": "m.safetensors", "b": name}}).encode()
    with pytest.raises(base.RemoteError, match="leads out of the folder") as caught:
        weight_files(index, "m.safetensors.index.json", "https://user:pw@host/m?sig=secret")
    assert "pw" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": 1}', b"\xff"])
def test_what_is_no_index(index) -> None:
    with pytest.raises(base.RemoteError, match="is no index"):
        weight_files(index, "m.safetensors.index.json", "s3://b/m")


def test_places() -> None:
    assert place_of("https://user:pw@host:80/a/b?x#y") == ("host:80", "a/b")
    assert place_of("s3://bucket") == ("bucket", "")
