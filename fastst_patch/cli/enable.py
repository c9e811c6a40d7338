"""``fastst-patch enable`` and ``disable``: whether FASTST_ENABLED is honoured in an environment.

``enable`` writes a ``.pth`` file into the environment's site-packages. Python executes its one line
at each start. The line reads FASTST_ENABLED and, where that is true, has safetensors patched when a
program imports it, as ``fastst-patch run`` does. It is listed in the package's RECORD, so
that uninstalling the package removes it, too.
"""

from __future__ import annotations

import contextlib
import os
import site
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from ..config import environment_enabled
from ..errors import OptionError
from ..terminal import say

__all__ = ["disable", "enable", "status"]

_NAME = "fastst_patch_enable.pth"
_RECORD_LINE = f"{_NAME},,\n"
# SourceFileLoader keeps the compiled file: to compile it at each start would take a millisecond.
_LINE = (
    "import os, _frozen_importlib_external as e; p = {path!r}; "
    "os.environ.get('FASTST_ENABLED', '').lower() in ('1', 'true', 'yes', 'on') "
    "and os.path.isfile(p) and "
    "exec(e.SourceFileLoader({name!r}, p).get_code({name!r}), {{'__name__': {name!r}}})\n"
)


def enable() -> int:
    """Write the file; returns the exit status.

    Raises:
        OptionError: the package does not lie in a folder whose ``.pth`` files Python reads.
        OSError: the folder cannot be written to.
    """
    folder = _folder()
    watcher = Path(__file__).resolve().parent.parent / "_site" / "sitecustomize.py"
    _write(folder / _NAME, _LINE.format(path=str(watcher), name="fastst_patch_enable"))
    record = _record()
    if record is not None and _RECORD_LINE not in record.read_text(encoding="utf-8"):
        _write(record, record.read_text(encoding="utf-8") + _RECORD_LINE)
    return status()


def disable() -> int:
    """Remove the file, if there is one; returns the exit status.

    Raises:
        OptionError: as `enable`.
        OSError: the folder cannot be written to.
    """
    with contextlib.suppress(FileNotFoundError):
        (_folder() / _NAME).unlink()
    record = _record()
    if record is not None and _RECORD_LINE in (text := record.read_text(encoding="utf-8")):
        _write(record, text.replace(_RECORD_LINE, ""))
    return status()


def status() -> int:
    """Print whether this environment honours FASTST_ENABLED; the exit status is 0.

    Raises:
        OptionError: as `enable`.
    """
    folder = _folder()
    if not (folder / _NAME).is_file():
        say("Not enabled: FASTST_ENABLED has no effect on programs that do not import fastst_patch")
        say(f"here: {folder}")
        return 0
    now = "is set now" if environment_enabled() else "is not set now"
    say("Enabled: with FASTST_ENABLED=1, programs of this environment load through fastst_patch")
    say(f"here: {folder / _NAME}; FASTST_ENABLED {now}")
    return 0


def _folder() -> Path:
    """The folder of ``.pth`` files in which the package is installed."""
    try:
        found = Path(str(metadata.distribution("fastst-patch").locate_file("")))
    except metadata.PackageNotFoundError:
        raise OptionError(
            "fastst-patch is not installed by pip; there is nothing to enable"
        ) from None
    read = {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")}
    if found.resolve() not in {Path(folder).resolve() for folder in read}:
        raise OptionError(f"{found}: Python reads no .pth file there; install into an environment")
    return found


def _record() -> Path | None:
    """The list of the package's files, by which pip uninstalls it."""
    for file in metadata.distribution("fastst-patch").files or ():
        if file.name == "RECORD":
            return Path(str(file.locate()))
    return None


def _write(path: Path, text: str) -> None:
    """Replace a file's text; another process sees either the old or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".fastst_patch_")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's is for its owner alone; other users start Python, too
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
