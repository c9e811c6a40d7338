"""Cases of ranks that load remote files: what each of them fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases_forms import FORMS, Me, full_of, way_of
from memory_source import Store, served
from sharded import assert_tensors, load_sharded

import fastst_patch
from fastst_patch.sources.base import RemoteError

FOLDER = "memory://here/model"


def _contents(files: list[str]) -> dict[str, bytes]:
    return {f"{FOLDER}/{Path(file).name}": Path(file).read_bytes() for file in files}


def fetched(rank: Any, files: list[str], form: str, **way: Any) -> dict[str, Any]:
    """Bytes that a rank asks for in a load of a folder, and the paths of its reports."""
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    with way_of(rank, way) as options, served(_contents(files)) as store:
        if rank.runtime is not None:  # the first load to a device is read back and compared
            load_sharded([FOLDER], None, plan, **options)
            store.reads.clear()
        with fastst_patch.profile() as seen:
            result = load_sharded([FOLDER], None, plan, **options)
        assert_tensors(result, full, expect)
        return {"bytes": store.nbytes, "paths": sorted({one.path for one in seen.reports})}


def fetched_by_http(rank: Any, files: list[str], url: str) -> None:
    """A load of a folder of a web server, which counts what it sends."""
    urls = [f"{url}/{Path(file).name}" for file in files]
    full = full_of(files)
    plan, expect = FORMS["rows"](full, Me(rank.rank, rank.world))
    assert_tensors(load_sharded(urls, None, plan, chunk_bytes=256 << 10), full, expect)


def failing(rank: Any, files: list[str], form: str, what: str) -> None:
    """A load that fails on rank 1; then one that does not."""
    full = full_of(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    urls = sorted(_contents(files))
    with served(_contents(files)) as store:
        if rank.rank == 1:
            _break(store, urls[-1], what)
        try:
            load_sharded(urls, None, plan)
        finally:
            store.before = lambda at, nbytes: None
            store.versions.clear()
            store.files.update(_contents(files))
            assert_tensors(load_sharded(urls, None, plan), full, expect)


def _break(store: Store, url: str, what: str) -> None:
    def before(at: int, nbytes: int) -> None:
        if nbytes > 16384:
            raise RemoteError("here", "model", "it broke", status=503)

    if what == "reads":
        store.before = before
    elif what == "version":
        store.versions[url] = 2
    else:
        del store.files[url]
