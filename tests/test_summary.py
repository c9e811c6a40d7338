"""The table of loads, and the file through which processes share them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastst_patch import LoadReport, launched, report, summary


def load(file: str = "a.safetensors", **changed: object) -> LoadReport:
    fields = {"call": "load_file", "device": "cpu", "path": "buffered", "bytes": 10**9,
              "tensors": 3, "seconds": 0.5, **changed}  # fmt: skip
    return LoadReport(file=file, **fields)


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_nothing() -> None:
    assert summary.render([]) == summary.NOTHING


def test_equal_loads_share_a_row() -> None:
    text = summary.render([(1, load()), (1, load(seconds=1.5)), (1, load("b", path="mmap"))])
    lines = cells(text)
    assert lines[1][0] == "file"  # one process: no need to name it
    assert ["a.safetensors", "load_file", "cpu", "buffered", "2", "6", "2.000", "2.0000", "1.00"
            ] in lines  # fmt: skip
    assert ["total,", "2", "files", "3", "9", "3.000", "2.5000", "1.20"] in lines
    assert "mapped, not copied" in text
    assert "fallbacks" not in text


def test_processes_are_told_apart() -> None:
    text = summary.render([(11, load()), (12, load())])
    assert [line[0] for line in cells(text)[3:5]] == ["11", "12"]
    assert "mapped" not in text


def test_fallbacks_with_reasons() -> None:
    stock = {"path": "stock", "bytes": 0, "seconds": 0.0}
    text = summary.render(
        [
            (1, load("a", **stock, fallback_reason="why not")),
            (1, load("b", **stock, fallback_reason="why not")),
            (1, load("c", path="buffered", fallback_reason="O_DIRECT refused")),
        ]
    )
    assert "  2 times: load_file by stock: why not (a and 1 more)" in text
    assert "  once: load_file by buffered: O_DIRECT refused (c)" in text
    assert ["a", "load_file", "cpu", "stock", "1", "3", "0.000", "0.0000", "-"] in cells(text)


def test_long_lists_are_cut_and_totals_kept() -> None:
    loads = [
        (1, load(f"file{i}", bytes=(i + 1) * 10**6, fallback_reason=f"reason {i}"))
        for i in range(100)
    ]
    text = summary.render(loads)
    lines = cells(text)
    shown = [line[0] for line in lines if line[0].startswith("file") and line[0] != "file"]
    assert shown == [f"file{i}" for i in range(61, 100)]  # the largest, in their order
    assert ["…", "61", "smaller", "rows", "61", "183", "1.891", "30.5000", "0.06"] in lines
    assert ["total,", "100", "files", "100", "300", "5.050", "50.0000", "0.10"] in lines
    assert lines[-1] == ["80", "times", "for", "80", "other", "reasons"]


def test_long_and_odd_names() -> None:
    text = summary.render([(1, load("/x" * 100 + "/end")), (1, load("bad\udcff"))])
    assert "x/end " in text
    assert max(map(len, text.splitlines())) < 140
    text.encode()


def test_records_survive_what_happens_to_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records"
    launched._append(str(path), load())
    assert not path.exists()  # whoever would have printed it is gone
    path.write_bytes(b"")
    launched._append(str(path), load("bad\udcff", resident=0.5))
    with path.open("ab") as file:
        file.write(b'\n{"pid": 3, "cut"')
        file.write(b'\n{"pid": 3, "file": "of another version"}\n7')
    launched._append(str(path), load("b"))
    record = json.loads(path.read_bytes().splitlines()[1])
    assert (record["pid"], record["file"]) == (os.getpid(), "bad\udcff")
    launched.print_table(str(path))
    assert "total, 2 files" in capfd.readouterr().err
    assert not path.exists()
    launched.print_table(str(path))
    assert capfd.readouterr().err == ""


def test_time_counts_once_for_calls_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 4.0, 10.0, 10.5])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    account = report.Account(seconds=0.25)
    with account:
        with account:  # as another thread's
            pass
    assert account.seconds == 3.25
    with pytest.raises(KeyError), account:
        raise KeyError
    assert account.seconds == 3.75
