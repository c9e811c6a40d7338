"""Remote files: which paths name one, how one is opened, and how much memory a load of one takes.

A remote file has no map, no page cache and no descriptor. Its bytes are read in ranges of some MiB,
several at a time, straight to where they go. Half of ``host_memory_budget`` bounds the ranges in
flight, and the other half the tensors that are read ahead of requests.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
from collections.abc import Iterator

from .. import engine, stock, tensors
from ..config import Config
from ..errors import Fallback, FaststError, OptionError
from ..layout import FileLayout
from ..sources.base import RemoteError, list_files, local_path, looks_remote, open_source

__all__ = [
    "StandInFile",
    "ahead_bytes",
    "is_remote",
    "local_file",
    "naming",
    "not_by_stock",
    "open_remote",
    "ranges",
    "refused_url",
    "remote_files",
    "shown",
    "stand_in",
    "without_secrets",
]

MIB = 1 << 20
BUDGET = 256 * MIB
"""Default of ``host_memory_budget``."""

RANGE_MIN = 64 << 10
"""Bytes of the smallest range, however small the budget."""

MOST = 60
"""Most ranges in flight; the engine has 64 threads, some of which serve other files."""

_LONGEST = 100_000_000
"""Bytes of the longest header that stock reads; of a longer one it reads the length alone."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL and no file. A local file of such a name goes first, as for stock."""
    return "://" in path and looks_remote(path) and not os.path.exists(path)


def local_file(url: str, config: Config) -> str | None:
    """The local file that a URL stands for; None where its bytes are elsewhere.

    Raises:
        UnknownSchemeError, RemoteError: as `open_source`.
        SafetensorError: a stand-in leads to another one.
    """
    from ..sources import cache, standin  # not for programs that load local files alone

    remote, stands = standin.resolved(url)
    found = local_path(remote, config.storage_options)
    if found is not None and stands is not None and standin.is_one(found):
        raise standin.refused(remote)  # it might stand for itself
    return cache.find_local(url, config, open_source) if found is None else found


class StandInFile(Fallback):
    """A local file that stands for a remote one: see `sources.standin`. Stock refuses it.

    Attributes:
        url: by which the remote file is opened.
    """

    def __init__(self, url: str) -> None:
        super().__init__("it stands for a remote file")
        self.url = url


def stand_in(file: engine.File) -> StandInFile | None:
    """What is to be raised for a file with an invalid header; None where it is no stand-in."""
    from ..sources import standin

    try:
        if standin.find(file.fd) is None:
            return None
    except RemoteError:  # raised again by what opens the URL
        pass
    return StandInFile(standin.url_of(file.path))


def refused_url(file: object, error: Exception) -> str | None:
    """The URL for a stand-in that stock has refused; None for another file, or another error.

    Args:
        file: path or file object, as the caller gave it.
        error: stock's.
    """
    path = os.fspath(file) if isinstance(file, (str, os.PathLike)) else getattr(file, "name", None)
    if "fastst_patch stand-in: " not in str(error) or not isinstance(path, str):
        return None
    from ..sources import standin

    return standin.url_of(path) if standin.is_one(path) else None


def without_secrets(path: str) -> str:
    """A URL without user info, query and fragment; another path as it is."""
    if "://" not in path or not looks_remote(path):
        return path
    scheme, _, rest = path.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    place, slash, name = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{name}"


def shown(path: object) -> str:
    """How messages and reports name what a caller gave as a file name."""
    return without_secrets(str(path)).removeprefix("fastst-stand-in://")


# ---- memory ----


def _budget(config: Config) -> int:
    given = config.host_memory_budget
    return BUDGET if given is None else given


def ranges(config: Config) -> tuple[int, int]:
    """Most ranges in flight, and the bytes of one."""
    half = _budget(config) // 2
    nbytes = max(min(2 * config.chunk_bytes, 64 * MIB, half), RANGE_MIN)
    most = max(min(half // nbytes, MOST), 1)
    return min(most, config.threads or most), nbytes


def ahead_bytes(config: Config) -> int:
    """Most bytes of tensors that are read ahead of requests."""
    return _budget(config) // 2


def bounds_of_network(config: Config) -> tuple[int, int]:
    """Most bytes that are read ahead of requests, and bytes of a group: see `bounds_ahead`.

    Groups are small, so that the first one is there soon.
    """
    most = ahead_bytes(config)
    return most, max(most // 8, 1)


# ---- opening ----


def open_remote(url: str, config: Config) -> tuple[engine.FedFile, FileLayout]:
    """Open a remote file and validate its header.

    Raises:
        RemoteError: it cannot be opened or read.
        SafetensorError: the header is wrong; the exception is stock's.
        FaststError: it is not certain that stock would read the file as we do.
        ImportError: the library for its scheme is not installed.
        MemoryError: no memory for it.
    """
    if config.verify:
        raise OptionError(
            f"{shown(url)}: option verify=True compares with stock safetensors, which reads no"
            " URLs: set verify=False, and compare every byte by `fastst-patch bench`; or load a"
            " local file"
        )
    error = engine.native_error()
    if error is not None:
        raise FaststError(f"{shown(url)}: remote files need the native engine: {error}")
    from ..sources.cache import open_kept

    opener = functools.partial(open_kept, url, config, open_source)
    file = engine.feed_file(opener, ranges(config)[0])
    try:
        layout = engine.read_layout(file)
        if not tensors.known_to_stock(layout.dtypes):
            raise Fallback("this safetensors lacks a dtype of the file")
    except Fallback as fallback:
        reason = Fallback.alone(fallback)
    else:
        return file, layout
    raise _judged(file, reason)


def _judged(file: engine.File, fallback: Fallback) -> FaststError:
    """Raise what stock raises for a local file with the header of a remote one.

    Returns:
        The error where stock would read such a file: it reads no URLs.

    Raises:
        SafetensorError: stock's own.
    """
    assert file.feed is not None
    head = file.feed.read(0, min(file.size, 8))
    length = min(int.from_bytes(head, "little"), _LONGEST)
    with stock.hollow_file(file.feed.read(0, min(file.size, 8 + length)), file.size) as hollow:
        stock.call(stock.safe_open, (hollow.name, stock.any_framework()), {})
    return not_by_stock(file.path, fallback)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Let a MemoryError name the file: one that stock does not try to load afterwards."""
    try:
        yield
    except MemoryError as error:
        if name in str(error):
            raise
        raise MemoryError(f"{name}: {error}") from None


def not_by_stock(name: str, fallback: Fallback) -> FaststError:
    """The error for a call on a remote file that only stock could do."""
    return FaststError(
        f"{name}: {fallback.reason}. A local file would be left to stock safetensors, which reads"
        " no URLs: download the file, and load that one"
    )


# ---- several files ----


def remote_files(url: str, config: Config) -> list[str]:
    """URLs of the files that a URL means: a file, an index of files, or a folder of files.

    Raises:
        RemoteError: it cannot be read, or is no folder.
        FileNotFoundError: the folder holds no safetensors files.
        ValueError: a JSON file is no index of files beside it.
    """
    local = local_file(url, config)
    if local is not None:
        return [local]
    name = without_secrets(url)
    if name.endswith(".safetensors"):
        return [url]
    if name.endswith(".json"):
        return _in_index(url, config)
    entries = [one for one in list_files(url, config.storage_options) if "/" not in one.name]
    indices = [one.url for one in entries if one.name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        return _in_index(indices[0], config)
    found = [one.url for one in entries if one.name.endswith(".safetensors")]
    if not found:
        raise FileNotFoundError(errno.ENOENT, "the folder holds no safetensors files", name)
    return found


def _in_index(url: str, config: Config) -> list[str]:
    source = open_source(url, config.storage_options)
    try:
        text = bytes(source.read(0, source.size))
    finally:
        source.close()
    name = without_secrets(url)
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
        plain = all(isinstance(one, str) for one in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not the index of a sharded checkpoint: {error!r}") from error
    if not plain or any(not _is_beside(one) for one in names):
        raise ValueError(f"{name} names files that are not beside it: it is refused")
    place, mark, query = url.partition("?")
    folder = place.rpartition("/")[0]
    http = url.lower().startswith("http")
    return [f"{folder}/{_quoted(one) if http else one}{mark}{query}" for one in names]


def _quoted(name: str) -> str:
    return re.sub(rb"[^\w.~/-]", lambda found: b"%%%02X" % found[0][0], name.encode()).decode()


def _is_beside(name: str) -> bool:
    """Whether a name in an index leads to a file in the index's folder, or below it."""
    parts = name.split("/")
    return "" not in parts and ".." not in parts and not set(name) & set("\\?#:")
