"""Writes the list of options in docs/options.md from fastst_patch/config.py.

    python docs/options_page.py [--check]

Names and defaults are the fields of `Config`, the text is its docstring, and what is allowed is
what the error for a bad value says. With --check nothing is written, and the exit status is 1
when the page is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from fastst_patch.config import Config, with_options
from fastst_patch.errors import OptionError

PAGE = Path(__file__).resolve().parent / "options.md"
BEGIN = "<!-- options: written by docs/options_page.py -->"
END = "<!-- end of options -->"
MIB = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether it is up to date")
    args = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8")
    head, rest = before.split(BEGIN)
    after = f"{head}{BEGIN}\n\n{options()}\n{rest[rest.index(END) :]}"
    if args.check and after != before:
        print("docs/options.md is out of date; run python docs/options_page.py", file=sys.stderr)
        return 1
    if after != before:
        PAGE.write_text(after, encoding="utf-8")
    return 0


def options() -> str:
    """A heading, the environment variable, default, allowed values and text of each option."""
    texts = described()
    parts = []
    for field in dataclasses.fields(Config):
        parts.append(
            f"### `{field.name}`\n\n"
            f"`FASTST_{field.name.upper()}` · default {shown(field.default)} ·"
            f" {allowed(field.name)}\n\n{texts[field.name]}\n"
        )
    return "\n".join(parts)


def described() -> dict[str, str]:
    """The text of each attribute in the docstring of `Config`."""
    attributes = inspect.cleandoc(Config.__doc__ or "").split("Attributes:\n")[1]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", attributes, re.DOTALL | re.MULTILINE)
    return {name: sentence(" ".join(text.split())) for name, text in found}


def sentence(text: str) -> str:
    return re.sub(r"^[a-z]", lambda first: first[0].upper(), text)


def shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB:
        return f"`{value // MIB}MiB`"
    return "unset" if value is None else f"`{value}`"


def allowed(name: str) -> str:
    try:
        with_options(Config(), {name: object()})
    except OptionError as error:
        return "allowed" + str(error).split(": allowed", 1)[1]
    raise AssertionError(f"option {name} takes anything")


if __name__ == "__main__":
    sys.exit(main())
