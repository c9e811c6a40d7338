"""``hf://`` URLs, against a server that answers as the Hub does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_server as faults
import pytest
from fault_server import FaultServer
from huggingface_hub import constants
from kept_files import locate, read_all, settled
from remote_state import SECRET, assert_no_secret

from fastst_patch.config import Config
from fastst_patch.sources.base import (
    RemoteError,
    RemoteNotFoundError,
    RemotePermissionError,
    list_files,
    local_path,
    open_source,
)
from fastst_patch.sources.hub import _parsed

CONTENT = random.Random(8).randbytes(50_000)
COMMIT = "a" * 40
QUICK = {"max_tries": 3, "deadline": 20.0, "stall": 10.0, "backoff": 0.01}

pytestmark = pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning")


@pytest.fixture
def store() -> Iterator[FaultServer]:
    """Where the Hub redirects to."""
    with FaultServer({"/blob": CONTENT}) as server:
        yield server


@pytest.fixture
def hub(
    store: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultServer]:
    count = iter(range(1000))

    def answer(request: faults.Request) -> Any:
        if request.path.startswith("/org/repo/resolve/"):
            if request.headers.get("authorization") != f"Bearer {SECRET}":
                return faults.status(401)
            if not request.path.endswith("/model.safetensors"):
                return faults.status(404)
            return faults.redirect(302, store.url(f"/blob?sig={SECRET}{next(count)}"))
        return None

    with FaultServer() as server:
        server.faults = answer
        monkeypatch.setattr(constants, "ENDPOINT", server.url(""))
        template = server.url("") + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.mark.parametrize(
    ("url", "repo", "revision", "path"),
    [
        ("hf://org/repo/a/b.bin", "org/repo", None, "a/b.bin"),
        ("hf://org/repo@main/b.bin", "org/repo", "main", "b.bin"),
        ("hf://org/repo@refs/pr/7/a/b.bin", "org/repo", "refs/pr/7", "a/b.bin"),
        ("hf://org/repo@refs%2Fpr%2F7/b.bin", "org/repo", "refs/pr/7", "b.bin"),
        ("hf://org/repo@my%2Fbranch/b.bin", "org/repo", "my/branch", "b.bin"),
        ("hf://org/repo/a@b.bin", "org/repo", None, "a@b.bin"),
        ("hf://org/repo", "org/repo", None, ""),
        ("hf://org/repo@v1", "org/repo", "v1", ""),
    ],
)
def test_hub_urls(url: str, repo: str, revision: str | None, path: str) -> None:
    found = _parsed(url)
    assert (found.repo, found.revision, found.path) == (repo, revision, path)


def test_a_file_comes_from_where_the_hub_redirects_to(hub: FaultServer, store: FaultServer) -> None:
    url = "hf://org/repo@v1/model.safetensors"
    source = open_source(url, {**QUICK, "token": SECRET}, head_bytes=10)
    try:
        assert source.read(0, len(CONTENT)) == CONTENT
        assert (source.scheme, source.name) == ("hf", url)
        asked = "/org/repo/resolve/v1/model.safetensors"
        assert [one.path for one in hub.requests if "/resolve/" in one.path] == [asked]
        assert all("authorization" not in request.headers for request in store.requests)
        # The address expires: another one is asked for.
        store.faults = faults.at(2, faults.status(403))
        assert source.read(100, 100) == CONTENT[100:200]
        assert [one.path for one in hub.requests if "/resolve/" in one.path] == [asked] * 2
        assert_no_secret(source, source.identity)
    finally:
        source.close()


def test_a_private_repository(hub: FaultServer) -> None:
    with pytest.raises(RemotePermissionError) as caught:
        open_source("hf://org/repo/model.safetensors", {**QUICK, "token": False})
    assert_no_secret(caught.value)
    assert str(caught.value).startswith("hf://org/repo/model.safetensors: access denied")


def test_a_missing_file(hub: FaultServer) -> None:
    with pytest.raises(RemoteNotFoundError, match="no such file"):
        open_source("hf://org/repo/other", {**QUICK, "token": SECRET})
    with pytest.raises(RemoteNotFoundError, match="names no file"):
        open_source("hf://org/repo@v1", QUICK)


def test_a_file_in_the_cache_is_a_local_path(hub: FaultServer, tmp_path: Path) -> None:
    url = "hf://org/repo/model.safetensors"
    assert local_path(url) is None
    top = tmp_path / "cache" / "models--org--repo"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    cached = top / "snapshots" / COMMIT / "model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cached")
    assert local_path(url) == str(cached)
    assert local_path(f"hf://org/repo@{COMMIT}/model.safetensors") == str(cached)
    assert local_path("hf://org/repo@v2/model.safetensors") is None
    assert local_path("hf://org/repo") is None
    assert hub.requests == []


def test_requests_of_a_second_load(
    hub: FaultServer, store: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(remote_cache=str(tmp_path / "kept"), storage_options={**QUICK, "token": SECRET})

    def loaded(url: str) -> tuple[int, int]:
        """Requests to the Hub for the file, and bytes that came from where it redirects to."""
        hub.requests.clear()
        store.sent = 0
        found = locate(url, config)
        if not isinstance(found, str):
            assert read_all(found) == CONTENT
            found.close()
            settled()
        return sum("/resolve/" in one.path for one in hub.requests), store.sent

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    commit, branch = (f"hf://org/repo@{one}/model.safetensors" for one in (COMMIT, "main"))
    assert loaded(commit) == loaded(branch) == (1, len(CONTENT))
    assert loaded(commit) == (0, 0)
    assert loaded(branch) == (1, 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert loaded(branch) == (0, 0)


def test_offline_mode(hub: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (open_source, list_files):
        with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
            ask("hf://org/repo/model.safetensors", QUICK)
    assert hub.requests == []


def test_a_repository_is_listed_at_one_commit(hub: FaultServer) -> None:
    tree = [
        {"type": "file", "path": "unet/model.safetensors", "size": 7, "oid": "b1"},
        {"type": "directory", "path": "unet", "oid": "d"},
        {"type": "file", "path": "config.json", "size": 3, "oid": "b2"},
    ]
    answers = {
        "/api/models/org/repo/revision/v1": {"id": "org/repo", "sha": COMMIT},
        f"/api/models/org/repo/tree/{COMMIT}": tree,
    }

    def told(request: faults.Request) -> Any:
        if request.path not in answers:
            return faults.status(404)
        body = json.dumps(answers[request.path]).encode()

        def fault(exchange: faults.Exchange) -> None:
            exchange.headers = {"Content-Type": "application/json"}
            exchange.send_head(200, Content_Length=str(len(body)))
            exchange.sock.sendall(body)

        return fault

    hub.faults = told
    found = list_files("hf://org/repo@v1", {"token": SECRET})
    assert [(one.name, one.size) for one in found] == [
        ("config.json", 3),
        ("unet/model.safetensors", 7),
    ]
    assert found[1].url == f"hf://org/repo@{COMMIT}/unet/model.safetensors"
    hub.faults = lambda _: faults.status(401)
    with pytest.raises(RemotePermissionError, match="hf auth login") as caught:
        list_files("hf://org/repo@v1", {"token": SECRET})
    assert_no_secret(caught.value)
