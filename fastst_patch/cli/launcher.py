"""``fastst-patch run``: start a program that patches itself, as its children do.

The launcher's process becomes the program by ``exec``, so that arguments, exit status, signals,
tracebacks and the terminal are the program's own. Its environment makes it patch itself: options,
and `_site` in front of PYTHONPATH. The one exception is ``--profile`` of a command, which need not
be Python and so might not print the table: then the launcher waits, and prints it at the end.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ..config import child_environment, environment_enabled, environment_profile, misspelt_variables
from ..errors import OptionError
from ..patching.child_hook import print_table
from ..patching.patcher import is_patched

__all__ = ["interpreter_flags", "launch"]

_NOT_FOUND, _NOT_STARTED = 127, 126  # exit statuses of shells
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_OURS = re.compile(r"fastst_patch(\.__main__)?")
_SENT_BY_KERNEL = 0x80  # si_code of signals from a terminal, which the program gets, too
# Passed on while the launcher waits. A terminal stops and continues both processes itself.
_PASSED_ON = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGALRM, signal.SIGWINCH,
)  # fmt: skip


def launch(
    target: Sequence[str], options: Mapping[str, str], *, verbose: bool, profile: bool
) -> int:
    """Become the program, or run it and wait for it.

    Args:
        target: a command after ``"--"``, else what follows ``python`` on a command line.
        options: for ``patch()``, as text, by name.
        verbose: log each load, and what was patched.
        profile: print a table at the end.

    Returns:
        The exit status, when the program could not be started, or was waited for.

    Raises:
        OptionError: an option, or one in the environment, is not allowed; or Python was called
            with flags that keep the program from being patched.
    """
    is_command = target[0] == "--"
    command = list(target[1:])
    if not is_command:
        command = [_python(), *interpreter_flags(sys.orig_argv, len(sys.argv) - 1), *target]
    wanted = dict(options)
    if verbose and wanted.get("log_level") != "debug":
        wanted["log_level"] = "info"
    # When this launcher was started by one that profiles, the loads are in that one's table.
    path = _profile_file() if profile and not _is_profiled() else None
    try:
        printing = 0 if is_command else os.getpid()
        environment = child_environment(wanted, _site(), None if path is None else (path, printing))
        _check_targets(environment)
        for warning in misspelt_variables():
            print(f"fastst_patch: {warning}", file=sys.stderr)
        if environment_enabled() is False and (verbose or profile):
            print("fastst_patch: FASTST_ENABLED is 0: nothing is patched", file=sys.stderr)
        if is_command and path is not None:
            return _wait_for(command, environment, path)
        return _become(command, environment)
    finally:  # not reached when this process has become the program
        if path is not None:
            _remove(path)


def interpreter_flags(original: Sequence[str], arguments: int) -> list[str]:
    """The flags of ``python -X dev -m fastst_patch ...``, which the program shall get.

    Args:
        original: ``sys.orig_argv``.
        arguments: how many of them, at its end, are ours.

    Returns:
        None of them when ``fastst-patch`` was started as a script: its flags are the installer's.

    Raises:
        OptionError: the flags keep the program from being patched.
    """
    head = list(original[1 : len(original) - arguments])
    if len(head) > 1 and _OURS.fullmatch(head[-1]) and re.fullmatch(r"-[a-zA-Z]*m", head[-2]):
        module_flag, head = head[-2][:-1], head[:-2]
    elif head and (joined := re.fullmatch(rf"(-[a-zA-Z]*)m{_OURS.pattern}", head[-1])):
        module_flag, head = joined[1], head[:-1]
    else:
        return []
    if module_flag != "-":
        head.append(module_flag)
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise OptionError(
            "a program cannot be patched under python -E, -I or -S: -E and -I ignore PYTHONPATH,"
            " and -S imports no sitecustomize"
        )
    return head


def _check_targets(environment: Mapping[str, str]) -> None:
    for name in environment.get("FASTST_TARGETS", "").split(","):
        if name.strip():
            is_patched(name.strip())  # raises when there is no such target


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # printing removes it
        os.unlink(path)


def _python() -> str:
    if not sys.executable:
        raise OptionError("Python does not know its own path (sys.executable); use -- COMMAND")
    return sys.executable


def _site() -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    site = os.path.join(package, "_site")
    if os.pathsep in site:
        raise OptionError(
            f"the path {site!r} contains {os.pathsep!r}, so it cannot be in PYTHONPATH"
        )
    return site


def _is_profiled() -> bool:
    """Whether another launcher prints the loads of the program."""
    profile = environment_profile()
    return profile is not None and os.path.exists(profile[0])


def _profile_file() -> str:
    try:
        fd, path = tempfile.mkstemp(prefix="fastst-profile-")
    except OSError as error:
        raise OptionError(f"--profile needs a temporary file: {error}") from None
    os.close(fd)
    return path


# ---- becoming the program ----


def _become(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Replace this process. If that fails, print why and return an exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    before = [signal.signal(number, signal.SIG_DFL) for number in _IGNORED_BY_PYTHON]
    try:
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        for number, handler in zip(_IGNORED_BY_PYTHON, before, strict=True):
            signal.signal(number, handler)
        print(f"fastst-patch run: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_STARTED


# ---- waiting for the program ----


def _wait_for(command: Sequence[str], environment: Mapping[str, str], path: str) -> int:
    """Run a command, pass signals on, print the file of loads, and end as it ended."""
    waited = {*_PASSED_ON, signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    on_child_end = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, waitpid would fail
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGCHLD, on_child_end)
        _be_child(command, environment, mask)
    while True:
        received = signal.sigwaitinfo(waited)
        if received.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                break
        elif received.si_code != _SENT_BY_KERNEL:
            os.kill(child, received.si_signo)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if killed_by in (None, signal.SIGINT):  # interrupted, which is an ordinary end
        verbose = environment.get("FASTST_LOG_LEVEL", "").lower() in ("info", "debug")
        print_table(path, verbose)
    if killed_by is not None:
        _remove(path)
        _die_of(killed_by)
    return os.waitstatus_to_exitcode(status)


def _be_child(
    command: Sequence[str], environment: Mapping[str, str], mask: set[int | signal.Signals]
) -> NoReturn:
    status = _NOT_STARTED
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # not Python's handler until the exec
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = _become(command, environment)
    finally:
        os._exit(status)


def _die_of(number: int) -> None:
    """End by the same signal as the program, without a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):  # some signals have no other action
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
