"""``fastst-patch run``: the program is patched, and so are its children, where they can be.

With ``--profile`` a table says what was loaded; an existing ``sitecustomize`` is called.
"""

from __future__ import annotations

import json
import os
import sys
import venv
from pathlib import Path

import pytest
import safetensors.torch
import torch
from launching import LAUNCH, SITE, Runner

from fastst_patch import LoadReport, engine
from fastst_patch.patching import child_hook
from fastst_patch.report_table import NOTHING

needs_engine = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {f"t{i}": torch.arange(1000) + i for i in range(4)}  # 32 kB
    safetensors.torch.save_file(tensors, path)
    return path


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
    assert done.stderr.count("patched when imported: safetensors.safe_open") == 1


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
    lines = stderr.split("fastst_patch: ", 1)[1].splitlines()[1:]
    assert lines[0].split()[:2] == ["pid", "file"]
    found = (line.split() for line in lines[2:] if line.split()[0].isdecimal())
    return {(int(cells[0]), cells[2]): (cells[1], *cells[3:]) for cells in found}


@needs_engine
@pytest.mark.usefixtures("model")
def test_children_are_patched_and_in_the_table(run: Runner) -> None:
    run.write("program.py", CHILDREN)
    done = run([*LAUNCH, "--profile", "program.py"], COLUMNS="200")
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
               OMP_NUM_THREADS="1", COLUMNS="200")  # fmt: skip
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
    with safetensors.safe_open("model.safetensors", "pt", backend="pread") as file:
        file.get_tensor("t0")
kept = safetensors.safe_open("model.safetensors", "pt")
kept.get_tensor("t1")
{end}
"""
    python = [sys.executable, "-c", code]
    done, plain = run.together([[*LAUNCH, "--profile", "-c", code], python], COLUMNS="200")
    assert done.returncode == status
    before, _, table = done.stderr.partition("fastst_patch: 1 of 2 loads took the fast path")
    assert before == plain.stderr
    lines = [line.split() for line in table.splitlines()]
    cells = {tuple(line[:6]) for line in lines}
    assert ("model.safetensors", "safe_open", "cpu", "mmap", "1", "1") in cells
    assert ("model.safetensors", "safe_open", "cpu", "stock", "1", "0") in cells
    assert "once: safe_open by stock: backend 'pread' is not accelerated" in table
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
        assert done.stderr == f"{NOTHING}\n"
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
    assert done.stderr == f"{NOTHING}\n"


def _report(file: str, resident: float | None = None) -> LoadReport:
    return LoadReport(file=file, call="load_file", device="cpu", path="buffered", bytes=10**9,
                      tensors=3, seconds=0.5, resident=resident)  # fmt: skip


def test_records_survive_what_happens_to_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records"
    child_hook._append(str(path), _report("a"))
    assert not path.exists()  # whoever would have printed it is gone
    path.write_bytes(b"")
    child_hook._append(str(path), _report("bad\udcff", resident=0.5))
    with path.open("ab") as file:
        file.write(b'\n{"pid": 3, "cut"')
        file.write(b'\n{"pid": 3, "file": "of another version"}\n7')
    child_hook._append(str(path), _report("b"))
    record = json.loads(path.read_bytes().splitlines()[1])
    assert (record["pid"], record["file"]) == (os.getpid(), "bad\udcff")
    child_hook.print_table(str(path))
    assert "total, 2 files" in capfd.readouterr().err
    assert not path.exists()
    child_hook.print_table(str(path))
    assert capfd.readouterr().err == ""
