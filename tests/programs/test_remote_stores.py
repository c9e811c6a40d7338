"""A model in each kind of store, from its URL to the tensors that transformers makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_stores import FakeAzure, FakeGoogle, FakeHub, FakeStore
from fault_server import FaultServer
from remote_state import SECRET, start_obstore
from servers import S3, an_s3  # noqa: F401 - a fixture
from streamed_models import (
    NEEDS,
    a_llama,  # noqa: F401 - a fixture
    digest,
    home,  # noqa: F401 - a fixture
    load_in_child,
)

import fastst_patch
from fastst_patch import engine
from fastst_patch.sources.base import RemotePermissionError

transformers = pytest.importorskip("transformers", minversion="5.0", reason=NEEDS)

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning"),
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
]


def put(folder: Path, store: Callable[[str, bytes], object]) -> None:
    """Store the files of a folder."""
    for path in folder.iterdir():
        store(path.name, path.read_bytes())


def test_s3(empty_s3: S3, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With signatures, by the variables of the environment, here and in another process."""
    put(sharded, lambda name, content: empty_s3.put(f"models/tiny/{name}", content))
    for name, value in empty_s3.environment.items():
        monkeypatch.setenv(name, value)
    kind = transformers.AutoModelForCausalLM
    expected = digest(kind.from_pretrained(sharded))
    folder = fastst_patch.remote("s3://bucket/models/tiny")
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        assert digest(kind.from_pretrained(folder)) == expected
    assert {report.path for report in seen.reports} == {"s3"}
    done = load_in_child(folder)
    assert done.stdout.split() == [expected], done.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with (
        fastst_patch.patched(),
        pytest.raises(RemotePermissionError, match=r"^bucket/models/tiny/"),
    ):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("kind", [FakeGoogle, FakeAzure])
def test_other_buckets(sharded: Path, kind: type[FakeStore]) -> None:
    start_obstore()
    auto = transformers.AutoModelForCausalLM
    expected = digest(auto.from_pretrained(sharded))
    with kind() as store:
        put(sharded, lambda name, content: store.put(f"models/tiny/{name}", content))
        with fastst_patch.patched(storage_options=store.options):
            folder = fastst_patch.remote(f"{kind.scheme}://bucket/models/tiny")
            store.requests.clear()
            with fastst_patch.profile() as seen:
                assert digest(auto.from_pretrained(folder)) == expected
    assert {report.path for report in seen.reports} == {kind.scheme}
    asked_for = {Path(urllib.parse.unquote(request.path)).name for request in store.requests}
    assert asked_for == {path.name for path in sharded.glob("*.safetensors")}


def test_the_hub(sharded: Path, tmp_path: Path) -> None:
    """In other processes, where HF_ENDPOINT leads to a Hub on loopback."""
    expected = digest(transformers.AutoModelForCausalLM.from_pretrained(sharded))
    with FaultServer() as store, FakeHub(store) as hub:
        put(sharded, hub.put)
        environment = {**hub.environment, "HF_HOME": str(tmp_path / "hub")}
        made = subprocess.run(
            [sys.executable, "-m", "fastst_patch", "remote", "hf://org/repo"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        store.requests.clear()
        done = load_in_child(made.stdout.strip(), **environment)
        assert done.stdout.split() == [expected], done.stderr
    weights = {path.name for path in sharded.glob("*.safetensors")}
    assert {request.path[1:] for request in store.requests} == weights
    assert SECRET not in made.stdout + made.stderr + done.stderr
    assert all("authorization" not in request.headers for request in store.requests)
