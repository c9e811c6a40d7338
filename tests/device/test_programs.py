"""Interrupts, forks and the end of the process, around loads to a device."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from numbered import file_of_numbers
from places import SUPPORT

import fastst_patch
from fastst_patch import engine

KINDS = ("dlpack", "owned")


@pytest.fixture
def path(raw) -> str:
    return file_of_numbers(raw, 40, 100_000)


def _right(tensors: dict[str, torch.Tensor]) -> bool:
    # By numpy: torch's OpenMP hangs in forked children.
    return all(bool((t.numpy() == int(name[1:])).all()) for name, t in tensors.items())


def _interrupt_when_held(call: str) -> threading.Thread:
    """Ctrl-C once the engine is in the middle of reads that never end."""

    def work() -> None:
        while engine.fault_calls(call) < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("progress", [False, True])
def test_interrupted_load(cuda, path, fast, nothing_left, kind, progress) -> None:
    with fastst_patch.config_context(tensors=kind, progress=progress, chunk_bytes=64 << 10):
        engine.set_fault("preadv", first=4, errno=11)  # EAGAIN, again and again
        thread = _interrupt_when_held("preadv")
        with pytest.raises(KeyboardInterrupt) as caught:
            fast.load_file(path, device="cuda")
        ended = time.monotonic()
        thread.join()
        assert time.monotonic() - ended < 1
        engine.clear_faults()
        # The traceback is still there, as a shell keeps it: it holds nothing.
        assert cuda.driver.live().blocks == 0
        assert engine.counters()["jobs"] == 0
        del caught
        assert _right(fast.load_file(path, device="cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_handle(cuda, path, fast, nothing_left, kind) -> None:
    """Other threads that wait for the same group go on, and so does the handle."""
    with fastst_patch.config_context(tensors=kind, chunk_bytes=64 << 10, threads=1):
        with fast.safe_open(path, "pt", "cuda") as handle:
            names = handle.offset_keys()
            assert _right({names[0]: handle.get_tensor(names[0])})
            engine.set_fault("preadv", first=1, errno=4)  # EINTR for ever
            found: list[Any] = []

            def other() -> None:
                try:
                    found.append(handle.get_tensor(names[2]))
                except BaseException as error:
                    found.append(error)

            second = threading.Thread(target=other)

            def strike() -> None:
                second.start()
                while engine.fault_calls("preadv") < 3:
                    time.sleep(0.001)
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)

            thread = threading.Thread(target=strike)
            thread.start()
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                handle.get_tensor(names[1])
            assert time.monotonic() - started < 5
            thread.join()
            assert second.is_alive()
            engine.clear_faults()
            second.join()
            assert _right({names[2]: found[0]})
            assert _right({name: handle.get_tensor(name) for name in names[1:] + names})
        found.clear()
    assert cuda.driver.live().blocks == 0


def _in_child(work: Any) -> str:
    """What a forked child says, which must come to an end."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_forked(cuda, asked, path, fast, watch, kind) -> None:
    """In the child the device is stock's affair, with the reason; the parent goes on."""
    with fastst_patch.config_context(tensors=kind, chunk_bytes=64 << 10):
        loaded = fast.load_file(path, device="cuda")
        handle = fast.safe_open(path, "pt", "cuda")
        names = handle.offset_keys()
        for name in names[:3]:
            handle.get_tensor(name)

        def child() -> str:
            with watch() as seen:
                mine = fast.load_file(path, device="cuda")
                rest = {name: handle.get_tensor(name) for name in names[3:] + names[:1]}
                handle.__exit__(None, None, None)
            reasons = {report.fallback_reason for report in seen.reports}
            return f"{_right(mine)} {_right(rest)} {asked.asked} {reasons}"

        said = _in_child(child)
        assert said.startswith("True True ['load_file', 'handle']"), said
        assert "forked" in said
        assert "None" not in said
        assert _right({name: handle.get_tensor(name) for name in names[3:]})
        assert _right(loaded)
        assert _right(fast.load_file(path, device="cuda"))
    assert asked.asked == []


def test_forked_in_the_middle(cuda, asked, path, fast) -> None:
    """Loads in other threads: neither side hangs, and the parent's bytes are right."""
    wrong: list[Any] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not _right(fast.load_file(path, device="cuda")):
                wrong.append("bytes")

    with fastst_patch.config_context(chunk_bytes=64 << 10):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert _in_child(lambda: "alive") == "alive"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []


_SCRIPT = """
import faulthandler, os, sys, threading
faulthandler.enable()
sys.path.insert(0, {tests!r})
import fake_device, fastst_patch, safetensors.torch
from fastst_patch import device, engine
driver = fake_device.Driver({library!r})
driver.lib.fake_devices(2)
fastst_patch.patch(tensors={kind!r}, chunk_bytes=65536, fallback="error")
device._runtime = fake_device.FakeRuntime(driver)  # to the very end
load, path = safetensors.torch.load_file, {path!r}
{body}
print("end", flush=True)
"""
_ENDINGS = {
    "tensors alive": "kept = load(path, device='cuda')",
    "tensors in a cycle": "kept = [load(path, device='cuda')]; kept.append(kept)",
    "handle in a walk": """
handle = safetensors.safe_open(path, 'pt', 'cuda')
kept = [handle.get_tensor(name) for name in handle.offset_keys()[:3]]""",
    "a load in a daemon thread": """
engine.set_fault('preadv', first=3, errno=4)
threading.Thread(target=load, args=(path, 'cuda'), daemon=True).start()
while engine.fault_calls('preadv') < 5: pass""",
    "read ahead under way": """
handle = safetensors.safe_open(path, 'pt', 'cuda')
handle.get_tensor('t00')
handle.get_tensor('t01')
engine.set_fault('preadv', first=1, errno=4, count=2000)""",
    "an exception": """
sys.excepthook = lambda *error: print('end', flush=True)
kept = load(path, device='cuda')
raise ValueError""",
    "sys.exit": "kept = load(path, device='cuda'); print('end', flush=True); sys.exit(0)",
}


@pytest.mark.parametrize("ending", _ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_process(fake_driver, path, tmp_path, warm_python, ending, kind) -> None:
    script = _SCRIPT.format(
        tests=str(SUPPORT),
        library=fake_driver.path,
        kind=kind,
        path=path,
        body=_ENDINGS[ending],
    )
    done = warm_python.run(script, folder=tmp_path)
    assert done.stdout.split() == ["end"], done
    assert done.returncode == (1 if ending == "an exception" else 0), done
    assert done.stderr == "", done
