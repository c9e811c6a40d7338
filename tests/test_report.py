"""Accounts, reports, totals and log lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from reported import reported

import fastst_patch
from fastst_patch import LoadReport, report

MIB = 1 << 20


def test_log_level_gives_one_line_per_load(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reported(checkpoint)
    assert capfd.readouterr().err == ""
    with fastst_patch.config_context(log_level="info"):
        fastst_patch.load_file(checkpoint)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in (str(checkpoint), " GB", " s,", "path mmap"):
        assert part in lines[0]
    fastst_patch.load_file(checkpoint)
    assert capfd.readouterr().err == ""


def test_stats_and_profile(checkpoint: Path) -> None:
    before = fastst_patch.stats()["paths"].get("buffered", {"loads": 0, "bytes": 0})
    load = reported(checkpoint, io="buffered")
    after = fastst_patch.stats()
    assert after["paths"]["buffered"]["loads"] == before["loads"] + 1
    assert after["paths"]["buffered"]["bytes"] == before["bytes"] + 16 * MIB
    assert (load.bytes, load.tensors, load.call) == (16 * MIB, 4, "load_file")
    assert load.seconds > 0
    assert load.gb_per_s > 0
    assert after["native"]["arenas"] >= 0


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


def test_the_part_of_the_link_is_told_where_it_was_measured() -> None:
    def load(seconds: float, **more: int) -> LoadReport:
        return LoadReport(
            "load_file", "s3://b/m", "cpu", "s3", 10**9, 3, seconds, requests=60,
            received=10**9, **more,
        )  # fmt: skip

    assert load(2.0, link=10**9).link_fraction == 0.5
    assert "60 requests, 50% of the link's 1.00 GB/s" in str(load(2.0, link=10**9))
    assert load(0.5, link=10**9).link_fraction == 1.0  # it was read ahead, between calls
    assert load(0.0, link=10**9).link_fraction is None
    assert load(2.0).link_fraction is None
    assert "link" not in str(load(2.0))
    assert str(dataclasses.replace(load(2.0), requests=1)).endswith(", 1 request")


def test_a_map_has_no_rate() -> None:
    def line(path: str, resident: float | None = None) -> str:
        return str(LoadReport("load_file", "a", "cpu", path, 10**9, 3, 0.5, resident))

    assert "GB/s" not in line("mmap", 1.0)
    assert "100% was cached" in line("mmap", 1.0)
    assert "2.00 GB/s" in line("buffered")


def test_an_account_reports_what_came_since_its_last_report() -> None:
    account = report.Account("buffered", bytes=5, tensors=2, seconds=0.5)
    with report.profile() as seen:
        account.emit("safe_open", "a", "cpu", last=False)
        account.emit("safe_open", "a", "cpu", last=False)  # nothing came since
        account.emit("safe_open", "a", "cpu")  # reported before
        report.Account("mmap").emit("safe_open", "b", "cpu", last=False)  # more may come
        report.Account("mmap").emit("safe_open", "b", "cpu")  # opened, and closed unused
        account.tensors += 1
        account.emit("safe_open", "a", "cpu")
    found = [(one.file, one.tensors, one.bytes, one.seconds) for one in seen.reports]
    assert found == [("a", 2, 5, 0.5), ("b", 0, 0, 0.0), ("a", 1, 0, 0.0)]


def test_listeners_get_every_report(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[LoadReport] = []
    monkeypatch.setattr(report, "_listeners", [])
    report.listen(heard.append)
    report.Account("stock", tensors=1).emit("load_file", "a", "cpu")
    assert [one.path for one in heard] == ["stock"]


def test_a_report_is_made_only_where_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LoadReport] = []
    real = report.LoadReport
    monkeypatch.setattr(report, "LoadReport", lambda *a: made.append(real(*a)) or made[-1])
    account = report.Account("buffered", bytes=5, tensors=2, seconds=0.5)
    before = report.totals()["paths"].get("buffered", {"tensors": 0})["tensors"]
    account.emit("safe_open", "a", "cpu")
    assert not made
    assert report.totals()["paths"]["buffered"]["tensors"] == before + 2
    account.tensors = 1
    with report.profile() as seen:
        account.emit("safe_open", "a", "cpu")
    assert seen.reports == made != []


def test_small_files_are_counted() -> None:
    def counted() -> tuple[int, int]:
        found = report.totals()
        return found["paths"]["stock"]["loads"], found["fallbacks"][report.SMALL_FILE]

    assert report.count_small() is False
    loads, fallbacks = counted()
    with report.profile():
        assert report.count_small() is True
    assert counted() == (loads + 1, fallbacks + 1)


def test_reasons_do_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_fallbacks", {})
    monkeypatch.setattr(report, "_small_files", 0)
    for i in range(3000):
        report.count("stock", 0, 0, 0.0, f"{i} bytes do not fit")
    report.count("stock", 0, 0, 0.0, "0 bytes do not fit")
    found = fastst_patch.stats()["fallbacks"]
    assert len(found) == 1001
    assert (found["0 bytes do not fit"], found["other reasons"]) == (2, 2000)
