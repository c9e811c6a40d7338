"""vLLM itself, its CPU build: in one process, and as engines with processes of their own.

Runs where vLLM can be imported: ``pip install "fastst-patch[engines]"``, then uninstall
torchvision, torchaudio and torchcodec where they do not fit torch. Each test starts one engine, or
one process that loads, and takes some minutes on two CPUs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM: the extra `engines`"
    ),
    pytest.mark.xdist_group("vllm"),
]

_MINUTES = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import vllm_checkpoint

    folder = tmp_path_factory.mktemp("llama")
    vllm_checkpoint.write(folder)
    return folder


def run(script: str, *args: str, **environment: str) -> tuple[str, str]:
    """A program's output, and what it wrote beside it. None of its processes outlives it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTST_")}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *args], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=args[0],
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=60 * _MINUTES)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out, err


# ---- one process ----

LOADS = """
import json, os, sys, tempfile
import torch
torch.accelerator.empty_cache = lambda: None  # as the worker of the CPU build has it
import fastst_patch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader import get_model

def config(**options):
    args = EngineArgs(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, **options)
    return args.create_engine_config()

with set_current_vllm_config(config()):
    where = "file://" + os.path.join(tempfile.mkdtemp(), "rendezvous")
    init_distributed_environment(1, 0, where, 0, backend="gloo")
    initialize_model_parallel(1, 1)

def load(**options):
    made = config(**options)
    with set_current_vllm_config(made), fastst_patch.profile() as seen:
        model = get_model(vllm_config=made)
    reports = [[r.call, r.path, r.tensors, r.fallback_reason] for r in seen.reports]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, reports

def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)

theirs, _ = load()
found = {"stock": [_, len(theirs), True]}

def compare(name, **options):
    ours, reports = load(**options)
    same = list(ours) == list(theirs)
    same = same and all(torch.equal(raw(ours[k]), raw(theirs[k])) for k in theirs)
    found[name] = [reports, len(ours), same]

compare("format", load_format="fastst")
compare("direct", load_format="fastst", model_loader_extra_config={"io": "direct"})
try:
    load(load_format="fastst", model_loader_extra_config={"oi": "direct"})
except Exception as error:
    found["refused"] = [type(error).__name__, str(error)]
with fastst_patch.patched() as report:
    found["target"] = report.targets["vllm.load"].patched
    compare("patched")
    compare("both", load_format="fastst")
    compare("prefetch", safetensors_load_strategy="prefetch")
    compare("eager", safetensors_load_strategy="eager")
    compare("threads", model_loader_extra_config={"enable_multithread_load": True})
compare("afterwards")
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def loads(checkpoint: Path) -> dict[str, Any]:
    out, _ = run(LOADS, str(checkpoint))
    (line,) = [line for line in out.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


STREAMED = ("format", "direct", "patched", "both", "prefetch")


@pytest.mark.parametrize("way", [*STREAMED, "eager", "threads", "afterwards"])
def test_parameters_equal_stocks(loads, way) -> None:
    _, count, same = loads[way]
    assert count == loads["stock"][1] > 10
    assert same


@pytest.mark.parametrize("way", STREAMED)
def test_fast_path_was_taken(loads, way) -> None:
    (report,) = loads[way][0]
    call, path, tensors, reason = report
    assert call == "vllm"
    assert path == "direct" if way == "direct" else path.startswith("mmap")
    assert (tensors, reason) == (21, None)


def test_others_are_vllms_own(loads) -> None:
    assert loads["target"] is True
    assert loads["stock"][0] == loads["afterwards"][0] == []
    assert loads["eager"][0] == [["vllm", "stock", 0, "safetensors_load_strategy is 'eager'"]]
    assert {report[0] for report in loads["threads"][0]} == {"load_file"}


def test_bad_options_are_refused(loads) -> None:
    kind, text = loads["refused"]
    assert kind == "OptionError"
    assert "unknown option 'oi'" in text


# ---- engines ----

GENERATES = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    options = json.loads(sys.argv[2])
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, seed=0, **options
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 5, 6, 7]}], sampling)
    print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""


def generate(checkpoint: Path, tmp_path: Path, *options: Any, **environment: str) -> Any:
    """Tokens, and the lines that tell of loads in any process of the engine."""
    script = tmp_path / "generates.py"  # a spawned process imports it
    script.write_text(GENERATES, encoding="utf-8")
    start = f"import runpy, sys; sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], None,"
    start += " '__main__')"
    out, err = run(start, str(checkpoint), json.dumps(options[0] if options else {}),
                   FASTST_LOG_LEVEL="info", **environment)  # fmt: skip
    (line,) = [line for line in out.splitlines() if line.startswith("TOKENS ")]
    told = [line for line in (out + err).splitlines() if line.startswith("fastst_patch: vllm ")]
    return json.loads(line.removeprefix("TOKENS ")), told


@pytest.fixture(scope="module")
def tokens(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    found, told = generate(checkpoint, tmp_path_factory.mktemp("plain"))
    assert told == []
    assert len(found) == 12
    return found


def test_environment_reaches_the_engine(checkpoint, tmp_path, tokens) -> None:
    found, told = generate(checkpoint, tmp_path, FASTST_ENABLED="1")
    assert found == tokens
    assert len(told) == 1
    assert "in 21 tensors" in told[0]
    assert "path mmap" in told[0]


def test_load_format_reaches_the_engine(checkpoint, tmp_path, tokens) -> None:
    options = {"load_format": "fastst", "model_loader_extra_config": {"io": "buffered"}}
    found, told = generate(checkpoint, tmp_path, options)
    assert found == tokens
    assert len(told) == 1
    assert "path buffered" in told[0]
