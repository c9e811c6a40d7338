"""The verdict of doctor, and the lines that it prints."""

from __future__ import annotations

from typing import Any

import pytest

from fastst_patch.cli import doctor_text
from fastst_patch.patching import targets

MARKS = {"ok": "+", "warn": "!", "bad": "x"}


def findings(**changed: Any) -> dict[str, Any]:
    """The result of `doctor.examine` where all is well."""
    return {
        "python": "3.11.0",
        "missing": {},
        "versions": {"torch": "2.13", "safetensors": "0.8", "fastst-patch": None},
        "frameworks": {"torch": {"version": "2.13", "loads": "accelerated"}},
        "native": {"loaded": "/engine.so", "reason": None},
        "options": {"io": "auto"},
        "unknown_variables": {},
        "machine": {
            "machine": "x86_64", "kernel": "6", "cpus_usable": 2.0, "workers_per_load": 4,
            "memory_headroom_bytes": None, "transparent_huge_pages": "always",
        },
        "libraries": {"libcuda.so.1": "x: No such file or directory"},
        "gpus": [],
        "gpu_reason": "torch sees no usable GPU",
        "paths": [],
        **changed,
    }  # fmt: skip


def path(named: bool, **changed: Any) -> dict[str, Any]:
    return {"path": "/models", "named": named, **changed}


CUT = {"left_to_stock": {"a": "cut off"}, "refused_by_stock": ["a"]}
BROKEN = "The fast path cannot be taken here."
SOME = "The fast path works here, but not every path that was named can be loaded."
REMARKS = "The fast path works here; see the remarks below."
FINE = "The fast path works here."


@pytest.mark.parametrize(
    ("changed", "text", "problems", "remarks"),
    [
        ({}, FINE, 0, 0),
        ({"missing": {"wrapt": "not installed"}}, BROKEN, 1, 0),
        ({"missing": {"torch": "not installed"}}, REMARKS, 0, 1),
        ({"missing": {"torch": "ImportError: no libc"}}, BROKEN, 1, 0),
        ({"gpu_reason": "torch cannot tell: no libc"}, BROKEN, 1, 0),
        ({"native": {"loaded": None, "reason": "no compiler"}}, BROKEN, 1, 0),
        ({"options": {"error": "bad"}}, BROKEN, 1, 0),
        ({"patch": {"possible": False, "reason": "it is off"}}, BROKEN, 1, 0),
        ({"paths": [path(True, error="gone")]}, SOME, 1, 0),
        ({"paths": [path(False, error="gone")]}, REMARKS, 0, 1),
        ({"paths": [path(True, left_to_stock={"a": "odd"})]}, REMARKS, 0, 1),
        ({"paths": [path(True, **CUT)]}, SOME, 1, 0),
        ({"paths": [path(False, **CUT)]}, REMARKS, 0, 1),
        ({"unknown_variables": {"FASTST_X": None}}, REMARKS, 0, 1),
        ({"gpus": [{"name": "G", "engine": "cannot use it"}]}, REMARKS, 0, 1),
    ],
)  # fmt: skip
def test_verdicts(changed: dict[str, Any], text: str, problems: int, remarks: int) -> None:
    verdict = doctor_text.diagnose(findings(**changed))
    assert verdict.text == text
    assert (len(verdict.problems), len(verdict.remarks)) == (problems, remarks)


def test_the_verdict_comes_before_its_reasons() -> None:
    found = findings(
        missing={"wrapt": "not installed"}, unknown_variables={"FASTST_IOO": "FASTST_IO"}
    )
    lines = doctor_text.render(found, MARKS, 80, verbose=False)
    assert lines[:2] == [f"x {BROKEN}", "  x wrapt: not installed"]
    assert lines[2].startswith("  ! options: FASTST_IOO has no effect")
    assert "  + safetensors 0.8, fastst-patch (not installed)" in lines
    assert "  + torch 2.13: accelerated" in lines
    assert any("native engine: loaded" in line for line in lines)
    assert not any("huge pages" in line for line in lines)
    lines = doctor_text.render(found, MARKS, 80, verbose=True)
    assert any("huge pages" in line for line in lines)


def test_targets_that_come_later_count_as_replaced() -> None:
    # The text must not import targets, which imports safetensors.
    assert doctor_text._LATER == targets.LATER


def test_code_that_wraps_safetensors_is_told() -> None:
    target = {
        "name": "safetensors.safe_open", "patched": True, "reason": None, "aliases": [],
        "summary": "fast", "wraps": "a.b", "lost": "a.b is not called",
    }  # fmt: skip
    patching = {"possible": True, "reason": None, "targets": [target], "left_to_stock": {}}
    found = findings(patch=patching, wrappers={"unsloth": "wraps it"})
    assert doctor_text.diagnose(found).remarks == ["a.b is not called"]
    lines = doctor_text.render(found, MARKS, 80, verbose=True)
    assert "  ! a.b is not called" in lines
    assert "  - unsloth wraps it" in lines
    assert any(line.strip() == "over a.b" for line in lines)
    target["lost"] = None
    assert doctor_text.diagnose(found).text == FINE
