"""Loading by several processes: each takes its part, and together they read every byte once.

`load_sharded` is the whole of it for most; the explicit loader's classes stand on
`ShardedFiles`. Plans come from callers, from transformers' ``tp_plan`` and from DTensor
placements (`plans`).
"""

from __future__ import annotations

from .files import ShardedFiles
from .groups import Group, SingleGroup
from .load import load_sharded
from .plans import plan_from_placements, plan_from_tp_plan
from .rules import SKIP, Owner, Packed, Plan, Rule

__all__ = [
    "SKIP",
    "Group",
    "Owner",
    "Packed",
    "Plan",
    "Rule",
    "ShardedFiles",
    "SingleGroup",
    "load_sharded",
    "plan_from_placements",
    "plan_from_tp_plan",
]
