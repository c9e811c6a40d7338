"""What the command line says of wrong use, of broken environments and to pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastst_patch import OptionError, config_context
from fastst_patch.cli.main import main

COMMAND = [sys.executable, "-m", "fastst_patch"]


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, **environment},
    )  # fmt: skip


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "usage", "words"),
    [
        (["bench", "--bogus"], "bench [-h]", "unrecognized arguments: --bogus"),
        (["bench", "--repaet", "3"], "bench [-h]", "did you mean --repeat?"),
        (["bench", "--rep", "3"], "bench [-h]", "did you mean --repeat?"),
        (["doctor", "--jsno"], "doctor [-h]", "did you mean --json?"),
        (["run", "--profil", "x.py"], "run [-v]", "did you mean --profile?"),
    ],
)
def test_usage_is_of_the_command(
    arguments: list[str], usage: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert usage in text.splitlines()[0]
    assert words in text


def test_version_names_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["fastst-patch", "torch", "safetensors", "engine"]


# ---- environment ----


def test_a_bad_environment_is_one_line(tmp_path: Path) -> None:
    for variables in (
        {"FASTST_ENABLED": "maybe"},
        {"FASTST_ENABLED": "1", "FASTST_THREADS": "many"},
    ):
        done = run(*COMMAND, "doctor", folder=tmp_path, **variables)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("fastst-patch: option FASTST_")
        done = run(sys.executable, "-c", "import fastst_patch", folder=tmp_path, **variables)
        assert "Traceback" in done.stderr  # a program's import fails where it is written


def test_a_misspelt_variable_is_told_with_the_nearest(tmp_path: Path) -> None:
    done = run(*COMMAND, "run", "-c", "print(1)", folder=tmp_path, FASTST_THREAD="4")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert done.stderr == (
        "fastst_patch: FASTST_THREAD has no effect: there is no such option; did you mean"
        " FASTST_THREADS?\n"
    )


def test_doctor_tells_of_a_misspelt_variable_once(tmp_path: Path) -> None:
    done = run(*COMMAND, "doctor", folder=tmp_path, FASTST_THREAD="4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("FASTST_THREAD ") == 1


def test_a_misspelt_option_is_told_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean threads"), config_context(thread=4):
        pass


# ---- broken installations ----


@pytest.mark.parametrize("missing", ["safetensors", "wrapt"])
def test_doctor_survives_and_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from fastst_patch.cli.main import main
for command in (["--version"], ["--help"]):
    try:
        main(command)
    except SystemExit as ended:
        assert not ended.code
print(main(["doctor"]))
"""
    done = run(sys.executable, "-c", code, folder=tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "1"
    assert any(line.endswith("The fast path cannot be taken here.") for line in lines)
    assert any(line.endswith(f"{missing}: not installed") for line in lines)


def test_names_that_need_safetensors_raise_when_used(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["safetensors"] = None
import fastst_patch
try:
    fastst_patch.patch()
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = run(sys.executable, "-c", code, folder=tmp_path)
    assert (done.stdout, done.stderr) == ("safetensors\n", "")


# ---- pipes ----


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "doctor", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=tmp_path,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
