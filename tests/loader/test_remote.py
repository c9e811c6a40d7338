"""The explicit loader's classes with URLs, over a source in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import bits, of_all_dtypes
from memory_source import Store, served

import fastst_patch
from fastst_patch import (
    FaststError,
    ParallelLoader,
    RankError,
    SafeTensorsFileLoader,
    engine,
    fastsafe_open,
    load_sharded,
)
from fastst_patch.sources.base import RemoteError, RemoteNotFoundError
from fastst_patch.stock import SafetensorError

pytestmark = pytest.mark.usefixtures("nothing_left")

FOLDER = "memory://here/all"
QUERY = "?sig=SECRET"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return of_all_dtypes(tmp_path_factory.mktemp("all"), 3)


@pytest.fixture(scope="module")
def expected(paths, stock) -> dict[str, Any]:
    return {name: bits(t) for path in paths for name, t in stock.load_file(path).items()}


@pytest.fixture
def store(paths) -> Iterator[Store]:
    with served({f"{FOLDER}/{Path(p).name}": Path(p).read_bytes() for p in paths}) as found:
        yield found
    gc.collect()  # threads that open files leave cycles where one fails
    assert engine.counters()["fed_files"] == 0
    assert all(source.cancelled for source in found.opened)


@pytest.fixture
def urls(store) -> list[str]:
    return [url + QUERY for url in store.files]


@pytest.mark.parametrize("options", [{}, {"tensors": "owned"}, {"host_memory_budget": 0}], ids=str)
def test_parallel_loader(urls, expected, watch, options) -> None:
    with watch() as seen, ParallelLoader(None, urls, use_tqdm_on_load=False, **options) as loader:
        given = {name: bits(tensor) for name, tensor in loader.iterate_weights()}
    assert given == expected
    assert {report.path for report in seen.reports} == {"memory"}
    assert not any("SECRET" in report.file for report in seen.reports)


def test_tensors_come_as_they_arrive(urls, store, expected) -> None:
    """The first one is there while later ones wait."""
    with ParallelLoader(None, urls[:1], use_tqdm_on_load=False) as loader:
        tensors = loader.iterate_weights()
        assert bits(next(tensors)[1])
        tensors.close()


def test_file_loader(urls, expected, watch) -> None:
    with watch() as seen, SafeTensorsFileLoader(None, "cpu") as loader:
        loader.add_filenames({0: urls})
        assert set(loader.get_keys()) == set(expected)
        buffer = loader.copy_files_to_device()
        assert {name: bits(buffer.get_tensor(name)) for name in reversed(loader.get_keys())} == (
            expected
        )
        buffer.close()
    assert {report.path for report in seen.reports} == {"memory"}


def test_fastsafe_open(urls, expected) -> None:
    with fastsafe_open(urls) as opened:
        assert {name: bits(opened.get_tensor(name)) for name in opened.keys()} == expected  # noqa: SIM118


@pytest.mark.parametrize("kind", ["folder", "index", "files"])
def test_load_sharded(urls, store, expected, kind) -> None:
    if kind == "index":
        weights = {name: Path(url).name.partition("?")[0] for url in urls for name in ["x" + url]}
        import json

        store.files[f"{FOLDER}/model.safetensors.index.json"] = json.dumps(
            {"weight_map": weights}
        ).encode()
    given = {"folder": FOLDER, "index": f"{FOLDER}/model.safetensors.index.json", "files": urls}
    found = load_sharded(given[kind])
    assert {name: bits(tensor) for name, tensor in found.items()} == expected


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "memory://x", "a?b", ""])
def test_an_index_that_leads_elsewhere_is_refused(store, name) -> None:
    import json

    url = f"{FOLDER}/model.safetensors.index.json"
    store.files[url] = json.dumps({"weight_map": {"a": name}}).encode()
    with pytest.raises(ValueError, match="not beside it"):
        load_sharded(url)


def test_an_empty_folder(store) -> None:
    with pytest.raises(RankError, match="no safetensors files"):  # as of a local one
        load_sharded("memory://here/nothing")


def test_errors(urls, store) -> None:
    with pytest.raises(RemoteNotFoundError) as missing:
        ParallelLoader(None, [*urls, f"{FOLDER}/no{QUERY}"], use_tqdm_on_load=False)._open()
    with pytest.raises(FaststError, match="reads no URLs") as refused:
        SafeTensorsFileLoader(None, "xpu:0").add_filenames({0: urls})
    first = next(iter(store.files))
    store.files[first] = b"rubbish!" + store.files[first]
    with pytest.raises(SafetensorError) as bad:
        SafeTensorsFileLoader(None, "cpu").add_filenames({0: urls})
    for caught in (missing, refused, bad):
        assert "SECRET" not in str(caught.value)


def test_reads_that_fail(urls, store) -> None:
    def before(at: int, nbytes: int) -> None:
        if at > 0:
            raise RemoteError("here", "x", "it broke", status=500)

    store.before = before
    with ParallelLoader(None, urls, use_tqdm_on_load=False) as loader:
        with pytest.raises(RemoteError, match="it broke"):
            list(loader.iterate_weights())


def test_to_a_device(cuda, urls, expected) -> None:
    with ParallelLoader(None, urls, use_tqdm_on_load=False, device="cuda") as loader:
        for name, tensor in loader.iterate_weights():
            assert torch.is_tensor(tensor)
            assert bits(tensor) == expected[name]
    with fastst_patch.profile() as seen:
        fastsafe_open(urls, device="cuda").close()
    assert {report.path for report in seen.reports} <= {"memory"}
