"""Exceptions and warnings of the package, and Fallback."""

from __future__ import annotations

import pickle
import warnings
import weakref

import pytest

from fastst_patch.errors import Fallback, FallbackWarning, RankError, warn_caller


@pytest.mark.parametrize(("rank", "text"), [(2, "rank 2: no file"), (None, "no file")])
def test_rank_errors_can_be_pickled(rank: int | None, text: str) -> None:
    error = pickle.loads(pickle.dumps(RankError(rank, "no file")))
    assert (error.rank, error.cause, str(error)) == (rank, "no file", text)


def test_warnings_name_the_line_of_the_program() -> None:
    package = {"__name__": "fastst_patch.some.module", "warn": warn_caller}
    exec("def inner(*args): warn(*args)\ndef outer(*args): inner(*args)", package)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        package["outer"]("text", FallbackWarning)
    assert [(str(one.message), one.category) for one in caught] == [("text", FallbackWarning)]
    assert caught[0].filename == __file__


def test_a_fallback_keeps_nothing_alive() -> None:
    class Memory:
        pass

    def fail(error: Exception) -> None:
        held = Memory()
        seen.append(weakref.ref(held))
        try:
            raise KeyError(held)
        except KeyError:
            raise error  # noqa: B904 - its context is what this is about

    seen: list[weakref.ref[Memory]] = []
    for error, reason in (
        (Fallback("the file is small"), "the file is small"),
        (MemoryError("5 bytes"), "not enough memory: 5 bytes"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
    ):
        try:
            fail(error)
        except Exception as caught:
            fallback = Fallback.alone(caught)
        del error
        assert fallback.reason == reason
        assert fallback.__traceback__ is fallback.__context__ is None
    assert seen[0]() is None
