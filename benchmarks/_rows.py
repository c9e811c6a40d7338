"""The rows of end_to_end.py, and the process in which one of them is timed once.

A row is what a program does: a function that gets everything ready and returns the call to time.
The same function serves stock and patched; nothing in it knows which it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORWARDS = 5

Tensors = dict[str, Any]  # torch tensors, but the parent of these processes needs no torch


@dataclass(frozen=True)
class Job:
    """One timed run in a fresh process."""

    row: str
    loader: str  # "stock", "patched", or the name of one of OFFERS
    folder: str  # the model
    files: tuple[str, ...]  # its weights
    device: str
    options: Mapping[str, object] = field(default_factory=dict)  # for patch()
    arguments: Mapping[str, object] = field(default_factory=dict)  # for from_pretrained; an Offer's
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment; an Offer's
    rehearse: bool = False  # the device is the CPU in truth: nothing can reach a GPU


@dataclass(frozen=True)
class Call:
    """What to time, and which tensors then prove that it did its work."""

    run: Callable[[], Any]
    tensors: Callable[[Any], Tensors]


@dataclass(frozen=True)
class Offer:
    """What a library has itself to load faster; raced like a loader, with stock safetensors."""

    name: str
    package: str
    there: Callable[[], bool]  # whether the installed version has it
    arguments: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table, for each loader."""

    name: str
    title: str
    model: str  # which one, of end_to_end's
    start: Callable[[Job], Call]
    imports: tuple[str, ...]
    cache: str = "warm"
    device: str = "cpu"
    packages: tuple[str, ...] = ("transformers",)
    offers: tuple[str, ...] = ()  # of OFFERS


ROWS: dict[str, Row] = {}

_LLAMA = ("transformers.models.llama.modeling_llama",)
_MIXTURE = ("transformers.models.qwen3_moe.modeling_qwen3_moe",)
_PIPELINE = ("diffusers", "diffusers.pipelines.dit.pipeline_dit")


def row(name: str, title: str, **facts: Any) -> Callable[[Callable[[Job], Call]], Any]:
    def register(start: Callable[[Job], Call]) -> Callable[[Job], Call]:
        ROWS[name] = Row(name, title, start=start, **facts)
        return start

    return register


# ---- what the libraries offer themselves --------------------------------


def _transformers_can_read_files_whole() -> bool:
    import transformers

    return (
        "disable_mmap" in inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
    )


def _diffusers_can_read_files_whole() -> bool:
    import diffusers

    # An argument among **kwargs, which only the function's text tells of.
    return '"disable_mmap"' in inspect.getsource(diffusers.DiffusionPipeline.from_pretrained)


def _diffusers_can_load_shards_in_parallel() -> bool:
    from diffusers.utils import constants

    return hasattr(constants, "HF_ENABLE_PARALLEL_LOADING")


OFFERS = {
    offer.name: offer
    for offer in (
        Offer("transformers, disable_mmap=True", "transformers",
              _transformers_can_read_files_whole, {"disable_mmap": True}),
        Offer("diffusers, disable_mmap=True", "diffusers",
              _diffusers_can_read_files_whole, {"disable_mmap": True}),
        Offer("diffusers, HF_ENABLE_PARALLEL_LOADING=1", "diffusers",
              _diffusers_can_load_shards_in_parallel,
              variables={"HF_ENABLE_PARALLEL_LOADING": "1"}),
    )
}  # fmt: skip
_OF_TRANSFORMERS = tuple(name for name, one in OFFERS.items() if one.package == "transformers")
_OF_DIFFUSERS = tuple(name for name, one in OFFERS.items() if one.package == "diffusers")

# ---- the rows -----------------------------------------------------------
# Decorators apply from the bottom up; the table follows that order.


@row("moe-cpu", "from_pretrained of a mixture of experts to the CPU", model="moe",
     imports=_MIXTURE, offers=_OF_TRANSFORMERS)  # fmt: skip
@row("cpu-cold", "from_pretrained to the CPU, all weights touched", model="dense", cache="cold",
     imports=_LLAMA, offers=_OF_TRANSFORMERS)  # fmt: skip
@row("cpu-warm", "from_pretrained to the CPU", model="dense", imports=_LLAMA,
     offers=_OF_TRANSFORMERS)  # fmt: skip
def load_to_cpu(job: Job) -> Call:
    architecture = _architecture(job.folder)
    return Call(lambda: architecture.from_pretrained(job.folder, **job.arguments), _state)


@row("disk-offload", f"{FORWARDS} forwards with the layers left on the disk", model="llama",
     imports=(*_LLAMA, "accelerate"), packages=("transformers", "accelerate"))  # fmt: skip
def offloaded_forward(job: Job) -> Call:
    import torch

    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers": "disk"}
    model = _architecture(job.folder).from_pretrained(job.folder, device_map=device_map)
    words = torch.arange(8).reshape(1, 8)
    torch.set_num_threads(1)  # what is timed is the files: waiting for another core is not theirs

    def forward() -> Any:
        with torch.no_grad():
            return [model(words).logits for _ in range(FORWARDS)]

    def tensors(logits: list[Any]) -> Tensors:
        proof = {f"logits of forward {i}": one for i, one in enumerate(logits)}
        kept = {name: t for name, t in _state(model).items() if t.device.type != "meta"}
        return kept | _offloaded(model) | proof

    return Call(forward, tensors)


@row("sentence-transformers", "SentenceTransformer(MiniLM), real weights", model="minilm",
     imports=("sentence_transformers", "transformers.models.bert.modeling_bert"),
     packages=("transformers", "sentence_transformers"))  # fmt: skip
def sentence_transformer(job: Job) -> Call:
    from sentence_transformers import SentenceTransformer

    return Call(lambda: SentenceTransformer(job.folder, device=job.device), _state)


@row("cuda-moe", "from_pretrained(device_map) of a mixture of experts", model="moe",
     device="cuda", imports=(*_MIXTURE, "accelerate"), packages=("transformers", "accelerate"),
     offers=_OF_TRANSFORMERS)  # fmt: skip
@row("cuda-device-map", "from_pretrained(device_map)", model="dense", device="cuda",
     imports=(*_LLAMA, "accelerate"), packages=("transformers", "accelerate"),
     offers=_OF_TRANSFORMERS)  # fmt: skip
def load_to_device(job: Job) -> Call:
    architecture = _architecture(job.folder)
    arguments = {"device_map": {"": job.device}, **job.arguments}
    return Call(lambda: architecture.from_pretrained(job.folder, **arguments), _state)


@row("cuda-to", "model.to(device), loaded on the CPU before", model="dense", device="cuda",
     imports=_LLAMA)  # fmt: skip
def model_to_device(job: Job) -> Call:
    model = _architecture(job.folder).from_pretrained(job.folder)
    return Call(lambda: model.to(job.device), _state)


@row("diffusers-warm", "from_pretrained of a diffusers pipeline to the CPU", model="pipeline",
     imports=_PIPELINE, packages=("diffusers",), offers=_OF_DIFFUSERS)  # fmt: skip
@row("diffusers-cold", "from_pretrained of a diffusers pipeline to the CPU, all weights touched",
     model="pipeline", cache="cold", imports=_PIPELINE, packages=("diffusers",),
     offers=_OF_DIFFUSERS)  # fmt: skip
def load_pipeline(job: Job) -> Call:
    import torch
    from diffusers import DiTPipeline

    arguments = {"torch_dtype": torch.bfloat16, **job.arguments}
    return Call(lambda: DiTPipeline.from_pretrained(job.folder, **arguments), _of_pipeline)


@row("cuda-pipeline", "pipe.to(device) of diffusers, loaded on the CPU before", model="pipeline",
     device="cuda", imports=_PIPELINE, packages=("diffusers",))  # fmt: skip
def pipeline_to_device(job: Job) -> Call:
    import torch
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(job.folder, torch_dtype=torch.bfloat16)
    return Call(lambda: pipeline.to(job.device), _of_pipeline)


# ---- what proves a row --------------------------------------------------


def _architecture(folder: str) -> Any:
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, config["architectures"][0])


def _state(model: Any) -> Tensors:
    """Everything a model holds: what it saves, and the buffers that it does not."""
    return dict(model.state_dict()) | dict(model.named_buffers())


def _of_pipeline(pipeline: Any) -> Tensors:
    """Everything that the models of a pipeline hold."""
    import torch

    return {
        f"{part}.{name}": tensor
        for part, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in _state(module).items()
    }


def _offloaded(model: Any) -> Tensors:
    """What accelerate's hooks load for each forward, through the very mapping they use."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            while hasattr(weights, "dataset"):  # the same under a prefix
                weights = weights.dataset
            if weights:
                return {f"offloaded {name}": weights[name] for name in weights}
    raise SystemExit("nothing was offloaded to the disk")


# ---- one run ------------------------------------------------------------


def run(job: Job, gate: Callable[..., None]) -> dict[str, Any]:
    """Time one row once, in this process. Ends the process where it cannot be a fair race.

    The whole call ends when its device has done everything.
    """
    from fastst_patch.bench import child, device_use

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.update(job.variables)
    line = ROWS[job.row]
    begin = time.perf_counter()
    if job.loader == "patched":
        child.patch_with(job.options)
    else:
        child.require_stock()
    for name in line.imports:
        importlib.import_module(name)
    imported = time.perf_counter()
    device_use.open_context(job.device)
    parts = _time_weights(job.device) if "transformers" in line.packages else []
    ready = time.perf_counter()
    call = line.start(job)
    device_use.synchronize(job.device)
    prepare_s = time.perf_counter() - ready
    parts.clear()
    with child.clock(job.loader, job.files, job.device, gate) as timed:
        result = call.run()
        device_use.synchronize(job.device)
        timed.lap("whole")
    tensors = call.tensors(result)
    touching = time.perf_counter()
    sums = {name: device_use.touch(tensor) for name, tensor in tensors.items()}
    touched = time.perf_counter()
    carried = _accelerated(job, timed.reports) if job.loader == "patched" else []
    whole_s, touch_s = timed.seconds["whole"], touched - touching if line.cache == "cold" else 0.0
    return {
        "import_s": imported - begin,  # patch(), and importing what the row needs
        "prepare_s": prepare_s,  # before the timed call, such as loading to the CPU
        "whole_s": whole_s,
        "weights_s": sum(parts) if parts else None,  # in transformers' _load_pretrained_model
        "touch_s": touch_s,  # reading every byte once; 0 where that is not timed
        "total_s": whole_s + touch_s,  # a lazy load is paid for when the bytes are read
        "digest": device_use.digest(tensors, sums),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "path": ", ".join(dict.fromkeys(str(report.path) for report in carried)) or "stock",
        "accelerated_bytes": sum(report.bytes for report in carried),
        "fallbacks": timed.fallbacks,
        "resident_before": timed.resident,
        "memory": timed.memory,
        "device_name": device_use.device_name(job.device),
    }


def _time_weights(device: str) -> list[float]:
    """Have every later call of transformers' weight loading add its seconds to a list."""
    from transformers.modeling_utils import PreTrainedModel

    from fastst_patch.bench.device_use import synchronize

    seconds: list[float] = []
    inner = PreTrainedModel._load_pretrained_model  # stock's, or what patch() put there

    @functools.wraps(inner)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = inner(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        return result

    PreTrainedModel._load_pretrained_model = staticmethod(timed)
    return seconds


def _accelerated(job: Job, reports: Sequence[Any]) -> list[Any]:
    """Return the reports of what we did. Stock under our name is no result."""
    from fastst_patch import report

    to_device = job.device != "cpu"
    carried = [
        one
        for one in reports
        if one.path != "stock" and one.bytes and (not to_device or one.device.startswith("cuda"))
    ]
    if not carried and not job.rehearse:
        seen = "; ".join(str(one) for one in reports[:3]) or "no report at all"
        raise SystemExit(
            f"nothing was accelerated{' to ' + job.device if to_device else ''} ({seen}); "
            f"since the start of the process: {json.dumps(report.totals())}"
        )
    return carried


# ---- what else a process is asked ---------------------------------------


def offers() -> dict[str, Any]:
    """Tell which of OFFERS the installed versions have."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    there = {}
    for name, offer in OFFERS.items():
        try:
            there[name] = offer.there()
        except ImportError:
            there[name] = False
    return there


def child(message: dict[str, Any], gate: Callable[..., None]) -> Mapping[str, Any]:
    """Do what the parent asks for in one JSON message, and return the answer."""
    kind = message.pop("kind")
    if kind == "run":
        message["files"] = tuple(message["files"])
        return run(Job(**message), gate)
    if kind == "make":
        import _models

        os.environ["HF_HUB_OFFLINE"] = "1"
        _models.MAKERS[message["model"]](Path(message["folder"]))
        return {}
    if kind == "offers":
        return offers()
    import gpu_ceilings

    return gpu_ceilings.facts() if kind == "device" else gpu_ceilings.copies(**message)
