"""A program that is struck under its locks: by a signal whose handler loads, or by a fork.

``python lock_strikes.py signal|fork SCENARIO FOLDER LIBRARY``, run by test_locks.py. A scenario
runs code whose functions take locks of ours (`SECTIONS`). With ``signal`` a handler loads files at
every place where Python may run one, in these functions and in what they call. With ``fork`` a
thread runs the scenario, and the main thread forks while it stands at each of their lines; the
child loads the same. Prints the functions that were struck; a deadlock ends it with its stacks:
one is assumed where no place is struck for `LIMIT_S`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from lock_sections import SECTIONS

import fastst_patch
from fastst_patch import device, layout, tensors
from fastst_patch.dropin import eligibility
from fastst_patch.patching import patcher

OURS = os.path.dirname(fastst_patch.__file__) + os.sep
LIMIT_S = 90
CHILD_LIMIT_S = 60
FEW = 19  # nested code takes each 19th tensor
STAND_S = 0.02  # how long a thread stands at a place; a fork may have to wait for it


class Scenario:
    """What is run, and what code nested in it or a forked child does with the same objects."""

    def __init__(self, folder: Path, library: str) -> None:
        self.paths = sorted(str(path) for path in folder.glob("model-*.safetensors"))
        self.expected = {p: safetensors.torch.load_file(p) for p in self.paths}
        self.library = library
        self.stack = contextlib.ExitStack()

    def run(self) -> None:
        """Enter every function of the scenario."""

    def again(self) -> None:
        """Use what `run` uses, from nested code or in a child."""

    def check(self) -> None:
        """Open a file and load it, by path, and use what `run` uses."""
        for path in self.paths[:2]:
            with fastst_patch.safe_open(path, "pt") as handle:
                for name in handle.keys()[::FEW]:
                    self.same(path, name, handle.get_tensor(name))
        path = self.paths[-1]
        for name, tensor in fastst_patch.load_file(path).items():
            self.same(path, name, tensor)
        self.again()

    def same(self, path: str, name: str, tensor: torch.Tensor) -> None:
        wanted = self.expected[path][name]
        assert tensor.dtype == wanted.dtype, (path, name)
        assert tensor.shape == wanted.shape, (path, name)
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, wanted)]
        assert torch.equal(*raw), (path, name)

    def fake_device(self) -> None:
        import fake_device

        driver = fake_device.Driver(Path(self.library))
        driver.lib.fake_devices(2)
        # Every call of the driver walks what was freed: with 64 MiB of it the last of some 300
        # strikes took ten times as long as the first.
        driver.lib.fake_quarantine(1 << 20)
        self.stack.enter_context(device.replaced(fake_device.FakeRuntime(driver)))
        fake_device.StockOnCpu(SimpleNamespace(setattr=setattr), driver)  # type: ignore[arg-type]


class Open(Scenario):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Each file pushes another one out of the cache.
        with fastst_patch.safe_open(self.paths[0], "pt") as handle:
            layout.LayoutCache.BYTES = 4 * handle._opened.layout.data_begin + 64
        self.kept: Any = None

    def run(self) -> None:
        with fastst_patch.config_context(io="mmap"), fastst_patch.profile() as seen:
            self.kept = fastst_patch.safe_open(self.paths[1], "pt")
            for path in self.paths * 2:
                with fastst_patch.safe_open(path, "pt") as handle:
                    names = handle.keys()
                    self.same(path, names[0], handle.get_tensor(names[0]))
            fastst_patch.load_file(self.paths[0])
        assert len(seen.reports) > len(self.paths)
        fastst_patch.config()
        fastst_patch.stats()

    def again(self) -> None:
        with fastst_patch.config_context(threads=3), fastst_patch.profile():
            assert fastst_patch.config().threads == 3
            kept = self.kept
            if kept is not None:
                for name in kept.keys()[::FEW]:
                    self.same(self.paths[1], name, kept.get_tensor(name))
        fastst_patch.stats()


class Dtypes(Scenario):
    def run(self) -> None:
        if hasattr(tensors, "_found"):
            tensors._found.clear()
        else:
            tensors._dtypes.cache_clear()
        for path in self.paths[:2]:
            tensors._dtypes()._tried = 0
            for name, tensor in fastst_patch.load_file(path).items():
                self.same(path, name, tensor)


class Handles(Scenario):
    """For NumPy, and with a loader of `prefetch`."""

    def run(self) -> None:
        path = self.paths[0]
        eligibility.SMALL_FOR_ARRAYS = 1 << 30
        with fastst_patch.safe_open(path, "np"):
            pass
        eligibility.SMALL_FOR_ARRAYS = 0
        with fastst_patch.safe_open(path, "np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            name = next(
                name for name, part in slices.items()
                if part.get_dtype() == "F32" and 0 not in part.get_shape()
            )  # fmt: skip
            self.same(path, name, torch.from_numpy(handle.get_tensor(name)))
        with fastst_patch.safe_open(path, "pt") as handle, handle.prefetch() as loader:
            self.same(path, name, loader.take(name))


class Patch(Scenario):
    def run(self) -> None:
        with fastst_patch.patched():
            safetensors.torch.load_file(self.paths[0])
        fastst_patch.patch()
        patcher._unsettled.add("safetensors.safe_open")
        with safetensors.safe_open(self.paths[0], "pt"):
            pass
        fastst_patch.patch_map()
        fastst_patch.unpatch()
        assert not fastst_patch.is_patched()
        assert safetensors.torch.load_file.__module__ == "safetensors.torch"

    def again(self) -> None:
        path = self.paths[0]
        for name, tensor in safetensors.torch.load_file(path).items():
            self.same(path, name, tensor)
        with fastst_patch.patched():
            for name, tensor in safetensors.torch.load_file(path).items():
                self.same(path, name, tensor)


class Device(Scenario):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fake_device()
        self.kept: Any = None

    def run(self) -> None:
        path = self.paths[0]
        self.kept = handle = fastst_patch.safe_open(path, "pt", device="cuda")
        for name in handle.offset_keys():
            self.same(path, name, handle.get_tensor(name))
        handle._opened._prefetcher.drop()

    def again(self) -> None:
        path = self.paths[0]
        if self.kept is not None:
            for name in self.kept.offset_keys()[::FEW]:
                self.same(path, name, self.kept.get_tensor(name))
        for name, tensor in fastst_patch.load_file(path, device="cuda").items():
            self.same(path, name, tensor)


class Loader(Scenario):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fake_device()
        self.kept: Any = None

    def _names(self) -> list[tuple[str, str]]:
        return [(path, name) for path in self.paths[:2] for name in self.expected[path]]

    def run(self) -> None:
        from loader_files import loader_of

        for where in ("cpu", "cuda"):
            with fastst_patch.config_context(io="buffered"):
                loader = loader_of(self.paths[:2], where)
                buffer = loader.copy_files_to_device()
                self.kept = buffer._files
                for path, name in self._names():
                    self.same(path, name, self.kept.take(name))
                self.kept._open[1].drop()
                buffer.close()
                loader.close()

    def again(self) -> None:
        kept = self.kept
        if kept is None:
            return
        for path, name in self._names()[::FEW]:
            try:
                found = kept.take(name)
            except ValueError:
                assert kept.closed
                return
            self.same(path, name, found)


class Requests(Scenario):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: Any = None
        self.process = os.getpid()

    def _through(self, prefetcher: Any) -> None:
        from fastst_patch.integrations.prefetch import Kind

        path = self.paths[0]
        with fastst_patch.config_context(io="buffered"):
            handle = fastst_patch.safe_open(path, "pt")
        opened = handle._opened

        def start(numbers: Any) -> Any:
            under_way = opened.ahead(numbers)
            return SimpleNamespace(landed=lambda: False, take=under_way.take)

        kind = Kind(id(opened), start)
        numbers = range(len(opened.layout.names))
        requests = [prefetcher.ask(kind, i, opened.layout.nbytes(i)) for i in numbers]
        prefetcher.flush()
        for i, request in enumerate(requests):
            self.same(path, opened.layout.names[i], prefetcher.take(request))

    def run(self) -> None:
        from fastst_patch.integrations.prefetch import RequestPrefetcher

        self.kept = RequestPrefetcher(1000)
        self._through(self.kept)
        self.kept.drop()

    def again(self) -> None:
        from fastst_patch.integrations.prefetch import RequestPrefetcher

        forked = self.kept is not None and os.getpid() != self.process
        self._through(self.kept if forked else RequestPrefetcher(1000))


class Groups(Scenario):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        import torch.distributed as dist

        store = f"file://{Path(self.paths[0]).parent / 'store'}.{os.getpid()}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        self.process = os.getpid()

    def run(self) -> None:
        import torch.distributed as dist

        from fastst_patch.sharding import groups

        groups._groups.pop(dist.group.WORLD, None)
        assert groups.Group.of(dist.group.WORLD).size == 1

    def again(self) -> None:
        import torch.distributed as dist

        from fastst_patch.sharding import groups

        if os.getpid() != self.process or dist.group.WORLD in groups._groups:
            return
        connecting = groups._connecting.get(dist.group.WORLD)
        if connecting is not None and getattr(connecting, "in_progress", True):
            try:
                groups.Group.of(dist.group.WORLD)
            except fastst_patch.FaststError:
                return
            raise AssertionError("a nested call made a group of its own")


SCENARIOS: dict[str, Callable[..., Scenario]] = {
    "open": Open, "dtypes": Dtypes, "handles": Handles, "patch": Patch, "device": Device,
    "loader": Loader, "requests": Requests, "groups": Groups,
}  # fmt: skip


def goes_on() -> None:
    """Note that the program does not hang, however long all of it takes on a busy machine."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)


class Striker:
    """Calls ``strike`` at places of sections, once at each, in the thread that it is started in.

    Args:
        sections: names as in `SECTIONS`.
        strike: told the place; returns whether that counts.
        deep: also in what sections call.
    """

    def __init__(self, sections: set[str], strike: Callable[[], None], *, deep: bool) -> None:
        self._sections = sections
        self._strike = strike
        self._deep = deep
        self.seen: set[tuple[Any, ...]] = set()
        self.struck: set[str] = set()

    def _section(self, frame: FrameType | None) -> str | None:
        for _ in range(12 if self._deep else 1):
            if frame is None:
                return None
            code = frame.f_code
            if code.co_filename.startswith(OURS):
                name = f"{code.co_filename.removeprefix(OURS)} {code.co_name}"
                if name in self._sections:
                    return name
            frame = frame.f_back
        return None

    def _place(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(OURS):
            return
        place = (code.co_filename, frame.f_lineno, event, getattr(argument, "__name__", ""))
        if place in self.seen:
            return
        section = self._section(frame)
        if section is not None:
            self.seen.add(place)
            self.struck.add(section)
            goes_on()
            self._strike()

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_return"):
            self._place(frame, event, argument)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._place(frame, event, None)
        elif not frame.f_code.co_filename.startswith(OURS):
            return None  # it has no places: its lines need not be traced
        elif event == "call" and self._section(frame) is None:
            return None
        return self._trace

    def run(self, call: Callable[[], None]) -> None:
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(None)
            sys.setprofile(None)


def by_signals(scenario: Scenario, sections: set[str]) -> set[str]:
    failures: list[str] = []

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            scenario.check()
        except BaseException:
            failures.append(traceback.format_exc())

    signal.signal(signal.SIGUSR1, handler)
    striker = Striker(sections, lambda: signal.raise_signal(signal.SIGUSR1), deep=True)
    striker.run(scenario.run)
    assert not failures, f"{len(failures)} of {len(striker.seen)}:\n{failures[0]}"
    return striker.struck


def by_forks(scenario: Scenario, sections: set[str]) -> set[str]:
    # The thread stands at a place; the process was forked since; the child is over.
    stands, forked, ready = threading.Event(), threading.Event(), threading.Event()
    struck_now: list[bool] = []
    failed: list[str] = []

    def strike() -> None:
        if stands.is_set() and not forked.is_set():
            # The fork may be waiting for a lock that this thread holds: another run stands here.
            striker.seen.discard(last[0])
            return
        ready.wait()  # with whatever locks: the main thread takes none meanwhile
        ready.clear()
        forked.clear()
        struck_now.append(True)
        stands.set()
        forked.wait(STAND_S)

    striker = Striker(sections, strike, deep=False)
    last: list[Any] = [None]

    place = striker._place

    def remembered(frame: FrameType, event: str, argument: Any) -> None:
        name = getattr(argument, "__name__", "")
        last[0] = (frame.f_code.co_filename, frame.f_lineno, event, name)
        place(frame, event, argument)

    striker._place = remembered  # type: ignore[method-assign]

    def body() -> None:
        try:
            striker.run(scenario.run)
        except BaseException:
            failed.append(traceback.format_exc())

    while True:
        struck_now.clear()
        forked.clear()
        ready.set()
        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        while thread.is_alive() or stands.is_set():
            if stands.wait(0.005):
                _fork(scenario, sorted(striker.struck), forked.set)
                stands.clear()
                ready.set()
        thread.join()
        assert not failed, failed[0]
        if not struck_now:
            return striker.struck


def _fork(scenario: Scenario, struck: list[str], forked: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_LIMIT_S)  # faulthandler's timer waits for the parent's thread
        code = 1
        try:
            scenario.check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    forked()
    _, status = os.waitpid(pid, 0)
    assert status == 0, (status, struck)


def main(mode: str, name: str, folder: str, library: str) -> None:
    goes_on()
    faulthandler.register(signal.SIGALRM, chain=True)
    torch.set_num_threads(1)  # threads of torch's do not survive a fork
    start = time.monotonic()
    scenario = SCENARIOS[name](Path(folder), library)
    scenario.check()
    struck = {"signal": by_signals, "fork": by_forks}[mode](scenario, SECTIONS[name])
    print(f"{time.monotonic() - start:.1f} s", file=sys.stderr)
    print(json.dumps(sorted(struck)))
    sys.stdout.flush()
    os._exit(0)  # the fake device's and gloo's threads are not taken apart


if __name__ == "__main__":
    main(*sys.argv[1:])
