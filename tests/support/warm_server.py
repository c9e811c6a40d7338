"""Forks of a process that has imported slow packages; warm_python.py is the client's side.

``python warm_server.py SOCKET MODULE...`` imports the modules, and starts nothing: no thread of
torch's, no device, nothing of ours. A message on the socket is a program, in JSON, with descriptors
for stdin, stdout, stderr and its status. The program becomes the ``__main__`` of a fork.
"""

from __future__ import annotations

import array
import builtins
import gc
import importlib
import importlib.machinery
import json
import os
import signal
import socket
import sys
import types
import warnings
from typing import Any

MESSAGE_BYTES = 1 << 17
DESCRIPTORS = 4

Program = tuple[types.CodeType, dict[str, Any]]


def serve(number: int, modules: list[str]) -> Program:
    """Serve until the client is gone. Returns in programs only: what they run, and where."""
    with socket.socket(fileno=number) as client:
        for module in modules:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # else collections in programs copy the objects' pages
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those below
        while True:
            message, files = _received(client)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                break
            for file in files:
                os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _fork_and_tell(files.pop())
    return _become(json.loads(message), files)


def _received(client: socket.socket) -> tuple[bytes, list[int]]:
    files = array.array("i")
    space = socket.CMSG_SPACE(DESCRIPTORS * files.itemsize)
    message, about, _, _ = client.recvmsg(MESSAGE_BYTES, space)
    for _, kind, data in about:
        assert kind == socket.SCM_RIGHTS
        files.frombytes(data)
    return message, list(files)


def _fork_and_tell(status: int) -> None:
    """Return in the program; its parent tells its pid and how it ended, and ends."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return
    os.write(status, f"{pid}\n".encode())
    os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _become(job: dict[str, Any], files: list[int]) -> Program:
    """Leave nothing in this process by which a program could tell that it is a fork."""
    os.setsid()  # it is ended with what it starts
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    if job["quiet"]:
        warnings.simplefilter("ignore")
    sys.argv[:] = job["argv"]
    sys.path[0] = os.path.dirname(job["argv"][0]) if job["file"] else ""
    # A new one: what was frozen is not collected as it ends, when its __del__ would be called.
    main = types.ModuleType("__main__")
    main.__dict__.update({"__builtins__": builtins, "__annotations__": {}})
    main.__loader__ = importlib.machinery.BuiltinImporter
    if job["file"]:
        main.__file__ = job["argv"][0]
    sys.modules["__main__"] = main
    name = job["argv"][0] if job["file"] else "<string>"
    return compile(job["source"], name, "exec", dont_inherit=True), main.__dict__


if __name__ == "__main__":
    exec(*serve(int(sys.argv[1]), sys.argv[2:]))
