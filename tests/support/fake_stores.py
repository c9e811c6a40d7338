"""What the web interfaces of GCS, Azure and the Hugging Face Hub are to a reader, on loopback.

Each wants credentials that hold `SECRET`, as far as a server of ours can check them.
"""

from __future__ import annotations

import email.utils
import json
import urllib.parse
from typing import Any
from xml.sax.saxutils import escape

from fault_server import FaultServer, Remote, Request
from remote_state import SECRET

COMMIT = "a" * 40

_Answer = tuple[int, dict[str, str], bytes]


class FakeStore(FaultServer):
    """Buckets of an object store.

    Attributes:
        files: of all buckets, by ``/bucket/key``.
    """

    scheme = ""
    authorization = ""
    """How the header begins that lets a request in."""

    def put(self, name: str, content: bytes) -> str:
        """Store a file, and give its URL."""
        path = f"/bucket/{name}"
        self.files[path] = Remote(content)
        return f"{self.scheme}:/{path}"

    def _healthy(self, path: str, request: Request) -> _Answer:
        if not request.headers.get("authorization", "").startswith(self.authorization):
            return 403, {}, b"access denied"
        path = urllib.parse.unquote(path)
        query = dict(urllib.parse.parse_qsl(request.target.partition("?")[2]))
        if "prefix" not in query:
            return super()._healthy(path, request)
        start = f"{path}/{query['prefix']}"
        found = [one for one in sorted(self.files) if one.startswith(start)]
        page = self.page([self.entry(one.removeprefix(f"{path}/"), one) for one in found])
        return 200, {"Content-Type": "application/xml"}, page.encode()

    def entry(self, key: str, path: str) -> str:
        """A file, in a listing."""
        raise NotImplementedError

    def page(self, entries: list[str]) -> str:
        """A listing."""
        raise NotImplementedError


class FakeGoogle(FakeStore):
    """Google Cloud Storage."""

    scheme = "gs"
    authorization = f"Bearer {SECRET}"

    @property
    def options(self) -> dict[str, Any]:
        """The `storage_options` that reach it."""
        return {"base_url": self.url(""), "allow_http": True, "bearer_token": SECRET}

    def entry(self, key: str, path: str) -> str:
        remote = self.files[path]
        return (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(remote.content)}</Size>"
            f"<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(remote.etag)}</ETag></Contents>"
        )

    def page(self, entries: list[str]) -> str:
        return f"<ListBucketResult>{''.join(entries)}</ListBucketResult>"


class FakeAzure(FakeStore):
    """Azure's blob storage."""

    scheme = "az"
    authorization = "SharedKey someone:"

    @property
    def options(self) -> dict[str, Any]:
        """The `storage_options` that reach it."""
        return {
            "endpoint": self.url(""),
            "allow_http": True,
            "account_name": "someone",
            "account_key": "a2V5",
        }

    def entry(self, key: str, path: str) -> str:
        remote = self.files[path]
        modified = email.utils.formatdate(remote.modified, usegmt=True)
        return (
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{modified}</Last-Modified>"
            f"<Etag>{escape(remote.etag)}</Etag><BlobType>BlockBlob</BlobType>"
            f"<Content-Length>{len(remote.content)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
        )

    def page(self, entries: list[str]) -> str:
        blobs = "".join(entries)
        return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"


class FakeHub(FaultServer):
    """The Hub with the model org/repo, which is at one commit. Its files are on another server.

    Args:
        store: that server, with the files as ``/name``.
    """

    def __init__(self, store: FaultServer) -> None:
        super().__init__()
        self.store = store

    @property
    def environment(self) -> dict[str, str]:
        """What brings huggingface_hub here."""
        return {"HF_ENDPOINT": self.url(""), "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "0"}

    def put(self, name: str, content: bytes) -> str:
        """Store a file, and give its URL."""
        self.store.files[f"/{name}"] = Remote(content)
        return f"hf://org/repo/{name}"

    def _healthy(self, path: str, request: Request) -> _Answer:
        if request.headers.get("authorization") != f"Bearer {SECRET}":
            return 401, {}, b"who are you?"
        what, _, rest = path.removeprefix("/").partition("org/repo")
        _, kind, revision, *name = [*rest.split("/", 3), ""][:4] if rest else ["", "", "", ""]
        if (what, kind) == ("", "resolve") and f"/{'/'.join(name)}" in self.store.files:
            return 302, {"Location": self.store.url(f"/{name[0]}?sig={SECRET}")}, b""
        if what != "api/models/" or kind not in ("", "revision", "tree"):
            return 404, {}, b"nothing"
        answer: Any = {"id": "org/repo", "sha": COMMIT}
        if kind == "tree":
            assert revision == COMMIT
            answer = [
                {"type": "file", "path": one[1:], "size": len(remote.content), "oid": remote.etag}
                for one, remote in sorted(self.store.files.items())
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
