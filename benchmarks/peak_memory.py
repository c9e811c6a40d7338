"""Memory of a cold load plus reading every byte: stock, patched, patched with O_DIRECT.

    python benchmarks/peak_memory.py [PATH ...] [--rounds 3] [--json FILE]

GB that the load added to a process that had imported torch. Without PATH a synthetic checkpoint is
used. File-mapped memory can be dropped by the kernel and is shared between processes; anonymous
memory cannot and is not.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import _scenario as scenario

from fastst_patch.bench import checkpoint_files, hardware, harness, synthetic_checkpoint
from fastst_patch.bench.job import Sample

CONTENDERS: dict[str, dict[str, object]] = {  # options for patch()
    "stock": {},
    "patched": {},
    "patched, io=direct": {"io": "direct"},
}
COLUMNS = {  # key in Sample.memory: heading
    "peak_rss": "peak RSS",
    "rss": "RSS",
    "pss": "PSS",
    "pss_anonymous": "anonymous",
    "pss_file": "file-mapped",
}


def main() -> int:
    parser = scenario.arguments(__doc__, "--dir", rounds=3)
    parser.add_argument("paths", nargs="*", metavar="PATH")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        given = args.paths or [str(stack.enter_context(synthetic_checkpoint(args.dir)))]
        files = checkpoint_files.expand(given)
        environment = hardware.environment(Path(files[0].path))
        paths = [file.path for file in files]

        def run(name: str) -> Sample:
            return scenario.in_cache("cold", paths, lambda gate: scenario.load(
                name, files, options=CONTENDERS[name], gate=gate))  # fmt: skip

        runs = harness.race([*CONTENDERS], args.rounds, run, lambda one: one.digests)
    total = sum(file.tensor_bytes for file in files)
    columns = [
        scenario.Column(heading, lambda one, key=key: one.memory[key] - one.memory_before[key],
                        1e-9, 2)
        for key, heading in COLUMNS.items()
    ]  # fmt: skip
    table = scenario.Table(columns, text={"path": lambda samples: samples[0].path})
    table.add(runs)
    title = f"{total / 1e9:.2f} GB of tensors; GB added by loading and reading them"
    return scenario.report(args, title, table, environment=environment, bytes=total)


if __name__ == "__main__":
    scenario.script("peak_memory", main)
