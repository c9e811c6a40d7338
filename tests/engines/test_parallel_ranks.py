"""Two ranks that load as vLLM's do, over gloo, on the CPU and over the fake driver."""

from __future__ import annotations

import parallel_model
import pytest
from ranks import Case

WAYS = [
    Case("cases_parallel.loads", {"folder": "", "device": device, "way": way}, f"{way}-{device}")
    for device in ("cpu", "cuda:0")
    for way in ("patched", "format")
]
OPTIONS = {
    "direct-cuda:0": {"io": "direct"}, "little-cuda:0": {"device_memory_budget": "96KiB"},
    "none-cuda:0": {"device_memory_budget": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(nursery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    parallel_model.write(folder)
    where = {"folder": str(folder)}
    cases = [Case(case.call, {**case.arguments, **where}, case.name) for case in WAYS]
    for name, extra in OPTIONS.items():
        given = {**where, "device": "cuda:0", "way": "format", "extra": extra}
        cases.append(Case("cases_parallel.loads", given, name))
    for device in ("cpu", "cuda:0"):
        given = {**where, "device": device, "way": "format", "extra": {"group": "tp"}}
        cases.append(Case("cases_parallel.loads", given, f"group-{device}"))
    cases.append(Case("cases_parallel.alone", where, "alone"))
    found = nursery.run(cases, 2, preload=["parallel_model"])
    found.assert_ended()
    return found


@pytest.mark.parametrize("name", [*(case.name for case in WAYS), *OPTIONS])
def test_each_rank_reads_its_part(ran, name) -> None:
    kept = []
    for found in ran.values(name):
        assert found["same"]
        assert found["asked"] == 2  # stock's load
        kept.append(found["keeps"])
        assert {report[0] for report in found["reports"]} == {"vllm"}
        assert sum(report[3] for report in found["reports"]) <= 1.1 * found["keeps"]
        assert {r[4] for r in found["reports"] if r[1] == found["device"]} == {None}
        if name.endswith("cuda:0"):
            assert 0.9 * found["keeps"] <= found["copied"] <= 1.1 * found["keeps"]
            assert found["left"] == 0
            path = "ring+direct" if name.startswith("direct") else "ring"
            assert [report[2] for report in found["reports"] if report[1] != "cpu"] == [path]
            (rest,) = [report for report in found["reports"] if report[1] == "cpu"]
            assert "are used from the map" in rest[4]  # the scales, of which items are taken
            assert rest[3] == 4 * parallel_model.LAYERS
        else:
            assert found["copied"] == 0
            assert {report[2] for report in found["reports"]} <= {"mmap", "mmap+readahead"}
    assert kept[0] == kept[1]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_group_exchanges_whole_tensors(ran, device) -> None:
    for found in ran.values(f"group-{device}"):
        assert found["same"]
        assert found["asked"] == 2
        assert {report[0] for report in found["reports"]} == {"vllm"}
        assert {report[4] for report in found["reports"]} == {None}


def test_a_rank_that_loads_alone_does_not_wait(ran) -> None:
    found, other = ran.values("alone")
    assert other is None
    assert found["same"]
