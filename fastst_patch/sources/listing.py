"""Which files a remote model has.

Object stores and hf:// list their folders. Web servers may: the pages that nginx, Apache and
Python write for a folder are links to its files. Where there is no such page, the names that
libraries give to the files of a model are tried, and those that these files mention.
"""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import urllib.parse
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import base, web
from .base import RemoteError, RemoteNotFoundError, RemotePermissionError
from .names import is_inside

__all__ = ["THREADS", "Listed", "list_model", "place_of", "weight_files"]

THREADS = 8
"""Requests for small files at a time: enough to hide the latency, and no burden for a server."""

_LARGEST_PAGE = 8 << 20
_MOST_FILES = 10_000
_DEEPEST = 4

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
_ROOT = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
    "quantize_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "model_index.json", "scheduler_config.json",
    *_TOKENIZER, *_WEIGHTS,
)  # fmt: skip
_COMPONENT = (
    "config.json", "scheduler_config.json", "preprocessor_config.json", "sentence_bert_config.json",
    *_TOKENIZER, *_WEIGHTS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file of a remote model.

    Attributes:
        name: relative to the model, with "/" between parts; it leads to no place outside.
        url: for `open_source`; may hold a secret.
        size: bytes; None where the listing does not tell.
        identity: None where the listing does not tell.
    """

    name: str
    url: str = dataclasses.field(repr=False)
    size: int | None = None
    identity: Hashable | None = None


def list_model(url: str, options: Mapping[str, object] | None = None) -> list[Listed]:
    """The files of a remote model, sorted by name.

    Args:
        url: of its folder.
        options: of the transport.

    Raises:
        RemoteNotFoundError: there is no such folder, or nothing is in it.
        RemoteError: it cannot be listed, or a name leads outside.
        ImportError: the library for this scheme is not installed.
    """
    if base.scheme_of(url) in ("http", "https"):
        folder = _WebFolder(url, options)
        found = folder.listed() or folder.guessed()
    else:
        found = [
            Listed(entry.name, entry.url, entry.size, entry.identity)
            for entry in base.list_files(url, options)
            if not entry.name.endswith("/")
        ]
    if not found:
        raise RemoteNotFoundError(
            *place_of(url),
            "nothing is in this folder",
            tries=0,
            remedy="is the name of the folder complete, and does this account see it?",
        )
    _check_names([one.name for one in found], url, "it lists")
    return sorted(found, key=lambda one: one.name)


def place_of(url: str) -> tuple[str, str]:
    """Host and path of a URL, as errors name them."""
    rest = re.split(r"[?#]", url.partition("://")[2], maxsplit=1)[0]
    host, _, path = rest.partition("/")
    return host.rpartition("@")[2], path


def weight_files(index: bytes, name: str, url: str) -> list[str]:
    """Names of the files in a ``weight_map``, relative to the model, each once.

    Args:
        index: content of a ``*.safetensors.index.json``.
        name: of this file, relative to the model.
        url: of the model, for errors.

    Raises:
        RemoteError: it is no such index, or a name leads outside.
    """
    try:
        values = json.loads(index)["weight_map"].values()
        names = sorted({str(value) for value in values})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RemoteError(
            *place_of(url),
            f"{name} is no index of safetensors files",
            tries=1,
            remedy="upload the folder again",
        ) from None
    _check_names(names, url, f"{name} names")
    folder, slash, _ = name.rpartition("/")
    return [folder + slash + one for one in names]


def _check_names(names: Iterable[str], url: str, who: str) -> None:
    for name in names:
        if not is_inside(name):
            raise RemoteError(
                *place_of(url),
                f"{who} {name!r}, which leads out of the folder",
                tries=1,
                remedy="do not load this model: its author may want to have other files read",
            )


# ---- web servers --------------------------------------------------------


class _Links(html.parser.HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each element."""
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]


class _WebFolder:
    """A folder of a web server."""

    def __init__(self, url: str, options: Mapping[str, object] | None) -> None:
        self._options = options
        rest, _, _ = url.partition("#")
        rest, question, query = rest.partition("?")
        self._base = rest.rstrip("/") + "/"
        self._query = question + query  # may sign all files of the folder

    def _url(self, name: str) -> str:
        return self._base + urllib.parse.quote(name) + self._query

    def _read(self, name: str, most: int) -> bytes:
        source = base.open_source(self._url(name), self._options)
        try:
            return bytes(source.read(0, min(source.size, most)))
        finally:
            source.close()

    # ---- by pages of links ----

    def listed(self) -> list[Listed]:
        """The files that the server's page for the folder links to; empty without such a page.

        Raises:
            RemoteError: the server does not answer.
        """
        names: list[str] = []
        folders = [""]
        while folders and len(names) < _MOST_FILES:
            folder = folders.pop()
            try:
                page = web.read_page(self._url(folder), self._options or {}, _LARGEST_PAGE)
            except RemoteError as error:
                if error.status is None:  # it does not answer
                    raise
                continue
            for name in self._linked(folder, page):
                if not name.endswith("/"):
                    names.append(name)
                elif name.count("/") <= _DEEPEST:
                    folders.append(name)
        return [Listed(name, self._url(name)) for name in sorted(set(names))]

    def _linked(self, folder: str, page: bytes) -> Iterator[str]:
        if page.lstrip()[:1] != b"<":
            return
        links = _Links()
        links.feed(page.decode("utf-8", "replace"))
        here = self._base + urllib.parse.quote(folder)
        for target in links.targets:
            try:
                found = urllib.parse.urljoin(here, target.strip())
            except ValueError:
                continue
            if found.startswith(here) and not re.search(r"[?#]", found):
                name = urllib.parse.unquote(found[len(here) :])
                if name and is_inside(name.removesuffix("/")):
                    yield folder + name

    # ---- by the names that libraries use ----

    def guessed(self) -> list[Listed]:
        """The files that are there of those that models have.

        Raises:
            RemoteError: there is none, because the server refuses.
        """
        found: dict[str, bytes] = {}
        wanted: Sequence[str] = _ROOT
        tried: set[str] = set()
        first: RemoteError | None = None
        with ThreadPoolExecutor(THREADS, "fastst-listing") as pool:
            while wanted:
                got = list(pool.map(self._looked, wanted))
                here = {
                    name: content
                    for name, content in zip(wanted, got, strict=True)
                    if isinstance(content, bytes)
                }
                refused = (one for one in got if isinstance(one, RemotePermissionError))
                first = first or next(refused, None)
                found.update(here)
                tried.update(wanted)
                wanted = sorted(set(self._mentioned(here)) - tried)
        if not found and first is not None:
            raise first
        return [Listed(name, self._url(name)) for name in sorted(found)]

    def _looked(self, name: str) -> bytes | RemoteError | None:
        """A file's content, of weights the first bytes; an error or None where it is not there."""
        weights = name.endswith(".safetensors")
        try:
            content = self._read(name, 16 if weights else _LARGEST_PAGE)
        except (RemoteNotFoundError, RemotePermissionError) as error:  # stores may say 403 for both
            return error
        # Some servers answer with a page, whatever is asked for.
        begin = content[8:9] if weights else content.lstrip()[:1]
        wrong = (weights or name.endswith(".json")) and begin not in (b"{", b"[")
        return None if wrong else content

    def _mentioned(self, contents: Mapping[str, bytes]) -> Iterator[str]:
        for name, content in contents.items():
            if name.endswith(".safetensors.index.json"):
                yield from weight_files(content, name, self._base)
            find_folders = _FOLDERS.get(name)
            if find_folders is not None:
                for folder in filter(is_inside, find_folders(content)):
                    yield from (f"{folder}/{one}" for one in _COMPONENT)


def _pipeline_folders(content: bytes) -> list[str]:
    """Components in diffusers' model_index.json: their names are folders."""
    index = _json(content)
    if not isinstance(index, dict):
        return []
    return [
        name for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value and value[0]
    ]  # fmt: skip


def _module_folders(content: bytes) -> list[str]:
    """Folders in sentence-transformers' modules.json."""
    modules = _json(content)
    if not isinstance(modules, list):
        return []
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return [path for path in paths if isinstance(path, str) and path]


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


_FOLDERS: Mapping[str, Callable[[bytes], list[str]]] = {
    "model_index.json": _pipeline_folders,
    "modules.json": _module_folders,
}
