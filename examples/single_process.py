"""Load a model's files in one process, tensor by tensor, with the explicit loader.

    python examples/single_process.py DEVICE FILE [FILE ...]

The imports are all that differs from a program written for fastsafetensors.
"""

from __future__ import annotations

import sys

import torch

from fastst_patch import (
    FastSafetensorsFile,
    ParallelLoader,
    SafeTensorsFileLoader,
    SingleGroup,
    fastsafe_open,
)


def by_name(files: list[str], device: str) -> dict[str, torch.Tensor]:
    """Name the files, then take tensors in any order; reading runs ahead meanwhile."""
    loader = SafeTensorsFileLoader(SingleGroup(), device)
    loader.add_filenames({0: files})
    buffer = loader.copy_files_to_device()  # returns at once
    try:
        return {name: buffer.get_tensor(name) for name in loader.get_keys()}
    finally:
        buffer.close()  # tensors stay valid: they own their memory
        loader.close()


def in_half_precision(files: list[str], device: str) -> dict[str, torch.Tensor]:
    """The same by the context manager; bytes move as they are and are cast on the device."""
    with fastsafe_open(files, device=device) as opened:
        return {name: opened.fb.get_tensor(name, dtype="F16") for name in opened.get_keys()}


def streamed(files: list[str], device: str) -> int:
    """Walk a checkpoint of any size in bounded memory: each tensor is let go of after its use."""
    loader = ParallelLoader(
        None, files, device=device, device_memory_budget=256 << 20, accumulate_resident=False
    )
    return sum(tensor.nbytes for _, tensor in loader.iterate_weights())


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    device, *files = sys.argv[1:]
    with FastSafetensorsFile(files[0]) as file:  # headers only, until a tensor is asked for
        for info in list(file.get_tensors().values())[:3]:
            print(f"{info.name}: {info.dtype} {list(info.shape)}, {info.nbytes} bytes")
    whole = by_name(files, device)
    halves = in_half_precision(files, device)
    print(f"{len(whole)} tensors, {sum(t.nbytes for t in whole.values())} bytes on {device}")
    print(f"as float16: {sum(t.nbytes for t in halves.values())} bytes")
    print(f"streamed: {streamed(files, device)} bytes")


if __name__ == "__main__":
    main()
