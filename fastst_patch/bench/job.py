"""What the runner tells the child that loads, and what it answers.

Neither side imports torch or the engine through this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from . import settle
from .process import Gate, run_json

CHILD = ("-m", "fastst_patch.bench.child")


@dataclass(frozen=True)
class LoadJob:
    """One timed load in a fresh process."""

    loader: str  # "stock" or "patched"
    device: str
    paths: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]  # per file: tensor names by offset
    options: Mapping[str, object] = field(default_factory=dict)  # for patch()
    touch: bool = True  # time reading every byte too (CPU only)
    split: bool = False  # start the engine's device before the clock, and time that apart


@dataclass(frozen=True)
class Sample:
    """What one LoadJob measured."""

    load_s: float
    touch_s: float
    digests: tuple[str, ...]  # per file, over names, dtypes, shapes, order and bytes
    tensors: int
    bytes: int
    path: str  # ways taken, such as "mmap+readahead"; "stock" for the stock loader
    fallbacks: tuple[str, ...]  # reasons given by fastst_patch
    resident_before: float | None  # fraction; None: not asked or cannot be told
    memory: Mapping[str, int]  # bytes, with all tensors alive
    memory_before: Mapping[str, int]  # bytes, torch imported and nothing loaded
    versions: Mapping[str, str]
    device_name: str
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds; see child.run

    @property
    def total_s(self) -> float:
        """What a program waits: a lazy load is paid for when the bytes are read."""
        return self.load_s + self.touch_s


def run_load(job: LoadJob, gate: Gate | None = None) -> Sample:
    """Run one timed load in a fresh process.

    It enters the gate when all is imported, and leaves it when the load is over. Without one it
    has memory that is there, and the page cache as it is.
    """
    label = f"{job.loader} loader"
    message = {"kind": "load", **asdict(job)}
    if gate is not None:
        answer = run_json(CHILD, message, label, gate)
    else:
        with settle.reserve_for(job.paths) as reserve:
            answer = run_json(CHILD, message, label, reserve.lend())
    answer["digests"] = tuple(answer["digests"])
    answer["fallbacks"] = tuple(answer["fallbacks"])
    return Sample(**answer)
