"""``fastst-patch run``: the program is as under plain Python.

Programs run with the launcher and without, and everything they can tell of themselves is compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import LAUNCH, LOOK, SITE, Runner

from fastst_patch import OptionError
from fastst_patch.cli import launcher
from fastst_patch.cli.main import _split, main
from fastst_patch.config import child_environment
from fastst_patch.report_table import NOTHING


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


# ---- arguments ----


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (["x.py"], ["x.py"]),
        (["x.py", "-v", "--profile"], ["x.py", "-v", "--profile"]),
        (["-v", "--profile", "x.py", "-o", "a"], ["x.py", "-o", "a"]),
        (["-o", "io=direct", "x.py"], ["x.py"]),
        (["--option=io=direct", "x.py"], ["x.py"]),
        (["-oio=direct", "x.py"], ["x.py"]),
        (["-m", "mod", "-v"], ["-m", "mod", "-v"]),
        (["-v", "-mmod", "-c"], ["-mmod", "-c"]),
        (["-c", "pass", "--profile"], ["-c", "pass", "--profile"]),
        (["-", "-v"], ["-", "-v"]),
        (["-v", "--", "torchrun", "--", "-m"], ["--", "torchrun", "--", "-m"]),
        (["-v"], []),
    ],
)
def test_arguments_are_divided(given: list[str], target: list[str]) -> None:
    ours, theirs = _split(["run", *given])
    assert theirs == target
    assert [*ours, *theirs] == ["run", *given]


@pytest.mark.parametrize(
    ("original", "arguments", "flags"),
    [
        (["python", "-m", "fastst_patch", "run", "x.py"], 2, []),
        (["python", "-X", "dev", "-u", "-m", "fastst_patch", "x.py"], 1, ["-X", "dev", "-u"]),
        (["python", "-um", "fastst_patch", "x.py"], 1, ["-u"]),
        (["python", "-umfastst_patch", "x.py"], 1, ["-u"]),
        (["python", "-mfastst_patch.__main__", "x.py"], 1, []),
        (["python", "-W", "error", "/bin/fastst-patch", "run", "-m", "fastst_patch"], 3, []),
    ],
)
def test_flags_for_the_program(original: list[str], arguments: int, flags: list[str]) -> None:
    assert launcher.interpreter_flags(original, arguments) == flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a script"),
        (["-v", "--"], "give a script"),
        (["-o", "io=warp", "x.py"], "option io='warp'"),
        (["-o", "warp=1", "x.py"], "unknown option 'warp'"),
        (["-o", "warp", "x.py"], "not NAME=VALUE"),
        (["-o", "io=mmap", "-o", "page_cache=drop", "x.py"], "exclude each other"),
        (["-o", "targets=safetensors.nonsense", "x.py"], "unknown target"),
        (["--fast", "x.py"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_use_says_so(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", *arguments])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_a_misspelt_command_is_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benhc"])
    assert "invalid choice: 'benhc'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-E", "-I"])
def test_flags_that_make_it_impossible(run: Runner, flag: str) -> None:
    done = run([sys.executable, flag, "-m", "fastst_patch", "-c", "print('ran')"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be patched under python -E" in done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, [SITE]),
        ("", [SITE]),  # as good as unset; an empty entry would be the current folder
        ("/a:b", [SITE, "/a", "b"]),
        ("/a:", [SITE, "/a", ""]),
        (f"/a:{SITE}:b", [SITE, "/a", "b"]),
        (SITE, [SITE]),
    ],
)
def test_path_for_children(
    before: str | None, after: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    assert child_environment({}, SITE)["PYTHONPATH"].split(":") == after


def test_options_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_THREADS", "3")
    options = {"io": "direct", "chunk_bytes": "2MiB", "targets": "safetensors.torch.load_file"}
    found = child_environment(options, SITE, ("/tmp/file", 12))
    assert found["FASTST_IO"] == "direct"
    assert found["FASTST_CHUNK_BYTES"] == "2MiB"
    assert found["FASTST_TARGETS"] == "safetensors.torch.load_file"
    assert found["FASTST_THREADS"] == "3"
    assert found["FASTST_ENABLED"] == "1"
    assert (found["FASTST_PROFILE_FILE"], found["FASTST_PROFILE_PID"]) == ("/tmp/file", "12")
    assert "FASTST_IO" not in os.environ
    monkeypatch.setenv("FASTST_IO", "warp")
    with pytest.raises(OptionError, match="FASTST_IO='warp'"):
        child_environment({}, SITE)


# ---- as under plain Python ----


@pytest.mark.parametrize("kind", ["script", "module", "package", "code", "stdin", "folder"])
def test_the_program_sees_what_it_would_see(run: Runner, kind: str) -> None:
    run.write("folder/script.py", LOOK)
    run.write("folder/__main__.py", LOOK)
    arguments = {
        "script": ["folder/script.py", "-v", "--profile", "--", "-m"],
        "module": ["-m", "folder.script", "-o", "io=direct"],
        "package": ["-m", "folder", "-c", "x"],
        "code": ["-c", LOOK, "-h", "a b", ""],
        "stdin": ["-", "-v"],
        "folder": ["folder", "--help"],
    }[kind]
    plain = run.same(arguments, stdin=LOOK if kind == "stdin" else "some input")
    seen = json.loads(plain.stdout.splitlines()[0])
    assert seen["argv"][1:] == (arguments[2:] if kind in ("module", "package", "code")
                                else arguments[1:])  # fmt: skip
    assert "atexit was here" in plain.stdout


def test_flags_of_python_reach_the_program(run: Runner) -> None:
    flags = ["-X", "dev", "-W", "error::ResourceWarning", "-uO"]
    seen = json.loads(run.same(["-c", LOOK], flags=flags).stdout.splitlines()[0])
    assert "'dev': True" in seen["x"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(41)", 41),
        ("import sys; sys.exit('gone wrong')", 1),
        ("import os; os._exit(7)", 7),
        ("def f():\n    1 / 0\nf()", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("this is no Python", 1),
    ],
)
def test_how_it_ends(run: Runner, code: str, status: int) -> None:
    run.write("script.py", code)
    assert run.same(["script.py"]).returncode == status


def test_what_is_not_there(run: Runner) -> None:
    assert run.same(["absent.py"]).returncode == 2
    assert run.same(["-m", "absent_module"]).returncode == 1
    for profile in ([], ["--profile"]):
        done = run([*LAUNCH, *profile, "--", "./absent"])
        assert done.returncode == 127
        assert "./absent: No such file or directory" in done.stderr
        run.write("not_executable", "")
        assert run([*LAUNCH, *profile, "--", "./not_executable"]).returncode == 126
    assert run.left() == []


@pytest.mark.parametrize("profile", [[], ["--profile"]])
def test_commands(run: Runner, profile: list[str]) -> None:
    shell = 'read line; echo "$line" "$@"; echo err >&2; trap - PIPE; exit 5'
    done = run([*LAUNCH, *profile, "--", "sh", "-c", shell, "sh", "-v", "--"], stdin="in\n")
    assert (done.stdout, done.returncode) == ("in -v --\n", 5)
    assert done.stderr.startswith("err\n")
    # Python ignores SIGPIPE, and whatever it became must not.
    done = run([*LAUNCH, *profile, "--", "sh", "-c", "kill -PIPE $$; exit 1"])
    assert done.returncode == -signal.SIGPIPE
    assert run.left() == []


def test_console_script(run: Runner) -> None:
    script = Path(sys.executable).parent / "fastst-patch"
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    plain = run([sys.executable, "-c", LOOK, "-v"])
    assert run([script, "run", "-c", LOOK, "-v"]).stdout == plain.stdout


WAIT = """
import signal, sys
{handler}
print("ready", flush=True)
while True:
    signal.pause()
"""
EXIT_7 = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"


@contextlib.contextmanager
def not_ignored(number: int) -> Iterator[None]:
    """Programs started within do not ignore the signal, as they would under nohup."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("how", ["script", "profile", "profile command"])
@pytest.mark.parametrize(
    ("number", "handler", "status"),
    [
        (signal.SIGTERM, "", -signal.SIGTERM),
        (signal.SIGTERM, EXIT_7, 7),
        (signal.SIGINT, "", -signal.SIGINT),
        (signal.SIGHUP, "", -signal.SIGHUP),
    ],
)
def test_signals(run: Runner, how: str, number: int, handler: str, status: int) -> None:
    run.write("script.py", WAIT.format(handler=handler))
    command = {
        "script": [*LAUNCH, "script.py"],
        "profile": [*LAUNCH, "--profile", "script.py"],
        "profile command": [*LAUNCH, "--profile", "--", sys.executable, "script.py"],
    }[how]
    with not_ignored(number):
        program = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=run.folder,
            env=run.environment,
        )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(number)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == status
    assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
    ended_by_itself = status == 7 or number == signal.SIGINT
    assert ("no safetensors loads" in stderr) == (ended_by_itself and how != "script")
    assert "fastst_patch/" not in stderr  # no frame of ours


@pytest.mark.parametrize("target", [["script.py"], ["--", sys.executable, "script.py"]])
def test_ctrl_c_on_a_terminal(run: Runner, target: list[str]) -> None:
    """The terminal sends it to us and to the program: it must not come twice."""
    run.write("script.py", """
        import signal, sys, time
        try:
            print("ready", flush=True)
            signal.pause()
        finally:
            for _ in range(20):  # a second one would end this
                time.sleep(0.01)
            print("cleaned up", flush=True)
    """)  # fmt: skip
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(run.folder)
        os.execve(sys.executable, [*LAUNCH, "--profile", *target], run.environment)
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while read := os.read(terminal, 4096):
            text += read
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT
    assert text.count(b"KeyboardInterrupt") == 1
    assert b"cleaned up" in text
    assert b"no safetensors loads" in text


# ---- odd programs ----

DAEMON = """
import os, sys, time
said, saying = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(0)
        os.write(saying, b"the daemon")
    os._exit(0)
os.wait()
print(os.read(said, 20), flush=True)
"""
EXEC = """
import os, sys
print(sys.argv, sys.orig_argv[1:], flush=True)
if "again" not in sys.argv:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
"""
THREAD = """
import sys, threading, time
def late():
    main.join()
    print("later than main")
main = threading.main_thread()
threading.Thread(target=late).start()
sys.exit(3)
"""
RUN_AGAIN = """
import runpy, sys
sys.argv = ["other", "arguments"]
runpy.run_path("a folder/my script.py", run_name="__main__")
runpy.run_module("package", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["a folder/my script.py", "a b", "", "--"], "some input"),
        (["app.zip", "-v"], ""),
        (["-m", "package.__main__", "run"], ""),
        (["./run", "run", "doctor"], ""),  # files named as our commands
        (["without_suffix"], ""),
        (["exec.py"], ""),
        (["daemon.py"], ""),
        (["thread.py"], ""),
        (["again.py"], "some input"),
        (["-m", "pdb", "exec.py"], "n\nn\np sys.argv\nq\n"),
        (["-c", "import code; code.interact(banner='', exitmsg='')"], "print(6 * 7)\n"),
        (["-c", "import sys; sys.excepthook = lambda *found: print(found[:2]); 1 / 0"], ""),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and len(value) < 3 else "",
)
def test_odd_programs(run: Runner, arguments: list[str], stdin: str) -> None:
    for name in ("a folder/my script.py", "package/__main__.py", "run", "without_suffix"):
        run.write(name, LOOK)
    for name, text in (("exec", EXEC), ("daemon", DAEMON), ("thread", THREAD),
                       ("again", RUN_AGAIN)):  # fmt: skip
        run.write(f"{name}.py", text)
    with zipfile.ZipFile(run.folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    plain = run.same(arguments, stdin)
    assert plain.stdout
    profiled = run([*LAUNCH, "--profile", *arguments], stdin)
    assert (profiled.stdout, profiled.returncode) == (plain.stdout, plain.returncode)
    assert profiled.stderr == f"{plain.stderr}{NOTHING}\n"
    assert run.left() == []


def test_launched_by_the_launcher(run: Runner) -> None:
    """Twice switched on is switched on; one table, the outermost's that shall print one."""
    run.write("program.py", "import sys; print(sys.argv)")
    command = ["--", sys.executable, "-m"]
    for outer in (["-m"], ["--profile", "-m"], command, ["--profile", *command]):
        for inner in (["program.py"], ["--", sys.executable, "program.py"]):
            done = run([*LAUNCH, *outer, "fastst_patch", "run", "--profile", *inner, "-v"])
            assert (done.stdout, done.returncode) == ("['program.py', '-v']\n", 0)
            assert done.stderr == f"{NOTHING}\n"
            assert run.left() == []
