"""Which paths are URLs, how they are shown, and the bounds of a load."""

from __future__ import annotations

import pytest

from fastst_patch.config import Config
from fastst_patch.files.remote import ahead_bytes, is_remote, ranges, without_secrets

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/key", True), ("https://host/a?b", True), ("file:///a", True),
        ("/a/b", False), ("a.safetensors", False), ("http:/a", False), ("://a", False),
        ("a b://c", False), ("", False),
    ],
)  # fmt: skip
def test_which_paths_are_urls(path: str, expected: bool) -> None:
    assert is_remote(path) is expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pass@host:80/a/b.safetensors?sig=x#y", "https://host:80/a/b.safetensors"),
        ("s3://bucket/key", "s3://bucket/key"), ("az://a?sas=1", "az://a"),
        ("http://h/a@b/c", "http://h/a@b/c"), ("/a?b#c@d", "/a?b#c@d"), ("a@b", "a@b"),
    ],
)  # fmt: skip
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize(
    ("options", "most", "nbytes"),
    [
        ({}, 16, 8 * MIB), ({"chunk_bytes": 8 * MIB}, 8, 16 * MIB), ({"threads": 3}, 3, 8 * MIB),
        ({"host_memory_budget": 32 * MIB}, 2, 8 * MIB),
        ({"host_memory_budget": 4 * MIB}, 1, 2 * MIB),
        ({"host_memory_budget": 0}, 1, 64 * KIB), ({"chunk_bytes": 64 * MIB}, 2, 64 * MIB),
        ({"host_memory_budget": 1 << 40}, 60, 8 * MIB),
    ],
)  # fmt: skip
def test_ranges_fit_the_budget(options: dict[str, int], most: int, nbytes: int) -> None:
    config = Config(**options)
    assert ranges(config) == (most, nbytes)
    budget = options.get("host_memory_budget", 256 * MIB)
    assert most * nbytes <= max(budget // 2, 64 * KIB)
    assert ahead_bytes(config) == budget // 2
