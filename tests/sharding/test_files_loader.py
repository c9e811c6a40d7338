"""SafeTensorsFileLoader over four ranks: torch's chunks, also where fastsafetensors gives none.

`test_beside_fastsafetensors` is skipped without that package. The other tests compare the same
results with torch's.
"""

from __future__ import annotations

import importlib.util

import pytest
import sharded
from ranks import Case, Ran

import fastst_patch
from fastst_patch import engine

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.skipif(
        not hasattr(fastst_patch, "SafeTensorsFileLoader"), reason="no explicit loader here"
    ),
]

WAYS = {
    "default": {},
    "direct": {"io": "direct", "chunk_bytes": 65536},
    "cuda": {"device": "cuda"},
}


def _files(folder, shapes) -> list[str]:
    files = []
    for number in range(4):
        path = folder / f"part-{number}.safetensors"
        sharded.write_file(path, [(f"{number}.{name}", *rest) for name, *rest in shapes], number)
        files.append(str(path))
    return files


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> list[str]:
    """Sizes that four ranks cannot share evenly, some of which leave ranks empty."""
    return _files(
        tmp_path_factory.mktemp("odd"),
        [("a", "BF16", (7, 10)), ("b", "F32", (3, 5, 2)), ("c", "I64", (9,)), ("d", "U8", (2, 6))],
    )


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> list[str]:
    return _files(
        tmp_path_factory.mktemp("even"),
        [
            ("a", "BF16", (8, 12)),
            ("b", "F32", (4, 8, 2)),
            ("c", "I64", (16,)),
            ("d", "F16", (3, 4)),
        ],
    )


@pytest.fixture(scope="module")
def ran(nursery, odd, even) -> Ran:
    cases = [
        Case("cases_loader.take_all", {"files": files, "way": way}, name=f"{name} {label}")
        for name, files in (("odd", odd), ("even", even)) for label, way in WAYS.items()
    ]  # fmt: skip
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", ["odd", "even"])
def test_shards_are_torchs(ran, sizes, way) -> None:
    """get_sharded, get_tensor, push_tensor, get_multi_cols."""
    values = ran.values(f"{sizes} {way}")
    assert values[0] > 30
    assert len(set(values)) == 1


@pytest.fixture(scope="module")
def mistaken(nursery, odd) -> Ran:
    cases = [
        Case("cases_loader.mistaken", {"files": odd, "way": way}, name=label)
        for label, way in WAYS.items()
    ]
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", WAYS)
def test_a_mistake_of_one_rank_raises_on_all_that_wait(mistaken, way) -> None:
    """Where ranks exchange, all raise. Where tensors come from the map, that rank alone does."""
    raised = mistaken.values(way)
    names = list(raised[0])
    assert len(names) == 14
    for name in names:
        errors = [one[name] for one in raised]
        if name == "no name anywhere":
            assert errors == [errors[0]] * 4
            assert errors[0].startswith("ValueError: key nope")
        elif way == "default" and name not in ("no rank to read", "no option"):
            assert [bool(error) for error in errors] == [
                False,
                name.startswith("no "),
                False,
                False,
            ]
            assert not errors[1].startswith("RankError")
        else:
            assert errors == [errors[0]] * 4, name
            assert errors[0].startswith("RankError: rank 1: "), name
            if name.startswith("another"):
                assert "where rank 0" in errors[0]


def test_beside_fastsafetensors(nursery, even) -> None:
    if importlib.util.find_spec("fastsafetensors") is None:
        pytest.skip("fastsafetensors is not installed")
    case = Case("cases_loader.beside", {"files": even}, name="beside")
    assert nursery.run([case], 4).values(case) == [18] * 4
