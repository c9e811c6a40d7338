#!/usr/bin/env python
"""safetensors' own tests with and without the patch: each must end in the same way.

    python .ci/stock_suite.py [--tests FOLDER] [--only FILE,…] [-- ARGUMENTS OF PYTEST]

For an environment that has fastst-patch, pytest and the frameworks of the extras test-jax,
test-tensorflow and test-paddle; tests of a framework that is missing are skipped in both runs. The
tests come from the source distribution of the installed safetensors unless a folder is named
(``bindings/python/tests`` of its repository). Fails, too, if the patched run left every load to
stock.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

LEFT_OUT = ("test_pt_model.py",)
"""Tests of saving, of which some take minutes."""

PLUGIN = """
import json, os
import fastst_patch
from fastst_patch.dropin import eligibility
eligibility.SMALL_FOR_ARRAYS = 0  # their files are tiny
fastst_patch.patch(small_file_bytes=0)
_profile = fastst_patch.profile()
_seen = _profile.__enter__()

def pytest_sessionfinish():
    paths = {}
    for report in _seen.reports:
        paths[report.path] = paths.get(report.path, 0) + 1
    with open(os.environ["FASTST_SUITE_PATHS"], "w") as file:
        json.dump(paths, file)
"""


# pip asks a source distribution's builder for metadata before it keeps it. The real builder would
# ask Rust's registry, which need not be reachable.
BUILDER = """
import os

def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "safetensors-{version}.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: safetensors\\nVersion: {version}\\n")
    return name
"""


def downloaded(folder: Path) -> Path:
    """The tests of the installed version's source distribution."""
    version = importlib.metadata.version("safetensors")
    (folder / "maturin.py").write_text(BUILDER.format(version=version), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-build-isolation", "--no-binary", "safetensors", f"safetensors=={version}"]
    environment = dict(os.environ, PYTHONPATH=str(folder))
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (found,) = folder.glob("*/bindings/python/tests")
    return found


def outcomes(file: Path, work: Path, name: str, arguments: list[str]) -> dict[str, str]:
    """How each test of a file ended, in a process of its own: some frameworks cannot share one."""
    report = work / f"{name}.{file.stem}.xml"
    (work / "fastst_suite_plugin.py").write_text(PLUGIN, encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(work), FASTST_SUITE_PATHS=str(work / "paths"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [
        "--noconftest",
        "-o",
        "addopts=",
        f"--junitxml={report}",
        f"--rootdir={file.parent}",
    ]
    command += ["-p", "fastst_suite_plugin"] if name == "patched" else []
    done = subprocess.run(
        [*command, *arguments, str(file)],
        cwd=file.parent.parent, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if not report.exists():
        return {file.stem: f"pytest ended with {done.returncode}: {done.stderr[-300:]}"}
    found = {}
    for case in ET.parse(report).iter("testcase"):
        ended = next((child for child in case if child.tag != "properties"), None)
        text = "passed" if ended is None else f"{ended.tag}: {ended.get('message', '')[:300]}"
        found[f"{case.get('classname')}.{case.get('name')}"] = text
    return found


def main() -> int:
    """Run both, and compare."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--tests", type=Path, help="folder of safetensors' tests")
    made.add_argument("--only", default="", help="names of files, such as test_flax_comparison")
    made.add_argument("arguments", nargs="*", help="more arguments of pytest")
    args = made.parse_args()
    different, fast, started = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tests = args.tests.resolve() if args.tests else downloaded(work)
        chosen = [name for name in args.only.split(",") if name]
        for file in sorted(tests.glob("test_*.py")):
            if file.name in LEFT_OUT or (chosen and file.stem not in chosen):
                continue
            (work / "paths").write_text("{}", encoding="utf-8")
            stock, patched = (
                outcomes(file, work, name, args.arguments) for name in ("stock", "patched")
            )
            paths = json.loads((work / "paths").read_text(encoding="utf-8"))
            passed = sum(text == "passed" for text in stock.values())
            seconds = time.monotonic() - started
            print(
                f"{file.stem}: {passed} of {len(stock)} pass; {paths}; {seconds:.0f} s", flush=True
            )
            fast += sum(count for path, count in paths.items() if path != "stock")
            for name in sorted(stock.keys() | patched):
                if stock.get(name) != patched.get(name):
                    different += 1
                    print(f"  {name}\n    stock:   {stock.get(name)}")
                    print(f"    patched: {patched.get(name)}")
    if not fast:
        print("no load took the fast path")
    return 1 if different or not fast else 0


if __name__ == "__main__":
    sys.exit(main())
