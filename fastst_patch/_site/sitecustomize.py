"""Patches every Python that a program run by ``fastst-patch run`` starts.

The launcher puts this folder in front of PYTHONPATH, and the ``site`` module imports this file.
That happens in every Python that the program starts. So it imports nothing before safetensors or
torch is imported, a Python without fastst_patch runs as without this file, and the
``sitecustomize`` that this one hides is imported at its end. This file is no module of the
package, which may be missing: it has no relative imports and reads the environment itself.
"""

import os
import sys

TYPE_CHECKING = False  # importing typing would take longer than this file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HERE = os.path.dirname(__file__) if __name__ == "sitecustomize" else ""
_WATCHED = ("safetensors", "torch")  # patching is not needed before
_TRUE = ("1", "true", "yes", "on")  # as in fastst_patch.config
_PRINT = """
import sys
sys.path[:] = filter(None, sys.path)  # nothing from the current folder
from fastst_patch.patching import child_hook
child_hook.print_table(sys.argv[1])
"""


class _FaststWatch:
    """A finder that finds modules by the other finders, and imports fastst_patch after them.

    ``import fastst_patch`` patches by itself, since FASTST_ENABLED is set.
    """

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name not in _WATCHED:
            return None
        finders = list(sys.meta_path)
        # Finders before this one have found nothing. Another thread may have removed this one.
        later = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in later:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: object) -> None:
        """Let the loader execute the module, and patch afterwards."""
        execute = getattr(loader, "exec_module", None)
        if execute is None or isinstance(loader, type):
            return

        def exec_module(module: object) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            self._switch_on()

        # Python leaves frames of its import system out of tracebacks, and so this one.
        if hasattr(exec_module.__code__, "replace"):
            exec_module.__code__ = exec_module.__code__.replace(
                co_filename="<frozen importlib._bootstrap>"
            )
        if hasattr(loader, "__dict__"):  # else the program stays unpatched
            vars(loader)["exec_module"] = exec_module

    def _switch_on(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            import fastst_patch  # noqa: F401
        except Exception as error:
            absent = isinstance(error, ImportError) and error.name == "fastst_patch"
            if not absent or os.environ.get("FASTST_LOG_LEVEL", "").lower() in ("debug", "info"):
                kind = type(error).__name__
                _say(f"fastst_patch: {sys.executable} stays unpatched: {kind}: {error}")


def _say(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
    except (AttributeError, OSError, ValueError):
        return  # stderr is missing or closed


def _watch_imports() -> None:
    if os.environ.get("FASTST_ENABLED", "").lower() not in _TRUE:
        return
    if any(type(finder).__name__ == _FaststWatch.__name__ for finder in sys.meta_path):
        return  # the other of the two that execute this file was there first
    watch = _FaststWatch()
    sys.meta_path.insert(0, watch)
    if any(name in sys.modules for name in _WATCHED):
        watch._switch_on()


def _print_at_end() -> None:
    """Print the loads of this process and its children at its end, for ``run --profile``."""
    import atexit

    ours, path = os.getpid(), os.environ["FASTST_PROFILE_FILE"]

    def finish() -> None:
        if os.getpid() != ours:  # a forked child
            return
        hook = sys.modules.get("fastst_patch.patching.child_hook")
        if hook is not None:
            hook.finish(path)
            return
        # Another process prints: importing dataclasses now would run exec() of text, after which
        # an interrupted Python ends with status 1 instead of by SIGINT.
        command = [sys.executable, "-c", _PRINT, path]
        os.waitpid(os.posix_spawn(sys.executable, command, os.environ), 0)

    atexit.register(finish)  # the first one, so it is called last


def _leave() -> None:
    """Remove this module from the program's view; PYTHONPATH stays for its children."""
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    sys.path_importer_cache.pop(_HERE, None)
    sys.modules.pop(__name__, None)


_watch_imports()
if __name__ == "sitecustomize":  # else it is the line that `fastst-patch enable` wrote
    ours = os.environ.get("FASTST_PROFILE_PID") == str(os.getpid())
    if ours and "FASTST_PROFILE_FILE" in os.environ:
        _print_at_end()
    _leave()
    # The hidden sitecustomize. If there is none, or it raises, `site` gets the same exception as
    # it would without this file.
    import sitecustomize  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
