"""The process that `remote` times: `python -m fastst_patch.bench.remote_child`, a job on stdin."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch

import fastst_patch

from ..config import config_context, current
from ..errors import FaststError
from ..sources import base
from ..sources.base import Source
from .child import require_stock
from .device_use import digest, open_context, synchronize, touch
from .process import end_with_parent, serve
from .remote import BYTES, STREAMED

_RANGE = 8 << 20
_THREADS = 8

Tensors = dict[str, torch.Tensor]


def act(job: dict[str, Any], gate: Callable[..., None]) -> dict[str, Any]:
    """Do the job: load the URLs in the way that it names, and tell how long it took."""
    try:
        open_context(job["device"])
        with config_context(**job["options"]):
            way = {STREAMED: _streamed, BYTES: _bytes_alone}.get(job["loader"], _downloaded)
            return way(job)
    except (FaststError, safetensors.SafetensorError, OSError, ImportError, MemoryError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def _streamed(job: Mapping[str, Any]) -> dict[str, Any]:
    with fastst_patch.patched(), fastst_patch.profile() as profile:
        begin = time.perf_counter()
        loaded = [safetensors.torch.load_file(url, job["device"]) for url in job["urls"]]
        synchronize(job["device"])
        seconds = time.perf_counter() - begin
    paths = ", ".join(dict.fromkeys(report.path for report in profile.reports))
    requests = sum(getattr(report, "requests", None) or 0 for report in profile.reports)
    return _answer(seconds, loaded, paths, requests)


def _downloaded(job: Mapping[str, Any]) -> dict[str, Any]:
    require_stock()
    begin = time.perf_counter()
    loaded, requests = [], 0
    for number, url in enumerate(job["urls"]):
        path = os.path.join(job["folder"], f"{os.getpid()}-{number}.safetensors")
        requests += _download(url, path)
        loaded.append(safetensors.torch.load_file(path, job["device"]))
        os.unlink(path)  # its map, or the device, has the bytes
    sums = _sums(loaded)  # reads what is mapped
    synchronize(job["device"])
    return _answer(time.perf_counter() - begin, loaded, "stock", requests, sums)


def _download(url: str, path: str) -> int:
    source = base.open_source(url, current().storage_options)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, source.size)

        def move(begin: int) -> None:
            data = memoryview(source.read(begin, min(_RANGE, source.size - begin)))
            while data:
                done = os.pwrite(fd, data, begin)
                data, begin = data[done:], begin + done

        _in_ranges(source, move)
        return source.stats.requests
    finally:
        os.close(fd)
        source.close()


def _bytes_alone(job: Mapping[str, Any]) -> dict[str, Any]:
    found = [_moved(url) for url in job["urls"]]
    return _answer(sum(one[0] for one in found), [], "", sum(one[1] for one in found))


def _moved(url: str) -> tuple[float, int]:
    """Seconds to bring a file into memory that exists, and the requests that it took."""
    begin = time.perf_counter()
    source = base.open_source(url, current().storage_options)
    seconds = time.perf_counter() - begin
    try:
        zeros: Any = torch.zeros(source.size, dtype=torch.uint8).numpy()
        place = memoryview(zeros)
        begin = time.perf_counter()
        _in_ranges(source, lambda at: source.read_into(at, place[at : at + _RANGE]))
        return seconds + time.perf_counter() - begin, source.stats.requests
    finally:
        source.close()


def _in_ranges(source: Source, move: Callable[[int], None]) -> None:
    """Call a function for the beginning of each range of a file, several at a time."""
    threads = 1 if source.sequential else _THREADS
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(move, range(0, source.size, _RANGE)))


def _sums(loaded: Sequence[Tensors]) -> list[dict[str, int]]:
    return [{name: touch(tensor) for name, tensor in file.items()} for file in loaded]


def _answer(
    seconds: float,
    loaded: Sequence[Tensors],
    path: str,
    requests: int,
    sums: Sequence[Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    sums = _sums(loaded) if sums is None else sums
    return {
        "seconds": seconds,
        "digests": [digest(file, found) for file, found in zip(loaded, sums, strict=True)],
        "path": path,
        "requests": requests,
    }


if __name__ == "__main__":
    end_with_parent()
    serve(act)
