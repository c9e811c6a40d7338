"""What the plug-in adds to the start of a process of vLLM that does not use it.

    python benchmarks/vllm_start.py [--rounds 9] [--json FILE]

A fresh interpreter imports ``LLM``, builds the parser of ``vllm serve``, parses arguments, which
loads the plug-ins, and imports the model loaders. With the plug-in installed and not enabled,
against ``VLLM_PLUGINS=`` without it. Until the plug-ins are loaded nothing of this package runs, so
the difference is taken behind the import of vLLM, whose seconds are shown beside.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import _scenario as scenario

from fastst_patch.bench import hardware, harness, stats
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.process import run_json

WITHOUT, WITH = "left out", "installed"
VARIABLES = {WITHOUT: {"VLLM_PLUGINS": ""}, WITH: {}}

# It imports nothing of this package by itself, as a process of vLLM's does not.
START = """
import json, os, sys, time
message = json.loads(sys.stdin.readline())
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM logs to stdout
os.environ.pop("VLLM_PLUGINS", None)
os.environ.update(message["variables"], HF_HUB_OFFLINE="1")
laps = [(time.perf_counter(), time.process_time())]

def lap():
    laps.append((time.perf_counter(), time.process_time()))

from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
lap()
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "."]))
lap()
import vllm.model_executor.model_loader
lap()
found = [[b - a for a, b in zip(*two)] for two in zip(laps, laps[1:])]
ours = "fastst_plugins" in sys.modules
print(json.dumps({"laps": found, "ours": ours}), file=answers, flush=True)
os._exit(0)
"""


def behind_the_import(one: Any) -> float:
    return sum(seconds for seconds, _ in one.laps[1:])


def cpu_behind_the_import(one: Any) -> float:
    return sum(used for _, used in one.laps[1:])


def run(name: str) -> Any:
    answer = run_json(["-c", START], {"variables": VARIABLES[name]}, f"vLLM, plug-in {name}")
    return SimpleNamespace(**answer)


def main() -> int:
    args = scenario.arguments(__doc__, rounds=9).parse_args()
    if not scenario.installed("vllm"):
        raise UsageError("vLLM's CPU build is needed: the extra `engines`")
    runs = harness.race(tuple(VARIABLES), args.rounds, run)
    for name, some in runs.items():
        if {one.ours for one in some} != {name == WITH}:
            raise UsageError(f"plug-in {name}: is this package installed, with its entry point?")
    table = scenario.Table([
        scenario.Column("import s", lambda one: one.laps[0][0]),
        scenario.Column("arguments s", lambda one: one.laps[1][0]),
        scenario.Column("loaders s", lambda one: one.laps[2][0]),
        scenario.Column("CPU s", cpu_behind_the_import),
    ])  # fmt: skip
    table.add(runs)
    more = {}
    for what, of in (("time", behind_the_import), ("CPU time", cpu_behind_the_import)):
        pairs = zip(runs[WITH], runs[WITHOUT], strict=True)
        found = stats.summarize([1e3 * (of(one) - of(other)) for one, other in pairs])
        more[what] = vars(found)
        print(f"{what} that the plug-in adds: {found.median:.1f} ± {found.spread or 0:.1f} ms")
    return scenario.report(args, "A process of vLLM starts", table, more_ms=more,
                           environment=hardware.environment("."))  # fmt: skip


if __name__ == "__main__":
    scenario.script("vllm_start", main)
