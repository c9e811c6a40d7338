"""The UNet of Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator

from fastst_patch.bench.checkpoint import TensorSpec

_WIDTHS = (320, 640, 1280)
_DEPTHS = (0, 2, 10)  # transformer blocks in each attention of a level
_TIME = 1280
_TEXT = 2048


def sdxl_unet() -> Iterator[TensorSpec]:
    """stabilityai/stable-diffusion-xl-base-1.0, unet/diffusion_pytorch_model.fp16.safetensors."""
    yield from _both("conv_in", 320, 4, 3, 3)
    yield from _both("time_embedding.linear_1", _TIME, 320)
    yield from _both("time_embedding.linear_2", _TIME, _TIME)
    yield from _both("add_embedding.linear_1", _TIME, 2816)
    yield from _both("add_embedding.linear_2", _TIME, _TIME)
    skips = [_WIDTHS[0]]
    arrives = _WIDTHS[0]
    for level, (width, depth) in enumerate(zip(_WIDTHS, _DEPTHS, strict=True)):
        at = f"down_blocks.{level}"
        for number in range(2):
            yield from _attention(f"{at}.attentions.{number}", width, depth)
            yield from _resnet(f"{at}.resnets.{number}", arrives, width)
            arrives = width
            skips.append(width)
        if level < 2:
            yield from _both(f"{at}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    yield from _attention("mid_block.attentions.0", _WIDTHS[-1], _DEPTHS[-1])
    for number in range(2):
        yield from _resnet(f"mid_block.resnets.{number}", _WIDTHS[-1], _WIDTHS[-1])
    levels = zip(reversed(_WIDTHS), reversed(_DEPTHS), strict=True)
    for level, (width, depth) in enumerate(levels):
        at = f"up_blocks.{level}"
        for number in range(3):
            yield from _attention(f"{at}.attentions.{number}", width, depth)
            yield from _resnet(f"{at}.resnets.{number}", arrives + skips.pop(), width)
            arrives = width
        if level < 2:
            yield from _both(f"{at}.upsamplers.0.conv", width, width, 3, 3)
    yield from _both("conv_norm_out", 320)
    yield from _both("conv_out", 4, 320, 3, 3)


def _weight(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", shape, "F16")


def _both(name: str, *shape: int) -> Iterator[TensorSpec]:
    yield _weight(name, *shape)
    yield TensorSpec(f"{name}.bias", shape[:1], "F16")


def _resnet(at: str, arrives: int, width: int) -> Iterator[TensorSpec]:
    yield from _both(f"{at}.norm1", arrives)
    yield from _both(f"{at}.conv1", width, arrives, 3, 3)
    yield from _both(f"{at}.time_emb_proj", width, _TIME)
    yield from _both(f"{at}.norm2", width)
    yield from _both(f"{at}.conv2", width, width, 3, 3)
    if arrives != width:
        yield from _both(f"{at}.conv_shortcut", width, arrives, 1, 1)


def _attention(at: str, width: int, depth: int) -> Iterator[TensorSpec]:
    if not depth:
        return
    yield from _both(f"{at}.norm", width)
    yield from _both(f"{at}.proj_in", width, width)
    for number in range(depth):
        yield from _block(f"{at}.transformer_blocks.{number}", width)
    yield from _both(f"{at}.proj_out", width, width)


def _block(at: str, width: int) -> Iterator[TensorSpec]:
    for kind, source in (("attn1", width), ("attn2", _TEXT)):
        yield from _both(f"{at}.norm{kind[-1]}", width)
        yield _weight(f"{at}.{kind}.to_q", width, width)
        yield _weight(f"{at}.{kind}.to_k", width, source)
        yield _weight(f"{at}.{kind}.to_v", width, source)
        yield from _both(f"{at}.{kind}.to_out.0", width, width)
    yield from _both(f"{at}.norm3", width)
    yield from _both(f"{at}.ff.net.0.proj", 8 * width, width)
    yield from _both(f"{at}.ff.net.2", width, 4 * width)
