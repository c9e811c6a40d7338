"""Loading by several processes: each takes its part, and together they read every byte once.

`load_sharded` is the whole of it for most; the explicit loader's classes stand on
`ShardedFiles`. Plans come from callers, from transformers' ``tp_plan`` and from DTensor
placements (`plans`).
"""

from __future__ import annotations

from .groups import Group, SingleGroup
from .load import load_sharded
from .plans import plan_from_placements, plan_from_tp_plan
from .sharded_files import ShardedFiles
from .spec import SKIP, Owner, Packed, Plan, Rule

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
