"""A timed load that is made up."""

from __future__ import annotations

import dataclasses

from fastst_patch.bench import job


def sample(loader="stock", digests=("same",), **changes):
    made = job.Sample(
        load_s=0.5,
        touch_s=0.5,
        digests=digests,
        tensors=147,
        bytes=10**9,
        path="stock" if loader == "stock" else "mmap+readahead",
        fallbacks=(),
        resident_before=None,
        memory={"peak_rss": 1},
        memory_before={"peak_rss": 1},
        versions={"torch": "2", "safetensors": "0.8"},
        device_name="cpu",
    )
    return dataclasses.replace(made, **changes)
