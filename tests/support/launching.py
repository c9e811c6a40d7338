"""Programs run with the launcher and without, and everything they can tell of themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastst_patch.cli import launcher

LAUNCH = (sys.executable, "-m", "fastst_patch", "run")
SITE = launcher._site()

# What a program can see of how it was started.
LOOK = """
import atexit, json, signal, sys
atexit.register(lambda: print("atexit was here"))
spec = __spec__
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": globals().get("__file__"),
    "package": __package__, "spec": spec and [spec.name, spec.origin],
    "loader": type(__loader__).__name__, "flags": str(sys.flags), "x": str(sys._xoptions),
    "warn": sys.warnoptions, "executable": sys.executable, "own": sys.orig_argv[1:],
    "modules": sorted(sys.modules), "main": sys.modules["__main__"].__dict__ is globals(),
    "importers": sorted(sys.path_importer_cache),
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "stdin": sys.stdin.read() if "-" not in sys.argv else None,
}))
"""


class Runner:
    """Runs commands in a folder of their own, with nothing of ours in the environment.

    Args:
        folder: theirs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not in it: sockets of multiprocessing lie in there, whose paths have 107 bytes at most.
        # Goes with this object.
        self.temporary = tempfile.TemporaryDirectory(prefix="run-")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTST_", "PYTHONPATH"))}
        self.environment = {
            **kept, "TMPDIR": self.temporary.name, "PYTHONDONTWRITEBYTECODE": "1"
        }  # fmt: skip

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def __call__(
        self, command: Sequence[object], stdin: str = "", **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**self.environment, **extra},
            check=False,
            timeout=300,
        )

    def together(
        self, commands: Sequence[Sequence[object]], stdin: str = "", **extra: str
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run commands beside each other, which takes less time."""
        with ThreadPoolExecutor(len(commands)) as pool:
            return list(pool.map(lambda command: self(command, stdin, **extra), commands))

    def same(
        self, arguments: Sequence[object], stdin: str = "", flags: Sequence[str] = (), **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run plainly and launched in each way; all must be equal. Returns the plain one."""
        ways = [[], ["-m", "fastst_patch"], ["-m", "fastst_patch", "run"]]
        commands = [[sys.executable, *flags, *way, *arguments] for way in ways]
        ended = self.together(commands, stdin, **extra)
        plain = ended[0]
        for launched in ended[1:]:
            assert launched.stdout == plain.stdout
            assert launched.stderr == plain.stderr
            assert launched.returncode == plain.returncode
        return plain

    def left(self) -> list[str]:
        """Temporary files of ours that are still there."""
        return [name for name in os.listdir(self.temporary.name) if name.startswith("fastst")]
