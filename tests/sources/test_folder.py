"""`remote`: a folder that stands for a remote model."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from remote_bucket import Bucket

import fastst_patch
from fastst_patch.errors import OptionError
from fastst_patch.sources import base, folder, standin, web
from fastst_patch.sources.folder import remote

WEIGHTS = safetensors.numpy.save({"w": np.ones(4000, np.float32)}, {"format": "pt"})
URL = "s3://bucket/models/tiny"
INDEX = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer/vocab.txt": b"a\nb\n",
    "model.safetensors.index.json": INDEX,
    "m-1.safetensors": WEIGHTS,
    "m-2.safetensors": WEIGHTS,
    "pytorch_model.bin": b"PK\x03\x04 pickle",
    ".gitattributes": b"*.safetensors lfs",
    "flax_model.msgpack": b"msgpack",
}


def placed(url: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{url}/{name}": content for name, content in files.items()}


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> Bucket:
    made = Bucket(placed(URL, FILES))
    monkeypatch.setattr(base, "open_source", made.open_source)
    monkeypatch.setattr(base, "list_files", made.list_files)
    monkeypatch.setattr(web, "read_page", made.read_page)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return made


def stands_for(path: str) -> standin.StandIn:
    fd = os.open(path, os.O_RDONLY)
    try:
        found = standin.find(fd)
    finally:
        os.close(fd)
    assert found is not None
    return found


def below(path: str) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in Path(path).rglob("*") if one.is_file())


def test_small_files_are_there_and_weights_stand_in(bucket, tmp_path) -> None:
    path = remote(URL)
    assert below(path) == ["config.json", "m-1.safetensors", "m-2.safetensors",
                           "model.safetensors.index.json", "tokenizer/vocab.txt"]  # fmt: skip
    for name in ("config.json", "tokenizer/vocab.txt", "model.safetensors.index.json"):
        assert Path(path, name).read_bytes() == FILES[name]
    weights = os.path.join(path, "m-1.safetensors")
    assert stands_for(weights).url == f"{URL}/m-1.safetensors"
    assert os.path.getsize(weights) == len(WEIGHTS)
    with pytest.raises(safetensors.SafetensorError, match=r"patch\(\)"):
        safetensors.safe_open(weights, "np")
    assert path.startswith(str(tmp_path / "home" / "fastst-patch"))
    assert os.path.basename(path) == "tiny"  # what programs show as the model's name
    assert all(source.closed for source in bucket.opened)


def test_it_is_exported(bucket) -> None:
    assert fastst_patch.remote is remote
    assert "remote" in fastst_patch.__all__


def test_the_second_call_only_lists(bucket) -> None:
    path = remote(URL)
    opened = len(bucket.opened)
    assert remote(URL + "/") == path
    assert remote(URL) == path
    assert len(bucket.opened) == opened


def test_a_changed_model_is_another_folder(bucket) -> None:
    old = remote(URL)
    bucket.version += 1
    bucket.files[f"{URL}/config.json"] = b'{"model_type": "other"}'
    new = remote(URL)
    assert new != old
    assert Path(new, "config.json").read_bytes() == b'{"model_type": "other"}'
    assert Path(old, "config.json").read_bytes() == FILES["config.json"]
    assert stands_for(f"{new}/m-1.safetensors") != stands_for(f"{old}/m-1.safetensors")


def test_old_folders_are_removed_after_a_month(bucket) -> None:
    old = Path(remote(URL)).parent
    left = old.parent / ".new-killed"
    left.mkdir()
    then = time.time() - 40 * 86400
    os.utime(old, (then, then))
    os.utime(left, (then, then))
    bucket.version += 1
    assert os.path.isdir(remote(URL))
    assert not old.exists()
    assert not left.exists()


def test_a_folder_is_on_the_disk_before_it_has_its_name(bucket, monkeypatch) -> None:
    """After a crash of the machine it is whole, or not there."""
    synced: set[int] = set()
    rename, fsync = os.rename, os.fsync

    def syncing(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    def renaming(old: str, new: str) -> None:
        assert {os.stat(os.path.join(old, name)).st_ino for name in below(old)} <= synced
        synced.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    remote(URL)
    assert synced == set()


def test_a_folder_that_is_removed_in_part_has_no_name(bucket, monkeypatch) -> None:
    old = Path(remote(URL)).parent
    os.utime(old, (1, 1))
    bucket.version += 1

    def killed(path: str, **_: object) -> None:
        for one in Path(path).rglob("config.json"):
            one.unlink()
            raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(folder.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            remote(URL)
    bucket.version -= 1
    assert Path(remote(URL), "config.json").exists()


def test_a_folder_for_the_bytes(bucket, tmp_path) -> None:
    path = remote(URL, cache=str(tmp_path / "cache"))
    assert path.startswith(str(tmp_path / "cache"))
    assert stands_for(f"{path}/m-1.safetensors").cache == str(tmp_path / "cache")
    assert stands_for(f"{remote(URL)}/m-1.safetensors").cache is None


def test_many_threads_make_one_folder(bucket) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(remote(URL))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(os.listdir(Path(found[0]).parent.parent)) == 1  # nothing half made


def test_nothing_is_left_when_it_fails(bucket, tmp_path) -> None:
    bucket.files[f"{URL}/m-2.safetensors"] = b"PK\x03\x04" + b"x" * 100
    with pytest.raises(safetensors.SafetensorError, match="pickle"):
        remote(URL)
    assert os.listdir(tmp_path / "home" / "fastst-patch" / "models") == []


def test_one_file(bucket) -> None:
    path = remote(f"{URL}/m-1.safetensors")
    assert os.path.basename(path) == "m-1.safetensors"
    assert stands_for(path).url == f"{URL}/m-1.safetensors"
    assert remote(f"{URL}/m-1.safetensors") == path


def test_a_web_folder(bucket) -> None:
    url = "https://user:pw@host/m"
    bucket.files = placed("https://user:pw@host/m", FILES)
    path = remote(f"{url}?sig=secret")
    assert "m-2.safetensors" in below(path)
    for name in below(path):
        content = Path(path, name).read_bytes()
        assert b"secret" not in content
    assert "secret" not in path
    bucket.version += 1
    assert remote(f"{url}?sig=other") != path


def test_without_safetensors(bucket) -> None:
    bucket.files = placed(URL, {"config.json": b"{}", "pytorch_model.bin": b"PK"})
    with pytest.raises(FileNotFoundError, match="no safetensors file") as caught:
        remote(URL)
    assert "pytorch_model.bin is a pickle" in str(caught.value)
    bucket.files = placed(URL, {"config.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        remote(URL)
    bucket.files = {}
    with pytest.raises(FileNotFoundError, match="nothing is in this folder"):
        remote(URL)


def test_an_index_that_leads_out(bucket) -> None:
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    bucket.files[f"{URL}/model.safetensors.index.json"] = index
    with pytest.raises(base.RemoteError, match="leads out of the folder"):
        remote(URL)


def test_an_index_that_names_what_is_not_there(bucket, caplog) -> None:
    index = json.dumps({"weight_map": {"a": "m-9.safetensors"}}).encode()
    bucket.files[f"{URL}/model.safetensors.index.json"] = index
    remote(URL)
    assert "m-9.safetensors, which is not there" in caplog.text


def test_a_model_that_is_being_written(bucket, monkeypatch) -> None:
    real = bucket.list_files
    monkeypatch.setattr(
        base, "list_files",
        lambda *given: [base.Entry(one.name, one.size + 1, one.url, 1) for one in real(*given)],
    )  # fmt: skip
    with pytest.raises(base.RemoteChangedError, match="try again"):
        remote(URL)


def test_large_files_are_left_out(bucket, monkeypatch) -> None:
    monkeypatch.setattr(folder, "_LARGEST_SMALL", 10)
    assert below(remote(URL)) == ["m-1.safetensors", "m-2.safetensors", "tokenizer/vocab.txt"]


def test_local_paths_stand_for_themselves(bucket, tmp_path) -> None:
    assert remote(str(tmp_path)) == str(tmp_path)
    assert remote(tmp_path) == str(tmp_path)
    assert remote(f"file://{tmp_path}") == str(tmp_path)
    with pytest.raises(FileNotFoundError):
        remote(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        remote(f"file://{tmp_path}/missing")


def test_an_unknown_scheme(bucket, monkeypatch) -> None:
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"s3://"):
        remote("ftp://host/model")


@pytest.mark.parametrize(
    ("url", "revision", "wanted"),
    [
        ("hf://org/repo", "main", "hf://org/repo@main"),
        ("hf://org/repo/sub", "v1", "hf://org/repo@v1/sub"),
        ("hf://org/repo@v1", "v1", "hf://org/repo@v1"),
        ("hf://org/repo", "refs/pr/3", "hf://org/repo@refs%2Fpr%2F3"),
    ],
)
def test_a_revision(bucket, url, revision, wanted, monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    bucket.files = placed(wanted, FILES)
    assert stands_for(f"{remote(url, revision=revision)}/m-1.safetensors").url.startswith(wanted)


@pytest.mark.parametrize("url", ["s3://bucket/m", "https://host/m?sig=secret", "hf://org/r@v2"])
def test_a_revision_where_there_is_none(bucket, url) -> None:
    with pytest.raises(OptionError, match="revision='v1'") as caught:
        remote(url, revision="v1")
    assert "secret" not in str(caught.value)


def test_offline_it_is_the_folder_made_last(bucket, monkeypatch) -> None:
    first = remote(URL)
    os.utime(Path(first).parent, (1, 1))
    bucket.version += 1
    second = remote(URL)
    opened = len(bucket.opened)
    monkeypatch.setattr(base, "list_files", lambda *_: pytest.fail("asked while offline"))
    with fastst_patch.config_context(remote_offline=True):
        assert remote(URL) == second
        with pytest.raises(base.RemoteError, match="offline"):
            remote("s3://bucket/never")
    assert len(bucket.opened) == opened


def test_offline_a_model_of_the_hub_is_that_in_its_cache(bucket, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = tmp_path / "snapshots" / "abc"
    monkeypatch.setattr(
        base, "local_path",
        lambda url, _: f"{snapshot}/modules.json" if url == "hf://org/m/modules.json" else None,
    )  # fmt: skip
    assert remote("hf://org/m") == str(snapshot)
    with pytest.raises(base.RemoteError, match="offline"):
        remote("hf://org/other")


def test_paths_are_plain(bucket) -> None:
    url = "s3://bucket/a b/..;rm -rf ü"
    bucket.files = placed(url, {"w.safetensors": WEIGHTS})
    path = remote(url)
    assert re.fullmatch(r"[\w.-]+", os.path.basename(path))
    assert not os.path.basename(path).startswith(".")
