"""Load the weights of a remote model without downloading it first.

    python examples/remote_model.py URL [CACHE]

URL names a folder in a bucket (s3://, gs://, az://), on the Hub (hf://org/repo) or on a web
server. With CACHE, a folder, the weights are kept there, and the next run loads them from the disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

import fastst_patch


def first_rows(file: Path) -> None:
    """Take some rows of the first tensor: their bytes alone are fetched."""
    with safe_open(file, "pt") as handle:
        name = min(handle.keys())
        rows = handle.get_slice(name)[:2]
        print(f"{name}: {rows.nbytes} bytes of {tuple(rows.shape)} taken")


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    url, cache = sys.argv[1], (sys.argv[2] if len(sys.argv) == 3 else None)
    folder = fastst_patch.remote(url, cache=cache)  # give it to any library's from_pretrained
    print(f"{Path(folder).name}: {sorted(one.name for one in Path(folder).iterdir())}")
    files = sorted(Path(folder).rglob("*.safetensors"))
    with fastst_patch.patched(), fastst_patch.profile() as profile:
        first_rows(files[0])
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    print(f"{len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values())} bytes")
    print("by", ", ".join(dict.fromkeys(report.path for report in profile.reports)))


if __name__ == "__main__":
    main()
