"""What holds for every target of ``patch()``: half-way failures, late and partial imports."""

from __future__ import annotations

import functools
import subprocess
import sys
import types
import warnings

import pytest
from torch import nn

import fastst_patch
from fastst_patch import UntestedVersionWarning
from fastst_patch.config import current
from fastst_patch.integrations import Hook
from fastst_patch.patching import notices, patcher, targets

TO = "torch.nn.Module.to"
STOCK_TO = nn.Module.to
PARTIAL = """
import transformers.core_model_loading as first  # which imports safetensors on its way
import fastst_patch
assert fastst_patch.is_patched("transformers.from_pretrained"), fastst_patch.patch_map()
assert hasattr(first.spawn_materialize, "__wrapped__")
"""


def test_a_module_that_imports_safetensors_itself(tmp_path) -> None:
    """``run`` patches in the middle of its import: its functions are not there yet."""
    pytest.importorskip(
        "transformers.core_model_loading", reason="transformers before 5 loads in another way"
    )
    command = [sys.executable, "-m", "fastst_patch", "run", "-c", PARTIAL]
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.fixture
def module(monkeypatch) -> types.ModuleType:
    """An importable module, and a target ``fast_one.name`` in it."""
    made = types.ModuleType("fast_one")
    made.__spec__ = types.SimpleNamespace(_initializing=False)  # type: ignore[assignment]

    def name(x: int) -> tuple[str, int]:
        return "stock", x

    made.name = name  # type: ignore[attr-defined]
    hook = Hook("pytest", "fast_one", "name", lambda f, args, kwargs: ("fast", *args), ("x",))
    target = targets.PatchTarget(
        "fast_one.name", "", (targets.PatchPoint(hook),), ("pytest", "0", "999")
    )
    monkeypatch.setitem(patcher._TARGETS, target.name, target)
    monkeypatch.setitem(sys.modules, "fast_one", made)
    return made


def test_a_module_that_is_being_imported(module) -> None:
    stock = module.__dict__.pop("name")
    module.__spec__._initializing = True
    with fastst_patch.patched("fast_one.name"):
        assert "being imported" in str(fastst_patch.patch_map()["fast_one.name"].reason)
        module.name = stock
        module.__spec__._initializing = False
        assert fastst_patch.is_patched("fast_one.name")
        assert module.name(2) == ("fast", 2)
    assert module.name is stock


def test_loads_patch_what_was_being_imported(module, model) -> None:
    stock = module.__dict__.pop("name")
    module.__spec__._initializing = True
    with fastst_patch.patched():
        import safetensors.torch

        module.name = stock
        safetensors.torch.load_file(model)
        assert module.name(2) == ("fast", 2)
    assert module.name is stock


def test_a_name_that_others_replace_afterwards(module) -> None:
    stock = module.name
    with fastst_patch.patched("fast_one.name"):
        ours = module.name

        @functools.wraps(ours)
        def around(x: int) -> object:
            return ours(x)

        module.name = around
        assert fastst_patch.is_patched("fast_one.name")  # through theirs
        assert module.name(1) == ("fast", 1)
        module.name = stock
        assert "other code" in str(fastst_patch.patch_map()["fast_one.name"].reason)
        module.name = around
    assert module.name is around
    assert module.name(1) == ("stock", 1)


def test_a_module_that_is_thrown_away(module, monkeypatch) -> None:
    with fastst_patch.patched(["fast_one.name", TO]):
        monkeypatch.delitem(sys.modules, "fast_one")
        assert not fastst_patch.is_patched("fast_one.name")
    assert nn.Module.to is STOCK_TO


@pytest.fixture
def untested(monkeypatch) -> None:
    monkeypatch.setattr(targets, "untested_version", lambda *_: "0.0")
    targets.warn_of_untested.cache_clear()
    monkeypatch.setattr(notices, "TESTED", {})


@pytest.mark.parametrize("how", ["patch", "patched"])
def test_patching_that_fails_half_way_changes_nothing(module, untested, how) -> None:
    """Where warnings are errors."""
    stock = module.name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntestedVersionWarning)
        with pytest.raises(UntestedVersionWarning):
            if how == "patch":
                fastst_patch.patch(["safetensors.safe_open", TO, "fast_one.name"], threads=3)
            else:
                fastst_patch.patched(["fast_one.name", TO], threads=3).__enter__()
    fastst_patch.unpatch()
    assert {name: t.uses for name, t in patcher._TARGETS.items() if t.uses} == {}
    assert (nn.Module.to, module.name) == (STOCK_TO, stock)
    assert current().threads != 3
    with pytest.warns(UntestedVersionWarning), fastst_patch.patched("fast_one.name"):
        assert module.name(1) == ("fast", 1)
    assert module.name is stock


def test_an_import_does_not_fail_of_our_warning(module, untested, monkeypatch) -> None:
    found = sys.modules.pop("fast_one")
    with fastst_patch.patched("fast_one.name"), warnings.catch_warnings():
        warnings.simplefilter("error", UntestedVersionWarning)
        monkeypatch.setitem(sys.modules, "fast_one", found)
        from wrapt.importer import notify_module_loaded

        notify_module_loaded(found)
        assert found.name(1) == ("stock", 1)
        assert "Untested" in str(fastst_patch.patch_map()["fast_one.name"].reason)
    patcher._hooked.discard("fast_one")


def test_a_target_named_twice() -> None:
    try:
        fastst_patch.patch([TO, TO])
        assert nn.Module.to is not STOCK_TO
    finally:
        fastst_patch.unpatch()
    assert nn.Module.to is STOCK_TO
