"""What ``doctor`` says of a URL: reachability, auth, ranges and latency, a line each."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ..config import Config, config
from ..errors import OptionError
from ..sources import base
from ..sources.base import RemoteNotFoundError, Source
from ..sources.listing import list_model, place_of
from ..sources.names import is_weak, public_url
from ..sources.standin import header_of

__all__ = ["examine_url"]

_REQUESTS = 5
_SUFFIX = ".safetensors"


def examine_url(url: str) -> dict[str, Any]:
    """Look at the file behind a URL, or at the first weights in the folder behind it.

    Reads its header, and a byte in each of five other places.

    Returns:
        ``"path"``: the URL without secrets; ``"remote"``: what was found, by name, as text;
        ``"remarks"``: names in it that are bad news; ``"error"``, where it cannot be loaded.
    """
    found: dict[str, Any] = {"path": public_url(url), "remote": {}, "remarks": []}
    try:
        source = _open(url, config(), found["remote"])
    except (OptionError, OSError, ImportError) as error:
        found["error"] = str(error)
        status = getattr(error, "status", None)
        if status is not None:
            found["remote"]["reachable"] = f"it answers, with status {status}"
    else:
        try:
            _examine(source, found)
        except Exception as error:  # stock's own class for what is no safetensors file, too
            found["error"] = str(error)
        finally:
            source.close()
    return found


def _open(url: str, options: Config, checks: dict[str, str]) -> Source:
    if not public_url(url).endswith(_SUFFIX):
        listed = list_model(url, options.storage_options)
        weights = [one for one in listed if one.name.endswith(_SUFFIX)]
        if not weights:
            raise RemoteNotFoundError(*place_of(url), "no safetensors file is in this folder")
        first = weights[0]
        checks["folder"] = f"{len(listed)} files, {len(weights)} of weights; first {first.name}"
        url = first.url
    begin = time.perf_counter()
    source = base.open_source(url, options.storage_options, head_bytes=1)
    seconds = time.perf_counter() - begin
    checks["reachable"] = f"the first byte came after {seconds * 1e3:.0f} ms"
    checks["auth"] = "granted"
    return source


def _examine(source: Source, found: dict[str, Any]) -> None:
    checks: dict[str, str] = found["remote"]
    checks["ranges"] = "served"
    if source.sequential:
        checks["ranges"] = "not served: every load is one stream from the first byte on"
        found["remarks"].append("ranges")
    checks["changes"] = "are noticed"
    if is_weak(source.identity):
        checks["changes"] = "are not noticed, and nothing is cached: there is no ETag and no date"
        found["remarks"].append("changes")
    if not source.sequential:
        checks["latency"] = f"{_latency(source) * 1e3:.1f} ms a request (median of {_REQUESTS})"
    tensors = [name for name in header_of(source) if name != "__metadata__"]
    checks["weights"] = f"{len(tensors)} tensors, {source.size / 1e9:.3f} GB"


def _latency(source: Source) -> float:
    """Seconds from a request for one byte to its arrival, over a connection that is open."""
    taken = []
    for i in range(_REQUESTS):
        begin = time.perf_counter()
        source.read(source.size - 1 - i % source.size, 1)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
