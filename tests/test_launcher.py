"""``fastst-patch run``: the program is as under plain Python, and patched, and so are its children.

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
import textwrap
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastst_patch import OptionError, cli, engine, launcher
from fastst_patch.config import child_environment

LAUNCH = (sys.executable, "-m", "fastst_patch", "run")
SITE = launcher._site()
needs_engine = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

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


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """For programs: nothing of ours in it, and temporary files where a test can see them."""
    (tmp_path / "tmp").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTST_", "PYTHONPATH"))}
    return {**kept, "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}


class Runner:
    """Runs commands in a folder of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

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

    def same(
        self, arguments: Sequence[object], stdin: str = "", flags: Sequence[str] = (), **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run plainly and launched in each way; all must be equal. Returns the plain one."""
        plain = self([sys.executable, *flags, *arguments], stdin, **extra)
        for launch in ([], ["run"]):
            command = [sys.executable, *flags, "-m", "fastst_patch", *launch, *arguments]
            launched = self(command, stdin, **extra)
            assert launched.stdout == plain.stdout
            assert launched.stderr == plain.stderr
            assert launched.returncode == plain.returncode
        return plain

    def left(self) -> list[str]:
        """Temporary files of ours that are still there."""
        return [name for name in os.listdir(self.folder / "tmp") if name.startswith("fastst")]


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Runner:
    return Runner(tmp_path, environment)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.arange(1000) + i for i in range(4)}  # 32 kB
    safetensors.torch.save_file(tensors, path)
    return path


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
    ours, theirs = cli._split(["run", *given])
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
        cli.main(["run", *arguments])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_a_misspelt_command_is_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["benhc"])
    assert "invalid choice: 'benhc'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-E", "-I"])
def test_flags_that_make_it_impossible(run: Runner, flag: str) -> None:
    done = run([sys.executable, flag, "-m", "fastst_patch", "-c", "print('ran')"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "keep a program from being switched on" in done.stderr


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
    _, stderr = program.communicate(timeout=300)
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


# ---- sitecustomize ----

TELL = (
    "import sys; m = sys.modules.get('sitecustomize'); print(m, m and m.__spec__.origin, sys.path)"
)


@pytest.mark.parametrize(
    "text",
    [
        "print('the other one')",
        "1 / 0",
        "import absent_module",
        "raise ImportError('odd', name='sitecustomize')",
        "import safetensors_of_theirs",
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_an_existing_sitecustomize(run: Runner, text: str, relative: bool) -> None:
    run.write("theirs/sitecustomize.py", text)
    run.write("theirs/safetensors_of_theirs.py", "print('a module of theirs')")
    path = "theirs:" if relative else str(run.folder / "theirs")
    plain = run([sys.executable, "-c", TELL], PYTHONPATH=path)
    launched = run([*LAUNCH, "-c", TELL], PYTHONPATH=path)
    # The launcher is a Python too, and imports it.
    assert launched.stdout.endswith(plain.stdout)
    assert launched.stderr.endswith(plain.stderr)
    assert launched.returncode == plain.returncode
    direct = {"FASTST_ENABLED": "1", "PYTHONPATH": f"{SITE}:{path}"}
    inherited = run([sys.executable, "-c", TELL], **direct)
    assert inherited.stdout == plain.stdout
    assert inherited.stderr == plain.stderr


def test_without_another_sitecustomize(run: Runner) -> None:
    run.same(["-c", TELL])


def test_a_failing_safetensors_fails_as_ever(run: Runner) -> None:
    run.write("theirs/safetensors/__init__.py", "def f():\n    1 / 0\nf()\n")
    code = "try:\n  import safetensors\nexcept ArithmeticError:\n  pass\nimport safetensors"
    environment = {"PYTHONPATH": str(run.folder / "theirs")}
    plain = run([sys.executable, "-c", code], **environment)
    assert "importlib" not in plain.stderr
    environment = {"FASTST_ENABLED": "1", "PYTHONPATH": f"{SITE}:{run.folder / 'theirs'}"}
    assert run([sys.executable, "-c", code], **environment).stderr == plain.stderr


@needs_engine
def test_looking_for_safetensors_is_no_import(run: Runner) -> None:
    code = """
import importlib.util, sys
first, second = (importlib.util.find_spec("safetensors") for _ in "12")
assert "fastst_patch" not in sys.modules and "safetensors" not in sys.modules
from safetensors import safe_open
import safetensors
assert "fastst_patch" in sys.modules
import fastst_patch
assert fastst_patch.is_patched("safetensors.safe_open")
assert safe_open is not fastst_patch.get_original("safetensors.safe_open")
assert safetensors.__loader__ is safetensors.__spec__.loader
assert type(safetensors.__loader__) is type(first.loader)
assert "exec_module" not in vars(safetensors.__loader__)
assert not any("sitecustomize" in type(f).__module__ for f in sys.meta_path)
assert not any("_site" in entry for entry in sys.path)
assert "torch" not in sys.modules
import importlib
importlib.reload(safetensors)
"""
    done = run([*LAUNCH, "-c", code])
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_fastst_patch_first(run: Runner) -> None:
    code = "import fastst_patch, safetensors; print(fastst_patch.is_patched())"
    done = run([*LAUNCH, "-v", "-c", code])
    assert done.stdout == f"{engine.native_error() is None}\n"
    assert done.stderr.count("patched: ") == 1


# ---- Pythons that cannot be patched ----

IMPORT = "import sys, safetensors; print(safetensors.__file__, 'fastst_patch' in sys.modules)"


def test_a_python_without_fastst_patch(run: Runner) -> None:
    venv.create(run.folder / "bare", symlinks=True)
    run.write("theirs/safetensors/__init__.py", "")
    python = run.folder / "bare" / "bin" / "python"
    for flags, line in (([], ""), (["-v"], "stays unpatched: ModuleNotFoundError")):
        command = [*LAUNCH, *flags, "--", "env", "PYTHONPATH=" + f"{SITE}:theirs", python]
        done = run([*command, "-c", IMPORT])
        assert done.stdout.split()[1:] == ["False"]
        assert done.returncode == 0
        assert line in done.stderr
        assert bool(done.stderr) == bool(line)


def test_a_broken_fastst_patch_breaks_no_program(run: Runner) -> None:
    run.write("theirs/safetensors/__init__.py", "")
    run.write("theirs/fastst_patch/__init__.py", "raise ValueError('broken')")
    environment = {"FASTST_ENABLED": "1", "PYTHONPATH": f"{SITE}:theirs"}
    done = run([sys.executable, "-c", IMPORT], **environment)
    assert done.returncode == 0
    assert done.stdout.split()[1:] == ["False"]
    assert "stays unpatched: ValueError: broken" in done.stderr


@pytest.mark.parametrize("flag", ["-I", "-E"])
def test_children_that_ignore_the_environment(run: Runner, flag: str) -> None:
    done = run([*LAUNCH, "--", sys.executable, flag, "-c", IMPORT])
    assert (done.stdout.split()[1:], done.stderr) == (["False"], "")


def test_children_without_site(run: Runner) -> None:
    done = run([*LAUNCH, "--", sys.executable, "-S", "-c", "print('well')"])
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_children_without_pythonpath(run: Runner) -> None:
    done = run([*LAUNCH, "--", "env", "-u", "PYTHONPATH", sys.executable, "-c", IMPORT])
    assert (done.stdout.split()[1:], done.stderr) == (["False"], "")


def test_switched_off_stays_off(run: Runner) -> None:
    done = run([*LAUNCH, "-c", IMPORT], FASTST_ENABLED="0")
    assert (done.stdout.split()[1:], done.stderr) == (["False"], "")
    done = run([*LAUNCH, "-v", "-c", IMPORT], FASTST_ENABLED="0")
    assert done.stdout.split()[1:] == ["False"]
    assert done.stderr == "fastst_patch: FASTST_ENABLED is 0: nothing is patched\n"


# ---- patched programs ----


@needs_engine
def test_verbose_and_options(run: Runner, model: Path) -> None:
    code = f"""
import safetensors.torch
safetensors.torch.load_file({str(model)!r})
kept = safetensors.safe_open({str(model)!r}, "pt")
kept.get_tensor("t1")
"""
    done = run([*LAUNCH, "-v", "-o", "io=buffered", "-c", code])
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "patched: safetensors.safe_open" in lines[0]
    assert f"load_file {model}: 0.000 GB in 4 tensors" in lines[1]
    assert "path buffered" in lines[1]
    assert f"safe_open {model}: 0.000 GB in 1 tensors" in lines[2]  # though it was never closed


CHILDREN = """
import json, multiprocessing, os, signal, subprocess, sys
import torch, torch.utils.data

def load():
    import safetensors.torch
    tensors = safetensors.torch.load_file(sys.argv[1] if len(sys.argv) > 1 else "model.safetensors")
    import fastst_patch
    assert fastst_patch.stats()["paths"].keys() == {"mmap"}, fastst_patch.stats()
    assert sum(int(t[0]) for t in tensors.values()) == 6
    return os.getpid()

def work(queue):
    queue.put(load())

def killed(queue):
    load()
    import safetensors
    kept = safetensors.safe_open("model.safetensors", "pt")
    kept.get_tensor("t0")
    os.kill(os.getpid(), signal.SIGKILL)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        from safetensors import safe_open
        self.kept = safe_open("model.safetensors", "pt")  # as many datasets do
        return os.getpid(), self.kept.get_tensor("t1")[:2].sum()

if __name__ == "__main__":
    pids = {}
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=work, args=(queue,))
        child.start()
        pids[method] = queue.get()
        child.join()
        loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=method)
        if method != "forkserver":
            got = list(loader)
            assert [int(x[1]) for x in got] == [3, 3]
            pids["loader " + method] = int(got[0][0])
    child = multiprocessing.get_context("fork").Process(target=killed, args=(None,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    pids["killed"] = child.pid
    code = "import os, program; print(program.load())"
    pids["subprocess"] = int(subprocess.check_output([sys.executable, "-c", code]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.check_output([sys.executable, "-c", "import safetensors.torch as s; s.load_file("
                             "'model.safetensors')"], env=environment)
    pids["self"] = load()
    print(json.dumps(pids))
    sys.exit(3)
"""


def _rows(stderr: str) -> dict[tuple[int, str], tuple[str, ...]]:
    """The table of several processes: (pid, call) -> the other cells."""
    lines = stderr.split("fastst_patch:\n", 1)[1].splitlines()
    assert lines[0].split()[:2] == ["pid", "file"]
    found = (line.split() for line in lines[2:] if line.split()[0].isdecimal())
    return {(int(cells[0]), cells[2]): (cells[1], *cells[3:]) for cells in found}


@needs_engine
@pytest.mark.usefixtures("model")
def test_children_are_patched_and_in_the_table(run: Runner) -> None:
    run.write("program.py", CHILDREN)
    done = run([*LAUNCH, "--profile", "program.py"])
    assert done.returncode == 3, done.stderr
    pids = json.loads(done.stdout)
    assert len(set(pids.values())) == len(pids) == 8
    rows = _rows(done.stderr)
    whole = {k for k in pids if not k.startswith("loader")}
    expected = {(pids[k], "load_file") for k in whole}
    expected |= {(pids[k], "safe_open") for k in pids.keys() - whole}
    assert set(rows) == expected  # the killed one's handle was never closed
    for (_, call), cells in rows.items():
        assert cells[:3] == ("model.safetensors", "cpu", "mmap")
        assert cells[3:5] == (("1", "4") if call == "load_file" else ("2", "2"))
    total = next(line for line in done.stderr.splitlines() if "total, 1 file" in line)
    assert total.split()[3:5] == [str(6 + 4), str(6 * 4 + 4)]
    assert run.left() == []


@needs_engine
@pytest.mark.usefixtures("model")
def test_torchrun(run: Runner) -> None:
    run.write("worker.py", """
        import os, safetensors.torch
        import fastst_patch
        safetensors.torch.load_file("model.safetensors")
        assert fastst_patch.stats()["paths"].keys() == {"mmap"}
    """)  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run([*LAUNCH, "--profile", "--", *torchrun, "--nproc-per-node=2", "worker.py"],
               OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = _rows(done.stderr)
    assert len(rows) == 2
    assert {call for _, call in rows} == {"load_file"}
    assert run.left() == []


@needs_engine
@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(4)", 4), ("1 / 0", 1), ("raise KeyboardInterrupt", -2)]
)
@pytest.mark.usefixtures("model")
def test_table_at_the_end(run: Runner, end: str, status: int) -> None:
    code = f"""
import atexit, sys, safetensors, safetensors.torch
@atexit.register
def later():
    with safetensors.safe_open("model.safetensors", "np") as file:
        file.get_tensor("t0")
kept = safetensors.safe_open("model.safetensors", "pt")
kept.get_tensor("t1")
{end}
"""
    done = run([*LAUNCH, "--profile", "-c", code])
    assert done.returncode == status
    before, _, table = done.stderr.partition("fastst_patch:\n")
    plain = run([sys.executable, "-c", code])
    assert before == plain.stderr
    lines = [line.split() for line in table.splitlines()]
    cells = {tuple(line[:6]) for line in lines}
    assert ("model.safetensors", "safe_open", "cpu", "mmap", "1", "1") in cells
    assert ("model.safetensors", "safe_open", "cpu", "stock", "1", "0") in cells
    assert "once: safe_open by stock: framework 'np' is not accelerated" in table
    assert run.left() == []


def test_no_table_when_killed(run: Runner) -> None:
    done = run([*LAUNCH, "--profile", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert (done.returncode, done.stderr) == (-9, "")
    done = run([*LAUNCH, "--profile", "--", "sh", "-c", "kill -9 $$"])
    assert (done.returncode, done.stderr) == (-9, "")


def test_nothing_loaded_is_one_line(run: Runner) -> None:
    for target in (["-c", "print('hello')"], ["--", "echo", "hello"]):
        done = run([*LAUNCH, "--profile", *target])
        assert done.stdout == "hello\n"
        assert done.stderr == "fastst_patch: no safetensors loads\n"
    done = run(
        [*LAUNCH, "--profile", "-c", "import sys; sys.stderr.close(); sys.__stderr__ = None"]
    )
    assert (done.returncode, run.left()) == (0, [])
    code = "import safetensors, sys; sys.stderr.close(); sys.__stderr__ = None"
    done = run([*LAUNCH, "--profile", "-c", code])
    assert (done.returncode, done.stderr, run.left()) == (0, "", [])


def test_forked_child_prints_no_table(run: Runner) -> None:
    code = "import os; pid = os.fork(); pid and os.waitpid(pid, 0); print(bool(pid), flush=True)"
    done = run([*LAUNCH, "--profile", "-c", code])
    assert done.stdout == "False\nTrue\n"
    assert done.stderr == "fastst_patch: no safetensors loads\n"
