"""Loading by several processes: each takes its shards, and together they read every byte once.

Most programs need `load_sharded` alone. The explicit loader uses `ShardedFiles`. Plans come from
callers, from transformers' ``tp_plan`` or from DTensor placements (`plans`).

    load -> sharded_files -> opening, mapped, exchange -> requests, schedule -> source, spec
                             shared_buffer, groups -> channel
"""

from __future__ import annotations

from .groups import Group, SingleGroup
from .load import load_sharded
from .plans import plan_from_placements, plan_from_tp_plan
from .sharded_files import ShardedFiles
from .spec import SKIP, Owner, Packed, Plan, ShardSpec

__all__ = [
    "SKIP",
    "Group",
    "Owner",
    "Packed",
    "Plan",
    "ShardSpec",
    "ShardedFiles",
    "SingleGroup",
    "load_sharded",
    "plan_from_placements",
    "plan_from_tp_plan",
]
