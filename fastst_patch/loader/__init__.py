"""The explicit loader: many files, one process or a group of them, fastsafetensors' interface.

    auto -> parallel -> files_loader, mapping -> buffer, local_files -> prefetch, headers
         -> tensor_factory -> metadata -> arguments, compat_tensor, stock_file -> frameworks

`SafeTensorsFileLoader` (`files_loader`) takes names of files and reads their headers (`headers`).
Its ``copy_files_to_device`` returns a `FilesBufferOnDevice` (`buffer`). The buffer hands out
tensors of one process (`local_files`, which reads ahead by `prefetch`) or of a group
(`fastst_patch.sharding`). `arguments` checks what callers pass.
"""

from __future__ import annotations

from .buffer import FilesBufferOnDevice
from .compat_tensor import WrappedTensor
from .experts import expert_parallel_filter, owned_expert_range
from .files_loader import SafeTensorsFileLoader, fastsafe_open
from .mapping import FastSafetensorsFile, TensorInfo
from .metadata import DType, SafeTensorsMetadata, TensorFrame
from .tensor_factory import LazyTensorFactory

__all__ = [
    "DType",
    "FastSafetensorsFile",
    "FilesBufferOnDevice",
    "LazyTensorFactory",
    "SafeTensorsFileLoader",
    "SafeTensorsMetadata",
    "TensorFrame",
    "TensorInfo",
    "WrappedTensor",
    "expert_parallel_filter",
    "fastsafe_open",
    "owned_expert_range",
]
