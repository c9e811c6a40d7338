"""Switches fastst_patch on in every Python that a program run by ``fastst-patch run`` starts.

The launcher puts this folder in front of PYTHONPATH, and the ``site`` module imports us. That
happens in whichever Pythons the program starts, so: nothing is imported before safetensors or
torch is, a Python without fastst_patch goes on as it was, and the ``sitecustomize`` that would
have been imported without us is imported then. Not a module of the package, which may not be
there: hence no relative imports, and the environment is read here and not by
``fastst_patch.config``.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself would take longer than all that is here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HERE = os.path.dirname(__file__) if __name__ == "sitecustomize" else ""
_WATCHED = ("safetensors", "torch")  # what nobody needs us before
_TRUE = ("1", "true", "yes", "on")  # as in fastst_patch.config
_PRINT = """
import sys
sys.path[:] = filter(None, sys.path)  # whatever lies in the current folder
from fastst_patch.patching import child_hook
child_hook.print_table(sys.argv[1])
"""


class _FaststWatch:
    """A finder that finds what the others find, and imports fastst_patch behind it.

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
        # Finders before us have been asked already. We may be gone, by another thread's import.
        later = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in later:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: object) -> None:
        """Have the module executed by the loader's own method, and then ourselves called."""
        execute = getattr(loader, "exec_module", None)
        if execute is None or isinstance(loader, type):
            return

        def exec_module(module: object) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            self._switch_on()

        # Python leaves its own frames out of the traceback of a failing import: this one too.
        if hasattr(exec_module.__code__, "replace"):
            exec_module.__code__ = exec_module.__code__.replace(
                co_filename="<frozen importlib._bootstrap>"
            )
        if hasattr(loader, "__dict__"):  # else it cannot be told, and the program stays as it was
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
        return  # there is none, or it is closed


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
    """The process that ``run --profile`` became prints what it and its children loaded."""
    import atexit

    ours, path = os.getpid(), os.environ["FASTST_PROFILE_FILE"]

    def finish() -> None:
        if os.getpid() != ours:  # a forked child
            return
        hook = sys.modules.get("fastst_patch.patching.child_hook")
        if hook is not None:
            hook.finish(path)
            return
        # Not imported now: what runs an exec() of text, as dataclasses do, makes Python forget
        # that it was interrupted, and so end with status 1 instead of by SIGINT.
        command = [sys.executable, "-c", _PRINT, path]
        os.waitpid(os.posix_spawn(sys.executable, command, os.environ), 0)

    atexit.register(finish)  # first of all, so it is called last


def _leave() -> None:
    """Be gone from where the program could see us; PYTHONPATH stays for its children."""
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    sys.path_importer_cache.pop(_HERE, None)
    sys.modules.pop(__name__, None)


_watch_imports()
if __name__ == "sitecustomize":  # else it is the line that `fastst-patch enable` wrote
    ours = os.environ.get("FASTST_PROFILE_PID") == str(os.getpid())
    if ours and "FASTST_PROFILE_FILE" in os.environ:
        _print_at_end()
    _leave()
    # The one that would have come without us. There being none, or its raising, is then told to
    # `site` as it would have been: as an ImportError of this name, or as what it raised.
    import sitecustomize  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
