"""What a thread of the soak does: one operation after another, each checked in every byte.

An operation takes the process that it runs in and its thread. What it allows is what stock allows:
a file that is replaced gives the old content or the new one, a truncated file its content or an
exception, a closed handle stock's exception.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import safetensors.torch
from _soak_files import evict
from loader_files import loader_of

import fastst_patch
from fastst_patch import stock
from fastst_patch.sources.base import RemoteError

if TYPE_CHECKING:
    from _soak_process import Process

SAFE_OPEN, LOAD_FILE = fastst_patch.safe_open, fastst_patch.load_file
CHILD_LIMIT_S = 120
NUMPY = ("U8", "I16", "F16", "F32", "I64", "F64")


class Worker:
    """A thread of the soak.

    Attributes:
        numbers: decides what it does.
        done: operations that it has finished, by kind.
        nbytes: that it has compared.
        kept: tensors of a load that is over, compared again when others take their place.
        armed: whether an exception may be thrown into it now; guarded by ``lock``.
    """

    def __init__(self, number: int, seed: str) -> None:
        self.number = number
        self.numbers = random.Random(f"{seed}/{number}")
        self.done: Counter[str] = Counter()
        self.nbytes = 0
        self.kept: deque[dict[str, Any]] = deque(maxlen=1)
        self.armed = False
        self.lock = threading.Lock()
        self.ident: int | None = None

    def check_all(self, here: Process, found: dict[str, Any]) -> None:
        self.nbytes += here.contents.check_all(found)

    def check(self, here: Process, name: str, found: Any, index: Any = ()) -> None:
        self.nbytes += here.contents.check(name, found, index)

    def keep(self, here: Process, tensors: dict[str, Any]) -> None:
        """Keep tensors beyond their file, and compare those that were kept so far."""
        for kept in self.kept:
            for name, tensor in kept.items():
                self.check(here, name, tensor)
        self.kept.append(tensors)


# ---------------------------------------------------------------- loading


def load(here: Process, me: Worker, device: str = "cpu") -> None:
    """The whole file; some of it outlives it, the rest is written to."""
    found = LOAD_FILE(here.some_file(me, device), device=device)
    me.check_all(here, found)
    names = me.numbers.sample(sorted(found), min(3, len(found)))
    me.keep(here, {name: found.pop(name) for name in names})
    for tensor in found.values():
        tensor.zero_()  # no other load may see this


def read_handle(here: Process, me: Worker, handle: Any, most: int = 6) -> None:
    """Tensors and slices of a handle, in some order."""
    names = list(handle.keys())
    here.contents.check_names(names)
    for name in me.numbers.sample(names, min(most, len(names))):
        if me.numbers.random() < 0.5:
            me.check(here, name, handle.get_tensor(name))
            continue
        piece = handle.get_slice(name)
        rows, columns = piece.get_shape()
        begin = me.numbers.randint(0, rows)
        index: Any = slice(begin, me.numbers.randint(begin, rows))
        if me.numbers.random() < 0.4:
            first = me.numbers.randint(0, columns)
            index = (index, slice(first, me.numbers.randint(first, columns)))
        me.check(here, name, piece[index], index)


def open_file(here: Process, me: Worker, device: str) -> Any:
    """A handle; with ``io="mmap"`` stock opens it, and there is no device for stock here."""
    handle = SAFE_OPEN(here.some_file(me, device), "pt", device=device)
    if device != "cpu" and type(handle) is stock.safe_open:
        return SAFE_OPEN(here.some_file(me), "pt")
    return handle


def open_handle(here: Process, me: Worker, device: str = "cpu") -> None:
    """A handle that is closed, or left to the collector."""
    handle = open_file(here, me, device)
    if me.numbers.random() < 0.7:
        with handle:
            read_handle(here, me, handle)
    else:
        read_handle(here, me, handle)


def walk(here: Process, me: Worker) -> None:
    """Every tensor of a file by a handle, as loaders walk: by name or by offset."""
    with SAFE_OPEN(here.some_file(me), "pt") as handle:
        names = handle.offset_keys() if me.numbers.random() < 0.5 else sorted(handle.keys())
        for name in names:
            me.check(here, name, handle.get_tensor(name))


def share(here: Process, me: Worker) -> None:
    """A handle that other threads read, and close, at the same time."""
    place = me.numbers.randrange(len(here.shared))
    handle = here.shared[place]
    if handle is None:
        device = me.numbers.choice(("cpu", "cpu", "cuda:1"))
        here.shared[place] = handle = open_file(here, me, device)
    try:
        if me.numbers.random() < 0.2:
            here.shared[place] = None
            handle.__exit__(None, None, None)
        else:
            read_handle(here, me, handle)
    except safetensors.SafetensorError as error:
        if "closed" not in str(error):
            raise


def numpy(here: Process, me: Worker) -> None:
    """Arrays and slices for NumPy."""
    with SAFE_OPEN(here.some_file(me), "np") as handle:
        pieces = {name: here.contents.piece(name) for name in handle.keys()}  # noqa: SIM118
        names = [name for name, piece in pieces.items() if piece.dtype in NUMPY]
        for name in me.numbers.sample(names, min(5, len(names))):
            me.check(here, name, handle.get_tensor(name))
            if pieces[name].shape[0]:  # stock refuses slices of nothing
                rows = slice(0, 1 + pieces[name].shape[0] // 2)
                me.check(here, name, handle.get_slice(name)[rows], rows)


def load_to_device(here: Process, me: Worker) -> None:
    load(here, me, me.numbers.choice(("cuda", "cuda:1")))


def handle_on_device(here: Process, me: Worker) -> None:
    open_handle(here, me, me.numbers.choice(("cuda:0", "cuda:1")))


def remote(here: Process, me: Worker) -> None:
    """A remote file, of which a few reads fail."""
    url = here.some_url(me)
    device = me.numbers.choice(("cpu", "cpu", "cuda:0"))
    try:
        if me.numbers.random() < 0.5:
            me.check_all(here, LOAD_FILE(url, device=device))
        else:
            with SAFE_OPEN(url, "pt", device=device) as handle:
                read_handle(here, me, handle)
    except RemoteError as error:
        if error.reason != here.INJECTED:
            raise


def prefetch(here: Process, me: Worker) -> None:
    """A handle's loader, used up or left in the middle."""
    with SAFE_OPEN(here.some_file(me), "pt") as handle:
        device = me.numbers.choice(("cpu", "cuda:0"))
        try:
            opened = handle.prefetch(device=device)
        except safetensors.SafetensorError as error:  # with io="mmap" it is left to stock
            if device == "cpu" or "no CUDA runtime" not in str(error):
                raise
            return
        left = me.numbers.choice((2, 1000))
        with opened as loader:
            for name, tensor in loader:
                me.check(here, name, tensor)
                left -= 1
                if not left:
                    break


def loader(here: Process, me: Worker) -> None:
    """The explicit loaders, over several files."""
    paths = [str(path) for path in me.numbers.sample(here.files, 3)]
    device = me.numbers.choice(("cpu", "cuda:1"))
    if me.numbers.random() < 0.5:
        files = fastst_patch.ParallelLoader(None, paths, use_tqdm_on_load=False, device=device)
        for name, tensor in files.iterate_weights():
            me.check(here, name, tensor)
        return
    made = loader_of(paths, device)
    buffer = made.copy_files_to_device()
    for name in me.numbers.sample(made.get_keys(), 3):
        me.check(here, name, buffer.get_tensor(name))
    buffer.close()
    made.close()


# ---------------------------------------------------------------- what happens to files


def replace(here: Process, me: Worker) -> None:
    """Another version in the place of a file, as a download that is renamed."""
    here.contents.write(me.numbers.choice(here.files), here.new_version())


def drop(here: Process, me: Worker) -> None:
    """Take files out of the page cache, while others read them."""
    for path in me.numbers.sample(here.files, 3):
        evict(path)


def truncate(here: Process, me: Worker) -> None:
    """Truncate a file under its readers; nobody maps it."""
    path = here.folder / f"truncated-{here.number}-{me.number}.safetensors"
    version = here.new_version()
    here.contents.write(path, version)
    size = os.path.getsize(path)
    left = me.numbers.randrange(size)
    cutter = threading.Timer(me.numbers.random() * 0.002, os.truncate, (path, left))
    device = me.numbers.choice(("cpu", "cpu", "cuda:0"))
    handle = SAFE_OPEN(path, "pt", device=device)
    cutter.start()
    try:
        with handle:
            for name in sorted(here.contents.pieces(version)):
                me.check(here, name, handle.get_tensor(name))
        me.check_all(here, LOAD_FILE(path, device=device))
    except (safetensors.SafetensorError, OSError):
        me.done["truncate: exceptions"] += 1
    finally:
        cutter.join()
        path.unlink()


# ---------------------------------------------------------------- what happens to processes


def options(here: Process, me: Worker) -> None:
    """Other options for the whole process, for the time of a few loads."""
    chosen = {
        name: me.numbers.choice(values)
        for name, values in here.options.items()
        if me.numbers.random() < 0.4
    }
    with contextlib.suppress(fastst_patch.OptionError):  # with those of another thread
        with fastst_patch.config_context(**chosen):
            for operation in (open_handle, load):
                operation(here, me)


def patch(here: Process, me: Worker) -> None:
    """Stock's names, patched for a moment by any number of threads."""
    path = here.some_file(me)
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        me.check_all(here, safetensors.torch.load_file(path))
        with safetensors.safe_open(path, "pt") as handle:
            read_handle(here, me, handle)
    if not seen.reports:
        raise AssertionError("no load was reported")


def idle(here: Process, me: Worker) -> None:
    """End the workers that are idle, beside loads."""
    fastst_patch.engine.shutdown()
    load(here, me)


def fork(here: Process, me: Worker) -> None:
    """A child in the middle of everything, which loads, and uses what it inherits."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            raise AssertionError(f"a forked child ended with {os.waitstatus_to_exitcode(status)}")
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(CHILD_LIMIT_S)
    code = 1
    try:
        for _ in range(2):
            load(here, me)
            open_handle(here, me)
            remote_in_child(here, me)
        for handle in here.shared:
            opened = getattr(handle, "_opened", None)  # none has a handle of stock
            if opened is not None and opened.device == "cpu":
                read_handle(here, me, handle, 2)
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def remote_in_child(here: Process, me: Worker) -> None:
    with contextlib.suppress(RemoteError), SAFE_OPEN(here.some_url(me), "pt") as handle:
        read_handle(here, me, handle, 2)


class Operation(NamedTuple):
    """How often it is chosen, and whether an exception may strike it anywhere."""

    call: Callable[[Process, Worker], None]
    weight: int
    struck: bool = False


OPERATIONS = {
    "load_file": Operation(load, 12, struck=True),
    "safe_open": Operation(open_handle, 14, struck=True),
    "walk": Operation(walk, 6, struck=True),
    "shared handle": Operation(share, 12),
    "numpy": Operation(numpy, 6, struck=True),
    # The fake device's blocks are handed over in Python, where an exception would lose one.
    "load_file to a device": Operation(load_to_device, 5),
    "safe_open on a device": Operation(handle_on_device, 5),
    "remote": Operation(remote, 6),
    "prefetch": Operation(prefetch, 4),
    "explicit loader": Operation(loader, 4),
    "replace": Operation(replace, 4),
    "evict": Operation(drop, 4),
    "truncate": Operation(truncate, 2),
    "options": Operation(options, 4),
    "patch": Operation(patch, 3),
    "idle": Operation(idle, 1),
    "fork": Operation(fork, 1),
}
