"""The race's loaders: each ends with stock's tensors, and these outlive loader and files.

Each runs in a process of its own, as in the race: some set variables that are read at import, one
needs another safetensors. Most processes of the race are copies of one that has imported torch, and
so are these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from places import ROOT
from warm_python import WarmPython

import fastst_patch
from fastst_patch import engine
from fastst_patch.bench import hardware

if not (ROOT / "benchmarks" / "race").is_dir():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
if engine.native_error() is not None:
    pytest.skip("no native extension", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the checkout may hold no built module

loaders = importlib.import_module("benchmarks.race.loaders")
environments = importlib.import_module("benchmarks.race.loaders.environments")

LOADERS = {loader.name: loader for loader in loaders.LOADERS}

# Prints, for each list of files, what it loaded, after everything else of the loader is gone.
CHILD = """
import builtins, gc, hashlib, json, os, shutil, sys
root, name, device, job = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
sys.path.append(root)
from benchmarks.race import loaders
loader = next(one for one in loaders.LOADERS if one.name == name)
if loader.environment is not None:
    sys.path.insert(0, str(loaders.folder(loader.environment)))
imported, original = set(), builtins.__import__
def noted(name, globals=None, locals=None, fromlist=(), level=0):
    if not level:
        imported.add(name.partition(".")[0])
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = noted
loader.warm_imports(device)
builtins.__import__ = original
assert "torch" in imported  # else its import would be timed as loading
import torch

HEAVY = {"torch", "numpy", "safetensors", "fastst_patch", "fastsafetensors", "instanttensor",
         "runai_model_streamer", "safetensors_streaming", "cattensors"}

def describe(tensor):
    tensor = tensor.cpu()
    data = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]

def lasting(files, number):
    folder = f"copies-{number}"
    os.mkdir(folder)
    copies = [shutil.copy(file, folder) for file in files]
    loader.make(copies)
    firsts, before = [], set(sys.modules)
    tensors = loader.load(copies, device, lambda: firsts.append(1))
    assert firsts == [1], firsts
    late = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in HEAVY)
    assert not late, late
    assert {str(tensor.device) for tensor in tensors.values()} <= {device, device + ":0"}
    shutil.rmtree(folder)
    gc.collect()
    # What was freed is handed out again, and holds other bytes: a tensor over it would show.
    sizes = {tensor.nbytes for tensor in tensors.values()} | {sum(map(os.path.getsize, files))}
    again = [torch.full((size,), 0xA5, dtype=torch.uint8, device=device) for size in sizes]
    return {key: describe(tensor) for key, tensor in tensors.items()}

answer = {"loaded": [], "refused": [], "paths": []}
def run(files, number):
    if loader.family != "fastst":
        return lasting(files, number)
    import fastst_patch
    with fastst_patch.profile() as loads:
        found = lasting(files, number)
    answer["paths"] += [[load.path, load.fallback_reason] for load in loads.reports]
    return found

for number, files in enumerate(job["load"]):
    answer["loaded"].append(run(files, number))
for number, files in enumerate(job["refuse"], len(job["load"])):
    try:
        run(files, number)
        answer["refused"].append(None)
    except Exception as error:
        answer["refused"].append(repr(error))
import importlib.metadata
answer["version"] = importlib.metadata.version(loader.package)
print("ANSWER" + json.dumps(answer))
"""

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = dtype.itemsize * int(torch.tensor(shape).prod())
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def described(files: list[str]) -> dict[str, list[object]]:
    """What stock's load_file gives."""
    from safetensors.torch import load_file

    found = {}
    for file in files:
        for name, tensor in load_file(file).items():
            data = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            found[name] = [
                str(tensor.dtype),
                list(tensor.shape),
                hashlib.sha256(data).hexdigest(),
            ]
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Lists of files by what is in them: one per dtype, and a sharded checkpoint."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("race")
    found = {}
    for short, long in DTYPES.items():
        dtype = getattr(torch, long, None)
        path = folder / f"{short}.safetensors"
        if dtype is None:
            continue
        try:
            # As large as chunks and pages are not, and one without elements.
            save_file({"a": noise(dtype, 37, 129), "none": torch.empty(0, 3, dtype=dtype)}, path)
            described([str(path)])
        except (KeyError, ValueError, AttributeError, TypeError, fastst_patch_error()):
            continue  # this safetensors does not know the dtype
        found[short] = [str(path)]
    shards = []
    for shard in range(3):
        path = folder / f"model-{shard + 1:05}-of-00003.safetensors"
        tensors = {f"l.{shard}.{n}.w": noise(torch.bfloat16, 129, 517) for n in range(24)}
        tensors[f"l.{shard}.scale"] = noise(torch.float32, 1).reshape(())
        tensors[f"l.{shard}.odd"] = noise(torch.uint8, 3)
        save_file(tensors, path)
        shards.append(str(path))
    found["shards"] = shards
    return found


def fastst_patch_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def run(warm_python: WarmPython, name: str, device: str, tmp_path: Path, load, refuse=()):
    job = json.dumps({"load": list(load), "refuse": list(refuse)})
    environment = {key: value for key, value in os.environ.items() if "FASTST_" not in key}
    if environments.FOLDER_VARIABLE in os.environ:
        environment[environments.FOLDER_VARIABLE] = os.environ[environments.FOLDER_VARIABLE]
    arguments = (ROOT, name, device, job)
    done = warm_python.run(CHILD, *arguments, folder=tmp_path, environment=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert done.returncode == 0, done.stderr
    assert lines, done.stderr
    return json.loads(lines[0].removeprefix("ANSWER"))


def check(warm_python: WarmPython, name: str, device: str, tmp_path: Path, checkpoints):
    loader = LOADERS[name]
    reason = loader.missing(device)
    if reason is not None:
        pytest.skip(reason)
    known = {kind: files for kind, files in checkpoints.items() if kind not in loader.lacks}
    unknown = [checkpoints[kind] for kind in loader.lacks if kind in checkpoints]
    answer = run(warm_python, name, device, tmp_path, known.values(), unknown)
    for (kind, files), loaded in zip(known.items(), answer["loaded"], strict=True):
        assert loaded == described(files), kind
    for files, refusal in zip(unknown, answer["refused"], strict=True):
        assert refusal is not None, f"{name} says that it does not know {files}, but loads it"
    return answer


@pytest.mark.parametrize("name", LOADERS)
def test_to_the_cpu(name, tmp_path, checkpoints, warm_python):
    answer = check(warm_python, name, "cpu", tmp_path, checkpoints)
    loader = LOADERS[name]
    if loader.environment is not None:
        assert answer["version"] == loader.environment.partition("==")[2]
    if loader.family == "fastst":
        _assert_fast(name, answer["paths"], tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOADERS)
def test_to_cuda(name, tmp_path, checkpoints, warm_python):
    check(warm_python, name, "cuda", tmp_path, checkpoints)


def _assert_fast(name, paths, tmp_path):
    wanted = {"fastst-buffered": "buffered", "fastst-direct": "direct"}.get(name, "mmap")
    if wanted == "direct" and hardware.filesystem(tmp_path).in_memory:
        wanted = "buffered"
    assert paths
    assert {path.partition("+")[0] for path, _ in paths} == {wanted}, paths
    assert name != "fastst-mmap" or {path for path, _ in paths} == {"mmap"}


# ---- what can run -------------------------------------------------------


def test_names_are_unique_and_every_family_is_there():
    assert len(LOADERS) == len(loaders.LOADERS)
    assert {loader.family for loader in loaders.LOADERS} == {
        "stock", "fastst", "torch", "fastsafetensors", "runai", "safetensors-streaming",
        "instanttensor", "cattensors",
    }  # fmt: skip
    assert all(loader.note for loader in loaders.LOADERS)


def test_asking_who_is_missing_imports_nothing_heavy(tmp_path):
    code = """
import json, sys
sys.path.append(sys.argv[1])
from benchmarks.race import loaders
for loader in loaders.LOADERS:
    for device in ("cpu", "cuda", "cuda:1"):
        reason = loader.missing(device)
        assert reason is None or reason, loader.name
heavy = {"torch", "safetensors", "fastsafetensors", "runai_model_streamer", "instanttensor",
         "cattensors"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_missing_says_why(monkeypatch, tmp_path):
    assert "CUDA devices only" in LOADERS["instanttensor"].missing("cpu")
    assert "CUDA devices only" in LOADERS["stock-0.9-prefetch"].missing("cpu")
    assert "is stock" in LOADERS["fastst-mmap"].missing("cuda")
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path))
    assert "prepare()" in LOADERS["stock-0.9"].missing("cpu")
    assert "prepare()" in LOADERS["cattensors"].missing("cpu")

    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip install '.[bench]'" in LOADERS["runai"].missing("cpu")


def test_an_older_package_is_not_raced(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.4.9")
    assert "needs 0.5.0" in LOADERS["fastsafetensors"].missing("cpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.10.0.post1")
    assert LOADERS["fastsafetensors"].missing("cpu") is None


def test_a_dtype_that_a_loader_does_not_know_is_named():
    assert "F8_E4M3" in LOADERS["safetensors-streaming"].refuses(["BF16", "F8_E4M3"])
    assert LOADERS["safetensors-streaming"].refuses(["BF16"]) is None
    assert LOADERS["stock-mmap"].refuses(list(DTYPES)) is None


def test_stock_is_not_timed_while_it_is_patched():
    LOADERS["stock-mmap"].warm_imports("cpu")
    with fastst_patch.patched(), pytest.raises(RuntimeError, match="is replaced"):
        LOADERS["stock-mmap"].warm_imports("cpu")


def test_another_safetensors_than_the_one_named_is_noticed():
    other = dataclasses.replace(LOADERS["stock-0.9"], environment="safetensors==0.0.1")
    with pytest.raises(RuntimeError, match=r"was imported, not 0\.0\.1"):
        other.warm_imports("cpu")


def test_ours_is_not_timed_when_nothing_is_patched(monkeypatch):
    monkeypatch.setenv("FASTST_ENABLED", "0")  # patch() does nothing then
    try:
        with pytest.raises(RuntimeError, match="replaced nothing"):
            LOADERS["fastst"].warm_imports("cpu")
    finally:
        fastst_patch.unpatch()


def test_the_yardstick_reads_files_of_its_own(tmp_path, checkpoints):
    files = [shutil.copy(file, tmp_path) for file in checkpoints["shards"]]
    yardstick = LOADERS["torch-load"]
    saved = yardstick.reads(files)
    yardstick.make(files)
    before = [os.stat(file).st_mtime_ns for file in saved]
    yardstick.make(files)
    assert [os.stat(file).st_mtime_ns for file in saved] == before
    assert sorted(map(str, tmp_path.iterdir())) == sorted([*files, *saved])
    assert LOADERS["stock-mmap"].reads(files) == files


# ---- side environments --------------------------------------------------


def _wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        about = f"{name}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{about}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{about}/WHEEL", tags)
        wheel.writestr(f"{about}/RECORD", "")


def test_an_environment_is_filled_once(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "ENVIRONMENTS", ("sample==1.0",))
    monkeypatch.setattr(environments, "BESIDE", {"sample==1.0": ("other==2.0",)})
    monkeypatch.setenv(environments.FOLDER_VARIABLE, str(tmp_path / "side"))
    told: list[str] = []
    failed = loaders.prepare(tmp_path, told.append)
    assert "pip could not install sample==1.0" in failed["sample==1.0"]

    _wheel(tmp_path, "sample", "1.0")
    assert "pip could not install sample==1.0" in loaders.prepare(tmp_path)["sample==1.0"]
    _wheel(tmp_path, "other", "2.0")
    folder = loaders.prepare(tmp_path, told.append)["sample==1.0"]
    assert (folder / "sample.py").is_file()
    assert (folder / "other.py").is_file()
    assert folder == loaders.folder("sample==1.0")
    assert environments.missing("sample==1.0") is None

    assert loaders.prepare(tmp_path, told.append) == {"sample==1.0": folder}
    assert len(told) == 2, "it was there already"
