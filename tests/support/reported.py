"""Loads with options, and their reports."""

from __future__ import annotations

from pathlib import Path

import torch

import fastst_patch


def reported(path: Path, **options: object) -> fastst_patch.LoadReport:
    """Load with options; the report of that load, after comparing every byte with stock."""
    expected = fastst_patch.get_original("safetensors.torch.load_file")(path)
    with fastst_patch.config_context(**options), fastst_patch.profile() as profile:
        found = fastst_patch.load_file(path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(profile.reports) == 1
    return profile.reports[0]
