"""One rank of sharding.py. Rank 0 waits at the gate before the clock, the others for rank 0.

Whatever the loader, the rank ends with its part of every tensor of the checkpoint and has read
each of its bytes once, by the same torch sum.
"""

from __future__ import annotations

import datetime
import gc
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist

from fastst_patch.bench import checkpoint_files, device_use, residency
from fastst_patch.bench.child import reports_of, require_stock
from fastst_patch.bench.process import end_with_parent, serve

Tensors = dict[str, torch.Tensor]


def dims_of(files: list[str]) -> dict[str, int]:
    """Rows and columns by turns, over all tensors by name; vectors have rows alone."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        entries, _ = checkpoint_files.header(file)
        shapes |= {name: one["shape"] for name, one in entries.items()}
    return {name: k % 2 if len(shapes[name]) > 1 else 0 for k, name in enumerate(sorted(shapes))}


# ---- the loaders: what is imported and asked before the clock starts, and the call --------


def ours(job: dict[str, Any]) -> Callable[[], Tensors]:
    import fastst_patch.sharding

    plan = dims_of(job["files"])
    return lambda: fastst_patch.load_sharded(job["files"], None, plan, **job["options"])


def stock(job: dict[str, Any]) -> Callable[[], Tensors]:
    """What its documentation shows for tensor parallelism: a slice of each tensor."""
    require_stock()
    dims, rank, ranks = dims_of(job["files"]), job["rank"], job["ranks"]

    def load() -> Tensors:
        found = {}
        for file in job["files"]:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle is no mapping
                    part = opened.get_slice(name)
                    dim = dims[name]
                    length = part.get_shape()[dim] // ranks
                    span = slice(rank * length, (rank + 1) * length)
                    found[name] = part[span] if dim == 0 else part[:, span]
        return found

    return load


def fastsafetensors(job: dict[str, Any]) -> Callable[[], Tensors]:
    """A file for each rank, scattered tensor by tensor, as its examples do it."""
    from fastsafetensors import SafeTensorsFileLoader

    dims = dims_of(job["files"])

    def load() -> Tensors:
        loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", nogds=True)
        loader.add_filenames({rank: [file] for rank, file in enumerate(job["files"])})
        buffers = loader.copy_files_to_device()
        found = {name: buffers.get_sharded(name, dims[name]) for name in loader.get_keys()}
        buffers.close()
        loader.close()
        return found

    return load


def pretrained(job: dict[str, Any]) -> Callable[[], Tensors]:
    """What a user of transformers runs under torchrun; with the patch on where it is ours."""
    os.environ |= {"RANK": str(job["rank"]), "LOCAL_RANK": str(job["rank"]),
                   "WORLD_SIZE": str(job["ranks"])}  # fmt: skip
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.utils import logging

    del LlamaForCausalLM  # imported ahead of the clock
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of tp_plan itself
    if job["loader"] == "fastst":
        import fastst_patch

        fastst_patch.patch(**job["options"])
    else:
        require_stock()
    folder = str(Path(job["files"][0]).parent)

    def load() -> Tensors:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16)
        return {
            name: getattr(tensor, "_local_tensor", tensor).detach()
            for name, tensor in model.named_parameters()
        }

    return load


LOADERS = {"fastst": ours, "stock": stock, "fastsafetensors": fastsafetensors}


# ---- measuring ----------------------------------------------------------


def touch(tensors: Tensors) -> int:
    """Read every byte where it lies; strided slices are not copied first."""
    total = 0
    for tensor in tensors.values():
        total ^= int(tensor.view(torch.int64).sum())
    return total


def digest(tensors: Tensors) -> str:
    """Of names, dtypes, shapes and bytes; slices of some loaders are strided, and of others not."""
    alike = {name: tensors[name].contiguous() for name in sorted(tensors)}
    sums = {name: device_use.touch(tensor) for name, tensor in alike.items()}
    return device_use.digest(alike, sums)


def start_line(job: dict[str, Any], gate: Callable[..., None]) -> float | None:
    """Wait until page cache and memory are as they should be; tell what is cached then."""
    resident = None
    dist.barrier()
    if job["rank"] == 0:
        gate()
        resident = residency.resident_fraction(job["files"])[0]
    gc.collect()
    gc.freeze()
    dist.barrier()
    return resident


def store_of(job: dict[str, Any]) -> dist.Store:
    """Where ranks meet: a server, as torchrun has one.

    Torch looks into a file's store every 10 ms, which is what connecting would measure there.
    """
    port = Path(job["port"])
    if job["rank"] == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        written = port.with_suffix(".new")
        written.write_text(str(store.port), encoding="ascii")
        written.rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(port.read_text(encoding="ascii")), is_master=False)


def act(job: dict[str, Any], gate: Callable[..., None]) -> dict[str, Any]:
    torch.set_num_threads(1)  # as many ranks as there are share the machine
    dist.init_process_group(
        "gloo", store=store_of(job), rank=job["rank"], world_size=job["ranks"],
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip
    load = (pretrained if job["model"] else LOADERS[job["loader"]])(job)
    resident = start_line(job, gate)
    before = device_use.read_bytes()
    with reports_of("patched" if job["loader"] == "fastst" else "stock") as reports:
        begin = time.perf_counter()
        tensors = load()
        ready = time.perf_counter()
        touch(tensors)
        end = time.perf_counter()
    after = device_use.read_bytes()
    memory = device_use.process_memory()
    dist.barrier()
    answer = {
        "begin": begin, "ready": ready, "end": end, "read_bytes": after - before,
        "peak_rss": memory["peak_rss"], "bytes": sum(t.nbytes for t in tensors.values()),
        "digest": digest(tensors), "path": _path(job["loader"], reports), "resident": resident,
    }  # fmt: skip
    dist.destroy_process_group()
    return answer


def _path(loader: str, reports: list[Any]) -> str:
    if loader != "fastst":
        return loader
    fallbacks = {report.fallback_reason for report in reports} - {None}
    if not reports or fallbacks:
        raise SystemExit(f"not by the fast path: {fallbacks or 'nothing was reported'}")
    return "+".join(sorted({report.path for report in reports}))


if __name__ == "__main__":
    end_with_parent()
    serve(act)
