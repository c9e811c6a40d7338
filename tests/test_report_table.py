"""The table of loads, and the file through which processes share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastst_patch import LoadReport, report_table


def load(file: str = "a.safetensors", **changed: object) -> LoadReport:
    fields = {"call": "load_file", "device": "cpu", "path": "buffered", "bytes": 10**9,
              "tensors": 3, "seconds": 0.5, **changed}  # fmt: skip
    return LoadReport(file=file, **fields)


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_nothing() -> None:
    assert report_table.render([]) == report_table.NOTHING


def test_equal_loads_share_a_row() -> None:
    text = report_table.render(
        [(1, load()), (1, load(seconds=1.5)), (1, load("b", path="mmap"))], 120
    )
    lines = cells(text)
    assert lines[0][1:4] == ["all", "3", "loads"]
    assert lines[1][0] == "file"  # one process: no need to name it
    assert ["a.safetensors", "load_file", "cpu", "buffered", "2", "6", "2.000", "2.0000", "1.00"
            ] in lines  # fmt: skip
    assert ["b", "load_file", "cpu", "mmap", "1", "3", "1.000", "0.5000", "-"] in lines
    assert ["total,", "2", "files", "3", "9", "3.000", "2.5000", "-"] in lines
    assert "mapped, not copied" in text
    assert "fallbacks" not in text


def test_processes_are_told_apart() -> None:
    text = report_table.render([(11, load()), (12, load())], 120)
    assert [line[0] for line in cells(text)[3:5]] == ["11", "12"]
    assert "mapped" not in text


def test_fallbacks_with_reasons() -> None:
    stock = {"path": "stock", "bytes": 0, "seconds": 0.0}
    text = report_table.render(
        [
            (1, load("a", **stock, fallback_reason="why not")),
            (1, load("b", **stock, fallback_reason="why not")),
            (1, load("c", path="buffered", fallback_reason="O_DIRECT refused")),
        ],
        120,
    )
    assert text.startswith("fastst_patch: 1 of 3 loads took the fast path, 1.000 of 1.000 GB")
    assert "  2 times: load_file by stock: why not (a and 1 more)" in text
    assert "  once: load_file by buffered: O_DIRECT refused (c)" in text
    assert ["a", "load_file", "cpu", "stock", "1", "3", "0.000", "0.0000", "-"] in cells(text)


def test_long_lists_are_cut_and_totals_kept() -> None:
    loads = [
        (1, load(f"file{i}", bytes=(i + 1) * 10**6, fallback_reason=f"reason {i}"))
        for i in range(100)
    ]
    text = report_table.render(loads, 120)
    lines = cells(text)
    shown = [line[0] for line in lines if line[0].startswith("file") and line[0] != "file"]
    assert shown == [f"file{i}" for i in range(61, 100)]  # the largest, in their order
    assert ["…", "61", "smaller", "rows", "61", "183", "1.891", "30.5000", "0.06"] in lines
    assert ["total,", "100", "files", "100", "300", "5.050", "50.0000", "0.10"] in lines
    assert lines[-1] == ["80", "times", "for", "80", "other", "reasons"]


def test_long_and_odd_names() -> None:
    text = report_table.render([(1, load("/x" * 100 + "/end")), (1, load("bad\udcff"))], 120)
    assert "x/end " in text
    assert max(map(len, text.splitlines())) <= 120
    text.encode()


@pytest.mark.parametrize("columns", [60, 80, 115])
def test_the_table_fits_the_terminal(columns: int) -> None:
    loads = [
        (pid, load(f"/models/some/where/model-0000{i}-of-00009.safetensors",
                   call="from_pretrained", device="cuda:0", path="ring+direct", bytes=10**10,
                   fallback_reason="for a reason that takes a whole sentence, or two, to say"))
        for i in range(9) for pid in (123456, 234567)
    ]  # fmt: skip
    text = report_table.render(loads, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "-of-00009.safetensors" in text or columns < 80
    full = report_table.render(loads, columns, verbose=True)
    heading = next(line for line in full.splitlines() if line.startswith("   pid"))
    assert heading.split() == list(report_table._HEADINGS)
    assert "/models/some/where/model-00001-of-00009.safetensors" in full


def test_a_file_mapped_cold_and_warm_is_one_row() -> None:
    text = report_table.render([(1, load(path="mmap")), (1, load(path="mmap+readahead"))], 120)
    assert ["a.safetensors", "load_file", "cpu", "mmap+readahead", "2", "6", "2.000", "1.0000",
            "-"] in cells(text)  # fmt: skip


def test_it_ends_with_the_command_that_compares(tmp_path: Path) -> None:
    one, two = tmp_path / "a model.safetensors", tmp_path / "b.safetensors"
    for path in (one, two):
        path.write_bytes(b"")
    text = report_table.render([(1, load(str(one)))], 80)
    assert text.endswith(f"\ncompare with stock: fastst-patch bench '{one}'")
    text = report_table.render([(1, load(str(one))), (1, load(str(two)))], 80)
    assert text.endswith(f"\ncompare with stock: fastst-patch bench {tmp_path}")
