"""SafeTensorsFileLoader over four ranks: torch's chunks, also where fastsafetensors has no answer.

`test_beside_fastsafetensors` needs that package and is skipped without it; what it would show is
what the other tests ask of torch.
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
    """Sizes that four ranks cannot share evenly, and some that leave ranks without any."""
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
        Case("cases_loader.taken", {"files": files, "way": way}, name=f"{name} {label}")
        for name, files in (("odd", odd), ("even", even)) for label, way in WAYS.items()
    ]  # fmt: skip
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", ["odd", "even"])
def test_parts_are_torchs(ran, sizes, way) -> None:
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
def test_a_mistake_of_one_rank_is_told_to_all_that_wait(mistaken, way) -> None:
    """Where ranks exchange, all raise; where each takes from the map, it is that rank's alone."""
    told = mistaken.values(way)
    names = list(told[0])
    assert len(names) == 14
    for name in names:
        said = [one[name] for one in told]
        if name == "no name anywhere":
            assert said == [said[0]] * 4
            assert said[0].startswith("ValueError: key nope")
        elif way == "default" and name not in ("no rank to read", "no option"):
            assert [bool(one) for one in said] == [False, name.startswith("no "), False, False]
            assert not said[1].startswith("RankError")
        else:
            assert said == [said[0]] * 4, name
            assert said[0].startswith("RankError: rank 1: "), name
            if name.startswith("another"):
                assert "where rank 0" in said[0]


def test_beside_fastsafetensors(nursery, even) -> None:
    if importlib.util.find_spec("fastsafetensors") is None:
        pytest.skip("fastsafetensors is not installed")
    case = Case("cases_loader.beside", {"files": even}, name="beside")
    assert nursery.run([case], 4).values(case) == [18] * 4
