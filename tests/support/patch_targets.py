"""What tests of patch() have in common."""

from __future__ import annotations

import sys
from typing import Any

TINY = {"small_file_bytes": 0}


def current_object(target: str) -> Any:
    """What a target's name leads to now."""
    module, _, name = target.rpartition(".")
    return getattr(sys.modules[module], name)
