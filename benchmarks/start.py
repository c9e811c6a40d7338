"""What `import fastst_patch; fastst_patch.patch()` adds to the start of a program.

    python benchmarks/start.py [--rounds 15] [--json FILE]

In a fresh interpreter that has imported nothing, and in one that has imported safetensors.torch,
and torch with it, as most programs have. The bytecode is there, as pip leaves it, and the garbage
of what was imported before is collected. What is imported only by the first load shows in that
load: of three small tensors, beside the same load of stock in a process of its own.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _scenario as scenario
import numpy as np
from safetensors.numpy import save_file

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.process import run_json

BEFORE = {"nothing": "", "safetensors.torch": "import safetensors.torch"}
LOADERS = {"nothing": "numpy", "safetensors.torch": "torch"}
STOCK = " (stock)"

START = """
import gc, importlib, json, os, sys, time
message = json.loads(sys.stdin.readline())
exec(message["before"])
gc.collect()
begin = imported = end = time.perf_counter()
used = time.process_time()
if message["patched"]:
    import fastst_patch
    imported = time.perf_counter()
    fastst_patch.patch()
    end = time.perf_counter()
used = time.process_time() - used
loading = time.perf_counter()
tensors = importlib.import_module(message["module"]).load_file(message["file"])
loaded = time.perf_counter()
assert len(tensors) == 3
if message["patched"]:
    assert fastst_patch.stats()["paths"].keys() <= {"mmap", "stock"}  # arrays so small are stock's
    assert fastst_patch.stats()["paths"]
found = {"import_s": imported - begin, "patch_s": end - imported, "both_s": end - begin,
         "cpu_s": used, "load_s": loaded - loading}
print(json.dumps(found), flush=True)
os._exit(0)
"""


def run(name: str, file: Path) -> Any:
    plain = name.removesuffix(STOCK)
    message = {
        "before": BEFORE[plain],
        "module": f"safetensors.{LOADERS[plain]}",
        "patched": name == plain,
        "file": str(file),
    }
    return SimpleNamespace(**run_json(["-c", START], message, f"after importing {name}"))


def main() -> int:
    args = scenario.arguments(__doc__, rounds=15).parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names = [name + stock for name in BEFORE for stock in ("", STOCK)]
    table = scenario.Table([
        scenario.Column(f"{what} ms", scenario.answer(of), 1e3, 1)
        for what, of in (("import", "import_s"), ("patch()", "patch_s"), ("both", "both_s"),
                         ("CPU", "cpu_s"), ("first load", "load_s"))
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "small.safetensors")
        save_file({name: np.arange(8, dtype=np.float32) for name in "abc"}, file)
        for name in BEFORE:
            run(name, file)  # compiles what is not compiled yet
        table.add(harness.race(names, args.rounds, lambda name: run(name, file)))
    return scenario.report(args, "After importing", table, environment=hardware.environment("."))


if __name__ == "__main__":
    scenario.script("start", main)
