"""What a load from a server may not leave behind, and may not tell."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer
from waiting import until

from fastst_patch.sources.base import open_source

SECRET = "S3cretT0ken"
"""Is part of every credential in the tests, and nowhere else."""


def _held() -> tuple[set[str], list[str]]:
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if not target.startswith("/proc/"):
                found.append(target)
    return {thread.name for thread in threading.enumerate()}, sorted(found)


def start_obstore() -> None:
    """Start obstore's own threads, which stay until the process ends; skips without obstore."""
    pytest.importorskip("obstore", reason="the package obstore is missing: install '.[remote]'")
    with FaultServer({"/b/x": b"x"}) as server:
        options = {"endpoint": server.url(""), "allow_http": True, "skip_signature": True}
        open_source("s3://b/x", {**options, "region": "x"}).close()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 with its key in one file; skips without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl is missing, which makes the certificate")
    key, certificate, both = (folder / name for name in ("key", "certificate", "both.pem"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=loopback", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    return both


def certificate_of(both: Path) -> str:
    """The certificate of `self_signed` alone, in PEM."""
    return (both.parent / "certificate").read_text()


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    """Afterwards the same threads run and the same descriptors are open as before."""
    before = _held()
    yield
    if not until(lambda: _held() == before, 5):
        raise AssertionError(f"before: {before}; and now: {_held()}")


def everything_told(error: BaseException) -> str:
    """All that a user or a log can get out of an exception, with what it hangs on."""
    told, seen = [], set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        told += [str(one), repr(one), repr(one.args), repr(vars(one))]
        told += traceback.format_exception(type(one), one, one.__traceback__, chain=False)
        pending += [one.__cause__, one.__context__]
    return "\n".join(told)


def assert_no_secret(*things: Any) -> None:
    for thing in things:
        text = everything_told(thing) if isinstance(thing, BaseException) else repr(thing)
        assert SECRET not in text, text.replace(SECRET, "<<SECRET>>")
