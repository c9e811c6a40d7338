"""`fastst-patch bench URL`: streaming against downloading first and loading then.

Three contenders take turns in fresh processes::

    streamed                load_file(url), patched
    downloaded, then stock  the bytes into files, by the same transport, then stock's load_file
    bytes alone             the same transport into memory that exists: what the network gives

Each ends when every byte of every tensor is there. The tensors of the first two are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import config_context, current
from ..errors import FaststError, OptionError
from ..report_table import grid
from ..sources import base, standin
from ..sources.listing import list_model, place_of
from ..sources.names import public_url
from ..terminal import say, width, wrapped
from . import harness
from .failures import BenchError, UsageError
from .process import run_json
from .stats import SPREAD, Summary, paired_ratio, summarize

__all__ = ["main", "names_remote", "with_urls"]

STREAMED, DOWNLOADED, BYTES = "streamed", "downloaded, then stock", "bytes alone"
_CHILD = ("-m", "fastst_patch.bench.remote_child")
_SUFFIX = ".safetensors"
_LEAST_ROUNDS = 3  # for a verdict, as of local files


def with_urls(paths: Sequence[str]) -> list[str]:
    """Paths and URLs; in place of a stand-in, or of a folder of them, what they stand for.

    Raises:
        BenchError: a stand-in cannot be read.
    """
    found: list[str] = []
    for path in paths:
        files = sorted(map(str, Path(path).glob(f"*{_SUFFIX}"))) if os.path.isdir(path) else [path]
        try:
            urls = [_stands_for(file) for file in files]
        except OSError as error:
            raise BenchError(str(error)) from None
        found += (
            [url or file for url, file in zip(urls, files, strict=True)] if any(urls) else [path]
        )
    return found


def _stands_for(path: str) -> str | None:
    """The URL for a stand-in; None of anything else."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        found = standin.find(file.fileno())
    return None if found is None else found.full_url


def names_remote(paths: Sequence[str]) -> bool:
    """Whether URLs are given.

    Raises:
        UsageError: paths and URLs are given together.
    """
    remote = [base.looks_remote(path) and not os.path.exists(path) for path in paths]
    if any(remote) and not all(remote):
        raise UsageError("give paths or URLs, not both: they are compared with different things")
    return any(remote)


def main(args: argparse.Namespace, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Measure, and return the text for people and the numbers for JSON.

    Args:
        args: of the command line.
        options: for patch(); ``storage_options`` among them serve all contenders.

    Raises:
        BenchError: it cannot be measured, or the tensors differ.
    """
    if args.plot:
        raise UsageError("--plot draws loads of local files; for URLs there is --json")
    try:
        with config_context(**options):
            urls, nbytes = _files(args.paths, current().storage_options)
    except OptionError as error:
        raise UsageError(str(error)) from None
    except (FaststError, OSError, ImportError) as error:
        raise BenchError(str(error)) from None
    names = [STREAMED, DOWNLOADED, *([BYTES] if args.ceilings else [])]
    with tempfile.TemporaryDirectory(prefix="fastst-bench-", dir=args.dir) as folder:
        if shutil.disk_usage(folder).free < nbytes + (1 << 30):
            raise UsageError(
                f"{folder}: its disk has no room to download {nbytes / 1e9:.1f} GB: name another"
                " folder by --dir"
            )
        say(f"{len(urls)} files, {nbytes / 1e9:.2f} GB; no round begins that would end after"
            f" {args.max_seconds:g} s (--max-seconds)", sys.stderr)  # fmt: skip

        def run(loader: str) -> dict[str, Any]:
            message = {
                "loader": loader, "urls": urls, "device": args.device, "options": dict(options),
                "folder": folder,
            }  # fmt: skip
            return run_json(_CHILD, message, loader)

        found = harness.race(names, args.repeat, run, None, args.max_seconds)
    if found[STREAMED][0]["digests"] != found[DOWNLOADED][0]["digests"]:
        raise BenchError(
            "streaming gave other tensors than downloading and stock. Unless the files were"
            " changed meanwhile, this is a bug: please report it"
        )
    shown = [public_url(path) for path in args.paths]
    return _text(shown, nbytes, found), _json(shown, nbytes, found)


def _files(paths: Sequence[str], options: Mapping[str, object] | None) -> tuple[list[str], int]:
    """URLs of safetensors files, and the bytes of all of them."""
    urls: list[str] = []
    for path in paths:
        if public_url(path).endswith(_SUFFIX):
            urls.append(path)
            continue
        below = [one.url for one in list_model(path, options) if one.name.endswith(_SUFFIX)]
        if not below:
            raise base.RemoteNotFoundError(*place_of(path), "no safetensors file is in this folder")
        urls += below
    nbytes = 0
    for url in urls:
        source = base.open_source(url, options, head_bytes=1)
        nbytes += source.size
        source.close()
    return urls, nbytes


# ---- results ------------------------------------------------------------


def _seconds(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [answer["seconds"] for answer in answers]


def _ratio(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Summary:
    return paired_ratio(_seconds(found[STREAMED]), _seconds(found[DOWNLOADED]))


def _text(
    shown: Sequence[str], nbytes: int, found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    rounds = len(found[STREAMED])
    ratio = _ratio(found)
    verdict = (
        f"Too few rounds for a verdict: {rounds}, and it takes {_LEAST_ROUNDS} (--repeat)."
        if rounds < _LEAST_ROUNDS
        else f"Streamed in {ratio.median:.2f} of the time that downloading and loading takes."
    )
    cells = [("loader", "s", "GB/s", "of downloading", "requests", "path")]
    for name, answers in found.items():
        taken = summarize(_seconds(answers))
        of = paired_ratio(_seconds(answers), _seconds(found[DOWNLOADED]))
        cells.append((
            name, _with_spread(taken), f"{nbytes / taken.median / 1e9:.2f}", _with_spread(of),
            str(answers[-1]["requests"]), answers[-1]["path"],
        ))  # fmt: skip
    notes = [
        f"{rounds} rounds in fresh processes, medians and {SPREAD}; GB = 1e9 bytes; every byte of"
        " every tensor was there when the clock stopped, and was compared.",
        f"{BYTES}: the same transport into memory, without tensors.",
    ]
    return "\n".join([
        *wrapped([verdict, "", *shown, f"{nbytes / 1e9:.2f} GB"], width()), "",
        *grid(cells, {"loader", "path"}), "", *wrapped(notes, width()),
    ])  # fmt: skip


def _with_spread(value: Summary) -> str:
    text = f"{value.median:.3f}"
    return text if value.spread is None else f"{text} ±{value.spread:.3f}"


def _json(
    shown: Sequence[str], nbytes: int, found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    return {
        "urls": list(shown),
        "bytes": nbytes,
        "results": [
            {
                "loader": name,
                "seconds": _seconds(answers),
                "median_s": summarize(_seconds(answers)).median,
                "requests": answers[-1]["requests"],
                "path": answers[-1]["path"],
            }
            for name, answers in found.items()
        ],
        "streamed_of_downloaded": _ratio(found).median,
    }
