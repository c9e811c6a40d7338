"""``%load_ext fastst_patch``: patched while loaded, and the magic ``fastst_profile``.

This module does not import IPython, which passes its shell.
"""

from __future__ import annotations

import ast
import contextlib
import os
from typing import Any

from ..dropin.handle import report_open_handles
from ..report import Profile, profile
from ..report_table import render
from .patcher import patched

__all__ = ["load", "unload"]

_NAME = "fastst_profile"
_loaded: list[patched] = []


def load(shell: Any) -> None:
    """Patch, and add the magic."""
    if not _loaded:
        entered = patched()
        entered.__enter__()
        _loaded.append(entered)

    def fastst_profile(line: str, cell: str | None = None) -> Any:
        """Run code and print what it loaded, in this process, from safetensors files.

        ``%%fastst_profile`` runs the cell, ``%fastst_profile STATEMENT`` the statement;
        ``%fastst_profile`` alone prints what the rest of the cell it stands in has loaded.
        """
        __tracebackhide__ = True
        if cell is not None and line.strip():
            raise ValueError("%%fastst_profile takes no arguments")
        if cell is None and not line.strip():
            _profile_rest(shell)
            return None
        return _profile_code(shell, line if cell is None else cell)

    shell.register_magic_function(fastst_profile, "line_cell", _NAME)


def unload(shell: Any) -> None:
    """Undo `load`. What ``patch()`` has patched stays patched."""
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop(_NAME, None)
    while _loaded:
        _loaded.pop().__exit__(None, None, None)


def _print(loads: Profile) -> None:
    print(render((os.getpid(), report) for report in loads.reports))


@contextlib.contextmanager
def _profiled() -> Any:
    report_open_handles()  # their tensors so far belong to earlier cells
    with profile() as loads:
        try:
            yield
        finally:
            report_open_handles()
            _print(loads)


def _profile_rest(shell: Any) -> None:
    profiled = _profiled()
    profiled.__enter__()

    def cell_is_over(*_: object) -> None:
        shell.events.unregister("post_run_cell", cell_is_over)
        profiled.__exit__(None, None, None)

    shell.events.register("post_run_cell", cell_is_over)


def _profile_code(shell: Any, source: str) -> Any:
    """Run code as %time does: it raises what the code raises, and returns its last expression."""
    __tracebackhide__ = True  # IPython then leaves this frame out
    source = shell.transform_cell(source)
    name = shell.compile.cache(source)  # so that tracebacks can show it
    tree = shell.compile.ast_parse(source, filename=name)
    tree = shell.transform_ast(tree)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    body = shell.compile(tree, name, "exec")
    value = None if last is None else shell.compile(last, name, "eval")
    with _profiled():
        exec(body, shell.user_ns)
        return None if value is None else eval(value, shell.user_ns)
