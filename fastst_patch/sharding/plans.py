"""Plans made from transformers' ``tp_plan`` or from DTensor placements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .spec import Owner, Packed, ShardSpec, chunk

if TYPE_CHECKING:
    import torch

__all__ = ["plan_from_placements", "plan_from_tp_plan"]

# Style names of transformers 5.0 to 5.24, grouped by how they shard a parameter.
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
) -> Callable[[str, Sequence[int], torch.dtype], ShardSpec]:
    """A plan from transformers' ``tp_plan``, for the tensors of a checkpoint.

    Args:
        tp_plan: pattern -> style, as in ``model._tp_plan`` or ``config.base_model_tp_plan``. A
            pattern is the name of a module or parameter, with ``*`` for numbers; it may lack the
            prefix of a checkpoint's names (``model.``). None: every tensor is whole. Where the
            model merges experts (``experts.gate_up_proj``) that the checkpoint has as separate
            tensors (``experts.3.gate_proj.weight``), each of these is sharded as the merged
            parameter would be.
        names: of the checkpoint's tensors. Where a style gives whole experts to ranks, separate
            experts (``experts.3.up_proj.weight``) go to the ranks that would hold them merged.

    Returns:
        A plan for `load_sharded`; tensors that match no pattern are whole.

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


# Parameters into which transformers 5 merges a checkpoint's experts, by the name in it.
_MERGED = {
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
}  # fmt: skip
_RENAMED = (".block_sparse_moe.", ".mlp.")
_APART = {"packed_colwise": "colwise", "local_packed_colwise": "colwise"}

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class _TensorParallel:
    """The plan that `plan_from_tp_plan` makes. It depends on the group's size: see `sized`."""

    def __init__(self, styles: dict[str, str], experts: dict[str, int]) -> None:
        self._styles = styles
        self._experts = experts
        self._size = 1

    def sized(self, size: int) -> _TensorParallel:
        """The same plan for a group of ``size`` ranks."""
        other = _TensorParallel(self._styles, self._experts)
        other._size = size
        return other

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> ShardSpec:
        generic = _NUMBER.sub("*", name)
        module, _, parameter = generic.rpartition(".")
        style = self._style(generic) or self._style(module)
        if style is None:
            style = self._merged_style(name)
        if style is not None:
            return _spec(style, parameter, len(shape))
        return self._expert(name)

    def _style(self, generic: str) -> str | None:
        while generic:
            if generic in self._styles:
                return self._styles[generic]
            _, _, generic = generic.partition(".")
        return None

    def _merged_style(self, name: str) -> str | None:
        """Style of an expert's tensor, from the parameter that the model merges it into."""
        found = _EXPERT.match(name)
        target = "" if found is None else _MERGED.get(name[found.end() :].partition(".")[0], "")
        if found is None or not target:
            return None
        merged = f"{_NUMBER.sub('*', found[1])}.{target}"
        style = self._style(merged) or self._style(merged.replace(*_RENAMED))
        if style is None or style in _EXPERTS:  # `_expert` gives these to ranks whole
            return None
        return _APART.get(style, style)

    def _expert(self, name: str) -> ShardSpec:
        found = _EXPERT.match(name)
        if not found:
            return None
        module = _NUMBER.sub("*", found[1])
        for pattern, style in self._styles.items():
            named = pattern if pattern.endswith(".experts") else pattern.rpartition(".")[0]
            if style in _EXPERTS and (module == named or module.endswith("." + named)):
                number, count = int(found[2]), self._experts[found[1]]
                each = max(chunk(count, 0, self._size)[1], 1)
                return Owner(number // each)
        return None


def _spec(style: str, parameter: str, ndim: int) -> ShardSpec:
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
) -> Callable[[str, Sequence[int], torch.dtype], ShardSpec]:
    """A plan from DTensor placements on a mesh: this rank's local tensors.

    Args:
        mesh: a DeviceMesh of one or more dimensions, of which this rank is a member.
        placements: name -> placements, one for each dimension of the mesh, or a single one;
            names left out are whole.

    Returns:
        A plan for `load_sharded`. A strided shard on a mesh of one dimension is `Packed`.

    Raises:
        ValueError: a placement is neither a shard nor a replica, such as ``Partial``.
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
                raise ValueError(f"tensor {name!r}: {placement} is neither a shard nor a replica")

    return _Placements(mesh, given)


class _Placements:
    """The plan that `plan_from_placements` makes.

    Attributes:
        names: of the placed tensors; each must be in the files.
    """

    def __init__(self, mesh: Any, placements: dict[str, tuple[Any, ...]]) -> None:
        self._mesh = mesh
        self._placements = placements
        self.names = tuple(placements)

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> ShardSpec:
        found = self._placements.get(name)
        return None if found is None else _placed(self._mesh, found, name, shape)


def _placed(mesh: Any, placements: tuple[Any, ...], name: str, shape: Sequence[int]) -> ShardSpec:
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
    # DTensor also counts from the front first: the function takes 0 and -1 for two dimensions.
    counted = [p if p.is_replicate() else Shard(p.dim % len(shape)) for p in placements]
    local, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, counted)
    return tuple(slice(at, at + n) for at, n in zip(offset, local, strict=True))
