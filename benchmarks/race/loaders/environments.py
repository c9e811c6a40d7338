"""Side environments: packages that cannot be installed beside what the others need.

The release candidate of safetensors needs one, as the installed release races, too; and cattensors,
over which safetensors 0.8's ``load_file`` raises TypeError.

Each is a folder that pip fills (`--target`, without dependencies), to be put in front of sys.path
before anything is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER_VARIABLE = "FASTST_RACE_ENVIRONMENTS"

# The name of an environment is what pip is asked for, with what goes beside it.
ENVIRONMENTS = ("safetensors==0.9.0rc1", "cattensors==0.2.0")
BESIDE = {"cattensors==0.2.0": ("safetensors==0.7.0",)}

Progress = Callable[[str], None]


def folder(name: str) -> Path:
    """Return where an environment is, or would be."""
    base = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "fastst-race"
    return Path(base).absolute() / f"{name}-cp{sys.version_info[0]}{sys.version_info[1]}"


def missing(name: str) -> str | None:
    """Say what is not there, or None."""
    found = [wanted.replace("==", "-") for wanted in (name, *BESIDE.get(name, ()))]
    if all((folder(name) / f"{one}.dist-info" / "METADATA").is_file() for one in found):
        return None
    return f"{name} is not in {folder(name)}: prepare() puts it there, by pip"


def prepare(
    wheels: Path | None = None, progress: Progress = lambda _: None
) -> dict[str, Path | str]:
    """Fill every environment that is not there yet.

    Args:
        wheels: a folder with wheels to take them from, instead of the index.
        progress: told what is being done.

    Returns:
        For each name the folder, or why there is none.
    """
    return {name: _prepare(name, wheels, progress) for name in ENVIRONMENTS}


def _prepare(name: str, wheels: Path | None, progress: Progress) -> Path | str:
    target = folder(name)
    if missing(name) is None:
        return target
    progress(f"installing {name} into {target}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(target)]
    command += [name, *BESIDE.get(name, ())]
    if wheels is not None:
        command += ["--no-index", "--find-links", str(wheels)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"pip could not install {name}: {error}"
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return f"pip could not install {name}: {(said or ['no reason given'])[-1]}"
    return target if missing(name) is None else f"pip did not put {name} into {target}"
