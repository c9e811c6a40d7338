"""Fixtures of transformers' models; `tiny` is imported late, as transformers may be missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tiny import Saved

    return Saved(tmp_path_factory)


@pytest.fixture
def both(tmp_path: Path, assert_same: Any) -> Any:
    from tiny import Both

    return Both(tmp_path, assert_same)


@pytest.fixture
def own(saved: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model's folder, to be changed."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / "own"))
