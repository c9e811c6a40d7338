"""What `patch()` does before the packages that it patches are imported, and what it leaves late."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastst_patch
from fastst_patch import stock
from fastst_patch.integrations import Late

HEAVY = {
    *("asyncio", "importlib.metadata", "numpy", "safetensors", "torch", "wrapt"),
    *("fastst_patch.dropin.handle", "fastst_patch.files", "fastst_patch.stock"),
    *("fastst_patch.engine.jobs", "fastst_patch.integrations.torch_module"),
}


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_patch_imports_nothing_heavy(tmp_path) -> None:
    code = f"""
import sys, fastst_patch
report = fastst_patch.patch()
print(sorted({HEAVY!r} & set(sys.modules)))
print(all(status.later for status in report.targets.values()))
"""
    assert run(code, tmp_path).splitlines() == ["[]", "True"]


LOADS = """
import sys, fastst_patch
fastst_patch.patch()
{before}
with fastst_patch.profile() as profile:
    from safetensors import safe_open
    with safe_open({file!r}, "pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]
    import safetensors.torch
    tensors += safetensors.torch.load_file({file!r}).values()
print(len(tensors), sorted({{report.path for report in profile.reports}}))
print(safe_open is safetensors.safe_open, fastst_patch.is_patched("safetensors.torch.load_file"))
fastst_patch.unpatch()
print(safetensors.safe_open.__module__, type(safetensors.safe_open) is type)
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import importlib.util; importlib.util.find_spec('safetensors')",
        "import wrapt",
        "import torch; torch.nn.Linear(2, 3).to('cpu')",  # whose replacement imports ours
        "import fastst_patch.loader",
        "fastst_patch.safe_open",
        "assert fastst_patch.is_patched()",
        "fastst_patch.unpatch(); assert not fastst_patch.is_patched(); fastst_patch.patch()",
    ],
)
def test_names_are_replaced_when_safetensors_is_imported(before, model, tmp_path) -> None:
    out = run(LOADS.format(before=before, file=str(model)), tmp_path).splitlines()
    count = 2 * len(stock.load_file(model))
    assert out == [f"{count} ['mmap']", "True True", "builtins True"]


THREADS = """
import sys, threading
import fastst_patch
if {first!r}:
    fastst_patch.patch()
sys.setswitchinterval(1e-6)
barrier, failed = threading.Barrier(4), []
def one(work):
    barrier.wait()
    try:
        work()
    except BaseException as error:
        failed.append(error)
def imports():
    import safetensors
def patches():
    fastst_patch.patch()
def asks():
    fastst_patch.patch_map()
def takes():
    fastst_patch.safe_open
threads = [threading.Thread(target=one, args=(w,)) for w in (imports, patches, asks, takes)]
for thread in threads: thread.start()
for thread in threads: thread.join(60)
assert not any(thread.is_alive() for thread in threads), "they wait for each other"
assert not failed, failed
assert fastst_patch.is_patched("safetensors.safe_open"), fastst_patch.patch_map()
"""


@pytest.mark.parametrize("first", [False, True])
def test_threads_that_import_and_patch(first, tmp_path) -> None:
    for _ in range(12):
        run(THREADS.format(first=first), tmp_path)


def test_an_import_does_not_fail_of_wrapt(tmp_path) -> None:
    code = """
import sys, fastst_patch
fastst_patch.patch()
sys.modules["wrapt"] = None
import safetensors
print(fastst_patch.is_patched())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "False\n"


UNTESTED = """
import importlib.metadata, sys, warnings
importlib.metadata.version = lambda name: "0.0.7"
import fastst_patch
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    fastst_patch.{begin}
    print(len(told))
    import safetensors
    print(*(str(warning.message)[:59] for warning in told), sep="\\n")
"""


@pytest.mark.parametrize("begin", ["patch()", "patched().__enter__()"])
def test_versions_are_looked_at_when_packages_are_imported(begin, tmp_path) -> None:
    said = "fastst_patch was tested with safetensors 0.4.3 to 0.8.0, an"
    assert run(UNTESTED.format(begin=begin), tmp_path).splitlines() == ["0", said]


def test_an_import_does_not_fail_of_our_warning(tmp_path) -> None:
    code = """
import importlib.metadata, warnings
importlib.metadata.version = lambda name: "0.0.7"
import fastst_patch
fastst_patch.patch()
warnings.simplefilter("error", fastst_patch.UntestedVersionWarning)
import safetensors
print(fastst_patch.is_patched("safetensors.safe_open"))
"""
    assert run(code, tmp_path) == "True\n"


# ---- what else goes on in the import system ----

SLOW = """
import sys, threading, time
from importlib.machinery import SourceFileLoader
import fastst_patch
began, get_code = threading.Event(), SourceFileLoader.get_code
def slow(self, name):
    if name == {slow!r}:
        began.set()
        time.sleep(0.3)
    return get_code(self, name)
SourceFileLoader.get_code = slow
def other():
    import {slow}
"""

NO_DEADLOCK = """
fastst_patch.patch()
thread = threading.Thread(target=other, daemon=True)
thread.start()
assert began.wait(60)
done = threading.Timer(20, lambda: __import__("os")._exit(3))
done.daemon = True
done.start()
import safetensors
thread.join()
print(fastst_patch.is_patched("safetensors.safe_open"))
"""


def test_an_import_waits_for_no_other_thread_that_imports(tmp_path) -> None:
    # wrapt imports asyncio, which another thread is importing.
    assert run(SLOW.format(slow="asyncio") + NO_DEADLOCK, tmp_path) == "True\n"


FORKS = """
import os, signal
fastst_patch.patch()
def other():
    import safetensors
thread = threading.Thread(target=other)
thread.start()
assert began.wait(60)
signal.alarm(20)
child = os.fork()
if child == 0:
    signal.alarm(10)
    import asyncio
    os._exit(0)
thread.join()
print(os.waitpid(child, 0)[1], fastst_patch.is_patched("safetensors.safe_open"))
"""


@pytest.mark.parametrize("slow", ["wrapt", "fastst_patch.patching.proxy", "safetensors"])
def test_a_fork_while_a_thread_imports(slow, tmp_path) -> None:
    assert run(SLOW.format(slow=slow) + FORKS, tmp_path) == "0 True\n"


FORK_AND_LOAD = """
import os, signal, safetensors, numpy
fastst_patch.patch()
thread = threading.Thread(target=lambda: fastst_patch.safe_open)
thread.start()
assert began.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(10)
    with safetensors.safe_open({file!r}, "np") as opened:
        opened.get_tensor(list(opened.keys())[0])
    os._exit(0)
thread.join()
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_loads_while_its_parent_imported_ours(model, tmp_path) -> None:
    code = SLOW.format(slow="fastst_patch.dropin.handle") + FORK_AND_LOAD.format(file=str(model))
    assert run(code, tmp_path) == "0\n"


@pytest.mark.parametrize("first", ["", "import safetensors.torch"])
def test_modules_that_are_executed_again_are_patched(first, tmp_path) -> None:
    code = f"""
import importlib, sys, fastst_patch
{first}
fastst_patch.patch(["safetensors.safe_open", "safetensors.torch.load_file"])
import safetensors.torch
stock = fastst_patch.get_original("safetensors.safe_open")
def check():
    print(*(status.patched for status in fastst_patch.patch_map().values() if status.patched))
check()
importlib.reload(safetensors)
check()
importlib.reload(safetensors.torch)
check()
for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
    del sys.modules[name]
import safetensors.torch
check()
fastst_patch.unpatch()
print(safetensors.safe_open is stock, type(safetensors.torch.load_file).__name__)
"""
    assert run(code, tmp_path).splitlines() == ["True True"] * 4 + ["True function"]


FINDERS = """
import importlib.util, sys, fastst_patch
fastst_patch.patch()
class Wrapper:
    inner = list(sys.meta_path)
    def find_spec(self, name, path=None, target=None):
        found = (finder.find_spec(name, path, target) for finder in self.inner)
        return next(filter(None, found), None)
class Asks:
    busy = set()
    def find_spec(self, name, path=None, target=None):
        if name in self.busy:
            return None
        self.busy.add(name)
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
{change}
import safetensors
print(type(safetensors.__loader__).__name__, type(safetensors.__spec__.loader).__name__)
print(type(safetensors.safe_open).__name__)
"""


@pytest.mark.parametrize(
    "change",
    [
        "sys.meta_path[:] = [Wrapper()]",
        "sys.meta_path.insert(0, Wrapper())",
        "sys.meta_path.insert(0, Asks())",
        "sys.meta_path = list(sys.meta_path)",
        "sys.meta_path[:] = sys.meta_path[1:]; fastst_patch.patch()",
        "import wrapt; wrapt.register_post_import_hook(lambda module: None, 'safetensors')",
    ],
)
def test_other_finders(change, tmp_path) -> None:
    out = run(FINDERS.format(change=change), tmp_path).splitlines()
    assert out == ["SourceFileLoader SourceFileLoader", "Proxy"]


def test_what_forbids_the_import_is_no_error_of_ours(tmp_path) -> None:
    code = """
import sys, fastst_patch
fastst_patch.patch()
sys.modules["safetensors"] = None
print(fastst_patch.is_patched())
fastst_patch.unpatch()
del sys.modules["safetensors"]
fastst_patch.patch()
import safetensors
sys.modules["safetensors"] = None
print(fastst_patch.is_patched("safetensors.safe_open"))
fastst_patch.unpatch()
"""
    assert run(code, tmp_path) == "False\nFalse\n"


def test_the_first_call_may_be_compiled(tmp_path) -> None:
    code = """
import torch, fastst_patch
fastst_patch.patch()
model = torch.nn.Linear(2, 3)
@torch.compile(backend="eager", fullgraph=True)
def moved(x):
    return model.to("cpu")(x)
print(moved(torch.ones(1, 2)).shape)
"""
    assert run(code, tmp_path) == "torch.Size([1, 3])\n"


# ---- functions whose module cannot be imported ----


def _original(*args: Any) -> tuple[str, tuple[Any, ...]]:
    return "original", args


def test_the_original_does_calls_whose_module_is_gone(caplog) -> None:
    late = Late("dropin.gone", "load_file_over")
    with caplog.at_level(logging.WARNING, "fastst_patch"):
        assert late(_original, (1,), {}) == ("original", (1,))
    assert "fastst_patch.dropin.gone cannot be imported" in caplog.text
    with (
        fastst_patch.config_context(fallback="error"),
        pytest.raises(fastst_patch.FaststError, match=r"dropin\.gone cannot be imported"),
    ):
        late(_original, (1,), {})


def test_a_module_is_imported_once() -> None:
    late = Late("dropin.handle", "load_file_over")
    first = late.function
    assert late.imported() is late.function is not first


GONE = """
import sys, fastst_patch
fastst_patch.patch()
import safetensors.torch, torch
from fastst_patch import stock
sys.modules["fastst_patch.dropin.handle"] = None
model = torch.nn.Linear(2, 3)
print(safetensors.torch.load_file({file!r}).keys() == stock.load_file({file!r}).keys())
with safetensors.safe_open({file!r}, "pt") as opened:
    print(type(opened) is stock.safe_open)
safetensors.torch.save_model(model, {saved!r})
print(safetensors.torch.load_model(torch.nn.Linear(2, 3), {saved!r}))
"""


def test_stock_loads_where_ours_cannot_be_imported(model, tmp_path) -> None:
    code = GONE.format(file=str(model), saved=str(tmp_path / "saved.safetensors"))
    assert run(code, tmp_path).splitlines() == ["True", "True", "(set(), [])"]
