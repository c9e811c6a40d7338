"""Everyone in the race, one small file per family.

`LOADERS` lists all of them, also those that cannot run here: `missing` says why. Nothing heavy is
imported before `warm_imports`. All rivals live in one environment (`pip install '.[bench]'`), but
for those that need another safetensors, which `prepare` puts into folders of their own.
"""

from __future__ import annotations

from . import cattensors, fastsafe, fastst, instant, runai, stock, streaming, torchpt
from .base import Loader
from .environments import folder, prepare

LOADERS: tuple[Loader, ...] = (
    *stock.LOADERS,
    *fastst.LOADERS,
    *torchpt.LOADERS,
    *fastsafe.LOADERS,
    *runai.LOADERS,
    *streaming.LOADERS,
    *instant.LOADERS,
    *cattensors.LOADERS,
)

__all__ = ["LOADERS", "Loader", "folder", "prepare"]
