"""Whole loads by URL, through every layer, from a server that does what networks do."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_server as faults
import pytest
import safetensors
import safetensors.torch
import torch
from fault_server import FaultServer
from remote_state import SECRET, assert_no_secret, nothing_left_open, start_obstore
from waiting import until

import fastst_patch
from fastst_patch import engine
from fastst_patch.config import Config
from fastst_patch.sources.base import (
    HEAD_BYTES,
    RemoteChangedError,
    RemoteError,
    RemoteNotFoundError,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning"),
    pytest.mark.skipif(
        "storage_options" not in {field.name for field in dataclasses.fields(Config)},
        reason="this version loads no URLs",
    ),
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
]

LIMITS = {"max_tries": 3, "deadline": 20.0, "stall": 10.0, "backoff": 0.01}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"w{number}": torch.randint(0, 256, (300_000 + number,), dtype=torch.uint8,
                                    generator=generator)
        for number in range(12)
    }  # fmt: skip


@pytest.fixture(scope="module")
def content(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("local") / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def obstore_started() -> None:
    start_obstore()


@pytest.fixture(params=["http", "s3", "store"])
def way(request: pytest.FixtureRequest, content: bytes) -> Iterator[tuple[FaultServer, str]]:
    if request.param != "http":
        request.getfixturevalue("obstore_started")
    engine.shutdown()
    with nothing_left_open(), FaultServer({"/b/model.safetensors": content}) as server:
        options: dict[str, Any] = dict(LIMITS)
        url = f"http://user:{SECRET}@{server.netloc}/b/model.safetensors?sig={SECRET}"
        if request.param != "http":
            url = "s3://b/model.safetensors"
            keys = {"access_key_id": "someone", "secret_access_key": SECRET}
            options |= {"endpoint": server.url(""), "allow_http": True, "region": "x", **keys}
            if request.param == "store":
                options["user_agent"] = "someone"  # no signed URL does that
        # 12 ranges of 256 KiB and more behind the first MiB
        with fastst_patch.config_context(storage_options=options, chunk_bytes=128 << 10):
            yield server, url
        gc.collect()
        engine.shutdown()


def load(url: str) -> dict[str, torch.Tensor]:
    with fastst_patch.patched():
        return safetensors.torch.load_file(url)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[k], wanted[k]) for k in wanted)


PASSING = {
    "reset mid-body": faults.reset_mid_body,
    "no answer": faults.hang_up,
    "truncated body": faults.truncated,
    "wrong Content-Range": faults.other_range,
    "longer than it says": faults.longer,
    "503": faults.status(503),
}


def test_a_load_by_url(way: Any, tensors: dict[str, torch.Tensor]) -> None:
    server, url = way
    with fastst_patch.profile() as seen:
        found = load(url)
    assert same(found, tensors)
    (report,) = seen.reports
    assert report.path == url.partition(":")[0]
    assert report.fallback_reason is None
    assert_no_secret(report, str(report), fastst_patch.stats())
    assert len(server.requests) > 5


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_load_gets_over_a_fault(
    way: Any, tensors: dict[str, torch.Tensor], name: str, number: int
) -> None:
    server, url = way
    server.faults = faults.at(number, PASSING[name])
    assert same(load(url), tensors)


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_load_that_cannot_go_on_is_one_error(way: Any, name: str, number: int) -> None:
    server, url = way
    server.faults = faults.since(number, PASSING[name])
    with pytest.raises(RemoteError) as caught:
        load(url)
    assert_no_secret(caught.value)
    assert caught.value.tries == 3


@pytest.mark.parametrize("number", [1, 4])
def test_a_load_of_a_file_that_changes_is_refused(way: Any, number: int) -> None:
    server, url = way
    server.faults = faults.at(number, faults.replaced)
    server.files["/b/model.safetensors"] = faults.Remote(
        server.files["/b/model.safetensors"].content, 1_600_000_000
    )
    with pytest.raises(RemoteChangedError, match="changed while it was read"):
        load(url)


def test_a_load_without_ranges(way: Any, tensors: dict[str, torch.Tensor]) -> None:
    server, url = way
    server.faults = lambda _: faults.whole_file
    assert same(load(url), tensors)
    assert len(server.requests) <= 5


def test_a_missing_file(way: Any) -> None:
    server, url = way
    server.files.clear()
    with pytest.raises(RemoteNotFoundError) as caught:
        load(url)
    assert_no_secret(caught.value)


def test_opening_is_one_request_and_a_slice_another(
    way: Any, tensors: dict[str, torch.Tensor]
) -> None:
    server, url = way
    with fastst_patch.patched(), safetensors.safe_open(url, "pt") as handle:
        assert handle.get_slice("w9").get_shape() == [300_009]
        assert len(server.requests) == 1
        assert server.sent == HEAD_BYTES
        found = handle.get_slice("w9")[1000:37_000]  # 1% of the file
    assert torch.equal(found, tensors["w9"][1000:37_000])
    assert len(server.requests) == 2
    assert server.sent - HEAD_BYTES <= 1.1 * found.nbytes


def test_a_header_longer_than_the_first_request_takes_a_second(way: Any) -> None:
    server, url = way
    many = {f"model.layers.{i}.weight": torch.tensor([i % 256], dtype=torch.uint8)
            for i in range(20_000)}  # fmt: skip
    content = safetensors.torch.save(many)
    server.files["/b/model.safetensors"] = faults.Remote(content)
    header = 8 + int.from_bytes(content[:8], "little")
    assert header > HEAD_BYTES
    with fastst_patch.patched(), safetensors.safe_open(url, "pt") as handle:
        assert len(handle.keys()) == len(many)
        assert len(server.requests) == 2
        assert server.sent == header


_PEAK = """
import sys
import safetensors, safetensors.torch, fastst_patch
from fastst_patch import engine, sources
url, small = sys.argv[1:]
fastst_patch.patch()

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

def by_handle(url):
    with safetensors.safe_open(url, "pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}

for load in (safetensors.torch.load_file, by_handle):
    load(small)  # imports, threads
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    before = memory("VmRSS")
    tensors = load(url)
    print(memory("VmHWM") - before, sum(one.nbytes for one in tensors.values()))
    del tensors
"""


def test_peak_memory(tmp_path: Path) -> None:
    """Beside the tensors: `host_memory_budget` of 256 MiB, and 64 MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not let VmHWM begin anew")
    block, count = bytes(range(256)) * (50 << 12), 12  # of 50 MiB
    header = json.dumps({
        f"w{i}": {"dtype": "U8", "shape": [len(block)],
                  "data_offsets": [i * len(block), (i + 1) * len(block)]}
        for i in range(count)
    }).encode()  # fmt: skip
    large = b"".join([len(header).to_bytes(8, "little"), header, *[block] * count])
    small = safetensors.torch.save({"w": torch.zeros(1000)})
    with FaultServer({"/large.safetensors": large, "/small.safetensors": small}) as server:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, server.url("/large.safetensors"),
             server.url("/small.safetensors")],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        grown, nbytes = map(int, line.split())
        assert nbytes == count * len(block)
        assert grown <= nbytes + (256 << 20) + (64 << 20)
    assert len(done.stdout.splitlines()) == 2


_PROGRAM = """
import sys, threading
import safetensors.torch, fastst_patch
fastst_patch.patch(storage_options=eval(sys.argv[2]), chunk_bytes=128 << 10)
print("ready", flush=True)
try:
    safetensors.torch.load_file(sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("fault", [faults.stalled, faults.silent])
def test_ctrl_c_ends_a_load(way: Any, fault: Any, tmp_path: Path) -> None:
    server, url = way
    server.faults = faults.since(2, fault)
    options = {**fastst_patch.config().storage_options, "stall": 60.0, "deadline": 60.0}
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, url, repr(options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        assert until(lambda: len(server.requests) >= 3)
        begin = time.monotonic()
        program.send_signal(2)
        told, complaints = program.communicate(timeout=30)
        assert time.monotonic() - begin < 5  # a second, and what a busy machine adds
    assert (program.returncode, told) == (0, "interrupted\n"), complaints
