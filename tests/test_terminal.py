"""What a terminal can show, the nearest word, and whether our own command runs."""

from __future__ import annotations

import io
import sys

import pytest

from fastst_patch import terminal


def test_marks_are_ascii_where_the_encoding_has_no_others() -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stream:
        for mark in terminal.marks(stream).values():
            mark.encode("ascii")
        terminal.say("caf\xe9 \udcff", stream)
    with io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as stream:
        assert terminal.marks(stream)["ok"] == "✓"


def test_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("100", 100), ("10", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal.width() == width


def test_long_lines_are_broken_between_words() -> None:
    lines = list(terminal.wrapped(["  one two three", "", "/a/path/that/stays/whole"], 10))
    assert lines == ["  one two", "      three", "", "/a/path/that/stays/whole"]


def test_the_nearest_word() -> None:
    known = ("threads", "tensors", "io")
    assert terminal.nearest("thread", known) == "threads"
    assert terminal.nearest("speed", known) is None


@pytest.mark.parametrize(
    ("argv", "original", "ours"),
    [
        (["-m", "doctor"], ["python", "-m", "fastst_patch", "doctor"], True),
        (["-m"], ["python", "-mfastst_patch"], True),
        (["-m"], ["python", "-Xm", "fastst_patch"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["/usr/bin/fastst-patch", "run"], ["python", "fastst-patch"], True),
        (["script.py"], ["python", "script.py"], False),
        ([], ["python"], False),
    ],
)
def test_whether_our_command_runs(
    argv: list[str], original: list[str], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert terminal.is_our_command() is ours
