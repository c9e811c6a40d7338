"""What the hardware could give at most, measured in the same rounds as the loaders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastst_patch import engine

from . import hardware, job, residency, settle
from .failures import BenchError
from .process import run_json

DIRECT = "O_DIRECT read"
COLD_BUFFERED = "cold buffered read"
PAGE_CACHE = "page-cache read"
HOST_TO_DEVICE = "pinned host-to-device copy"

_THREADS_MAX = 64  # the native reader's limit


@dataclass(frozen=True)
class Variant:
    """One way to call engine.read_ceiling."""

    direct: bool
    threads: int
    chunk_bytes: int

    @property
    def label(self) -> str:
        """Threads and size of a request, as the table shows them."""
        size = self.chunk_bytes
        chunk = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        return f"{self.threads} x {chunk}"


@dataclass
class Ceiling:
    """One way to read, tried in several variants in the first round, then in the best."""

    name: str
    cache: str  # state the files are put into first
    variants: Sequence[Variant]
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    chosen: str = ""
    verified: bool | None = True  # the files were in that state, every time
    unavailable: str | None = None  # why there is no number
    tried: dict[str, list[float]] = field(default_factory=dict)  # GB/s of each variant, in order

    def measure(self, paths: Sequence[str], reserve: settle.Reserve) -> None:
        """Add one measurement, over all files."""
        if self.unavailable:
            return
        try:
            timed = [(self._read(variant, paths, reserve), variant) for variant in self.variants]
        except OSError as error:
            if not self.variants[0].direct:
                raise BenchError(f"measuring the {self.name}: {error}") from error
            # Some filesystems have no O_DIRECT; then nothing is bound by it either.
            self.unavailable = str(error)
            return
        for (seconds, nbytes), variant in timed:
            self.tried.setdefault(variant.label, []).append(nbytes / seconds / 1e9)
        (seconds, self.bytes), best = min(timed, key=lambda one: one[0][0])
        self.variants = [best]
        self.chosen = best.label
        self.seconds.append(seconds)

    def _read(
        self, variant: Variant, paths: Sequence[str], reserve: settle.Reserve
    ) -> tuple[float, int]:
        state = residency.prepare(self.cache, paths)
        self.verified = residency.weakest([self.verified, state.verified])
        total_bytes, total_s = 0, 0.0
        with reserve.lend():  # the page cache takes fresh memory
            for path in paths:
                read, seconds = engine.read_ceiling(
                    path,
                    direct=variant.direct,
                    threads=variant.threads,
                    chunk_bytes=variant.chunk_bytes,
                )
                total_bytes += read
                total_s += seconds
        return total_s, total_bytes


@dataclass
class BusCeiling(Ceiling):
    """Copies from pinned memory to the device; no file takes part."""

    device: str = "cuda"

    def measure(self, paths: Sequence[str], reserve: settle.Reserve) -> None:
        """Add one measurement, made in a process of its own."""
        answer = run_json(job.CHILD, {"kind": "h2d", "device": self.device}, self.name)
        self.chosen = "2 x 128 MiB, reused"
        self.bytes = int(answer["bytes"])
        self.seconds.append(float(answer["seconds"]))


def plan(caches: Sequence[str], device: str, direct_wanted: bool) -> dict[str, list[Ceiling]]:
    """Return what can bind a load, under the cache state it is measured beside."""
    beside: dict[str, list[Ceiling]] = {cache: [] for cache in caches}
    if "cold" in beside:
        variants = [Variant(False, 8, chunk) for chunk in (1 << 20, 4 << 20)]
        beside["cold"].append(Ceiling(COLD_BUFFERED, "cold", variants))
    if "cold" in beside or direct_wanted:
        # Requests of 1 MiB were served at 3.0 GB/s by a virtual disk, those of 4 MiB at 2.2.
        variants = [Variant(True, depth, mib << 20) for mib in (4, 1) for depth in (8, 16)]
        beside[caches[0]].append(Ceiling(DIRECT, "cold", variants))
    if "warm" in beside:
        variants = [Variant(False, min(hardware.cpu_count(), _THREADS_MAX), 512 << 10)]
        beside["warm"].append(Ceiling(PAGE_CACHE, "warm", variants))
    if device != "cpu":
        beside[caches[0]].append(BusCeiling(HOST_TO_DEVICE, "", [], device=device))
    return beside
