"""The names that Stable Diffusion's first files have, for the tiny models of `test_diffusers`.

One block of each layer count 1: enough for every rule by which diffusers renames.
"""

from __future__ import annotations

import re

import torch

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip

# Of a UNet with blocks (Down, CrossAttnDown), (CrossAttnUp, Up), and one layer in each.
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _renamed(name: str, names: dict[str, str]) -> tuple[str, str]:
    """The longest prefix in other words, and what follows it."""
    for old in sorted(names, key=len, reverse=True):
        if name.startswith(f"{old}."):
            return names[old], name[len(old) + 1 :]
    raise KeyError(name)


def _unet(name: str) -> str:
    new, rest = _renamed(name, _UNET)
    if "resnets" in name:
        new, rest = f"{new}.{_renamed(rest, _RESNET)[0]}", _renamed(rest, _RESNET)[1]
    return f"model.diffusion_model.{new}.{rest}"


def _vae(name: str, blocks: int) -> str:
    def up(found: re.Match[str]) -> str:
        return f"up.{blocks - 1 - int(found[1])}."

    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("resnets.", "block.")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for old, new in _ATTENTION.items():
        name = name.replace(f"attn_1.{old}.", f"attn_1.{new}.")
    return f"first_stage_model.{name}"


def original(
    unet: dict[str, torch.Tensor], vae: dict[str, torch.Tensor], text: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of three models, as one file of the original layout has them."""
    found = {_unet(name): tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        new = _vae(name, blocks=2)
        matrix = "attn_1" in new and tensor.dim() == 2  # convolutions of 1x1 there
        found[new] = tensor[..., None, None].contiguous() if matrix else tensor
    for name, tensor in text.items():
        prefix = "" if name.startswith("text_model.") else "text_model."
        found[f"cond_stage_model.transformer.{prefix}{name}"] = tensor
    return found
