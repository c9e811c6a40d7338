"""A model whose weights are loaded as vLLM's are: each rank narrows what it is given, and copies.

Parameters are real tensors of the CPU. What is told of their device is another matter: the fake
driver's devices have the CPU's tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, MIDDLE, HEAD, KV, VOCAB, EXPERTS = 512, 768, 64, 2, 301, 3
LAYERS = 5
Q = 8 * HEAD


def tensors(layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A Llama in bfloat16, whose odd layers have fused experts."""
    generator = torch.Generator().manual_seed(9)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    found = {"model.embed_tokens.weight": made(VOCAB, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        found |= {
            f"{layer}.input_layernorm.weight": made(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": made(Q, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": made(KV * HEAD, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": made(KV * HEAD, HIDDEN),
            f"{layer}.self_attn.q_proj.bias": made(Q),
            f"{layer}.self_attn.o_proj.weight": made(HIDDEN, Q),
            f"{layer}.self_attn.scale": torch.tensor(float(n)),
        }
        if n % 2:
            found[f"{layer}.mlp.experts.gate_up_proj"] = made(EXPERTS, HIDDEN, 2 * MIDDLE)
            found[f"{layer}.mlp.experts.down_proj"] = made(EXPERTS, HIDDEN, MIDDLE)
        else:
            found[f"{layer}.mlp.gate_proj.weight"] = made(MIDDLE, HIDDEN)
            found[f"{layer}.mlp.up_proj.weight"] = made(MIDDLE, HIDDEN)
            found[f"{layer}.mlp.down_proj.weight"] = made(HIDDEN, MIDDLE)
    found["model.norm.weight"] = made(HIDDEN)
    found["lm_head.weight"] = made(VOCAB, HIDDEN)
    return found


def write(folder: Path, layers: int = LAYERS) -> None:
    """A checkpoint of two files."""
    folder.mkdir(exist_ok=True)
    found = tensors(layers)
    names = list(found)
    half = len(names) // 2
    for number, some in enumerate((names[:half], names[half:])):
        save_file({name: found[name] for name in some}, folder / f"m-{number}.safetensors")


class Parallel:
    """One rank's model.

    Args:
        rank: of tensor parallelism.
        size: of tensor parallelism.
        device: what is told of the parameters' device.
        stage: the layers of this pipeline stage.
        dtype: of the parameters.
    """

    def __init__(
        self, rank: int, size: int, device: str = "cpu", stage: range = range(LAYERS),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.stage = rank, size, stage
        self._device = torch.device(device)
        self.kv = max(KV // size, 1)
        rows = -(-(-(-VOCAB // 64) * 64) // size)
        shapes = {"model.embed_tokens.weight": (rows, HIDDEN), "lm_head.weight": (rows, HIDDEN)}
        shapes["model.norm.weight"] = (HIDDEN,)
        q, middle = Q // size, MIDDLE // size
        for n in stage:
            layer = f"model.layers.{n}"
            shapes |= {
                f"{layer}.input_layernorm.weight": (HIDDEN,),
                f"{layer}.self_attn.qkv_proj.weight": (q + 2 * self.kv * HEAD, HIDDEN),
                f"{layer}.self_attn.qkv_proj.bias": (q,),
                f"{layer}.self_attn.o_proj.weight": (HIDDEN, q),
                f"{layer}.self_attn.scale": (),
            }
            if n % 2:
                shapes[f"{layer}.mlp.experts.w13"] = (EXPERTS, 2 * middle, HIDDEN)
                shapes[f"{layer}.mlp.experts.w2"] = (EXPERTS, HIDDEN, middle)
            else:
                shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * middle, HIDDEN)
                shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, middle)
        self.params = {
            name: torch.nn.Parameter(torch.full(shape, 7.0).to(dtype), requires_grad=False)
            for name, shape in shapes.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(param.nbytes for param in self.params.values())

    def parameters(self) -> Iterator[Any]:
        for param in self.params.values():
            yield SimpleNamespace(device=self._device, numel=param.numel)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.params.items())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy what this rank takes."""
        for name, loaded in weights:
            if name.startswith("model.layers.") and int(name.split(".")[2]) not in self.stage:
                continue
            self._load(name, loaded)

    def _load(self, name: str, loaded: torch.Tensor) -> None:
        prefix, _, last = name.rpartition(".")
        place, _, kind = prefix.rpartition(".")
        if kind in ("embed_tokens", "lm_head") or name == "lm_head.weight":
            self._vocabulary(self.params[name], loaded)
        elif kind in ("q_proj", "k_proj", "v_proj"):
            self._qkv(self.params[f"{place}.qkv_proj.{last}"], loaded, kind[0])
        elif kind in ("gate_proj", "up_proj"):
            self._gate_up(self.params[f"{place}.gate_up_proj.weight"], loaded, kind)
        elif kind in ("o_proj", "down_proj"):
            self._part(self.params[name], loaded, 1)
        elif kind == "experts":
            self._experts(prefix, last, loaded)
        else:
            self._default(self.params[name], loaded)

    def _default(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        if param.numel() == 1 and loaded.numel() == 1:
            param.data.fill_(loaded.item())
        else:
            assert param.size() == loaded.size()
            param.data.copy_(loaded)

    def _part(self, param: torch.Tensor, loaded: torch.Tensor, dim: int) -> None:
        length = param.shape[dim]
        loaded = loaded.narrow(dim, self.rank * length, length)
        assert param.shape == loaded.shape
        param.data.copy_(loaded)

    def _vocabulary(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        assert loaded.shape[0] == VOCAB
        start = min(self.rank * len(param), VOCAB)
        loaded = loaded.narrow(0, start, min(len(param), VOCAB - start))
        param[: loaded.shape[0]].data.copy_(loaded)
        param[loaded.shape[0] :].data.fill_(0)

    def _qkv(self, param: torch.Tensor, loaded: torch.Tensor, which: str) -> None:
        q, kv = Q // self.size, self.kv * HEAD
        length = q if which == "q" else kv
        turn = self.rank if which == "q" else self.rank * KV // max(self.size, KV)
        into = param.data.narrow(0, {"q": 0, "k": q, "v": q + kv}[which], length)
        into.copy_(loaded.narrow(0, turn * length, length))

    def _gate_up(self, param: torch.Tensor, loaded: torch.Tensor, kind: str) -> None:
        half = len(param) // 2
        into = param.data.narrow(0, 0 if kind == "gate_proj" else half, half)
        into.copy_(loaded.narrow(0, self.rank * half, half))

    def _experts(self, prefix: str, last: str, loaded: torch.Tensor) -> None:
        if last == "down_proj":
            into = self.params[f"{prefix}.w2"]
            for expert in range(EXPERTS):
                length = into.shape[2]
                into.data[expert].copy_(loaded[expert].narrow(1, self.rank * length, length))
            return
        into = self.params[f"{prefix}.w13"]
        half = into.shape[1] // 2
        for n, one in enumerate(loaded.transpose(-1, -2).chunk(2, dim=1)):
            for expert in range(EXPERTS):
                wanted = one[expert].narrow(0, self.rank * half, half)
                into.data[expert, n * half : (n + 1) * half] = wanted
