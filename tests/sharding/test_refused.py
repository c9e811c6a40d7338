"""Plans, options and files that load_sharded refuses, alike in all ranks, before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
from cases_files import WRONG
from ranks import Case, Ran

from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

# Text that the message must contain, where it is not the name F32.7x4.
NAMES = {"unknown name": "nobody", "unknown name, whole": "nobody", "scalar": "F32.",
         "scalar from the end": "F32."}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "unknown option": {"speed": "high"},
    "bad value": {"io": "sideways"},
    "read_once": {"read_once": "never"},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(file) for file in sharded.write_zoo(tmp_path_factory.mktemp("zoo"))]


@pytest.fixture(scope="module", params=[1, 2])
def refused(request, nursery, zoo) -> Ran:
    cases = [Case("cases_files.wrong", {"files": zoo, "what": what}, name=what) for what in WRONG]
    cases += [
        Case("cases_files.refused", {"files": zoo, **options}, name=name)
        for name, options in OPTIONS.items()
    ]
    return nursery.run(cases, request.param)


@pytest.mark.parametrize("what", WRONG)
def test_plan(refused, what) -> None:
    """All ranks refuse it alike, with the tensor's name; then the group loads again."""
    for error in refused.values(what):
        assert error is not None, "nothing was raised"
        assert NAMES.get(what, "F32.7x4") in error["text"], error
        kinds = {"ValueError", "TypeError"} & {*error["bases"], *error["text"].split(": ")}
        assert kinds, error


@pytest.mark.parametrize("what", NAMES)
def test_plan_of_all_ranks_is_a_value_error(refused, what) -> None:
    """All ranks have the same error, so it is no RankError."""
    for error in refused.values(what):
        assert "ValueError" in error["bases"], error


@pytest.mark.parametrize("name", OPTIONS)
def test_option(refused, name) -> None:
    for error in refused.values(name):
        assert error is not None, "nothing was raised"
        assert {"OptionError", "TypeError", "ValueError"} & set(error["bases"]), error
        assert "".join(OPTIONS[name]) in error["text"]
