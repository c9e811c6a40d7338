"""`python -m benchmarks`: race, report, ceilings, readme. Run it in the repository's folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def installed_first() -> None:
    """Put the repository at the end of sys.path: what is installed is what is measured.

    `python -m` puts the working folder first, and a checkout holds no built extension unless it
    was installed in place.
    """
    here = {"", str(ROOT)}
    sys.path[:] = [entry for entry in sys.path if entry not in here] + [str(ROOT)]


def names(text: str) -> list[str]:
    """A list separated by commas."""
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    race = commands.add_parser("race", help="every loader, side by side, against the ceilings")
    race.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    race.add_argument("--suite", choices=("quick", "full"), default="quick")
    race.add_argument("--loaders", type=names, metavar="A,B", help="only these")
    race.add_argument("--workloads", type=names, metavar="A,B", help="only these")
    race.add_argument("--out", default="race-results", metavar="DIR",
                      help="for results.json, report.md and the charts (%(default)s)")  # fmt: skip
    race.add_argument("--dir", metavar="DIR", help="where to write the files that are loaded")
    race.add_argument("--rounds", type=int, default=5, metavar="N",
                      help="of every cell (%(default)d); fewer than 5 rank nobody")  # fmt: skip
    race.add_argument("--minutes", type=float, metavar="M",
                      help="leave cells out so that it ends by then (quick: 18 on the CPU, 8 on a "
                      "GPU; full: no limit)")  # fmt: skip
    race.add_argument("--afresh", action="store_true",
                      help="let every process import torch itself, which takes longer (on a GPU it "
                      "always does)")  # fmt: skip
    race.add_argument("--seed", type=int, metavar="N", help="of the random order")
    race.add_argument("--wheels", metavar="DIR", help="take side environments from these wheels")
    race.add_argument("--no-end-to-end", dest="end_to_end", action="store_false",
                      help="without the rows of transformers and diffusers")  # fmt: skip

    report = commands.add_parser("report", help="draw results again, or several together")
    report.add_argument("folders", nargs="+", metavar="DIR",
                        help="with a results.json or a summary.json, or such a file")  # fmt: skip
    report.add_argument("--out", metavar="DIR", help="where to (the folder itself, if it is one)")

    ceilings = commands.add_parser("ceilings", help="what this machine can give at most")
    from benchmarks.ceilings import add_arguments

    add_arguments(ceilings)

    readme = commands.add_parser("readme", help="write the README's tables from the results")
    readme.add_argument("--check", action="store_true", help="only tell whether they are current")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    from fastst_patch.bench import guarded

    args = parser().parse_args(arguments)
    if args.command == "ceilings":
        from benchmarks import ceilings

        return guarded("benchmarks ceilings", lambda: ceilings.run(args))
    if args.command == "readme":
        from benchmarks import readme

        return guarded("benchmarks readme", lambda: readme.main(args.check))
    from benchmarks.race import command

    chosen = command.race if args.command == "race" else command.redraw
    return guarded(f"benchmarks {args.command}", lambda: chosen(args))


if __name__ == "__main__":
    installed_first()
    sys.exit(main())
