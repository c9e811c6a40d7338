"""A cache of remote files in a test: a bucket in memory, and what is kept of it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest
from remote_bucket import Bucket

from fastst_patch.config import Config
from fastst_patch.sources import base
from fastst_patch.sources.cache import CachedSource, find_local, open_kept

MIB = 1 << 20
URL = "memory://bucket/model.safetensors"


def content(nbytes: int = 5 * MIB + 123) -> bytes:
    return random.Random(5).randbytes(nbytes)


@pytest.fixture(name="bucket")
def a_bucket(monkeypatch) -> Iterator[Bucket]:
    made = Bucket({URL: content()})
    monkeypatch.setattr(base, "open_source", made.open_source)
    yield made
    settled()


@pytest.fixture(name="config")
def caching(tmp_path) -> Config:
    return Config(remote_cache=str(tmp_path / "cache"))


def locate(url: str, config: Config):
    """A path, or a source, as for any load."""
    return find_local(url, config) or open_kept(url, config)


def settled() -> None:
    """Wait until complete files have got their names."""
    for thread in threading.enumerate():
        if thread.name == "fastst-cache":
            thread.join()


def read_all(source, step: int = MIB) -> bytes:
    """As the engine reads: in pieces, the last ones first."""
    got = bytearray(source.size)
    for begin in reversed(range(0, source.size, step)):
        source.read_into(begin, memoryview(got)[begin : begin + step])
    return bytes(got)


def kept(config: Config) -> list[str]:
    return sorted(os.path.splitext(name)[1] for name in os.listdir(config.remote_cache)
                  if name not in (".lock", "CACHEDIR.TAG"))  # fmt: skip


def fill(config: Config, url: str = URL) -> str:
    """Load a file once, and give its local path."""
    source = locate(url, config)
    assert isinstance(source, CachedSource)
    read_all(source)
    source.close()
    settled()
    found = locate(url, config)
    assert isinstance(found, str)
    return found
