"""SGLang's own plug-ins, loader and iterators, imported where no GPU is.

Runs where SGLang's wheel is in PYTHONPATH: ``pip download --no-deps --only-binary :all: sglang``,
unpacked. It also needs some of the wheel's requirements, but no GPU packages: see
tests/support/sglang_loading.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="needs SGLang's wheel in PYTHONPATH"
)

PROGRAM = """
import multiprocessing, sys

def reached(queue):
    from sglang_loading import stand_in
    stand_in()
    from sglang.srt.plugins import load_plugins
    before = "fastst_patch" in sys.modules
    load_plugins()
    found = [before, "fastst_patch" in sys.modules]
    import fastst_patch
    import sglang.srt.model_loader.loader
    queue.put([*found, fastst_patch.is_patched("sglang.load")])

def main():
    from sglang_loading import load, stand_in, tell
    stand_in()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.model_loader import loader, weight_utils

    found, asked = {"before": "fastst_patch" in sys.modules}, []
    name = "sglang.srt.model_loader.weight_utils.safetensors_weights_iterator"

    def around(original, *args, **kwargs):
        asked.append(name)
        return original(*args, **kwargs)

    HookRegistry.register(name, around, HookType.AROUND)  # as another plug-in would
    load_plugins()
    import fastst_patch
    found["patched"] = fastst_patch.patch_map()["sglang.load"].reason

    folder, shapes = sys.argv[1], {"norm": [3], "a.w": [64, 48], "b.w": [64, 48], "a.b": [5]}
    ways = {
        "default": {},
        "one thread": {"extra": {"enable_multithread_load": False}},
        "disable_mmap": {"weight_loader_disable_mmap": True},
        "prefetch": {"weight_loader_prefetch_checkpoints": True},
        "drop": {"weight_loader_drop_cache_after_load": True},
    }
    ours = {way: load(folder, shapes, **told) for way, told in ways.items()}
    fastst_patch.unpatch()
    theirs = {way: load(folder, shapes, **told) for way, told in ways.items()}
    for way in ways:
        same = all(bool((ours[way][0][n] == theirs[way][0][n]).all()) for n in shapes)
        found[way] = [same, ours[way][1], theirs[way][1]]
    found["asked"] = len(asked)
    spawn = multiprocessing.get_context("spawn")  # as SGLang starts its scheduler
    queue = spawn.Queue()
    process = spawn.Process(target=reached, args=(queue,))
    process.start()
    found["spawned"] = queue.get(timeout=300)
    process.join()
    tell(found)

if __name__ == "__main__":
    main()
"""

WAYS = {
    "default": "mmap",
    "one thread": "mmap",
    "disable_mmap": "buffered",
    "prefetch": "mmap",
    "drop": "direct",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sglang")
    torch.manual_seed(1)
    model = folder / "model"
    model.mkdir()
    save_file({"norm": torch.randn(3), "a.w": torch.randn(64, 48)}, model / "m-1.safetensors")
    save_file({"b.w": torch.randn(64, 48), "a.b": torch.randn(5)}, model / "m-2.safetensors")
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    script = folder / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTST_")}
    paths = [str(ROOT / "tests" / "support"), env.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "FASTST_ENABLED": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(model)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=900, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(told) == 1, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(told[0].removeprefix("FOUND "))
    return result


def test_its_plug_ins_patch(found) -> None:
    assert found["before"] is False
    assert found["patched"] is None
    assert found["spawned"] == [False, True, True]


def test_hooks_of_other_plug_ins_run(found) -> None:
    assert found["asked"] == 4  # by one thread and with prefetching, patched and not


@pytest.mark.parametrize("way", WAYS)
def test_parameters_equal_stocks(found, way) -> None:
    same, ours, theirs = found[way]
    assert same
    assert theirs == []
    ((call, path, tensors, reason),) = ours
    assert (call, tensors, reason) == ("sglang", 4, None)
    assert path.startswith(WAYS[way])
