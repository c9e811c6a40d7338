"""Programs over vLLM itself, which tests start and end."""

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

NEEDS_VLLM = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM: the extra `engines`"
    )
]

_MINUTES = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama in three shards."""
    import vllm_checkpoint

    folder = tmp_path_factory.mktemp("llama")
    vllm_checkpoint.write(folder)
    return folder


def run(command: list[str], **environment: str) -> tuple[str, str]:
    """What a Python program prints and logs. None of its processes outlives the call."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTST_")}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    env["PYTHONPATH"] = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, *command], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=60 * _MINUTES)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out, err


def found_by(script: Path, folder: Path, text: str, ranks: int = 1) -> list[Any]:
    """What each rank of a program tells by `vllm_loading.tell`.

    Args:
        script: where the program goes.
        folder: its argument, a checkpoint.
        text: the program.
        ranks: processes, started by torchrun if more than one.
    """
    script.write_text(text, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    out, _ = run([*(torchrun if ranks > 1 else []), str(script), str(folder)])
    told = [line for line in out.splitlines() if line.startswith("FOUND ")]
    assert len(told) == ranks, out[-3000:]
    return [json.loads(line.removeprefix("FOUND ")) for line in told]
