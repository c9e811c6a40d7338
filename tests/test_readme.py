"""The README's results are those of the measurements beside them."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from places import BENCHMARKS

SCRIPT = BENCHMARKS / "readme_table.py"


@pytest.fixture(scope="module")
def readme_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_up_to_date(readme_table) -> None:
    assert readme_table.main(["--check"]) == 0


def test_a_changed_number_is_found_and_mended(readme_table, tmp_path, monkeypatch) -> None:
    text = readme_table.README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("| **0.", "| **1.", 1), encoding="utf-8")
    monkeypatch.setattr(readme_table, "README", copy)
    assert readme_table.main(["--check"]) == 1
    assert readme_table.main([]) == 0
    assert copy.read_text(encoding="utf-8") == text
