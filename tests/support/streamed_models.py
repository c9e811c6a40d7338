"""A tiny model that is streamed by libraries: as files, on a web server, and in a child process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import FaultServer, Remote
from places import SUPPORT

from fastst_patch.cli import launcher
from fastst_patch.config import child_environment

NEEDS = "needs transformers 5"


class Served(FaultServer):
    """Folders on a web server."""

    def put(self, folder: Path, name: str = "m") -> str:
        """Serve what is in a folder; its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                self.files[f"/{name}/{relative}"] = Remote(path.read_bytes())
        return self.url(f"/{name}")

    def asked_for(self, name: str) -> list[str]:
        """Ranges that were asked for of files whose path ends so."""
        return [
            request.headers.get("range", "all")
            for request in self.requests
            if request.path.endswith(name)
        ]


@pytest.fixture(name="served")
def a_server() -> Iterator[Served]:
    """A web server for folders."""
    with Served() as server:
        yield server


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders of stand-ins lie with the test's own files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module", name="sharded")
def a_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason=NEEDS)
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def digest(module: Any) -> str:
    """Names, dtypes, shapes and bytes of a module's tensors."""
    found = hashlib.blake2b()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


_LOADING = """
import sys
sys.path.insert(0, sys.argv[2])
from transformers import AutoModelForCausalLM
from streamed_models import digest
print(digest(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""


def load_in_child(folder: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load a model in another process, patched unless the environment says no, and print it."""
    return subprocess.run(
        [sys.executable, "-c", _LOADING, folder, str(SUPPORT)],
        capture_output=True, text=True, check=False,
        env={**os.environ, **child_environment({}, launcher._site()), **environment},
        cwd="/",  # not the sources, which have no engine
    )  # fmt: skip
