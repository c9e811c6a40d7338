"""vLLM's own loader on its CPU build: streamed by the integration, by `safe_open` alone, and stock.

    python benchmarks/vllm_load.py [--cache cold,warm] [--gb 1.75] [--rounds 9] [-o NAME=VALUE]
                                   [--json FILE]

A copy of a process that has imported vLLM builds a Llama, and has `DefaultModelLoader.load_weights`
fill it from a checkpoint in several files; the clock has that call alone. `safe_open` alone is what
`patch()` does for versions of vLLM that the integration does not know. The bytes of all parameters
are compared with those of the first run. A run that was not accelerated in its own way is an error
and no row.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import _models
import _scenario as scenario
from race.copies import Copy
from sharding import HEADS, STEP, hidden_size
from tqdm import tqdm

import fastst_patch
from fastst_patch.bench import hardware, harness, settle
from fastst_patch.bench.checkpoint import transformer_specs
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.process import ask, serve
from fastst_patch.config import undecided_environment

STOCK, STREAMED, HANDLES = "stock", "streamed", "safe_open"
IMPORTED = ("vllm", "vllm.engine.arg_utils", "vllm.distributed",
            "vllm.model_executor.model_loader", "vllm.model_executor.models.llama")  # fmt: skip
VARIABLES = {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
WAYS = (STOCK, STREAMED, HANDLES)
CACHES = ("cold", "warm")
SHARD_BYTES = 500_000_000


# ---- the process that is timed ------------------------------------------


def child(job: dict[str, Any], gate: Callable[..., None]) -> dict[str, Any]:
    from fastst_patch import patch_map
    from fastst_patch.bench.child import clock, patch_with, require_stock

    way, loader = job["way"], "patched"
    if way == STOCK:
        loader = STOCK
        require_stock()
    else:
        targets = None if way == STREAMED else [t for t in patch_map() if t != "vllm.load"]
        patch_with(job["options"] | {"targets": targets})
    model, load = built(job["folder"])
    with clock(loader, job["paths"], "cpu", gate) as timed:
        before = cpu_seconds()
        load()
        timed.lap("load")
        used = cpu_seconds() - before
    require_way(way, timed.reports)
    return {
        "seconds": timed.seconds["load"],
        "cpu_seconds": used,
        "path": ", ".join(dict.fromkeys(str(one.path) for one in timed.reports)) or STOCK,
        "resident_before": timed.resident,
        "memory": timed.memory,
        "digest": digest(model),
    }


def built(folder: str) -> tuple[Any, Callable[[], None]]:
    """A model of vLLM's without weights, and what loads them."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    made = EngineArgs(
        folder, enforce_eager=True, max_model_len=128, skip_tokenizer_init=True
    ).create_engine_config()
    with tempfile.TemporaryDirectory() as place, set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"file://{place}/rendezvous", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(made.model_config.dtype):
            model = initialize_model(vllm_config=made)

    def load() -> None:
        with set_current_vllm_config(made):
            get_model_loader(made.load_config).load_weights(model, made.model_config)

    return model, load


def cpu_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def require_way(way: str, reports: Sequence[Any]) -> None:
    """End the process if the weights came in another way than the one that is named."""
    took = {(one.call, one.path) for one in reports}
    calls = {call for call, path in took if path != "stock"}
    if calls != {STOCK: set(), STREAMED: {"vllm"}, HANDLES: {"safe_open"}}[way]:
        raise SystemExit(f"the weights were to come by {way}, and came by {sorted(took)}")


def digest(model: Any) -> str:
    """Of names, dtypes, shapes and bytes of all parameters."""
    from fastst_patch import engine

    found = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous()
        checksum = engine.touch(data.data_ptr(), data.nbytes)
        seen = (name, str(data.dtype), list(data.shape), checksum)
        found.update(json.dumps(seen).encode())
    return found.hexdigest()


def answer() -> None:
    """In a copy: answer one message."""
    serve(child)
    os._exit(0)


def with_bytecode() -> None:
    """Compile the package as pip does: copies would compile a checkout under the clock."""
    compileall.compile_dir(Path(fastst_patch.__file__).parent, quiet=1)


def copy(errors: IO[bytes]) -> Copy:
    return Copy("", undecided_environment() | VARIABLES, errors, IMPORTED, answer)


# ---- rounds -------------------------------------------------------------


def checkpoint(folder: Path, nbytes: int) -> _models.Model:
    """Write a Llama that vLLM can build, in several files."""
    hidden = hidden_size(nbytes, HEADS)
    specs = transformer_specs(408 * hidden**2 + 66 * hidden)
    config = _models.llama_config(specs, head=STEP)
    return _models.write(folder / "model", config, _models.in_shards(specs, SHARD_BYTES))


def measure(
    args: argparse.Namespace, model: _models.Model, cache: str, lender: Any, bar: tqdm
) -> Mapping[str, Sequence[Any]]:
    job = {"folder": model.folder, "paths": model.files, "options": dict(args.options)}

    def run(way: str) -> Any:
        bar.set_description(f"{cache}: {way}")
        found = scenario.in_cache(
            cache, model.files,
            lambda gate: SimpleNamespace(**ask(copy, job | {"way": way}, f"vLLM, {way}", gate)),
            lender,
        )  # fmt: skip
        bar.update()
        return found

    return harness.race(WAYS, args.rounds, run, lambda one: one.digest)


def caches(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [one for one in chosen if one not in CACHES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: not among {', '.join(CACHES)}")
    return chosen


def parser() -> argparse.ArgumentParser:
    made = scenario.arguments(__doc__, "--dir", "-o", rounds=9)
    made.add_argument("--cache", type=caches, default=list(CACHES), help="cold,warm")
    made.add_argument("--gb", type=float, default=1.75, help="at most (%(default)g)")
    return made


def main() -> int:
    args = parser().parse_args()
    if not scenario.installed("vllm"):
        raise UsageError("vLLM's CPU build is needed: the extra `engines`")
    with_bytecode()
    seconds, used = scenario.answer("seconds"), scenario.answer("cpu_seconds")
    table = scenario.Table(
        [scenario.Column("s", seconds), scenario.ratio(seconds, STOCK),
         scenario.Column("CPU s", used), scenario.ratio(used, STOCK, name="CPU")],
        facts=["cache"],
        text={"path": lambda some: some[0].path},
    )  # fmt: skip
    with scenario.folder(args.dir) as folder:
        model = checkpoint(folder, int(args.gb * 1e9))
        environment = hardware.environment(model.files[0]) | {"vllm": hardware.version("vllm-cpu")}
        total = args.rounds * len(WAYS) * len(args.cache)
        with (
            settle.reserve_for(model.files) as lender,
            tqdm(total=total, unit="run", disable=None, leave=False) as bar,
        ):
            for cache in args.cache:
                table.add(measure(args, model, cache, lender, bar), cache=cache)
    title = f"{model.file_bytes / 1e9:.2f} GB, {model.tensors} tensors in {len(model.files)} files"
    return scenario.report(args, title, table, environment=environment, bytes=model.file_bytes,
                           tensors=model.tensors, files=len(model.files))  # fmt: skip


if __name__ == "__main__":
    scenario.script("vllm_load", main)
