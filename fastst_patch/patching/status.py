"""What ``patch()`` and ``patch_map()`` tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .targets import LATER

__all__ = ["PatchReport", "TargetStatus"]


@dataclasses.dataclass(frozen=True)
class TargetStatus:
    """The state of a target.

    Attributes:
        name: dotted name.
        patched: whether calls reach the fast version now.
        reason: why they do not; None when they do.
        aliases: other names in imported modules that were rebound, as ``module.name``.
        summary: what the fast version does.
        wraps: whose function stands beneath the fast version, or would, in the place of
            safetensors' own; as ``module.name``. None: safetensors' own.
        wrapped_by: whose function stands over the fast version; None: nobody's.
        lost: what is lost of other code's work while the target is patched; None: nothing.
    """

    name: str
    patched: bool
    reason: str | None
    aliases: tuple[str, ...]
    summary: str
    wraps: str | None = None
    wrapped_by: str | None = None
    lost: str | None = None

    @property
    def later(self) -> bool:
        """Whether it is patched as soon as its module is imported."""
        return self.reason is not None and self.reason.endswith(LATER)


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """The result of one ``patch()``.

    Attributes:
        targets: status of every known target afterwards, by name.
        reason: why nothing could be patched at all, or None.
    """

    targets: Mapping[str, TargetStatus]
    reason: str | None = None

    def __str__(self) -> str:
        """One line per target."""
        if self.reason is not None:
            return f"fastst_patch: nothing patched: {self.reason}"
        lines = ["fastst_patch:"]
        for status in self.targets.values():
            state = "patched" if status.patched else f"not patched ({status.reason})"
            if status.later:
                state = f"when it is imported ({str(status.reason).partition(' ')[0]})"
            count = len(status.aliases)
            aliases = f", and under {count} other name{'s'[: count > 1]}" if count else ""
            over = f", over {status.wraps}" if status.wraps else ""
            under = f", under {status.wrapped_by}" if status.wrapped_by else ""
            lines.append(f"  {status.name}: {state}{aliases}{over}{under}")
        return "\n".join(lines)
