"""Plans made of what models already say: transformers' ``tp_plan``, DTensor placements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .spec import Owner, Packed, Rule, chunk

if TYPE_CHECKING:
    import torch

__all__ = ["plan_from_placements", "plan_from_tp_plan"]

# What transformers 5.0 to 5.24 calls its styles, by what they do to a parameter.
_COLUMNS = ("colwise", "colwise_rep", "colwise_gather_output", "local_colwise")
_ROWS = ("rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise")
_PACKED_COLUMNS = ("packed_colwise", "local_packed_colwise")
_PACKED_ROWS = ("packed_rowwise", "local_packed_rowwise")
_EXPERTS = ("grouped_gemm", "ep_dispatch_experts")
_FIRST, _SECOND = ("embedding_rowwise",), ("embedding_colwise",)
_WHOLE = (
    "all_reduce", "ep_router", "gather", "isolated", "local", "local_params",
    "mla_kv_a_proj", "moe_identity_expert", "moe_tp_experts", "replicate", "replicated",
    "replicated_with_grad_allreduce", "sequence_parallel",
)  # fmt: skip
_STYLES = (
    *_COLUMNS, *_ROWS, *_PACKED_COLUMNS, *_PACKED_ROWS, *_EXPERTS, *_FIRST, *_SECOND, *_WHOLE,
)  # fmt: skip


def plan_from_tp_plan(
    tp_plan: Mapping[str, str] | None, names: Iterable[str]
) -> Callable[[str, Sequence[int], torch.dtype], Rule]:
    """A plan from transformers' ``tp_plan``, for the tensors of a checkpoint.

    Args:
        tp_plan: pattern -> style, as ``model._tp_plan`` or ``config.base_model_tp_plan`` has it:
            a module's or parameter's name, with ``*`` for numbers; what stands before it in a
            checkpoint's names (``model.``) may be missing. None: all is whole. Of experts that
            are merged in the model (``experts.gate_up_proj``) and apart in the checkpoint
            (``experts.3.gate_proj.weight``) each is cut as the merged one would be.
        names: of the checkpoint's tensors. Experts that are tensors of their own
            (``experts.3.up_proj.weight``) are dealt to the ranks in runs, as merged ones are cut.

    Returns:
        A plan for `load_sharded`; what no pattern names is whole.

    Raises:
        ValueError: a style is unknown.
    """
    styles = dict(tp_plan or {})
    for pattern, style in styles.items():
        if style not in _STYLES:
            raise ValueError(
                f"tp_plan: {pattern!r} has the style {style!r}; known are {', '.join(_STYLES)}"
            )
    experts: dict[str, int] = {}  # module -> how many it holds
    for name in names:
        found = _EXPERT.match(name)
        if found:
            count = max(experts.get(found[1], 0), int(found[2]) + 1)
            experts[found[1]] = count
    return _TensorParallel(styles, experts)


# Where transformers 5 merges a checkpoint's experts: names of theirs, and of what they become.
_MERGED = {
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
}  # fmt: skip
_RENAMED = (".block_sparse_moe.", ".mlp.")
_APART = {"packed_colwise": "colwise", "local_packed_colwise": "colwise"}

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class _TensorParallel:
    """The plan that `plan_from_tp_plan` makes. Needs to be told the group's size: see `sized`."""

    def __init__(self, styles: dict[str, str], experts: dict[str, int]) -> None:
        self._styles = styles
        self._experts = experts
        self._size = 1

    def sized(self, size: int) -> _TensorParallel:
        """The same plan in a group of so many ranks."""
        other = _TensorParallel(self._styles, self._experts)
        other._size = size
        return other

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Rule:
        generic = _NUMBER.sub("*", name)
        module, _, parameter = generic.rpartition(".")
        style = self._style(generic) or self._style(module)
        if style is None:
            style = self._merged_style(name)
        if style is not None:
            return _rule(style, parameter, len(shape))
        return self._expert(name)

    def _style(self, generic: str) -> str | None:
        while generic:
            if generic in self._styles:
                return self._styles[generic]
            _, _, generic = generic.partition(".")
        return None

    def _merged_style(self, name: str) -> str | None:
        """The style of what an expert's tensor becomes a part of, for that part."""
        found = _EXPERT.match(name)
        part = "" if found is None else _MERGED.get(name[found.end() :].partition(".")[0], "")
        if found is None or not part:
            return None
        merged = f"{_NUMBER.sub('*', found[1])}.{part}"
        style = self._style(merged) or self._style(merged.replace(*_RENAMED))
        if style is None or style in _EXPERTS:  # these are dealt out whole
            return None
        return _APART.get(style, style)

    def _expert(self, name: str) -> Rule:
        found = _EXPERT.match(name)
        if not found:
            return None
        module = _NUMBER.sub("*", found[1])
        for pattern, style in self._styles.items():
            of = pattern if pattern.endswith(".experts") else pattern.rpartition(".")[0]
            if style in _EXPERTS and (module == of or module.endswith("." + of)):
                number, count = int(found[2]), self._experts[found[1]]
                each = max(chunk(count, 0, self._size)[1], 1)
                return Owner(number // each)
        return None


def _rule(style: str, parameter: str, ndim: int) -> Rule:
    if ndim == 0 or style in _WHOLE or (style in _ROWS + _PACKED_ROWS and parameter == "bias"):
        return None
    if style in _COLUMNS:
        return max(ndim - 2, 0)
    if style in _PACKED_COLUMNS:
        return Packed(ndim - 2) if ndim > 1 else 0
    if style in _ROWS:
        return ndim - 1
    if style in _PACKED_ROWS:
        return Packed(ndim - 1)
    return min(1, ndim - 1) if style in _SECOND else 0


def plan_from_placements(
    mesh: Any, placements: Mapping[str, Sequence[Any]]
) -> Callable[[str, Sequence[int], torch.dtype], Rule]:
    """A plan from DTensor placements on a mesh: this rank's local tensors.

    Args:
        mesh: a DeviceMesh of one or more dimensions, of which this rank is a member.
        placements: name -> placements, one for each dimension of the mesh, or a single one;
            names left out are whole.

    Returns:
        A plan for `load_sharded`. A strided shard on a mesh of one dimension is `Packed`.

    Raises:
        ValueError: a placement that is no part of a tensor, such as ``Partial``.
    """
    given = {
        name: tuple(each) if isinstance(each, (tuple, list)) else (each,)
        for name, each in placements.items()
    }
    for name, each in given.items():
        if len(each) != mesh.ndim:
            raise ValueError(
                f"tensor {name!r}: {len(each)} placements for a mesh of {mesh.ndim} dimensions"
            )
        for placement in each:
            if not (placement.is_replicate() or hasattr(placement, "dim")):
                raise ValueError(f"tensor {name!r}: {placement} is no part of a tensor")

    return _Placements(mesh, given)


class _Placements:
    """The plan that `plan_from_placements` makes.

    Attributes:
        names: of the tensors that it places; each must be in the files.
    """

    def __init__(self, mesh: Any, placements: dict[str, tuple[Any, ...]]) -> None:
        self._mesh = mesh
        self._placements = placements
        self.names = tuple(placements)

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Rule:
        found = self._placements.get(name)
        return None if found is None else _placed(self._mesh, found, name, shape)


def _placed(mesh: Any, placements: tuple[Any, ...], name: str, shape: Sequence[int]) -> Rule:
    import torch
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in placements:
        dim = 0 if placement.is_replicate() else placement.dim
        if not -len(shape) <= dim < max(len(shape), 1):
            raise ValueError(
                f"tensor {name!r} of shape {list(shape)} has no dimension for {placement}"
            )
    strided = [p for p in placements if not p.is_replicate() and not p.is_shard()]
    if strided:
        if len(placements) > 1:
            raise ValueError(
                f"tensor {name!r}: strided shards are loaded on meshes of one dimension only"
            )
        return Packed(strided[0].dim, strided[0].split_factor)
    if not shape:
        return None
    # As DTensor does first: what follows takes dimensions 0 and -1 of a vector for two.
    counted = [p if p.is_replicate() else Shard(p.dim % len(shape)) for p in placements]
    local, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, counted)
    return tuple(slice(at, at + n) for at, n in zip(offset, local, strict=True))
