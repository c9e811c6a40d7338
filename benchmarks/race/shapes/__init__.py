"""True names, shapes and dtypes of published checkpoints, in the order they were saved in."""

from __future__ import annotations

from .image import sdxl_unet
from .text import (
    gpt2_medium,
    llama_3_8b,
    llama_3_8b_fp8,
    llama_3_8b_lora,
    qwen2_5_7b,
    qwen3_30b_a3b,
)

__all__ = [
    "gpt2_medium",
    "llama_3_8b",
    "llama_3_8b_fp8",
    "llama_3_8b_lora",
    "qwen2_5_7b",
    "qwen3_30b_a3b",
    "sdxl_unet",
]
