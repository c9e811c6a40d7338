"""What `import fastst_patch; fastst_patch.patch()` adds to the start of a program.

    python benchmarks/start.py [--rounds 15] [--json FILE]

In a fresh interpreter that has imported nothing, and in one that has imported safetensors.torch,
and torch with it, as most programs have. The bytecode is there, as pip leaves it.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness
from fastst_patch.bench.process import run_json

BEFORE = {"nothing": "", "safetensors.torch": "import safetensors.torch"}

START = """
import json, os, sys, time
message = json.loads(sys.stdin.readline())
exec(message["before"])
begin, used = time.perf_counter(), time.process_time()
import fastst_patch
imported = time.perf_counter()
fastst_patch.patch()
end = time.perf_counter()
assert fastst_patch.is_patched() and fastst_patch.engine.native_error() is None
found = {"import_s": imported - begin, "patch_s": end - imported, "both_s": end - begin,
         "cpu_s": time.process_time() - used}
print(json.dumps(found), flush=True)
os._exit(0)
"""


def run(name: str) -> Any:
    message = {"before": BEFORE[name]}
    return SimpleNamespace(**run_json(["-c", START], message, f"after importing {name}"))


def main() -> int:
    args = scenario.arguments(__doc__, rounds=15).parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name in BEFORE:
        run(name)  # compiles what is not compiled yet
    table = scenario.Table([
        scenario.Column(f"{what} ms", scenario.answer(of), 1e3, 1)
        for what, of in (("import", "import_s"), ("patch()", "patch_s"),
                         ("both", "both_s"), ("CPU", "cpu_s"))
    ])  # fmt: skip
    table.add(harness.race(tuple(BEFORE), args.rounds, run))
    return scenario.report(args, "After importing", table, environment=hardware.environment("."))


if __name__ == "__main__":
    scenario.script("start", main)
