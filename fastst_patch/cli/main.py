"""The `fastst-patch` command. Commands import what they need, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from ..terminal import nearest, width, wrapped

_COMMANDS = ("bench", "disable", "doctor", "enable", "remote", "run")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and suggests an option for a misspelt one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with the usage of this command, and suggestions for the arguments."""
        known = [name for action in self._actions for name in action.option_strings]
        words = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        guesses = list(filter(None, (nearest(word, known) for word in words)))
        hint = f"; did you mean {', '.join(guesses)}?" if guesses else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


class _Version(argparse.Action):
    """Prints the installed versions."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from .. import engine

        reason = engine.native_error()
        lines = [
            f"fastst-patch {_version('fastst-patch')}",
            f"torch {_version('torch')}",
            f"safetensors {_version('safetensors')}",
            f"engine {_version('fastst-patch')}" if reason is None else f"engine: {reason}",
        ]
        print("\n".join(wrapped(lines, width())))
        parser.exit()


def main(argv: Sequence[str] | None = None, *, run_is_meant: bool = False) -> int:
    """Run one command; return the exit status.

    Args:
        argv: arguments; those of this process when None.
        run_is_meant: arguments that do not begin with a command are those of ``run``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if run_is_meant and given and given[0] not in (*_COMMANDS, "-h", "--help", "--version"):
        given.insert(0, "run")
    target: list[str] = []
    if given[:1] == ["run"]:
        given, target = _split(given)
    try:
        return _dispatch(given, target, run_is_meant)
    except BrokenPipeError:  # as in `fastst-patch doctor | head -1`
        # Python flushes stdout again at its end, and would report the same error there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE


def _dispatch(given: list[str], target: list[str], run_is_meant: bool) -> int:
    parser, commands = _parser(run_is_meant)
    args, unknown = parser.parse_known_args(given)
    if unknown:
        commands[args.command].refuse(unknown)
    if args.command == "run":
        return _run(commands["run"], args, target)
    if args.command == "doctor":
        from . import doctor

        return doctor.main(args.paths, args.json, verbose=args.verbose)
    if args.command == "remote":
        from . import remote

        return remote.main(args.url, args.revision, args.cache, dict(args.options))
    if args.command in ("enable", "disable"):
        return _enable(commands[args.command], args)
    from .. import bench

    return bench.main(args)


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments of ``run`` into ours, for argparse, and the program's."""
    i = 1
    while i < len(given):
        argument = given[i]
        if argument in ("-o", "--option"):
            i += 2
        elif argument[:2] in ("-m", "-c") or argument in ("-", "--") or argument[:1] != "-":
            break
        else:
            i += 1
    return list(given[:i]), list(given[i:])


def _run(parser: _Parser, args: argparse.Namespace, target: list[str]) -> int:
    from ..errors import OptionError
    from . import launcher

    if target in ([], ["--"]):
        parser.error("give a script, -m MODULE, -c CODE or -- COMMAND")
    try:
        return launcher.launch(
            target, dict(args.options), verbose=args.verbose, profile=args.profile
        )
    except OptionError as error:
        parser.error(str(error))


def _enable(parser: _Parser, args: argparse.Namespace) -> int:
    from ..errors import OptionError
    from . import enable

    try:
        if args.command == "disable":
            return enable.disable()
        return enable.status() if args.status else enable.enable()
    except (OptionError, OSError) as error:
        parser.exit(1, f"fastst-patch: {error}\n")


def _parser(
    run_is_meant: bool,
) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and those of the commands."""
    parser = _Parser(
        prog="python -m fastst_patch" if run_is_meant else "fastst-patch",
        description="Loads safetensors files at the speed of the hardware.",
        epilog="Without a command: `run`, so that `python -m fastst_patch SCRIPT` runs a script."
        if run_is_meant
        else None,
    )
    parser.add_argument("--version", action=_Version, nargs=0,
                        help="print versions of package, torch, safetensors, engine")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    _add_bench(commands)
    _add_doctor(commands)
    _add_remote(commands)
    _add_run(commands)
    _add_enable(commands)
    return parser, dict(commands.choices)


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="time stock against patched safetensors on this machine",
        description="Times stock against patched safetensors: fresh processes, alternating, "
        "with the page cache proven cold or warm, beside raw reads of the same files. "
        "Takes minutes; compares every byte, and exits with 1 if one differs.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="safetensors files or model folders; without any, a synthetic "
                        "checkpoint is written and removed. Of a URL streaming is compared with "
                        "downloading it and loading the file then")  # fmt: skip
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu or cuda[:N] (%(default)s)"
    )
    parser.add_argument("--cache", choices=("cold", "warm", "both"), default="both",
                        help="where the bytes come from: the disk, or the page cache "
                        "(%(default)s)")  # fmt: skip
    parser.add_argument("--repeat", type=_positive_int, default=5, metavar="N",
                        help="rounds (%(default)s)")  # fmt: skip
    parser.add_argument("--max-seconds", type=float, default=240.0, metavar="S",
                        help="begin no round that would end later (%(default)g)")  # fmt: skip
    parser.add_argument("--dir", metavar="DIR", help="where to write the synthetic checkpoint")
    parser.add_argument(
        "--io",
        metavar="MODE",
        dest="io",
        help="short for -o io=MODE: auto, mmap, buffered, direct or gds",
    )
    parser.add_argument("-o", "--option", type=option, action="append", default=[],
                        metavar="NAME=VALUE", dest="options",
                        help="an option for patch(), such as -o threads=4; repeatable")  # fmt: skip
    parser.add_argument("--ceilings", action=argparse.BooleanOptionalAction, default=True,
                        help="measure raw reads of the same files, too (yes)")  # fmt: skip
    parser.add_argument("--gate", action="store_true",
                        help="exit with 1 if patched is slower than stock in a row, beyond the "
                        "spread of its rounds and 5 %%; the first line says so")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="all columns of the table, however wide, and all notes")  # fmt: skip
    parser.add_argument("--json", metavar="FILE",
                        help="write all numbers there; - is standard output")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="draw a chart (extra: fastst-patch[plot])")


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say whether the fast path works here, and why not",
        description="Says in its first line whether the fast path works here, and below what the "
        "machine, its libraries and the files offer. Changes nothing. Exits with 1 where the "
        "fast path cannot be taken, or a file that is named cannot be loaded.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="model files, folders of such, or URLs of either, to look at (the "
                        "current folder and the one for temporary files)")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="every version, option, library and target, with reasons")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_remote(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "remote",
        help="make a local folder that stands for a model in a bucket, and print its path",
        description="Makes a local folder that stands for a remote model, and prints its path: "
        "small files are fetched, weights are streamed when a patched program loads them. "
        'For example: vllm serve "$(fastst-patch remote s3://bucket/model)".',
    )
    parser.add_argument("url", metavar="URL",
                        help="hf://org/repo, s3://bucket/folder, gs://, az://, https:// or "
                        "http://; a folder, or one safetensors file")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit, for hf://")
    parser.add_argument("--cache", metavar="DIR",
                        help="keep weights in this folder when they are loaded; without it as "
                        "FASTST_REMOTE_CACHE says at the time of the load")  # fmt: skip
    parser.add_argument("-o", "--option", type=option, action="append", default=[],
                        metavar="NAME=VALUE", dest="options",
                        help="an option, such as -o storage_options=JSON; repeatable. Programs "
                        "that load need it, too")  # fmt: skip


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "run",
        help="run a program, and its children, with safetensors patched",
        usage="%(prog)s [-v] [--profile] [-o NAME=VALUE] "
        "(SCRIPT | -m MODULE | -c CODE | -- COMMAND) [ARGUMENT ...]",
        description="Runs a Python program, or a command that starts some, with safetensors "
        "patched in it and in the Pythons that it starts. Its arguments, exit status and signals "
        "are its own. `python -m fastst_patch` does the same, and `run` may then be left out.",
    )
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="a line on stderr for each load, and what was patched")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="at the end a table on stderr of what the program and its children "
                        "loaded and how, and of what was left to stock and why")  # fmt: skip
    parser.add_argument("-o", "--option", type=option, action="append", default=[],
                        metavar="NAME=VALUE", dest="options",
                        help="an option for patch(), such as -o threads=4; repeatable")  # fmt: skip


def _add_enable(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "enable",
        help="have this environment honour FASTST_ENABLED",
        description="Writes a .pth file into site-packages. From then on each program of this "
        "environment that is started with FASTST_ENABLED=1 is patched when it imports "
        "safetensors. Without the variable nothing changes.",
    )
    parser.add_argument("--status", action="store_true", help="only say whether it is enabled")
    commands.add_parser(
        "disable",
        help="undo enable",
        description="Removes what `enable` wrote. Uninstalling the package removes it, too.",
    )


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda[:N]")
    return text


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def option(text: str) -> tuple[str, str]:
    """Split NAME=VALUE, an option for patch()."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value  # text, which patch() reads as it reads the environment


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"
