"""Stand-ins: found by us, refused by everything else, and never read as weights."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from remote_bucket import MemorySource

import fastst_patch
from fastst_patch.files import remote
from fastst_patch.sources import base, standin
from fastst_patch.sources import seal as seal_module
from fastst_patch.sources.names import identity_text, is_inside, public_url
from fastst_patch.sources.seal import is_sealed, sealed

NAME = "s3://bucket/models/model.safetensors"
TENSORS = {
    "a.weight": np.arange(60_000, dtype=np.float32).reshape(300, 200),
    "b": np.zeros((0, 3), np.float16),
    "c": np.ones(1, np.int8),
}


def source(tensors=TENSORS, name: str = NAME, metadata=None) -> MemorySource:
    return MemorySource(name, safetensors.numpy.save(tensors, metadata), ("etag", '"x"', 7))


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return str(tmp_path / "model.safetensors")


def written(path: str, of: MemorySource, cache: str | None = None) -> str:
    standin.write(path, of, standin.header_of(of), cache)
    return path


def found(path: str) -> standin.StandIn | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return standin.find(fd)
    finally:
        os.close(fd)


def test_it_says_what_it_stands_for(path) -> None:
    remote = source(metadata={"format": "pt"})
    assert found(written(path, remote, "/some/cache")) == standin.StandIn(
        NAME, remote.size, identity_text(remote.identity), "/some/cache"
    )
    found(path).check(remote)
    remote.identity = ("etag", '"y"', 7)
    with pytest.raises(base.RemoteChangedError, match=r"make the folder again"):
        found(path).check(remote)


def test_it_has_the_size_and_takes_no_room(path) -> None:
    remote = source({"w": np.zeros(8 << 20, np.uint8)})
    assert os.path.getsize(written(path, remote)) == remote.size
    assert os.stat(path).st_blocks * 512 < 100_000


def test_where_there_are_no_holes_it_takes_no_room_either(path, monkeypatch) -> None:
    remote = source({"w": np.zeros(8 << 20, np.uint8)})
    monkeypatch.setattr(standin, "_BLOCK", 1 << 30)  # each block seems to be that large
    assert os.path.getsize(written(path, remote)) < 100_000
    assert found(path).size == remote.size


CASES = {
    "plain": TENSORS,
    "one byte": {"w": np.ones(1, np.uint8)},
    "empty tensors": {"w": np.ones((0, 4), np.float32)},
    "none": {},
    "many": {f"layer.{i}.weight": np.ones(i, np.float16) for i in range(2000)},
}


@pytest.mark.parametrize("case", CASES)
def test_stock_refuses_it_with_our_text(path, case) -> None:
    written(path, source(CASES[case]))
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.safe_open(path, "np")
    text = str(caught.value)
    for part in (NAME, "holds no weights", "fastst_patch.patch()", "fastst-patch run"):
        assert part in text
    with pytest.raises(safetensors.SafetensorError, match="holds no weights"):
        safetensors.numpy.load_file(path)
    with pytest.raises(safetensors.SafetensorError, match="holds no weights"):
        safetensors.numpy.load(Path(path).read_bytes())
    assert found(path) is not None


def test_programs_that_read_headers_find_the_real_ones(path) -> None:
    written(path, source(metadata={"format": "pt", "k": "v"}))
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {k: v for k, v in header["__metadata__"].items() if k != "fastst_patch"} == {
        "format": "pt",
        "k": "v",
    }
    real = {name: (info["dtype"], info["shape"]) for name, info in header.items()
            if name in TENSORS}  # fmt: skip
    assert real == {"a.weight": ("F32", [300, 200]), "b": ("F16", [0, 3]), "c": ("I8", [1])}
    ours = [name for name in header if name not in (*TENSORS, "__metadata__")]
    assert len(ours) == 1
    assert header[ours[0]]["dtype"] == "F32"  # counted as one of theirs
    assert header[ours[0]]["shape"] == [0]


def test_who_reads_tensors_by_the_header_finds_no_bytes(path) -> None:
    written(path, source())
    with open(path, "rb") as file:
        nbytes = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(nbytes))
        for name in TENSORS:
            file.seek(8 + nbytes + header[name]["data_offsets"][0])
            assert file.read(1) == b""


def test_names_that_need_escapes(path) -> None:
    name = "s3://bucket/a \"b`\\'ü\n/model.safetensors"
    written(path, source(name=name))
    assert found(path).url == name
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.safe_open(path, "np")
    assert "a%20%22b%60%5C%27%C3%BC%0A/model" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b'\x10\0\0\0\0\0\0\0{"fastst_patch s',
        b'\x80\0\0\0\0\0\0\0{"fastst_patch stand-in: but nothing follows',
        safetensors.numpy.save(TENSORS),
        safetensors.numpy.save(TENSORS, {"fastst_patch": "{}"}),
    ],
)
def test_other_files_are_none(path, content) -> None:
    Path(path).write_bytes(content)
    assert found(path) is None


def test_one_of_a_later_version(path, monkeypatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(standin, "_VERSION", 2)
        written(path, source())
    with pytest.raises(base.RemoteError, match=r"update fastst-patch"):
        found(path)


def test_it_is_never_written_over_a_file(path) -> None:
    Path(path).write_bytes(b"weights")
    with pytest.raises(FileExistsError):
        written(path, source())
    assert Path(path).read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04" + b"x" * 100, "pickle"),
        (b"\x80\x02}q\x00." + b"x" * 100, "pickle"),
        (b"<!DOCTYPE html><html>" + b"x" * 100, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"", "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        (b'\x09\0\0\0\0\0\0\0{"a":1}xx', "is not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        (b'\x07\0\0\0\0\0\0\0{"a":1}', "is not a safetensors file"),
    ],
)
def test_no_stand_in_for_other_files(content, says) -> None:
    with pytest.raises(safetensors.SafetensorError, match=says) as caught:
        standin.header_of(MemorySource(NAME, content))
    assert str(caught.value).startswith("Error while deserializing header: s3://bucket/models/")


def test_no_stand_in_for_a_stand_in(path) -> None:
    content = Path(written(path, source())).read_bytes()
    with pytest.raises(safetensors.SafetensorError, match="itself a stand-in"):
        standin.header_of(MemorySource(NAME, content))


def test_no_more_than_the_header_is_read() -> None:
    remote = source({"w": np.zeros(8 << 20, np.uint8)})
    standin.header_of(remote)
    assert sum(nbytes for _, nbytes in remote.ranges) < 1000


def test_what_a_url_holds_stays_in_this_process(path) -> None:
    name = "https://host/m/model.safetensors"
    written(path, source(name=name))
    standin.remember(name, f"{name}?Signature=hunter2")
    assert found(path).full_url == f"{name}?Signature=hunter2"
    assert b"hunter2" not in Path(path).read_bytes()


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://user:pw@host:8000/a/b?sig=x#y", "https://host:8000/a/b"),
        ("HTTP://host/a", "http://host/a"),
        ("https://host/a@b/c", "https://host/a@b/c"),
        ("s3://bucket/what?is#this", "s3://bucket/what?is#this"),
        ("hf://org/repo@main/x", "hf://org/repo@main/x"),
    ],
)
def test_public_urls(url, public) -> None:
    assert public_url(url) == public


@pytest.mark.parametrize("name", ["a", "a/b.json", "..a/b", "a b/c..", ".hidden"])
def test_names_inside(name) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "name", ["", "/a", "..", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0", "../../etc/passwd"]
)
def test_names_that_lead_out(name) -> None:
    assert not is_inside(name)


# ---- files that pretend to be one ----

RECORD = {"version": 1, "url": NAME, "size": 9, "identity": "x", "cache": None}
PRETENDED = {
    "no JSON": '"\\x"',
    "not of UTF-8": '"\xff"',
    "nested": json.dumps("[" * 20_000),
    "no object": json.dumps("[1]"),
    "empty": json.dumps("{}"),
    "without a seal": json.dumps(json.dumps(RECORD)),
    **{
        f"seal {seal!r}": json.dumps(json.dumps({**RECORD, "seal": seal}))
        for seal in (None, 5, [], "", "0" * 64, "\ud800", "\xe9")
    },
}


def pretend(path: str, record: str) -> str:
    """A file that begins as a stand-in does."""
    text = (
        '{"fastst_patch stand-in: x":{"dtype":"U8","shape":[0],"data_offsets":[1,0]},'
        f'"__metadata__":{{"fastst_patch":{record}}}}}'
    ).encode("latin-1")
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text)
    return path


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize("case", PRETENDED)
def test_what_is_none_gets_stocks_answer(path, stock, fast, agree, case, has_key) -> None:
    if has_key:
        sealed("")
    pretend(path, PRETENDED[case])
    assert found(path) is None
    agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
    agree(lambda: fast.safe_open(path, "np"), lambda: stock.safe_open(path, "np"))


@pytest.mark.parametrize("change", ["url", "size", "identity", "cache", "more"])
def test_a_seal_is_for_all_of_a_record(path, change, caplog) -> None:
    written(path, source())
    text = Path(path).read_bytes()
    (begin,) = struct.unpack("<Q", text[:8])
    record = json.loads(json.loads(text[8 : 8 + begin])["__metadata__"]["fastst_patch"])
    record[change] = {"size": 10}.get(change, "s3://elsewhere/x")
    standin._warn_of_others.cache_clear()
    pretend(path, json.dumps(json.dumps(record)))
    assert found(path) is None
    assert "not made with the key" in caplog.text


def test_stand_ins_of_other_users_are_not_followed(
    path, tmp_path, stock, fast, agree, monkeypatch
) -> None:
    written(path, source())
    assert found(path) is not None
    for home in ("other", "third"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        assert found(path) is None
        agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
        sealed("")  # from the second on, they have a key of their own
        assert found(path) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert found(path) is not None


def test_the_key_is_for_its_owner_alone(path, tmp_path) -> None:
    assert not is_sealed("a", "")
    seal = sealed("a")
    key = tmp_path / "home" / "fastst-patch" / "key"
    assert (key.stat().st_mode & 0o777, key.stat().st_size) == (0o600, 32)
    assert sealed("a") == seal != sealed("b")
    assert is_sealed("a", seal)
    assert not is_sealed("b", seal)
    key.write_bytes(b"torn")  # the machine went down while it was made
    assert not is_sealed("a", seal)
    assert is_sealed("a", sealed("a"))


def test_a_key_that_is_mounted_for_reading_is_enough(path, monkeypatch) -> None:
    seal = sealed("a")
    monkeypatch.setattr(seal_module, "_made", None)
    assert sealed("a") == seal


def test_where_no_key_can_be_written_the_error_says_what_to_do(path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/home")
    with pytest.raises(OSError, match=r"set XDG_CACHE_HOME to a folder of yours") as caught:
        sealed("a")
    assert caught.value.filename == "/dev/null/home/fastst-patch/key"


def test_none_that_names_itself_in_an_error(raw, stock, fast, agree) -> None:
    path = raw.write(raw.pack('{"fastst_patch stand-in: ":5}'))
    agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
    path = raw.write(raw.pack('"fastst_patch stand-in: "'))
    agree(lambda: fast.load_file(path), lambda: stock.load_file(path))
    with fastst_patch.config_context(small_file_bytes=1 << 20):
        agree(lambda: fast.load_file(path), lambda: stock.load_file(path))


def test_one_that_leads_to_itself_is_refused(path, fast, monkeypatch) -> None:
    """As in huggingface_hub's cache, where a repository holds a stand-in for its own file."""
    written(path, source(name="hf://org/model/model.safetensors"))
    monkeypatch.setattr(remote, "local_path", lambda url, options: path)
    for load in (fast.load_file, lambda path: fast.safe_open(path, "pt")):
        with pytest.raises(safetensors.SafetensorError, match="is itself a stand-in"):
            load(path)
