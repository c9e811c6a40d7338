"""Folders of the checkout that tests read."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
BENCHMARKS = ROOT / "benchmarks"
FUZZ = ROOT / "fuzz"
EXAMPLES = ROOT / "examples"
NATIVE_TESTS = ROOT / "native" / "tests"
