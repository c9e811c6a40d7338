"""``fastst-patch run``: start a program that patches itself, and whose children do.

We become the program: nothing of ours is between it and whoever started us, so that arguments,
exit status, signals, tracebacks and the terminal are its own. What switches it on is in its
environment: options, and `_site` in front of PYTHONPATH. The one exception is ``--profile`` of a
command, which need not be Python and so might not print: there we wait, and print at its end.
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

_NOT_FOUND, _NOT_STARTED = 127, 126  # as a shell says it
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_OURS = re.compile(r"fastst_patch(\.__main__)?")
_SENT_BY_KERNEL = 0x80  # si_code of what a terminal sends, to the program as well
# Passed on while we wait. Stopping and continuing reach us both, from the terminal.
_PASSED_ON = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGALRM, signal.SIGWINCH,
)  # fmt: skip


def launch(
    target: Sequence[str], options: Mapping[str, str], *, verbose: bool, profile: bool
) -> int:
    """Become the program, or wait for it.

    Args:
        target: a command after ``"--"``, else what follows ``python`` on a command line.
        options: for ``patch()``, as text, by name.
        verbose: log each load, and what was patched.
        profile: print a table at the end.

    Returns:
        The exit status, where we could not become the program or waited for it.

    Raises:
        OptionError: an option, or one in the environment, is not allowed; or Python was called
            with flags that keep the program from being switched on.
    """
    is_command = target[0] == "--"
    command = list(target[1:])
    if not is_command:
        command = [_python(), *interpreter_flags(sys.orig_argv, len(sys.argv) - 1), *target]
    wanted = dict(options)
    if verbose and wanted.get("log_level") != "debug":
        wanted["log_level"] = "info"
    # Launched by a launcher that profiles, we are in its table.
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
    finally:  # not reached where we became the program
        if path is not None:
            _remove(path)


def interpreter_flags(original: Sequence[str], arguments: int) -> list[str]:
    """The flags of ``python -X dev -m fastst_patch ...``, which are meant for the program.

    Args:
        original: ``sys.orig_argv``.
        arguments: how many of them, at its end, are ours.

    Returns:
        None, when we were started as a script, whose flags are the installer's.

    Raises:
        OptionError: the flags keep the program from being switched on.
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
        raise OptionError("python -E, -I and -S keep a program from being switched on")
    return head


def _check_targets(environment: Mapping[str, str]) -> None:
    for name in environment.get("FASTST_TARGETS", "").split(","):
        if name.strip():
            is_patched(name.strip())  # raises where there is no such target


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):  # printed, and so removed
        os.unlink(path)


def _python() -> str:
    if not sys.executable:
        raise OptionError("this Python does not know its own path; use -- command")
    return sys.executable


def _site() -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    site = os.path.join(package, "_site")
    if os.pathsep in site:
        raise OptionError(f"{site!r} cannot be put on PYTHONPATH, because of the {os.pathsep!r}")
    return site


def _is_profiled() -> bool:
    """Whether loads of the program go to a table that somebody prints already."""
    profile = environment_profile()
    return profile is not None and os.path.exists(profile[0])


def _profile_file() -> str:
    try:
        fd, path = tempfile.mkstemp(prefix="fastst-profile-")
    except OSError as error:
        raise OptionError(f"--profile needs a temporary file: {error}") from None
    os.close(fd)
    return path


# ---- becoming it ----


def _become(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Replace this process. Returns an exit status, having said why, where that fails."""
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


# ---- waiting for it ----


def _wait_for(command: Sequence[str], environment: Mapping[str, str], path: str) -> int:
    """Run a command, pass signals on, print the file of loads, and end as it ended."""
    waited = {*_PASSED_ON, signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    on_child_end = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody could wait
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
    if killed_by in (None, signal.SIGINT):  # a program that was interrupted ends in its own way
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
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # or it would be ours until the exec
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = _become(command, environment)
    finally:
        os._exit(status)


def _die_of(number: int) -> None:
    """Look to our parent as the program would have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):  # some can be neither caught nor reset
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
