"""``hf://`` URLs: files of the Hugging Face Hub, found and authenticated by huggingface_hub.

The bytes come from where the Hub redirects to. That address is signed and expires; it is asked for
again when it does (`HttpTransport.get`).
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from ..errors import OptionError
from .base import Entry, RemoteError, RemoteNotFoundError, Source
from .retry import Failure, of_status
from .transport import Place
from .urls import parse_http
from .web import open_http

__all__ = ["list_files", "local_path", "open_source"]

_FORM = "write it as hf://org/repo[@revision]/path"
_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]+")
_SPECIAL = re.compile(r"(refs/(?:pr/[0-9]+|convert/[^/]+))(?:/|$)")  # revisions that hold a "/"


@dataclasses.dataclass(frozen=True)
class _File:
    repo: str
    revision: str | None
    path: str

    @property
    def place(self) -> Place:
        at = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        path = f"/{self.repo}{at}/{self.path}"
        return Place("hf", "hf:/", path, f"hf:/{path}")


def _parsed(url: str) -> _File:
    """Take an ``hf://`` URL apart. Only models have weights, so no other kind of repository."""
    rest = url.partition("://")[2]
    org, _, rest = rest.partition("/")
    repo, at, rest = rest.partition("@") if "@" in rest.partition("/")[0] else (rest, "", "")
    if at:
        special = _SPECIAL.match(rest)
        revision = special[1] if special else rest.partition("/")[0]
        path = rest[len(revision) :].lstrip("/")
        revision = urllib.parse.unquote(revision)
    else:
        repo, _, path = repo.partition("/")
        revision = ""
    if not _NAME.fullmatch(org) or not _NAME.fullmatch(repo) or (at and not revision):
        raise RemoteNotFoundError(org, repo, "the URL names no repository", tries=0, remedy=_FORM)
    if ".." in path.split("/"):
        raise RemoteNotFoundError(org, repo, "a path with '..'", tries=0, remedy=_FORM)
    return _File(f"{org}/{repo}", revision or None, path.strip("/"))


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ImportError(
            "hf:// URLs take the package huggingface_hub: pip install 'fastst-patch[remote]'",
            name="huggingface_hub",
        ) from None


def local_path(url: str, options: dict[str, object]) -> str | None:
    """The file in huggingface_hub's cache; None where it is not there."""
    file = _parsed(url)
    if not file.path:
        return None
    found = _library().try_to_load_from_cache(file.repo, file.path, revision=file.revision)
    return found if isinstance(found, str) else None  # or it is known that there is none


def open_source(url: str, options: dict[str, object], head_bytes: int) -> Source:
    """Open a file of the Hub; see `base.open_source`. The option ``token`` goes before the login's.

    Raises:
        RemoteError: huggingface_hub is in offline mode, and the file is not in its cache.
    """
    file = _parsed(url)
    if not file.path:
        place = file.place
        raise RemoteNotFoundError(
            place.host, place.path, "the URL names no file", tries=0, remedy=_FORM
        )
    hub = _library()
    _refuse_offline(file)
    address = parse_http(
        hub.hf_hub_url(file.repo, file.path, revision=file.revision, endpoint=_endpoint())
    )
    utils = importlib.import_module("huggingface_hub.utils")
    token = _token(options)
    built = utils.build_hf_headers(token=token, library_name="fastst-patch")
    headers = {name.title(): value for name, value in built.items()}
    agent = headers.pop("User-Agent", None)
    if agent is not None:
        options.setdefault("user_agent", agent)
    return open_http(address, options, head_bytes, headers, file.place)


def list_files(url: str, options: dict[str, object]) -> Sequence[Entry]:
    """The files of a repository, or of a folder in it, all of the same commit."""
    file = _parsed(url)
    hub = _library()
    _refuse_offline(file)
    token = _token(options)
    api = hub.HfApi(endpoint=_endpoint(), token=token)
    failure = None
    try:
        commit = api.model_info(file.repo, revision=file.revision).sha
        tree = list(
            api.list_repo_tree(file.repo, file.path or None, recursive=True, revision=commit)
        )
    except Exception as error:  # of the HTTP library that huggingface_hub uses, which changes
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        failure = (
            of_status(int(status))
            if status is not None
            else Failure(f"the Hub cannot be asked ({type(error).__name__})")
        )
    if failure is not None:
        failure.remedy = "check the name, and log in by 'hf auth login' where it is private"
        raise failure.error(file.place.host, file.place.path)
    prefix = f"{file.path}/" if file.path else ""
    found = [
        Entry(one.path[len(prefix) :], one.size, f"hf://{file.repo}@{commit}/{one.path}",
              ("commit", commit, one.blob_id))
        for one in tree
        if hasattr(one, "size") and one.path.startswith(prefix)
    ]  # fmt: skip
    return sorted(found, key=lambda one: one.name)


def _constants() -> Any:
    return importlib.import_module("huggingface_hub.constants")


def _endpoint() -> str:
    return str(_constants().ENDPOINT)


def _token(options: dict[str, object]) -> str | bool | None:
    token = options.pop("token", None)
    if token is not None and not isinstance(token, (str, bool)):
        raise OptionError("option token of storage_options: allowed are a text, True and False")
    return token


def _refuse_offline(file: _File) -> None:
    if _constants().HF_HUB_OFFLINE:
        place = file.place
        raise RemoteError(
            place.host, place.path, "huggingface_hub is offline, and its cache has no such file",
            tries=0, remedy="unset HF_HUB_OFFLINE, or download the file first",
        )  # fmt: skip
