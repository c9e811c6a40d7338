"""The ranks of test_tensor_parallel.py: from_pretrained with a tp_plan, by torchrun.

``torchrun tp_ranks.py JOB`` runs the cases of a JSON file in order, in all ranks, and writes their
results to a file for each rank. Ranks meet between the cases, so a rank that waits for another in
vain fails in its own case.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging as their_logging

import fastst_patch
from fastst_patch import engine
from fastst_patch.bench import residency
from fastst_patch.files import readahead_share
from fastst_patch.files.readahead import ReadAhead
from fastst_patch.files.readahead_share import STRIPE
from fastst_patch.integrations import tensor_parallel

MEETING_S = 20.0  # timeout of the program's own collectives


def load(folder: str, **options: Any) -> Any:
    if "distributed_config" not in options:
        options["tp_plan"] = "auto"
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of tp_plan itself
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.arange(12).view(2, 6)).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def placed(tensor: torch.Tensor, mapped: bool) -> str:
    found = local(tensor)
    return str((
        type(tensor).__name__, str(getattr(tensor, "placements", "")), tensor.shape,
        tensor.stride(), found.shape, found.stride(), found.dtype, str(found.device),
        found.untyped_storage().nbytes() if mapped else 0, tensor.requires_grad,
    ))  # fmt: skip


def assert_same(ours: Any, theirs: Any, mapped: bool = True) -> int:
    """Compare parameters, buffers and logits; return how many tensors are sharded.

    A shard is a view of the whole tensor, as stock's is, unless only its rows were read.
    """
    mine, yours = ours.state_dict(keep_vars=True), theirs.state_dict(keep_vars=True)
    assert list(mine) == list(yours)
    for name, tensor in yours.items():
        assert placed(mine[name], mapped) == placed(tensor, mapped), name
        assert torch.equal(local(mine[name]), local(tensor)), name
    assert torch.equal(logits(ours), logits(theirs))
    return sum(hasattr(tensor, "placements") for tensor in mine.values())


def reported(seen: Any) -> list[dict[str, Any]]:
    return [
        {"file": Path(r.file).name, "call": r.call, "path": r.path, "bytes": r.bytes,
         "tensors": r.tensors, "why": r.fallback_reason}
        for r in seen.reports
    ]  # fmt: skip


# ---- cases ----


def same(folder: str, options: dict[str, Any], load_options: dict[str, Any]) -> dict[str, Any]:
    """Stock, patched, and stock again."""
    theirs = load(folder, **load_options)
    returned = []
    local_shard = tensor_parallel.Shards.local

    def watched(*args: Any, **kwargs: Any) -> Any:
        returned.append(local_shard(*args, **kwargs))
        return returned[-1]

    tensor_parallel.Shards.local = watched
    try:
        with fastst_patch.patched(**options), fastst_patch.profile() as seen:
            ours = load(folder, **load_options)
    finally:
        tensor_parallel.Shards.local = local_shard
    mapped = options.get("io") != "buffered" and options.get("tensors") != "owned"
    sharded = assert_same(ours, theirs, mapped)
    with fastst_patch.profile() as after:
        again = load(folder, **load_options)
    assert_same(again, theirs)
    return {
        "sharded": sharded, "reports": reported(seen), "after": len(after.reports),
        "views": sum(one is not None for one in returned), "asked": len(returned),
    }  # fmt: skip


def one_by_one(**arguments: Any) -> dict[str, Any]:
    """Without transformers' threads."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        return same(**arguments)
    finally:
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def cold(folder: str, file: str, force: bool, **load_options: Any) -> dict[str, Any]:
    """Load a file that is not cached: each rank's reading ahead, and bytes from storage."""
    evicted = True
    gc.collect()  # mapped files stay cached
    dist.barrier()
    if int(os.environ["RANK"]) == 0:
        evicted = residency.prepare("cold", [file]).verified is not False
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, evicted)
    plans = []
    plan, is_cold = readahead_share.in_turn, ReadAhead.cold

    def watched(alone: Any, shared: Any, turn: int, turns: int) -> Any:
        result = plan(alone, shared, turn, turns)
        extents = [(begin, end - begin) for begin, end in result.ranges]
        plans.append({"turn": turn, "turns": turns, "alone": list(alone), "shared": list(shared),
                      "extents": extents})  # fmt: skip
        return result

    readahead_share.in_turn = watched
    if force:  # even where the file system keeps the file cached
        ReadAhead.cold = lambda self: True
    before, counted = io(), engine.counters()
    try:
        with fastst_patch.patched(), fastst_patch.profile() as seen:
            model = load(folder, **load_options)
            total = sum(local(tensor).double().sum() for tensor in model.state_dict().values())
    finally:
        readahead_share.in_turn, ReadAhead.cold = plan, is_cold
    after, count = io(), engine.counters()
    return {
        "evicted": all(gathered), "plans": plans, "stripe": STRIPE, "sum": float(total),
        "reports": reported(seen), "storage": after["read_bytes"] - before["read_bytes"],
        "ahead": count["bytes_prefetched"] - counted["bytes_prefetched"],
    }  # fmt: skip


def io() -> dict[str, int]:
    with open("/proc/self/io", encoding="ascii") as file:
        return {line.split(":")[0]: int(line.split(":")[1]) for line in file}


def failing(folder: str, broken: str) -> dict[str, Any]:
    """One rank loads a damaged model; the others load theirs, as with stock."""
    found = {}
    for which in ("stock", "patched"):
        begin = time.monotonic()
        patched = fastst_patch.patched() if which == "patched" else contextlib.nullcontext()
        try:
            with patched:
                load(broken if os.environ["RANK"] == "1" else folder)
            found[which] = "loaded"
        except Exception as error:
            found[which] = f"{type(error).__name__}: {error}"
        found[f"{which} seconds"] = time.monotonic() - begin
        # The program's own collectives still work.
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found[which])
        found[f"{which} gathered"] = gathered
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEETING_S))
    outcomes: dict[str, Any] = {}
    out = Path(job["folder"]) / f"rank{rank}.json"
    for case in job["cases"]:
        try:
            value = globals()[case["call"]](**case["arguments"])
            outcomes[case["name"]] = {"value": value, "error": None}
        except Exception:
            outcomes[case["name"]] = {"value": None, "error": traceback.format_exc()}
        out.write_text(json.dumps(outcomes), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
