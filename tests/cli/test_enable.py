"""``fastst-patch enable``: FASTST_ENABLED is honoured in one environment, until it is undone."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import fastst_patch

PTH = "fastst_patch_enable.pth"
LOOK = "import safetensors, sys; print('fastst_patch' in sys.modules)"


class Environment:
    """A virtual environment in which pip believes the package to be installed."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python")
        self.site = next(folder.glob("lib/python*/site-packages"))
        package = Path(fastst_patch.__file__).parent.parent
        paths = [entry for entry in sys.path if entry.endswith("site-packages")]
        (self.site / "base.pth").write_text("\n".join([str(package), *paths]) + "\n")
        self.info = self.site / "fastst_patch-0.1.0.dist-info"
        self.info.mkdir()
        (self.info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: fastst-patch\nVersion: 0.1.0\n"
        )
        (self.info / "INSTALLER").write_text("pip\n")
        names = ("METADATA", "INSTALLER", "RECORD")
        (self.info / "RECORD").write_text("".join(f"{self.info.name}/{name},,\n" for name in names))

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("FASTST_", "PYTHON"))}
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True, text=True, check=False, cwd=self.site, env=kept | variables,
        )  # fmt: skip

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "fastst_patch", *arguments)

    def patched(self, **variables: str) -> bool:
        done = self.run("-c", LOOK, **variables)
        assert done.stderr == ""
        return done.stdout == "True\n"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_enable_and_disable(environment: Environment) -> None:
    record = environment.info / "RECORD"
    before = record.read_text()
    assert environment.command("enable", "--status").stdout.startswith("Not enabled: ")
    assert not environment.patched(FASTST_ENABLED="1")
    for _ in range(2):
        done = environment.command("enable")
        assert done.stdout.startswith("Enabled: ")
        assert (done.returncode, done.stderr) == (0, "")
    assert record.read_text() == before + f"{PTH},,\n"
    assert environment.patched(FASTST_ENABLED="1")
    assert not environment.patched(FASTST_ENABLED="0")
    assert not environment.patched()
    for _ in range(2):
        assert environment.command("disable").stdout.startswith("Not enabled: ")
    assert record.read_text() == before
    assert not (environment.site / PTH).exists()
    assert not environment.patched(FASTST_ENABLED="1")


def test_nothing_is_imported_before_safetensors(environment: Environment) -> None:
    environment.command("enable")
    code = (
        "import sys; print(sorted(set(sys.modules) & {'fastst_patch', 'torch', 'importlib.util'}))"
    )
    assert environment.run("-c", code, FASTST_ENABLED="1").stdout == "[]\n"


def test_together_with_run(environment: Environment) -> None:
    environment.command("enable")
    code = LOOK + "; print(sum('Watch' in type(finder).__name__ for finder in sys.meta_path))"
    done = environment.command("run", "-c", code)
    assert (done.stdout, done.stderr) == ("True\n0\n", "")


def test_uninstalling_removes_it(environment: Environment) -> None:
    environment.command("enable")
    pip = [sys.executable, "-m", "pip", "--python", environment.python]
    subprocess.run([*pip, "uninstall", "-y", "fastst-patch"], capture_output=True, check=True)
    assert not (environment.site / PTH).exists()


def test_a_package_that_is_gone_is_not_missed(environment: Environment) -> None:
    environment.command("enable")
    line = (environment.site / PTH).read_text()
    watcher = str(Path(fastst_patch.__file__).parent / "_site" / "sitecustomize.py")
    assert watcher in line
    (environment.site / PTH).write_text(line.replace(watcher, watcher + ".gone"))
    assert not environment.patched(FASTST_ENABLED="1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(environment: Environment) -> None:
    environment.site.chmod(0o555)
    try:
        done = environment.command("enable")
    finally:
        environment.site.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.startswith("fastst-patch: ")
    assert str(environment.site) in done.stderr


def test_no_environment(environment: Environment, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment.info.rename(elsewhere / environment.info.name)
    done = environment.run("-m", "fastst_patch", "enable", PYTHONPATH=str(elsewhere))
    assert done.returncode == 1
    assert done.stderr.startswith(f"fastst-patch: {elsewhere}: Python reads no .pth file there")
