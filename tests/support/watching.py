"""What loads have reported, and which path they took."""

from __future__ import annotations

import os
from typing import Any

import fastst_patch


class Watch:
    """profile(), and what it must have seen. A handle is seen once it is closed or collected."""

    def __init__(self) -> None:
        self._context = fastst_patch.profile()

    def __enter__(self) -> Any:
        self._profile = self._context.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    @property
    def reports(self) -> list[Any]:
        return list(self._profile.reports)

    def paths(self, file: str | os.PathLike[str] | None = None) -> list[str]:
        reports = self.reports
        if file is not None:
            # Other tests' forgotten handles may be collected, and reported, while we watch.
            wanted = os.path.realpath(file)
            reports = [r for r in reports if os.path.realpath(r.file) == wanted]
        return [r.path for r in reports]

    def assert_fast(self, file: str | os.PathLike[str] | None = None, count: int = 1) -> None:
        """At least `count` loads (of this file), and all of them on the fast path."""
        paths = self.paths(file)
        assert len(paths) >= count, f"{len(paths)} reports, expected {count}: {self.reports}"
        known = {"mmap", "mmap+readahead", "buffered", "direct", "owned"}
        assert set(paths) <= known, self.reports

    def assert_stock(self, file: str | os.PathLike[str] | None = None) -> None:
        """Stock did it, and the report says why."""
        paths = self.paths(file)
        assert set(paths) == {"stock"}, self.reports
        assert all(r.fallback_reason for r in self.reports if r.path == "stock"), self.reports
