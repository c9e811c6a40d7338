"""Models loaded patched, in other processes: data loader workers, DDP and FSDP over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from twice import FAST

_PRELUDE = """
import copy, gc, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
torch.set_num_threads(1)
import safetensors.torch
import fastst_patch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x):
        return self.second(self.first(x).relu()) * self.scale

def load(file, which):
    with torch.device("meta"):
        model = Net()
    if which == "stock":
        tensors = safetensors.torch.load_file(file)
    else:
        with fastst_patch.profile() as seen, fastst_patch.patched():
            tensors = safetensors.torch.load_file(file)
        assert {(r.path, r.fallback_reason) for r in seen.reports} <= {
            (path, None) for path in FAST}, seen
        assert len(seen.reports) == 1
    model.load_state_dict(tensors, assign=True)
    del tensors
    gc.collect()
    return model
"""

_WORKERS = """
def main():
    from torch.utils.data import DataLoader, TensorDataset
    models = [load(sys.argv[1], which) for which in ("stock", "patched")]
    for context in ("spawn", "fork"):
        batches = []
        for model in models:
            data = TensorDataset(model.first.weight.detach(), model.second.weight.detach().T)
            loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=context)
            batches.append([t for batch in loader for t in batch])
        assert len(batches[0]) == len(batches[1]) == 16
        assert all(torch.equal(a, b) for a, b in zip(*batches)), context
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    weight = models[1].first.weight.detach()
    queue.put(weight)  # moves the tensor itself to shared memory, as it does stock's
    assert torch.equal(queue.get(), models[0].first.weight) and weight.is_shared()
    print("same")

if __name__ == "__main__":  # spawned workers import this file
    main()
"""

_DISTRIBUTED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def sharded(model):
    for part in (model.first, model.second):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)

WRAPS = {
    "ddp": DistributedDataParallel,
    "fsdp": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    "fsdp, names kept": lambda m: FullyShardedDataParallel(
        m, device_id=torch.device("cpu"), use_orig_params=True),
    "fully_shard": sharded,
}
for name, wrap in WRAPS.items():
    steps = []
    for which in ("stock", "patched"):
        torch.manual_seed(rank)
        model = wrap(load(sys.argv[1], which))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 16)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        local = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
        steps.append(losses + local)
    assert len(steps[0]) > 2 and all(torch.equal(a, b) for a, b in zip(*steps)), name
dist.barrier()
dist.destroy_process_group()
print("same")
"""


@pytest.fixture
def program(tmp_path) -> Callable[[str], tuple[Path, Path]]:
    """Write a script, and the file that it loads."""
    torch.manual_seed(2)
    state = {"first.weight": torch.randn(32, 16), "first.bias": torch.randn(32)}
    state |= {"second.weight": torch.randn(16, 32), "second.bias": torch.randn(16)}
    file = tmp_path / "net.safetensors"
    safetensors.torch.save_file({**state, "scale": torch.rand(16)}, file)

    def write(body: str) -> tuple[Path, Path]:
        script = tmp_path / "script.py"
        script.write_text(f"FAST = {FAST!r}\n" + _PRELUDE + body)
        return script, file

    return write


def test_dataloader_workers(program, tmp_path) -> None:
    command = [sys.executable, *map(str, program(_WORKERS))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_distributed(program, tmp_path, warm_python) -> None:
    """DDP, FSDP and fully_shard over gloo, two processes: optimizer steps as with stock."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    script, file = program(_DISTRIBUTED)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        arguments = (file, rank, tmp_path / "store")
        return warm_python.run(script, *arguments, folder=tmp_path, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(2)):
            assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr
