"""Ranks load remote files: each byte is fetched by one of them, and errors are shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sharded
from fault_server import FaultServer
from ranks import Case, Ran

from fastst_patch import engine
from fastst_patch.sources.base import HEAD_BYTES

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

WORLD = 4
WAYS = {
    "cpu": {"chunk_bytes": 256 << 10},
    "owned": {"tensors": "owned", "chunk_bytes": 256 << 10},
    "cuda": {"device": "cuda", "chunk_bytes": 256 << 10},
}
FORMS = ("rows", "last", "whole", "alternating", "owners")
BROKEN = {"reads": "it broke", "version": "another file", "missing": "no such file"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of 12 MB."""
    folder = tmp_path_factory.mktemp("remote")
    found = []
    for number in range(2):
        path = folder / f"part-{number}.safetensors"
        sharded.write_file(path, [(f"{number}.w{k}", "BF16", (1024, 1024)) for k in range(6)])
        found.append(str(path))
    return found


@pytest.fixture(scope="module")
def server(files: list[str]) -> Iterator[FaultServer]:
    with FaultServer({f"/m/{Path(file).name}": Path(file).read_bytes() for file in files}) as found:
        yield found


@pytest.fixture(scope="module")
def ran(nursery, files, server) -> Ran:
    cases = [
        Case("cases_remote.fetched", {"files": files, "form": form, **way}, name=f"{name}: {form}")
        for name, way in WAYS.items()
        for form in FORMS
    ]
    cases += [
        Case("cases_remote.failing", {"files": files, "form": "last", "what": what}, name=what)
        for what in BROKEN
    ]
    by_http = {"files": files, "url": server.url("/m")}
    cases.append(Case("cases_remote.fetched_by_http", by_http, name="http"))
    return nursery.run(cases, WORLD)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_each_byte_is_fetched_once(ran, files, way, form) -> None:
    values = ran.values(f"{way}: {form}")
    headers = WORLD * len(files) * 16384
    needed = sum(os.path.getsize(file) for file in files)
    assert sum(one["bytes"] for one in values) <= 1.02 * needed + headers
    assert {path for one in values for path in one["paths"]} == {"memory"}


def test_a_server_sends_each_byte_once(ran, files, server) -> None:
    """And to each rank the first bytes of each file, in which the header is."""
    ran.values("http")
    nbytes = sum(map(os.path.getsize, files))
    assert nbytes <= server.sent <= 1.02 * nbytes + WORLD * len(files) * HEAD_BYTES


@pytest.mark.parametrize("what", BROKEN)
def test_errors_are_shared(ran, what) -> None:
    for error in ran.errors(what):
        assert error.type == "RankError"
        assert error.rank == 1
        assert BROKEN[what] in error.text
