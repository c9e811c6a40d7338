"""A call made twice, with stock and patched, and everything by which a user could tell which.

The libraries are asked the same thing in one process: stock first, then patched. Both start from
the same random seed, because what a checkpoint lacks is initialised at random.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastst_patch

# What a CPU load may be called; a fallback has a name or a reason of its own.
FAST = {"mmap", "mmap+readahead", "buffered", "direct", "owned"}

# Libraries whose loggers do not all propagate; "" is everybody else's.
_LOGGERS = ("", "transformers", "accelerate", "diffusers", "peft", "sentence_transformers", "timm")

_ADDRESS = re.compile(r"0x[0-9a-f]+")


@dataclass
class Run:
    """What one of the two calls gave, said and reported.

    Attributes:
        value: the result, None after an exception.
        error: type and text of the exception, or None.
        said: log records as (logger, level, text) and warnings as (category, text).
        reports: what `fastst_patch.profile()` saw.
    """

    value: Any = None
    error: tuple[type[BaseException], str] | None = None
    said: list[tuple[str, str, str]] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)

    def assert_fast(
        self, files: Iterable[str | os.PathLike[str]], nbytes: int | None = None
    ) -> None:
        """These files and no others were read, by the fast path alone, and all of their bytes.

        Args:
            files: read by the call, each as often as it was read whole.
            nbytes: handed out in all, where that is something else.
        """
        files = list(files)
        wanted = {os.path.realpath(file) for file in files}
        assert wanted
        assert {os.path.realpath(r.file) for r in self.reports} == wanted, self.reports
        assert {r.path for r in self.reports} <= FAST, self.reports
        assert {r.fallback_reason for r in self.reports} == {None}, self.reports
        assert {r.device for r in self.reports} == {"cpu"}, self.reports
        expected = sum(map(data_bytes, files)) if nbytes is None else nbytes
        assert sum(r.bytes for r in self.reports) == expected, self.reports


class _Listener(logging.Handler):
    def __init__(self, said: list[tuple[str, str, str]]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append((record.name, record.levelname, record.getMessage()))


@contextlib.contextmanager
def _listening(said: list[tuple[str, str, str]]) -> Iterator[None]:
    """Collect log records and warnings, those too that are given once in a process only."""
    for function in ("warning_once", "info_once"):  # caches of transformers and accelerate
        with contextlib.suppress(AttributeError):
            getattr(logging.Logger, function).cache_clear()
    listener = _Listener(said)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        if not logger.propagate or logger.name == "root":
            logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", fastst_patch.UntestedVersionWarning)
            # A file that an earlier test forgot is collected whenever it happens.
            warnings.simplefilter("ignore", ResourceWarning)
            yield
        said.extend((one.category.__name__, "warning", str(one.message)) for one in warned)
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models computed by several threads wait for them, long where others are busy too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clean(text: str, scratch: Path) -> str:
    return _ADDRESS.sub("0x", text.replace(str(scratch), "SCRATCH"))


class _Heap:
    """Collections look at what came after the libraries' own imports, which are most of it."""

    modules = 0

    @classmethod
    def settle(cls) -> None:
        """Let handles that earlier tests forgot report now, not while somebody looks."""
        gc.collect()
        if cls.modules != len(sys.modules):
            cls.modules = len(sys.modules)
            gc.freeze()  # until the end of the test's module: see conftest's _young_heap


def _run(call: Callable[[Path], Any], scratch: Path) -> Run:
    scratch.mkdir(parents=True)
    _Heap.settle()
    run = Run()
    with fastst_patch.profile() as seen, _listening(run.said), one_thread():
        torch.manual_seed(0)
        try:
            run.value = call(scratch)
        except Exception as error:
            run.error = type(error), _clean(str(error), scratch)
        gc.collect()  # after an exception handles go with its traceback
    run.said = [(who, level, _clean(text, scratch)) for who, level, text in run.said]
    run.reports = list(seen.reports)
    return run


def twice(call: Callable[[Path], Any], tmp_path: Path, **options: Any) -> tuple[Run, Run]:
    """Make a call with stock and patched: same exception or none, same logs and warnings.

    Args:
        call: takes an empty folder of its own.
        tmp_path: where these folders are made.
        **options: of `fastst_patch.patched()`.

    Returns:
        Ours, theirs. The values are the caller's to compare.
    """
    made = sum(1 for _ in tmp_path.glob("stock-*"))
    theirs = _run(call, tmp_path / f"stock-{made}")
    assert theirs.reports == []
    with fastst_patch.patched(small_file_bytes=0, **options):
        ours = _run(call, tmp_path / f"patched-{made}")
    assert ours.error == theirs.error
    assert ours.said == theirs.said
    return ours, theirs


@dataclass(frozen=True)
class Failed:
    """What stands for the result of a call that raised."""

    error: type[BaseException]
    text: str


def attempts(calls: dict[str, Callable[[Path], Any]]) -> Callable[[Path], dict[str, Any]]:
    """One call of many: their results, and `Failed` for those that raise.

    Patching takes long where thousands of modules are imported; so it is done once for them all.
    """

    def call(scratch: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, (name, one) in enumerate(calls.items()):
            folder = scratch / str(number)
            folder.mkdir()
            torch.manual_seed(number)
            try:
                found[name] = one(folder)
            except Exception as error:
                found[name] = Failed(type(error), _clean(str(error), scratch))
        return found

    return call


class Same:
    """Calls made twice give the same values; of modules, all that `portrait` shows."""

    def __init__(self, assert_same: Callable[[Any, Any], None], tmp_path: Path) -> None:
        self._assert_same = assert_same
        self._tmp_path = tmp_path

    def __call__(
        self, call: Callable[[Path], Any] | dict[str, Callable[[Path], Any]], **options: Any
    ) -> tuple[Run, Run]:
        """Ours and theirs; `call` is one or several, which may then raise, see `attempts`."""
        if isinstance(call, dict):
            call = attempts(call)
        ours, theirs = twice(call, self._tmp_path, **options)
        self._assert_same(look(ours.value), look(theirs.value))
        return ours, theirs


def data_bytes(file: str | os.PathLike[str]) -> int:
    """How many bytes of tensors a safetensors file holds."""
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return os.path.getsize(file) - 8 - header


def tensor_bytes(file: str | os.PathLike[str]) -> dict[str, int]:
    """The size of every tensor in a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items()}


def weights_in(folder: Path) -> list[Path]:
    """The safetensors files of a folder and those below it."""
    return sorted(folder.rglob("*.safetensors"))


# ---------------------------------------------------------------- modules


def _classes(named: list[tuple[str, torch.Tensor]], key: Callable[[torch.Tensor], Any]) -> Any:
    groups: dict[Any, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(key(tensor), []).append(name)
    return sorted(groups.values())


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"  # some are made on the spot


def portrait(module: nn.Module) -> dict[str, Any]:
    """All there is to a module's tensors, for conftest's assert_same: names, order, tied-ness."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    stored = [(name, t) for name, t in named if t.device.type != "meta" and t.numel()]
    return {
        "classes": [(name, _class(one), one.training) for name, one in module.named_modules()],
        "state dict": list(module.state_dict().items()),
        "tensors": named,
        "the same object": _classes(named, id),
        "the same memory": _classes(stored, lambda t: t.data_ptr()),
        "the same storage": _classes(stored, lambda t: t.untyped_storage().data_ptr()),
        "grads": [(name, t.grad) for name, t in named],
    }


def look(value: Any) -> Any:
    """A result with portraits for the modules in it."""
    if isinstance(value, nn.Module):
        return portrait(value)
    if isinstance(value, dict):
        return {key: look(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [look(one) for one in value]
    models = getattr(value, "components", None)
    if isinstance(models, dict):  # a pipeline of diffusers
        return {key: look(one) for key, one in models.items() if isinstance(one, nn.Module)}
    return value
