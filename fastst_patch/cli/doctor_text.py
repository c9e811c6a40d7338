"""The verdict of ``doctor``, and the text that it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..terminal import wrapped

__all__ = ["Verdict", "diagnose", "render"]

_LIBRARIES = {
    "libcuda.so.1": "CUDA driver",
    "libcufile.so.0": "GPU Direct Storage",
    "libamdhip64.so": "ROCm",
}
_LATER = "is not imported yet; it is patched when it is"


@dataclass
class Verdict:
    """The judgement of `doctor.examine`'s result.

    Attributes:
        text: one sentence.
        problems: reasons why the fast path cannot be taken, or a named path not be loaded.
        remarks: things that work, but less well than they could or than the user may think.
    """

    text: str = ""
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def diagnose(found: Mapping[str, Any]) -> Verdict:
    """Judge the result of `doctor.examine`."""
    verdict = Verdict()
    problems = verdict.problems
    _diagnose_missing(found["missing"], verdict)
    if str(found["gpu_reason"]).startswith("torch cannot tell") and "torch" not in found["missing"]:
        problems.append(f"torch: {found['gpu_reason']}")
    if found["native"]["reason"] is not None:
        problems.append(f"native engine: NOT LOADED, stock is used: {found['native']['reason']}")
    if "error" in found["options"]:
        problems.append(f"options: {found['options']['error']}; patch() would raise OptionError")
    patching = found.get("patch")
    if patching is not None and not patching["possible"]:
        problems.append(f"patch() would do nothing: {patching['reason']}")
    broken_here = bool(problems)
    for entry in found["paths"]:
        _diagnose_path(entry, verdict)
    for name, near in found["unknown_variables"].items():
        hint = f"; did you mean {near}?" if near else ""
        verdict.remarks.append(f"options: {name} has no effect: there is no such option{hint}")
    verdict.remarks += found.get("unreached", [])
    verdict.remarks += [one["lost"] for one in _targets(found) if one.get("lost")]
    for gpu in found["gpus"]:
        if not gpu["engine"].startswith("ready"):
            verdict.remarks.append(f"GPU {gpu['name']}: {gpu['engine']}")
    if broken_here:
        verdict.text = "The fast path cannot be taken here."
    elif problems:
        verdict.text = "The fast path works here, but not every path that was named can be loaded."
    elif verdict.remarks:
        verdict.text = "The fast path works here; see the remarks below."
    else:
        verdict.text = "The fast path works here."
    return verdict


def _diagnose_missing(missing: Mapping[str, str], verdict: Verdict) -> None:
    for package, why in missing.items():
        if (package, why) == ("torch", "not installed"):
            verdict.remarks.append("torch: not installed; other frameworks are loaded without it")
        else:
            verdict.problems.append(f"{package}: {why}")


def _diagnose_path(entry: Mapping[str, Any], verdict: Verdict) -> None:
    path = entry["path"]
    verdict.remarks += [
        f"{path}: {one}: {entry['remote'][one]}" for one in entry.get("remarks", ())
    ]
    if "error" in entry:
        text = f"{path}: {entry['error']}"
        named = entry["named"]
        (verdict.problems if named else verdict.remarks).append(text)
        return
    bad = entry.get("refused_by_stock", [])
    for name, reason in entry.get("left_to_stock", {}).items():
        if name not in bad:
            verdict.remarks.append(f"{path}: {name}: not accelerated, stock reads it: {reason}")
        elif entry["named"]:
            verdict.problems.append(f"{path}: {name}: cannot be loaded, by stock either: {reason}")
        else:
            verdict.remarks.append(f"{path}: {name}: cannot be loaded, by stock either: {reason}")


def render(
    found: Mapping[str, Any], marks: Mapping[str, str], columns: int, *, verbose: bool
) -> list[str]:
    """Lines to print: the verdict, its reasons, and with ``verbose`` everything."""
    verdict = diagnose(found)
    mark = marks["bad"] if verdict.problems else marks["warn"] if verdict.remarks else marks["ok"]
    lines = [f"{mark} {verdict.text}"]
    lines += [f"  {marks['bad']} {text}" for text in verdict.problems]
    lines += [f"  {marks['warn']} {text}" for text in verdict.remarks]
    lines += [f"  {marks['ok']} {text}" for text in _good(found)]
    lines += [f"  - {text}" for text in _absent(found)]
    if verbose:
        lines += ["", *_lines(found), *_path_lines(found), *_patch_lines(found)]
    else:
        lines.append("`fastst-patch doctor -v` shows everything, `--json` the same as JSON.")
    return list(wrapped(lines, columns))


def _good(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each part that works."""
    versions = found["versions"]
    packages = [f"safetensors {versions['safetensors']}"] if versions["safetensors"] else []
    yield ", ".join([*packages, f"fastst-patch {versions['fastst-patch'] or '(not installed)'}"])
    for name, one in found["frameworks"].items():
        yield f"{name} {one['version']}: {one['loads']}"
    if found["native"]["reason"] is None:
        yield f"native engine: loaded, {found['machine']['workers_per_load']} workers a load"
    ready = [gpu for gpu in found["gpus"] if gpu["engine"].startswith("ready")]
    for (name, memory), count in Counter((gpu["name"], gpu["memory"]) for gpu in ready).items():
        yield f"GPU: {f'{count} x ' if count > 1 else ''}{name}: {memory}"
    targets = _targets(found)
    if targets:
        yes = [one["name"] for one in targets if one["patched"] or _later(one)]
        yield "patch() would replace " + ", ".join(yes)
    for entry in found["paths"]:
        if "remote" in entry:
            good = {k: v for k, v in entry["remote"].items() if k not in entry["remarks"]}
            yield from (f"{entry['path']}: {name}: {text}" for name, text in good.items())
        elif "error" not in entry:
            yield f"{entry['path']}: {_held(entry)}{entry['file_system']}"


def _absent(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each part that is not there and need not be."""
    if not found["gpus"]:
        yield f"GPU: none ({found['gpu_reason']}); loads to the CPU need none"
    for one in _targets(found):
        if not one["patched"] and not _later(one):
            yield f"{one['name']}: {one['reason']}"
    for package, text in found.get("wrappers", {}).items():
        yield f"{package} {text}"


def _targets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    patching = found.get("patch")
    return patching["targets"] if patching is not None and patching["possible"] else []


def _later(status: Mapping[str, Any]) -> bool:
    return str(status["reason"]).endswith(_LATER)


# ---- everything ----


def _gib(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / (1 << 30):.1f} GiB"


def _lines(found: Mapping[str, Any]) -> list[str]:
    machine, native = found["machine"], found["native"]
    installed = [f"{name} {v}" for name, v in found["versions"].items() if v]
    lines = [f"python {found['python']}; " + ", ".join(installed)]
    if "tested" in found:
        ranges = [f"{name} {low} to {high}" for name, (low, high) in found["tested"].items()]
        lines.append("tested with " + ", ".join(ranges))
    if native["reason"] is None:
        lines.append(f"native engine: loaded from {native['loaded']}")
    lines.append(
        f"machine: {machine['machine']}, Linux {machine['kernel']}, {machine['cpus_usable']:g} CPUs"
        f" usable, {machine['workers_per_load']} workers a load,"
        f" {_gib(machine['memory_headroom_bytes'])} of memory to take,"
        f" huge pages: {machine['transparent_huge_pages']}"
    )
    for gpu in found["gpus"]:
        lines.append(f"GPU: {gpu['name']}, {_gib(gpu['memory_bytes'])}; engine: {gpu['engine']}")
    for name, reason in found["libraries"].items():
        lines.append(f"{_LIBRARIES[name]} ({name}): {_library(reason)}")
    if "error" not in found["options"]:
        lines.append("options: " + ", ".join(f"{k}={v}" for k, v in found["options"].items()))
    return lines


def _library(reason: str | None) -> str:
    if reason is None:
        return "found"
    absent = "No such file or directory" in reason
    return "not found (needed only for such a device)" if absent else f"cannot be used: {reason}"


def _path_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{entry['path']}: {_held(entry)}{entry['file_system']}, O_DIRECT {entry['o_direct']},"
        f" page cache seen through {entry['residency_probe']}"
        for entry in found["paths"]
        if "error" not in entry and "remote" not in entry
    ]


def _held(entry: Mapping[str, Any]) -> str:
    if "files" not in entry:
        return ""
    cached = entry["cached_bytes"] / max(entry["bytes"], 1)
    files = f"{entry['files']} files, " if entry["files"] > 1 else ""
    if entry["stand_ins"] == entry["files"]:
        return f"{files or '1 file, '}for remote ones: name the URL to see what is there; "
    if entry["stand_ins"]:
        files += f"{entry['stand_ins']} of them for remote ones, "
    return (
        f"{files}{entry['tensors']} tensors, {entry['bytes'] / 1e9:.3f} GB, {cached:.0%} cached; "
    )


def _patch_lines(found: Mapping[str, Any]) -> list[str]:
    patching = found.get("patch")
    if patching is None or not patching["possible"]:
        return ["patch() would do nothing, or raise: see above"]
    lines = ["patch() would replace:"]
    for status in patching["targets"]:
        state = "yes" if status["patched"] else f"no, {status['reason']}"
        lines.append(f"  {status['name']}: {state} ({status['summary']})")
        if status["aliases"]:
            lines.append(f"    and {', '.join(status['aliases'])}")
        if status.get("wraps"):
            lines.append(f"    over {status['wraps']}")
    lines.append("left to stock:")
    lines += [f"  {what}: {why}" for what, why in patching["left_to_stock"].items()]
    return lines
