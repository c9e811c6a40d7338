"""Options: what they are, where they come from, which are in force.

Precedence: keyword of ``patch()``, ``patched()`` or ``config_context()`` > environment
(``FASTST_<NAME>``) > default. Options are process-wide, since loader threads do not inherit
context variables; layers may be pushed and popped by any thread in any order. This is the
only module that reads ``os.environ``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .errors import OptionError
from .locks import shared
from .option_values import (
    NO_LIMIT,
    boolean,
    bytes_or_default,
    choice,
    mapping,
    size,
    text_or_none,
)
from .terminal import nearest

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Config",
    "Options",
    "cache_home",
    "child_environment",
    "config",
    "config_context",
    "current",
    "environment_enabled",
    "environment_profile",
    "environment_targets",
    "hub_is_offline",
    "loader_config_path",
    "local_ranks",
    "misspelt_variables",
    "pop",
    "push",
    "undecided_environment",
    "unknown_variables",
    "with_options",
]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_IO = ("auto", "mmap", "buffered", "direct", "gds")
_PAGE_CACHE = ("auto", "keep", "drop")
_TENSORS = ("auto", "dlpack", "owned")
_FALLBACK = ("auto", "warn", "error")


@dataclasses.dataclass(frozen=True)
class Config:
    """The options in force when a file is opened. Sizes are in bytes.

    Attributes:
        io: how bytes are moved. ``auto`` maps the file and reads ahead in parallel; ``mmap``
            maps it and leaves reading to the kernel, as stock does; ``buffered`` reads through
            the page cache into memory of our own; ``direct`` does so with O_DIRECT. To a device,
            ``auto`` is ``buffered`` unless the file is too large to be cached, ``gds`` reads by
            cuFile (to the CPU it is ``auto``), and ``mmap`` is left to stock.
        page_cache: ``auto`` and ``keep`` leave the file cached; ``drop`` leaves it uncached,
            which makes ``io="auto"`` read with O_DIRECT. To a device whose memory is the host's,
            ``auto`` reads with O_DIRECT what is not cached.
        threads: most workers on one load, 1 to 64; 0 chooses by CPUs. With O_DIRECT
            to the CPU, 0 means twice as many, each with a quarter of ``chunk_bytes``.
        chunk_bytes: bytes one worker handles at a time, 64 KiB to 64 MiB; of a remote file twice
            as many.
        pinned_bytes: most host memory the process pins for copies to devices; None: 256 MiB.
            Memory is pinned as needed, and kept. With less than one chunk, nothing is pinned.
        device_memory_budget: most device memory, in bytes, of tensors that a handle reads ahead
            of their use, and the largest block that tensors share; None: 256 MiB. With 0 a
            handle reads nothing ahead. A tensor larger than it gets a block of its own. It also
            bounds the tensors that integrations move ahead; None: see
            `fastst_patch.integrations.prefetch`.
        host_memory_budget: most host memory, in bytes, that a load of a remote file takes beside
            its tensors; None: 256 MiB. Half of it is for ranges in flight, at least one of 64 KiB,
            and half for tensors that a handle on the CPU reads ahead; with 0 it reads nothing
            ahead.
        tensors: ``dlpack`` places tensors in shared arenas, each with storage of its own;
            ``owned`` gives each an allocation of its own from torch; ``auto`` is ``dlpack`` on
            the CPU, as stock maps files, and ``owned`` on a device, as stock allocates there.
        fallback: when a call goes to stock: ``auto`` reports it, ``warn`` also warns,
            ``error`` raises FaststError.
        verify: load with stock too and compare every byte; on a difference stock's result
            is returned and an error logged. Moves to a device by integrations are left to
            stock, and reported. A remote file is refused, because stock reads none.
        progress: show a tqdm bar with GB/s; a load then returns when its bytes are there.
        log_level: level of the ``fastst_patch`` logger, with output to stderr.
        small_file_bytes: files of at most this size go to stock. 0, because the fast path was
            faster on every size tried, down to three tensors in 1 KB.
        remote_cache: folder in which remote files are kept while they are streamed, so that they
            are local files the next time; None: none are kept, unless a stand-in names a folder.
        remote_cache_bytes: most bytes in that folder. What was used last stays; None: all of its
            disk but a twentieth.
        remote_offline: take what ``remote_cache`` has without asking whether it has changed. Of
            ``hf://``, ``HF_HUB_OFFLINE`` says the same.
        node_id: ranks of a process group that name the same node share its page cache; None:
            the machine's boot id. For containers, and for several hosts in tests.
        storage_options: for remote files, a mapping (in the environment a JSON object) of the
            transport's settings, such as credentials, region or endpoint; None: what the
            transport finds in its own environment variables. No log or report shows them.
    """

    io: str = "auto"
    page_cache: str = "auto"
    threads: int = 0
    chunk_bytes: int = 4 * MIB
    pinned_bytes: int | None = None
    device_memory_budget: int | None = None
    host_memory_budget: int | None = None
    tensors: str = "auto"
    fallback: str = "auto"
    verify: bool = False
    progress: bool = False
    log_level: str | None = None
    small_file_bytes: int = 0
    remote_cache: str | None = None
    remote_cache_bytes: int | None = None
    remote_offline: bool = False
    node_id: str | None = None
    storage_options: Mapping[str, object] | None = dataclasses.field(default=None, repr=False)

    def public(self) -> dict[str, Any]:
        """The options by name, to be shown: of `storage_options` the names, and no secret."""
        names = None if self.storage_options is None else sorted(self.storage_options)
        return {**dataclasses.asdict(self), "storage_options": names}


class Options(TypedDict, total=False):
    """The fields of `Config` as keyword arguments, for editors and type checkers.

    Text is read as from the environment: ``chunk_bytes="8MiB"``, ``threads="4"``.
    """

    io: Literal["auto", "mmap", "buffered", "direct", "gds"]
    page_cache: Literal["auto", "keep", "drop"]
    threads: int | str
    chunk_bytes: int | str
    pinned_bytes: int | str | None
    device_memory_budget: int | str | None
    host_memory_budget: int | str | None
    tensors: Literal["auto", "dlpack", "owned"]
    fallback: Literal["auto", "warn", "error"]
    verify: bool
    progress: bool
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None
    small_file_bytes: int | str
    remote_cache: str | None
    remote_cache_bytes: int | str | None
    remote_offline: bool
    node_id: str | None
    storage_options: Mapping[str, object] | str | None


def _log_level(name: str, value: object) -> str | None:
    if value is None or value == "":
        return None
    return choice(name, value, _LOG_LEVELS)


_VALIDATORS = {
    "io": lambda name, value: choice(name, value, _IO),
    "page_cache": lambda name, value: choice(name, value, _PAGE_CACHE),
    "threads": lambda name, value: size(name, value, 0, 64),
    "chunk_bytes": lambda name, value: size(name, value, 64 * KIB, 64 * MIB),
    "pinned_bytes": bytes_or_default,
    "device_memory_budget": bytes_or_default,
    "host_memory_budget": bytes_or_default,
    "tensors": lambda name, value: choice(name, value, _TENSORS),
    "fallback": lambda name, value: choice(name, value, _FALLBACK),
    "verify": boolean,
    "progress": boolean,
    "log_level": _log_level,
    "small_file_bytes": lambda name, value: size(name, value, 0, NO_LIMIT),
    "remote_cache": text_or_none,
    "remote_cache_bytes": bytes_or_default,
    "remote_offline": boolean,
    "node_id": text_or_none,
    "storage_options": mapping,
}


def _validated(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in options.items():
        if name not in _VALIDATORS:
            near = nearest(name, _VALIDATORS)
            hint = f"did you mean {near}? " if near else ""
            raise OptionError(
                f"unknown option {name!r}: {hint}allowed are {', '.join(_VALIDATORS)}"
            )
        label = prefix + name.upper() if prefix else name
        result[name] = _VALIDATORS[name](label, value)
    return result


def _check_together(result: Config) -> Config:
    if result.io == "mmap" and result.page_cache == "drop":
        raise OptionError(
            "options io='mmap' and page_cache='drop' exclude each other: mapped tensors live in"
            " the page cache; use io='auto', 'buffered' or 'direct'"
        )
    if result.tensors == "owned" and result.io == "mmap":
        raise OptionError(
            "options io='mmap' and tensors='owned' exclude each other: mapped tensors share the"
            " file's map; use io='auto', 'buffered' or 'direct'"
        )
    return result


def with_options(base: Config, options: Mapping[str, Any]) -> Config:
    """A copy of ``base`` with other values for some options; the options in force stay.

    Raises:
        OptionError: a name or value is not allowed, or two exclude each other.
    """
    return _check_together(dataclasses.replace(base, **_validated(options)))


def _is_privileged() -> bool:
    """Whether the rights are not the caller's, who has set the environment: then it has no say."""
    if os.name != "posix":
        return False
    return (os.getuid(), os.getgid()) != (os.geteuid(), os.getegid())


def _variable(name: str) -> str | None:
    """A variable of ours; an empty one counts as unset."""
    value = os.environ.get(name)
    return value if value and not _is_privileged() else None


def _environment() -> dict[str, Any]:
    names = {name: f"FASTST_{name.upper()}" for name in _VALIDATORS}
    # An empty one counts as unset.
    found = {name: os.environ[one] for name, one in names.items() if os.environ.get(one)}
    return {} if _is_privileged() else _validated(found, "FASTST_")


def environment_enabled() -> bool | None:
    """``FASTST_ENABLED``: True patches on import, False forbids patching; None: not set."""
    value = _variable("FASTST_ENABLED")
    return boolean("FASTST_ENABLED", value) if value else None


def hub_is_offline() -> bool:
    """``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``, as huggingface_hub reads them."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def cache_home() -> str:
    """The folder of this package in the user's cache: ``XDG_CACHE_HOME``, else ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "fastst-patch")


def loader_config_path() -> str | None:
    """``FASTSAFETENSORS_CONFIG``: path of the file with the arguments of an `AutoLoader`."""
    return _variable("FASTSAFETENSORS_CONFIG")


def environment_targets() -> tuple[str, ...] | None:
    """``FASTST_TARGETS``: comma-separated names for ``patch()`` called without any."""
    names = (_variable("FASTST_TARGETS") or "").split(",")
    return tuple(name.strip() for name in names if name.strip()) or None


_WARNED = "FASTST_WARNED"
"""Set for programs whose launcher has warned of misspelt variables."""

_warned = False


def unknown_variables() -> dict[str, str | None]:
    """Variables that begin with ``FASTST_`` and name no option.

    Returns:
        For each, the variable of an option with the most similar name; None when none is similar.
    """
    known = {f"FASTST_{name.upper()}" for name in _VALIDATORS} | {"FASTST_ENABLED"}
    known |= {"FASTST_TARGETS"}
    ours = known | {"FASTST_PROFILE_FILE", "FASTST_PROFILE_PID", "FASTST_WERROR", _WARNED}
    names = sorted(name for name in os.environ if name.startswith("FASTST_") and name not in ours)
    return {name: nearest(name, known) for name in names}


def misspelt_variables() -> list[str]:
    """A sentence for each of `unknown_variables`, for the first caller in a process.

    Empty from then on, and in the children of a launcher, which has warned of them.
    """
    global _warned  # noqa: PLW0603 - once in a process
    if _warned or os.environ.get(_WARNED):
        return []
    _warned = True
    return [
        f"{name} has no effect: there is no such option"
        + (f"; did you mean {near}?" if near else "")
        for name, near in unknown_variables().items()
    ]


def environment_profile() -> tuple[str, int] | None:
    """Where ``fastst-patch run --profile`` has loads written, and the process that prints them.

    Returns:
        ``FASTST_PROFILE_FILE``, to which each process appends its loads, and
        ``FASTST_PROFILE_PID``, the process that prints them at its end (0: the launcher waits
        for the program and prints). None without the first.
    """
    path = _variable("FASTST_PROFILE_FILE")
    pid = _variable("FASTST_PROFILE_PID") or ""
    return (path, int(pid) if pid.isdecimal() else 0) if path else None


def object_store_settings(prefix: str) -> dict[str, str]:
    """The variables that begin with "aws_", say: obstore's settings, named as its options."""
    found = {name.lower(): value for name, value in os.environ.items() if value}
    return {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}


def local_ranks() -> tuple[int, int] | None:
    """The number of this rank among those of its node, and their count, as ``torchrun`` sets them.

    None when the variables are missing or are not valid.
    """
    try:
        rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank, count) if 0 <= rank < count else None


def child_environment(
    options: Mapping[str, str], site: str, profile: tuple[str, int] | None = None
) -> dict[str, str]:
    """The environment for a Python that patches itself, as its children do.

    ``FASTST_ENABLED=0``, which the user has set, stays.

    Args:
        options: values of ``FASTST_<NAME>`` by the option's name; ``targets`` may be among them.
        site: the folder of our sitecustomize; goes in front of ``PYTHONPATH``.
        profile: the result of `environment_profile` in the program.

    Raises:
        OptionError: an option, or a variable that is set already, has a value that is not allowed.
    """
    wanted = {name: value for name, value in options.items() if name != "targets"}
    _check_together(Config(**{**_environment(), **_validated(wanted)}))
    result = dict(os.environ)
    result.update({f"FASTST_{name.upper()}": value for name, value in options.items()})
    if environment_enabled() is not False:
        result["FASTST_ENABLED"] = "1"
    if unknown_variables():
        result[_WARNED] = "1"
    if profile is not None:
        result["FASTST_PROFILE_FILE"], result["FASTST_PROFILE_PID"] = profile[0], str(profile[1])
    # An empty variable counts as unset, but an empty entry among others is the current folder.
    old = result.get("PYTHONPATH")
    entries = old.split(os.pathsep) if old else []
    result["PYTHONPATH"] = os.pathsep.join([site, *(e for e in entries if e != site)])
    return result


def undecided_environment() -> dict[str, str]:
    """The environment for a Python whose code decides whether to patch.

    ``FASTST_ENABLED`` is not in it. The caller has warned of misspelt variables.
    """
    kept = {name: value for name, value in os.environ.items() if name != "FASTST_ENABLED"}
    return {**kept, _WARNED: "1"}


# ---- layers ----

# Guarded by the lock `shared`. A signal handler may push and pop in the middle of an update. So a
# layer is added or removed in one operation, and `_resolve` starts again when layers have changed.
_layers: list[tuple[object, dict[str, Any]]] = []
_current: Config | None = None
_last_environment: dict[str, Any] = {}
_handler: logging.Handler | None = None


def _apply_log_level(level: str | None) -> None:
    global _handler  # noqa: PLW0603 - one handler for the process
    logger = logging.getLogger("fastst_patch")
    if level is None:
        if _handler is not None:
            logger.removeHandler(_handler)
            logger.setLevel(logging.NOTSET)
            _handler = None
        return
    logger.setLevel(level.upper())
    if _handler is None:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(_handler)


def _resolve(environment: Mapping[str, Any] | None = None) -> Config:
    global _current, _last_environment  # noqa: PLW0603 - the one value in force
    if environment is None:
        environment = _last_environment = _environment()
    layers = None
    while layers != tuple(_layers):
        layers = tuple(_layers)
        merged = dict(environment)
        for _, options in layers:
            merged.update(options)
        result = _check_together(Config(**merged))
        if _current is None or _current.log_level != result.log_level:
            _apply_log_level(result.log_level)
        _current = result
    return result


def push(options: Mapping[str, Any]) -> object:
    """Put options on top of those in force.

    Returns:
        A token for `pop`.

    Raises:
        OptionError: a name or value is not allowed; nothing has changed then.
    """
    token = object()
    with shared:
        layer = (token, _validated(options))
        _layers.append(layer)
        try:
            _resolve()
        except OptionError:
            _layers.remove(layer)
            raise
    return token


def pop(token: object) -> None:
    """Remove a layer, wherever it lies; a token already popped is ignored.

    Never raises, since it is called to clean up, maybe after an exception. When the environment
    has become invalid, its last valid values count until `config` is called.
    """
    with shared:
        for layer in tuple(_layers):
            if layer[0] is token:
                _layers.remove(layer)
        try:
            _resolve()
        except OptionError:
            with contextlib.suppress(OptionError):  # the layers that are left exclude each other
                _resolve(_last_environment)


def current() -> Config:
    """The options in force, without reading the environment again."""
    return _current or config()


def config() -> Config:
    """Read the environment again; return the options in force.

    Raises:
        OptionError: the environment holds a bad value.
    """
    with shared:
        return _resolve()


@contextlib.contextmanager
def config_context(**options: Unpack[Options]) -> Iterator[Config]:
    """Use options for the duration of a ``with`` block, in the whole process.

    Raises:
        OptionError: a name or value is not allowed.
    """
    token = push(options)
    try:
        yield current()
    finally:
        pop(token)
