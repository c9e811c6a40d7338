"""What a reader of the bench sees: table, JSON and chart of runs that are made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from bench_samples import sample

from fastst_patch.bench import (
    ceilings,
    checkpoint_files,
    hardware,
    harness,
    plot,
    progress,
    residency,
    results,
    runner,
    stats,
    table,
)
from fastst_patch.bench.failures import UsageError


def outcome(rounds=3):
    described = checkpoint_files.CheckpointFile("/home/someone/model.safetensors", 10**9, 10**9, ())
    runs = {
        (cache, loader): [
            harness.Run(sample(loader), residency.CacheState(cache, fraction, "cachestat"))
        ]
        * rounds
        for cache, fraction in (("cold", 0.0), ("warm", 1.0))
        for loader in runner.LOADERS
    }
    made = runner.Outcome(runner.Plan([described]), runs, [], rounds)
    for group in ceilings.plan(("cold", "warm"), "cpu", False).values():
        for ceiling in group:
            ceiling.seconds, ceiling.bytes, ceiling.chosen = [0.5] * rounds, 10**9, "8 x 4 MiB"
            made.ceilings.append(ceiling)
    return made


def environment():
    return hardware.environment(Path(__file__))


def test_summary_and_paired_ratio():
    assert stats.summarize([2.0]) == stats.Summary(2.0, None)
    assert stats.summarize([1.0, 2.0, 3.0, 4.0, 5.0]) == stats.Summary(3.0, 1.0)
    # A machine that slows down fourfold half-way changes no ratio.
    assert stats.paired_ratio([1.0, 4.0], [2.0, 8.0]) == stats.Summary(0.5, 0.0)


@pytest.mark.parametrize(
    ("cache", "path", "name"),
    [
        ("cold", "mmap+readahead", ceilings.COLD_BUFFERED),
        ("cold", "stock", ceilings.COLD_BUFFERED),
        ("cold", "direct", ceilings.DIRECT),
        ("warm", "mmap", ceilings.PAGE_CACHE),
        ("warm", "ring+direct", ceilings.DIRECT),
        ("cold", "gds (compatibility mode)", ceilings.DIRECT),
    ],
)
def test_binding_ceiling_follows_the_path(cache, path, name):
    speeds = {ceilings.DIRECT: 3.0, ceilings.COLD_BUFFERED: 2.0, ceilings.PAGE_CACHE: 20.0}
    assert results.binding_ceiling(cache, path, "cpu", speeds) == name
    assert results.binding_ceiling(cache, path, "cpu", {}) is None
    with_bus = {**speeds, ceilings.HOST_TO_DEVICE: 1.0}
    assert results.binding_ceiling(cache, path, "cuda", with_bus) == ceilings.HOST_TO_DEVICE


def test_table_fits_a_terminal_and_tells_the_conditions():
    for columns in (80, 100, 125):
        text = table.render(outcome(), environment(), columns)
        assert max(map(len, text.splitlines())) <= columns
        assert "patched / stock" in text
        assert "read-ahead" in text
        assert stats.SPREAD in " ".join(text.split())
        assert "ceiling" not in text  # it can be exceeded
    text = table.render(outcome(), environment(), 60, verbose=True)
    assert "50% cold buffered" in text
    assert "touch s" in text


def with_ratio(ratio, rounds=3):
    made = outcome(rounds)
    for (cache, loader), runs in made.runs.items():
        if loader == "patched" and cache == "cold":
            made.runs[cache, loader] = [
                dataclasses.replace(
                    run, sample=dataclasses.replace(run.sample, load_s=ratio / 2, touch_s=ratio / 2)
                )
                for run in runs
            ]
    return made


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.5, "cold 2.0x faster, warm the same (±5 %)."),
        (0.8, "cold 1.25x faster, warm the same (±5 %)."),
        (3.3, "cold 3.3x slower, warm the same (±5 %)."),
        (0.97, "cold the same (±5 %), warm the same (±5 %)."),
    ],
)
def test_the_first_sentence_is_a_verdict(ratio, words):
    first = table.render(with_ratio(ratio), environment(), 120).splitlines()[0]
    assert first == f"Patched against stock: {words}"


def with_ratios(*ratios):
    """A round for each; cold alone, since warm stays as stock's."""
    made = outcome(len(ratios))
    made.runs["cold", "patched"] = [
        with_ratio(ratio).runs["cold", "patched"][0] for ratio in ratios
    ]
    return made


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        ((0.5, 0.5, 0.5), "Gate passed: no row is slower than stock beyond its spread."),
        ((1.04, 1.04, 1.04), "Gate passed: no row is slower than stock beyond its spread."),
        # The spread is 0.175: what one round says the next denies.
        ((0.7, 1.1, 1.4), "Gate passed: no row is slower than stock beyond its spread."),
        (
            (1.1, 1.2, 1.4),
            "Gate failed: slower than stock beyond the spread: cold 1.20 ±0.07 of stock's time.",
        ),
    ],
)
def test_the_gate_judges_as_the_verdict(ratios, sentence):
    made = with_ratios(*ratios)
    assert table.gate(made) == (sentence.startswith("Gate passed"), sentence)
    assert ("slower" in table.verdict(made, results.rows(made))) is sentence.startswith("Gate fail")


def test_a_gate_that_cannot_judge_fails():
    passed, sentence = table.gate(with_ratios(0.5, 0.5))
    assert (passed, sentence.split(":")[0]) == (False, "Gate failed. Too few rounds for a verdict")
    made = with_ratios(0.5, 0.5, 0.5)
    made.runs["cold", "stock"][0] = harness.Run(
        sample(), residency.CacheState("cold", 1.0, "cachestat")
    )
    passed, sentence = table.gate(made)
    assert (passed, sentence.split(":")[0]) == (False, "Gate failed. No verdict")


def test_no_verdict_from_too_little():
    for rounds in (1, 2):
        first = table.render(with_ratio(0.5, rounds), environment(), 120).splitlines()[0]
        assert first.startswith("Too few rounds for a verdict")
    made = with_ratio(0.5)
    made.runs["cold", "stock"][0] = harness.Run(
        sample(), residency.CacheState("cold", 1.0, "cachestat")
    )
    first = table.render(made, environment(), 120).splitlines()[0]
    assert first.startswith("No verdict: a run did not find the page cache")


def test_the_bar_ends_where_the_time_cap_does():
    made = progress.Progress(5, 8, 240.0)
    assert made.expected_rounds(1, 1.0) == 5
    assert made.expected_rounds(8, 80.0) == 3  # 80 s a round
    assert made.expected_rounds(17, 170.0) == 3  # in the third already
    assert made.expected_rounds(3, 600.0) == 1


def test_a_load_that_moves_all_bytes_is_also_told_without_the_touch():
    made = outcome()
    copied = dataclasses.replace(sample("patched"), path="direct")  # 0.5 s, and 0.5 s of touch
    for run in made.runs["cold", "patched"]:
        object.__setattr__(run, "sample", copied)
    rows = results.to_json(made, environment())["results"]
    assert [row["load_ceiling_fraction"] for row in rows] == [None, 1.0, None, None]
    assert rows[1]["ceiling_fraction"] == 0.5
    text = " ".join(table.render(made, environment()).split())
    assert "patched, cold: the load alone" in text
    assert "100% of the O_DIRECT read" in text
    assert "the load alone" not in table.render(outcome(), environment())


def test_memory_of_a_device_is_told():
    made = outcome()
    memory = {"peak_rss": 9 * 10**8, "pinned": 64 * 10**6, "device_used": 3 * 10**9}
    for runs in made.runs.values():
        for run in runs:
            changed = dataclasses.replace(
                run.sample,
                memory=memory,
                memory_before={"device_used": 10**9},
                parts={"pinning": 1},
            )
            object.__setattr__(run, "sample", changed)
    made.plan = dataclasses.replace(made.plan, device="cuda")
    text = table.render(made, environment())
    assert ["2000", "0", "64", "900"] in [line.split()[-4:] for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    row = results.to_json(made, environment())["results"][0]
    assert row["memory"]["device_used"] == 2 * 10**9
    assert row["parts"] == {"pinning": 1}


def test_json_schema():
    report = json.loads(json.dumps(results.to_json(outcome(), environment())))
    assert {"cpu", "kernel", "fs", "read_ahead_kb", "python", "torch", "safetensors",
            "fastst_patch", "cpus", "memory"} <= set(report["environment"])  # fmt: skip
    assert report["ceilings"][ceilings.DIRECT]["gb_per_s"] == 2.0
    assert report["ceilings"][ceilings.DIRECT]["seconds"] == [0.5] * 3
    assert [(row["cache"], row["loader"]) for row in report["results"]] == [
        ("cold", "stock"), ("cold", "patched"), ("warm", "stock"), ("warm", "patched"),
    ]  # fmt: skip
    row = report["results"][1]
    assert (row["device"], row["files"], row["tensors"], row["bytes"]) == ("cpu", 1, 147, 10**9)
    assert row["seconds"] == [1.0] * 3
    assert (row["median_s"], row["load_s"], row["gb_per_s"]) == (1.0, 0.5, 1.0)
    assert (row["ceiling"], row["ceiling_fraction"]) == (ceilings.COLD_BUFFERED, 0.5)
    assert (row["path"], row["verified"]) == ("mmap+readahead", True)
    assert "/home" not in json.dumps(report)


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "chart.png"
    plot.draw(outcome(), environment(), str(target))
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write"):
        plot.draw(outcome(), environment(), str(tmp_path / "chart.nonsense"))
