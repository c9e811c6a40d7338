"""Files that the tests of the explicit loader share, and nobody changes."""

from __future__ import annotations

from typing import Any

import pytest
from loader_files import bits, of_all_dtypes


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files of every dtype."""
    return of_all_dtypes(tmp_path_factory.mktemp("all"), 3)


@pytest.fixture(scope="session")
def expected(paths: list[str], stock: Any) -> dict[str, Any]:
    """The tensors of these files, as stock loads them."""
    return {name: bits(t) for path in paths for name, t in stock.load_file(path).items()}
