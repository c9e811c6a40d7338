"""`remote`: a local folder that stands for a remote model.

::

    ROOT/<key of the URL>-<key of its listing>/<name of the model>/
        config.json, tokenizer.json, ...     fetched
        *.safetensors                        stand-ins: see `standin`

The folder is made beside its place and moved there when it is complete, so any number of processes
may make it at once. A model of which any file has changed has another listing, and so gets another
folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..config import Config, cache_home, current, hub_is_offline
from ..errors import OptionError
from . import base, standin
from .base import RemoteChangedError, RemoteError, RemoteNotFoundError, Source
from .listing import THREADS, Listed, list_model, place_of, weight_files
from .names import identity_text, is_weak, public_url
from .seal import sealed

__all__ = ["remote"]

_log = logging.getLogger("fastst_patch")

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_OTHER_WEIGHTS = frozenset((
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".gguf", ".ggml",
    ".onnx", ".onnx_data", ".ot", ".tflite", ".npz", ".nemo", ".pdparams", ".mlmodel", ".tar",
    ".gz", ".zip",
))  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SNAPSHOT = ("config.json", "model_index.json", "modules.json")  # one of them is in each model
_LARGEST_SMALL = 64 << 20
"""Bytes of a file up to which it is fetched: the largest tokenizers have some 35 MB."""

_DAYS = 30
"""Days after their last use in which folders of earlier listings of a model are kept."""


def remote(url: str, *, revision: str | None = None, cache: str | None = None) -> str:
    """A local folder that stands for a remote model: give it to ``from_pretrained``, or to vLLM.

    Configurations, tokenizers and indexes are fetched. Each safetensors file is a stand-in, which
    `fastst_patch.patch` makes safetensors stream from where it really is, in child processes as
    well. Safetensors that is not patched refuses it.

    The folder lies in ``~/.cache/fastst-patch``, or in ``cache``, and takes as much disk as the
    small files. It stays there: another call for the same model finds it after one listing.

    Args:
        url: ``hf://org/repo``, ``s3://bucket/folder``, ``gs://``, ``az://``, ``https://`` or
            ``http://``; of a folder, or of one safetensors file. A local path stands for itself.
        revision: branch, tag or commit; for ``hf://`` only.
        cache: folder in which weights are kept when they are loaded; None: as the option
            ``remote_cache`` says at the time of the load.

    Returns:
        The path of the folder; for the URL of one file that of its stand-in.

    Raises:
        RemoteNotFoundError: there is no such folder, or no safetensors file in it. It is a
            FileNotFoundError.
        SafetensorError: a file is no safetensors file.
        RemoteError: it cannot be read, or a name in it leads to a place outside. It is an OSError.
        OptionError: ``revision`` for a URL that has none.
        ImportError: the library for this scheme is not installed; the message says which.
    """
    url = os.fspath(url)
    if os.path.exists(url):
        return url
    url = _with_revision(url, revision)
    config = current()
    if base.scheme_of(url) == "file":
        return _local(url, config)
    if not base.looks_remote(url):
        raise FileNotFoundError(2, "No such file or folder, and no URL", url)
    return _Model(url, config, cache).path()


def _with_revision(url: str, revision: str | None) -> str:
    if revision is None:
        return url
    found = re.fullmatch(r"(hf://[^/@]+/[^/@]+)(@[^/]*)?(/.*)?", url)
    if found is None:
        raise OptionError(
            f"revision={revision!r}: only hf://org/repo has revisions, and {public_url(url)} is"
            " none; name the folder of that version in the URL"
        )
    if found[2] not in (None, f"@{revision}"):
        raise OptionError(f"revision={revision!r}: the URL names another one, {found[2][1:]!r}")
    return f"{found[1]}@{revision.replace('/', '%2F')}{found[3] or ''}"


def _local(url: str, config: Config) -> str:
    path = base.local_path(url, config.storage_options)
    if path is None or not os.path.exists(path):
        raise FileNotFoundError(2, "No such file or folder", path or url)
    return path


class _Model:
    """One call of `remote`.

    Args:
        url: of the folder, or of one file.
        config: in force.
        cache: as of `remote`.
    """

    def __init__(self, url: str, config: Config, cache: str | None) -> None:
        self._url = url
        self._options: Mapping[str, object] | None = config.storage_options
        self._offline = config.remote_offline or (base.scheme_of(url) == "hf" and hub_is_offline())
        self._cache = None if cache is None else os.path.abspath(os.path.expanduser(cache))
        self._root = os.path.join(self._cache or cache_home(), "models")
        self._leaf = re.sub(r"[^\w.-]", "_", place_of(url)[1].rstrip("/").rpartition("/")[2])
        self._leaf = self._leaf.lstrip(".") or "model"
        self._single = self._leaf if self._leaf.endswith(_SUFFIX) else None

    def path(self) -> str:
        """The folder, or the file; made where it is not there."""
        # With another key the stand-ins of a folder are not followed: it is made again.
        start = _key([public_url(self._url).rstrip("/"), self._cache, sealed("folder")]) + "-"
        if self._offline:
            return self._here(start)
        listed = self._listed()
        place = os.path.join(self._root, start + _key(listed))
        if os.path.isdir(place):
            os.utime(place)
            self._remember(listed)
        else:
            self._make(place, listed)
            self._tidy(start, place)
        return self._inside(place)

    def _inside(self, place: str) -> str:
        parts = ("model", self._single) if self._single else (self._leaf,)
        return os.path.join(place, *parts)

    def _here(self, start: str) -> str:
        """The folder that was made last; of hf://, else that in huggingface_hub's cache."""
        with suppress(OSError):
            places = [one.path for one in os.scandir(self._root) if one.name.startswith(start)]
            if places:
                return self._inside(max(places, key=os.path.getmtime))
        for name in _SNAPSHOT if base.scheme_of(self._url) == "hf" else ():
            found = base.local_path(f"{self._url.rstrip('/')}/{name}", self._options)
            if found is not None:
                return os.path.dirname(found)
        raise RemoteError(
            *place_of(self._url),
            "no folder was made for this model before, and none can be made offline",
            tries=0,
            remedy="call fastst_patch.remote(url) once while online",
        )

    # ---- listing ----

    def _listed(self) -> list[Listed]:
        if self._single:
            return self._identified([Listed(self._single, self._url)])
        listed = [one for one in list_model(self._url, self._options) if not _hidden(one.name)]
        if not any(one.name.endswith(_SUFFIX) for one in listed):
            raise self._without_weights([one.name for one in listed])
        return self._identified(listed)

    def _identified(self, listed: Sequence[Listed]) -> list[Listed]:
        """Ask for each file that the listing says too little of."""
        with ThreadPoolExecutor(THREADS, "fastst-listing") as pool:
            return list(pool.map(self._asked, listed))

    def _asked(self, one: Listed) -> Listed:
        if one.identity is not None:
            return one
        source = base.open_source(one.url, self._options, head_bytes=1)
        source.close()
        # Where the server does not tell when a file changes, it may have changed.
        identity = time.time_ns() if is_weak(source.identity) else source.identity
        return Listed(one.name, one.url, source.size, identity)

    def _without_weights(self, names: Sequence[str]) -> RemoteNotFoundError:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        remedy = "name the folder in which they are"
        if pickles:
            remedy = (
                f"{pickles[0]} is a pickle, which can run code when it is loaded: convert the model"
                " by save_pretrained()"
            )
        return RemoteNotFoundError(
            *place_of(self._url), "no safetensors file is in this folder", tries=1, remedy=remedy
        )

    def _remember(self, listed: Sequence[Listed]) -> None:
        """Keep what the URL holds beside the name, for stand-ins that are there already."""
        for one in listed:
            if one.name.endswith(_SUFFIX):
                standin.remember(public_url(one.url), one.url)

    # ---- making ----

    def _make(self, place: str, listed: Sequence[Listed]) -> None:
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        new = tempfile.mkdtemp(prefix=".new-", dir=self._root)
        try:
            folder = self._inside(new) if not self._single else os.path.dirname(self._inside(new))
            wanted = [one for one in listed if self._is_wanted(one)]
            with ThreadPoolExecutor(THREADS, "fastst-remote") as pool:
                list(pool.map(lambda one: self._write(folder, one), wanted))
            for name in (one.name for one in wanted if one.name.endswith(_INDEX)):
                self._check_index(folder, name)
            os.rename(new, place)
        except OSError:
            if not os.path.isdir(place):  # else another process was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _log.info("%s stands for %s", place, public_url(self._url))

    def _is_wanted(self, one: Listed) -> bool:
        if one.name.endswith(_SUFFIX):
            return True
        if os.path.splitext(one.name)[1].lower() in _OTHER_WEIGHTS:
            return False
        if one.size is not None and one.size > _LARGEST_SMALL:
            _log.info("%s is left out: it has %d bytes", public_url(one.url), one.size)
            return False
        return True

    def _write(self, folder: str, one: Listed) -> None:
        path = os.path.join(folder, *one.name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        source = base.open_source(one.url, self._options)
        try:
            if one.size not in (None, source.size):
                raise RemoteChangedError(
                    *place_of(one.url),
                    f"it has {source.size} bytes, and the folder's listing says {one.size}",
                    remedy="try again: the model is being written",
                )
            if one.name.endswith(_SUFFIX):
                self._stand_in(path, one.url, source)
            else:
                _save(path, bytes(source.read(0, source.size)))
        finally:
            source.close()

    def _stand_in(self, path: str, url: str, source: Source) -> None:
        standin.write(path, source, standin.header_of(source), self._cache)
        standin.remember(source.name, url)

    def _check_index(self, folder: str, name: str) -> None:
        with open(os.path.join(folder, *name.split("/")), "rb") as file:
            files = weight_files(file.read(), name, self._url)
        missing = [one for one in files if not os.path.exists(os.path.join(folder, one))]
        if missing:
            _log.warning(
                "%s: %s names %s, which is not there", public_url(self._url), name, missing[0]
            )

    def _tidy(self, start: str, place: str) -> None:
        """Remove folders of earlier listings that nobody uses, and what killed processes left."""
        with suppress(OSError):
            for one in os.scandir(self._root):
                days = (time.time() - one.stat().st_mtime) / 86400
                left = one.name.startswith(".new-") and days > 1
                old = one.name.startswith(start) and one.path != place and days > _DAYS
                gone = one.path
                if old:  # a kill in the middle leaves nothing that looks like a whole folder
                    gone = os.path.join(self._root, f".new-{one.name}")
                    os.rename(one.path, gone)
                if left or old:
                    shutil.rmtree(gone, ignore_errors=True)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _save(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _key(value: Sequence[Any]) -> str:
    """A short name for some values."""
    text = json.dumps([_plain(one) for one in value])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Hashable) -> Any:
    if isinstance(value, Listed):
        identity = None if value.identity is None else identity_text(value.identity)
        return [value.name, value.size, identity]
    return value
