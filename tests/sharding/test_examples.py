"""The programs in examples/, run by torchrun as their docstrings say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from places import EXAMPLES
from warm_python import TORCHRUN, WarmPython

from fastst_patch import engine

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no gloo",
    ),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 4,
        reason="NCCL wants a GPU for each rank",
    ),
]

LIMIT_S = 120


@pytest.fixture
def torchrun(warm_python: WarmPython, tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Run torchruns side by side: sorted lines and the errors of all.

    None may leave a process running.
    """

    def run(*several: Sequence[object], nodes: Sequence[str] = (), status: int = 0) -> Any:
        programs = []
        out, errors = tmp_path / "out", tmp_path / "errors"
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        try:
            for number, arguments in enumerate(several):
                if nodes:
                    environment["FASTST_NODE_ID"] = nodes[number]
                with out.open("ab") as stdout, errors.open("ab") as stderr:
                    programs.append(warm_python.start(
                        TORCHRUN, arguments, folder=tmp_path, stdin=None,
                        stdout=stdout, stderr=stderr, environment=environment,
                    ))  # fmt: skip
            statuses = [program.wait(LIMIT_S) for program in programs]
        except subprocess.TimeoutExpired:
            told = out.read_text() + errors.read_text()
            raise AssertionError(f"torchrun hangs\n{told}") from None
        finally:
            for program in programs:
                program.kill()
        assert statuses == [status] * len(programs), errors.read_text()
        for program in programs:
            with pytest.raises(ProcessLookupError):
                os.killpg(program.pid, 0)
        return sorted(out.read_text().splitlines()), errors.read_text()

    return run


def _rows_and_columns(layer: int) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (f"model.layers.{layer}.self_attn.q_proj.weight", "BF16", (10, 8)),
        (f"model.layers.{layer}.self_attn.o_proj.weight", "BF16", (8, 10)),
        (f"model.layers.{layer}.mlp.down_proj.weight", "F32", (3, 8)),
        (f"model.layers.{layer}.input_layernorm.weight", "F32", (8,)),
    ]


def test_four_ranks(torchrun, tmp_path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for layer in range(2):
        sharded.write_file(model / f"model-{layer}.safetensors", _rows_and_columns(layer))
    arguments = ["--nproc-per-node", "4", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                 str(tmp_path / "store"), "--rdzv-conf", "store_type=file",
                 "--local-addr", "127.0.0.1", str(EXAMPLES / "four_ranks.py")]  # fmt: skip
    lines, _ = torchrun([*arguments, str(model)])
    # 10 rows or columns over four ranks: 3, 3, 3, 1; 8 columns: 2 each; the norm: all of it.
    nbytes = [2 * (2 * 8 * n * 2 + 3 * 2 * 4 + 8 * 4) for n in (3, 3, 3, 1)]
    expected = [f"rank {rank} of 4: 8 tensors, {n} bytes" for rank, n in enumerate(nbytes)]
    shapes = [
        ("self_attn.q_proj", [3, 8], "bfloat16"), ("mlp.down_proj", [3, 2], "float32"),
        ("self_attn.o_proj", [8, 3], "bfloat16"), ("input_layernorm", [8], "float32"),
    ]  # fmt: skip
    expected += [
        f"  model.layers.{layer}.{name}.weight {shape} torch.{dtype} on cpu"
        for layer in range(2) for name, shape, dtype in shapes
    ]  # fmt: skip
    if not torch.cuda.is_available():
        assert lines == sorted(expected)


def test_four_ranks_fail_together(torchrun) -> None:
    """Each prints the error, and torchrun ends with a status of failure."""
    arguments = ["--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1",
                 str(EXAMPLES / "four_ranks.py"), "nowhere.safetensors"]  # fmt: skip
    _, errors = torchrun(arguments, status=1)
    assert "No such file or directory" in errors
    assert "nowhere.safetensors" in errors


@pytest.mark.parametrize("scope", ["node", "job"])
def test_two_nodes(torchrun, tmp_path, scope) -> None:
    """Two torchruns on one machine, with the node ids of two."""
    path = tmp_path / "model.safetensors"
    tensors = [(f"layers.0.experts.{n}.up.weight", "BF16", (16, 4)) for n in range(6)]
    sharded.write_file(path, [("norm.weight", "F32", (16,)), *tensors])
    arguments = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                 "--rdzv-id", "example", "--rdzv-endpoint", str(tmp_path / "store"),
                 "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1",
                 str(EXAMPLES / "two_nodes.py"), str(path), "--read-once", scope]  # fmt: skip
    lines, _ = torchrun(arguments, arguments, nodes=("a", "b"))
    owned = [[0, 4], [1, 5], [2], [3]]
    assert lines == [
        f"rank {rank} of 4: experts {experts}, {64 + 128 * len(experts)} bytes"
        for rank, experts in enumerate(owned)
    ]
