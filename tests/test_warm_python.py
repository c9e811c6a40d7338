"""Programs that are forks (support/warm_python.py): as good as fresh ones, and gone like them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until
from warm_python import WarmPython

GIVEN = {**os.environ, "A_VARIABLE": "given"}
SEES = """
import json, os, sys, threading
print(json.dumps({
    "argv": sys.argv, "first": sys.path[0], "cwd": os.getcwd(), "name": __name__,
    "names": sorted(globals()), "main": sys.modules["__main__"].__dict__ is globals(),
    "stdin": sys.stdin.read(), "variable": os.environ.get("A_VARIABLE"),
    "threads": threading.active_count(), "files": sorted(os.listdir("/proc/self/fd")),
    "thread": threading.current_thread() is threading.main_thread(),
}))
"""
ENDS = {
    "nothing": "",
    "status": "import sys; print('said'); sys.exit(3)",
    "words": "import sys; sys.exit('gone wrong')",
    "exception": "def f():\n    1 / 0\nf()",
    "syntax": "this is no Python",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os; os.kill(os.getpid(), 9)",
    "at exit": "import atexit; atexit.register(print, 'late'); print('early')",
    "hook": "import sys; sys.excepthook = lambda *e: print(e[1]); raise ValueError('seen')",
    "thread": (
        "import threading\n"
        "main = threading.main_thread()\n"
        "threading.Thread(target=lambda: main.join() or print('later than main')).start()"
    ),
    "daemon": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    ),
    "global": (
        "class Late:\n    def __del__(self): print('the very end', self.other)\n"
        "late = Late()\nlate.other = [1]"
    ),
    "stderr": "import sys; print('told', file=sys.stderr, end=''); print('said', end='')",
}


def fresh(code: str, *arguments: str, folder: Path, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, cwd=folder, input=stdin,
        env=GIVEN,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_program_sees_what_a_fresh_one_sees(warm_python: WarmPython, tmp_path: Path) -> None:
    arguments = ("-v", "two words", "")
    done = warm_python.run(SEES, *arguments, folder=tmp_path, stdin="é\nmore", environment=GIVEN)
    assert (done.returncode, done.stdout, done.stderr) == fresh(
        SEES, *arguments, folder=tmp_path, stdin="é\nmore"
    )


@pytest.mark.parametrize("code", ENDS)
def test_it_ends_as_a_fresh_one(warm_python: WarmPython, tmp_path: Path, code: str) -> None:
    """Its traceback begins with the server's frames."""
    done = warm_python.run(ENDS[code], folder=tmp_path)
    status, said, told = fresh(ENDS[code], folder=tmp_path)
    assert (done.returncode, done.stdout) == (status, said)
    assert done.stderr.splitlines()[-1:] == told.splitlines()[-1:]


def test_torch_is_all_that_is_imported(warm_python: WarmPython, tmp_path: Path) -> None:
    code = """
import sys
assert "torch" in sys.modules
assert not {"fastst_patch", "safetensors", "pytest"} & set(sys.modules)
assert not hasattr(sys, "left")
import safetensors
sys.left = 1
"""
    for _ in range(2):  # the second sees nothing of the first
        done = warm_python.run(code, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_script_imports_from_its_folder(warm_python: WarmPython, tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("here = __file__")
    script = folder / "script.py"
    script.write_text("import beside, sys; print(beside.here, __file__, *sys.argv)")
    done = warm_python.run(script, 1, folder=tmp_path)
    assert done.stdout.split() == [str(folder / "beside.py"), str(script), str(script), "1"]


def test_a_late_one_is_ended(warm_python: WarmPython, tmp_path: Path) -> None:
    """With the child that it waits for."""
    code = """
import os, signal, time
child = os.fork()
if child:
    open("pids", "w").write(f"{os.getpid()} {child}")
signal.pause()
"""
    with pytest.raises(subprocess.TimeoutExpired):
        warm_python.run(code, folder=tmp_path, limit_s=1)
    for pid in (tmp_path / "pids").read_text().split():
        assert until(lambda pid=pid: not _runs(pid))  # the kernel ends it some time after the kill


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_nothing_to_read(warm_python: WarmPython, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        program = warm_python.start(
            "import sys; print(repr(sys.stdin.read()))",
            folder=tmp_path, stdin=None, stdout=out, stderr=out,
        )  # fmt: skip
    assert program.wait(60) == 0
    assert (tmp_path / "out").read_text() == "''\n"


def test_pipes_to_a_program(warm_python: WarmPython, tmp_path: Path) -> None:
    """Two at a time: an end is seen, because neither holds the other's pipes."""
    code = "import sys\nfor line in sys.stdin: print(line.strip() * 2, flush=True)"
    with (tmp_path / "errors").open("wb") as errors:
        programs = [
            warm_python.start(
                code, folder=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
            for _ in range(2)
        ]
    for program in programs:
        assert program.stdin is not None
        assert program.stdout is not None
        with program.stdin, program.stdout:
            program.stdin.write(b"ab\n")
            program.stdin.flush()
            assert program.stdout.readline() == b"abab\n"
            program.stdin.close()
            assert program.stdout.read() == b""
        assert program.wait(60) == 0
    assert (tmp_path / "errors").read_bytes() == b""
