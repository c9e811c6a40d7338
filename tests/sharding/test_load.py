"""load_sharded over gloo: each rank gets torch's own slice of stock's tensor, bit for bit.

The cases run in the ranks' processes (cases_forms.py, cases_files.py), many in one group.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
import torch.distributed as dist
from cases_files import PLACED
from cases_forms import FORMS
from ranks import Case, Nursery, Ran

import fastst_patch
from fastst_patch import engine
from fastst_patch.sharding.source import Source

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

SMALL = {"chunk_bytes": 64 << 10, "threads": 2}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "views": {"contiguous": False},
    "mmap": {"io": "mmap"},
    "buffered": {"io": "buffered", **SMALL},
    "direct": {"io": "direct", **SMALL},
    "owned": {"tensors": "owned", **SMALL},
    "drop": {"page_cache": "drop", **SMALL},
    "cuda": {"device": "cuda", **SMALL},
    "cuda-direct": {"device": "cuda:1", "io": "direct", **SMALL},
    "cuda-owned": {"device": "cuda", "tensors": "owned", **SMALL},
    "cuda-little": {"device": "cuda", "device_memory_budget": 100_000, **SMALL},
}
# Not every way is tried with every number of ranks, and ways that differ little from others are
# not tried with all forms.
FEW = ("rows", "last", "alternating", "steps", "owners", "each its own")
IN_LITTLE = ("mmap", "buffered", "drop", "cuda-owned", "cuda-direct")
WAYS_OF = {
    1: ("default", "views", "buffered", "cuda"),
    2: ("default", "direct", "cuda"),
    4: tuple(WAYS),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of every dtype and shape."""
    return [str(file) for file in sharded.write_zoo(tmp_path_factory.mktemp("zoo"))]


def _form_cases(zoo: list[str], world: int) -> dict[tuple[str, str], Case]:
    return {
        (way, form): Case("cases_forms.form", {"files": zoo, "form": form, **WAYS[way]},
                          name=f"{way}: {form}")
        for way in WAYS_OF[world]
        for form in (FEW if world > 2 and way in IN_LITTLE else FORMS)
    }  # fmt: skip


@pytest.fixture(scope="module")
def formed(nursery: Nursery, zoo: list[str]) -> dict[int, Ran]:
    """All forms in all ways, for each number of ranks."""
    return {world: nursery.run(list(_form_cases(zoo, world).values()), world) for world in WAYS_OF}


@pytest.mark.parametrize(
    ("world", "way", "form"), [(world, *key) for world in WAYS_OF for key in _form_cases([], world)]
)
def test_form(formed, zoo, world: int, way: str, form: str) -> None:
    """Each case compares every tensor in its ranks; here the sizes must add up."""
    total = sum(end - begin for file in zoo for begin, end in sharded.data_offsets(file).values())
    values = formed[world].values(_form_cases(zoo, world)[way, form])
    if form in ("whole", "empty mapping", "replicate"):
        assert values == [total] * world
    elif form in ("callable", "rows", "owners") and world > 1:
        assert total <= sum(values) < total * world


def test_all_ended(formed) -> None:
    for ran in formed.values():
        ran.assert_ended()


# ---------------------------------------------------------------- groups

GROUPED = ["rows", "alternating", "owners", "each its own"]


@pytest.fixture(scope="module")
def grouped(nursery, zoo) -> Ran:
    cases = [
        Case("cases_forms.groups", {"files": zoo, "forms": GROUPED, **WAYS[way]}, name=way)
        for way in ("default", "direct", "cuda")
    ]
    for way in ("default", "buffered", "cuda"):
        arguments = {"files": zoo, "times": 4, "met": True, **WAYS[way]}
        cases.append(Case("cases_files.two_threads", arguments, name=f"threads: {way}"))
    cases.append(Case("cases_forms.views_by_default", {"files": zoo}, name="views"))
    cases.append(Case("cases_forms.rounds", {"files": zoo}, name="rounds"))
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", ["default", "direct", "cuda"])
def test_subgroups_side_by_side(grouped, way) -> None:
    """Ranks 1, 3 while 0, 2 load; groups of one; the default group by None and by name."""
    grouped.values(way)


def test_columns_are_views_by_default(grouped) -> None:
    assert all(count > 0 for count in grouped.values("views"))


def test_ranks_exchange_three_messages(grouped) -> None:
    """The reports of opening, the requests, and the errors. Each exchange costs milliseconds."""
    assert grouped.values("rounds") == [3] * 4


@pytest.mark.parametrize("way", ["default", "buffered", "cuda"])
def test_two_groups_of_the_same_ranks_in_threads(grouped, way) -> None:
    grouped.values(f"threads: {way}")


# The cases below hung once, so each has its own ranks and a short timeout.


@pytest.mark.parametrize("server", [False, True], ids=["file", "server"])
def test_two_groups_meet_first_in_threads(nursery, zoo, server) -> None:
    """Each thread connects its group without waiting for the other thread.

    Also by a server's store, to which a process has one connection, where one thread waits at a
    time.
    """
    if server and not hasattr(dist.Store, "clone"):
        pytest.skip("this torch has no second connection to a store: see docs/programs.md")
    case = Case("cases_files.two_threads", {"files": zoo, "times": 2, "met": False}, name="first")
    nursery.run([case], 2, timeout=10, limit=30, server=server).values(case)


@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_list_of_files_that_some_see(nursery, zoo, named) -> None:
    """The others use the list of a rank that sees it, which need not be rank 0."""
    cases = [
        Case("cases_files.some_see_the_list", {"files": zoo, "named": named, "seen": seen},
             name=str(seen))
        for seen in ([0], [1], [1, 2])
    ]  # fmt: skip
    unseen = Case("cases_files.some_see_the_list", {"files": zoo, "named": named, "seen": []},
                  name="unseen")  # fmt: skip
    ran = nursery.run([*cases, unseen], 3)
    for case in cases:
        ran.values(case)
    for outcome in ran.of(unseen):
        assert "No such file" in outcome.error.text
        assert outcome.error.type == "RankError"


def test_ranks_in_different_numbers_of_groups(nursery, zoo) -> None:
    """Some ranks have loaded in groups that others are not in; then all load together."""
    case = Case("cases_forms.uneven_groups", {"files": zoo[:1]}, name="uneven")
    nursery.run([case], 4, timeout=10, limit=40).values(case)


def test_a_rank_outside_the_group(nursery, zoo) -> None:
    case = Case("cases_forms.outside", {"files": zoo[:1]}, name="outside")
    ran = nursery.run([case], 2, timeout=10, limit=40)
    assert ran.values(case) == ["loaded", "ValueError"]


@pytest.mark.parametrize("way", ["default", "buffered", "cuda"])
def test_without_a_group(nursery, zoo, way) -> None:
    """One process without torch.distributed: every form, over one rank."""
    case = Case("cases_forms.no_group", {"files": zoo, "forms": list(FORMS), **WAYS[way]}, name="x")
    ran = nursery.run([case], 1, group=False)
    ran.values(case)
    ran.assert_ended()


# ---------------------------------------------------------------- DTensor

MESHES = [([4], 4, name) for name, words in PLACED.items() if len(words) == 1]
MESHES += [([2, 2], 4, name) for name, words in PLACED.items() if len(words) == 2]
MESHES += [([2], 2, "shard 0"), ([1, 2], 2, "shard 0 twice"), ([2, 1], 2, "shard 1, shard 0")]


def _mesh_cases(zoo: list[str], world: int) -> list[Case]:
    cases = [
        Case("cases_files.placed",
             {"files": zoo, "placements": name, "mesh_of": mesh, **WAYS[way]},
             name=f"{way}: {mesh} {name}")
        for mesh, ranks, name in MESHES if ranks == world
        for way in ("default", "cuda")
    ]  # fmt: skip
    cases.append(Case("cases_files.placed_spec", {"files": zoo}, name="spec"))
    cases.append(Case("cases_files.partial", {"files": zoo}, name="partial"))
    if world == 4:
        cases.append(Case("cases_files.sub_mesh", {"files": zoo}, name="sub-mesh"))
    return cases


@pytest.fixture(scope="module")
def meshed(nursery, zoo) -> dict[int, Ran]:
    return {world: nursery.run(_mesh_cases(zoo, world), world) for world in (2, 4)}


@pytest.mark.parametrize("way", ["default", "cuda"])
@pytest.mark.parametrize(("mesh", "world", "name"), MESHES)
def test_placements(meshed, mesh, world, name, way) -> None:
    """Tensors equal those of distribute_tensor, also on meshes of two dimensions."""
    meshed[world].values(f"{way}: {mesh} {name}")


@pytest.mark.parametrize("world", [2, 4])
def test_shard_is_the_spec_of_its_dimension(meshed, world) -> None:
    meshed[world].values("spec")


def test_a_dimension_of_a_mesh(meshed) -> None:
    meshed[4].values("sub-mesh")


@pytest.mark.parametrize("world", [2, 4])
def test_partial_is_refused(meshed, world) -> None:
    for error in meshed[world].values("partial"):
        assert error is not None
        assert "ValueError" in error["bases"], error
        assert "F32.7x4" in error["text"]


# ---------------------------------------------------------------- names of files


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory) -> Path:
    """A model's folder: two of the files, their index, and other files."""
    path = tmp_path_factory.mktemp("model")
    names = []
    for file in zoo[:2]:
        names.append(Path(file).name)
        (path / names[-1]).symlink_to(file)
    weights = {name: names[k] for k in range(2) for name in sharded.data_offsets(zoo[k])}
    index = {"metadata": {"total_size": 1}, "weight_map": dict(sorted(weights.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "model.bin").write_bytes(b"no safetensors")
    return path


@pytest.fixture(scope="module")
def bare(zoo, tmp_path_factory) -> Path:
    """A folder of files without an index."""
    path = tmp_path_factory.mktemp("bare")
    for file in zoo[:2]:
        (path / Path(file).name).symlink_to(file)
    return path


NAMED = ("one", "list", "tuple", "folder", "bare", "index", "path", "paths", "folder path")


@pytest.fixture(scope="module")
def named(nursery, zoo, folder, bare) -> Ran:
    index = str(folder / "model.safetensors.index.json")
    two = zoo[:2]
    means = {
        "one": {"what": zoo[0], "files": zoo[:1]},
        "list": {"what": two, "files": two},
        "folder": {"what": str(folder), "files": two},
        "bare": {"what": str(bare), "files": two},
        "index": {"what": index, "files": two},
        "path": {"what": zoo[0], "files": zoo[:1], "as_path": True},
        "paths": {"what": two, "files": two, "as_path": True},
        "folder path": {"what": str(folder), "files": two, "as_path": True},
    }
    cases = [Case("cases_files.named", arguments, name=name) for name, arguments in means.items()]
    cases.append(Case("cases_files.tuple_of_files", {"files": two}, name="tuple"))
    return nursery.run(cases, 2)


@pytest.mark.parametrize("name", NAMED)
def test_names_of_files(named, name) -> None:
    named.values(name)


# ---------------------------------------------------------------- tensors handed out

DTYPES = ("float32", "bfloat16", "float64")
HELD_WAYS = ("default", "buffered", "direct", "owned", "cuda", "cuda-owned")


@pytest.fixture(scope="module")
def handed_out(nursery, zoo) -> Ran:
    cases = [
        Case("cases_files.cast", {"files": zoo, "dtype": dtype, "form": form, **WAYS[way]},
             name=f"{way}: {form} as {dtype}")
        for dtype in DTYPES for form in ("rows", "last") for way in ("default", "direct", "cuda")
    ]  # fmt: skip
    cases += [
        Case("cases_files.private", {"files": zoo, "form": form, **WAYS[way]},
             name=f"{way}: {form} is private")
        for form in ("whole", "rows", "last") for way in HELD_WAYS
    ]  # fmt: skip
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", ["default", "direct", "cuda"])
@pytest.mark.parametrize("form", ["rows", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(handed_out, dtype, form, way) -> None:
    handed_out.values(f"{way}: {form} as {dtype}")


@pytest.mark.parametrize("way", HELD_WAYS)
@pytest.mark.parametrize("form", ["whole", "rows", "last"])
def test_tensors_are_a_ranks_own(handed_out, form, way) -> None:
    """Writes change neither the file nor other ranks' tensors; each outlives the others."""
    handed_out.values(f"{way}: {form} is private")


# ---------------------------------------------------------------- options of each rank

OTHERS: dict[str, list[dict[str, Any]]] = {
    "io": [{"io": "direct"}, {"io": "buffered"}, {}, {"io": "mmap"}],
    "chunks": [{"io": "buffered", "chunk_bytes": 65536}, {"io": "buffered", "threads": 1}],
    "memory": [{"tensors": "owned"}, {"tensors": "dlpack", "io": "direct"}],
}


@pytest.fixture(scope="module")
def mixed(nursery, zoo) -> Ran:
    return nursery.run([
        Case("cases_files.own_options", {"files": zoo, "form": form, "each": each},
             name=f"{name}: {form}")
        for name, each in OTHERS.items() for form in ("rows", "last", "whole")
    ], 4)  # fmt: skip


@pytest.mark.parametrize("form", ["rows", "last", "whole"])
@pytest.mark.parametrize("name", OTHERS)
def test_options_may_differ(mixed, name, form) -> None:
    """They change how a rank reads: the tensors are the same, and no rank hangs."""
    mixed.values(f"{name}: {form}")


def test_stock_reads_the_file_that_is_open(raw) -> None:
    """Another file lies at the path by then."""
    path = raw.tensors({"w": torch.zeros(4)})
    with fastst_patch.safe_open(path, "pt") as handle:
        opened = handle._opened
        source = Source(path, opened.layout.names, [0], opened, None, opened.layout)
        os.replace(raw.tensors({"w": torch.ones(4)}, "other.safetensors"), path)
        assert torch.equal(source.stock_tensor(0), torch.zeros(4))
