"""What patching replaces, and that it puts back exactly that.

`from safetensors import safe_open` is how most programs import it, so replacing an attribute of
safetensors alone would patch nobody. Only reports of the fast path count as proof here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from patch_targets import TINY, current_object

import fastst_patch
from fastst_patch import engine


@pytest.fixture
def module(stock) -> Iterator[types.ModuleType]:
    """A program's module that imported everything by name before anything was patched."""
    made = types.ModuleType("a_program_that_reads_safetensors")
    made.safe_open = safetensors.safe_open
    made.renamed = safetensors.safe_open
    if stock.handle is not None:
        made._safe_open_handle = safetensors._safe_open_handle
    made.load_file = safetensors.torch.load_file
    made.safe_load_file = safetensors.torch.load_file
    made.load_model = safetensors.torch.load_model
    made.namespace = types.SimpleNamespace(safe_open=safetensors.safe_open)
    made.as_default = lambda path, open_=safetensors.safe_open: open_(path, "pt").keys()
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


NAMES = ("safe_open", "renamed", "load_file", "safe_load_file", "load_model")
if hasattr(safetensors, "_safe_open_handle"):  # came with 0.6
    NAMES += ("_safe_open_handle",)


# ---------------------------------------------------------------- aliases


def test_aliases_follow(module, is_fast, stock) -> None:
    before = {name: getattr(module, name) for name in NAMES}
    assert not is_fast(module.safe_open)
    assert not is_fast(module.load_file)
    with fastst_patch.patched(**TINY):
        for name in NAMES:
            assert getattr(module, name) is not before[name], name
        for name in ("safe_open", "renamed", "load_file", "safe_load_file"):
            assert is_fast(getattr(module, name)), name
        assert module.safe_open is safetensors.safe_open is safetensors.torch.safe_open
        assert module.load_file is safetensors.torch.load_file
    assert all(getattr(module, name) is before[name] for name in NAMES)
    assert not is_fast(module.safe_open)
    assert module.safe_open is stock.safe_open


@pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error()))
def test_dicts_that_hold_an_object_are_found() -> None:
    """By identity, as a value and not as a key, wherever in the dict it is."""
    one, other = object(), [1]
    dicts: list[dict[Any, Any]] = [
        {}, {"a": one}, {"equal": [1]}, {one: 1}, {i: i for i in range(5000)} | {"last": other},
    ]  # fmt: skip
    assert engine.dicts_holding(dicts, [id(one), id(other)]) == [1, 4]
    assert engine.dicts_holding(dicts, []) == engine.dicts_holding([], [id(one)]) == []
    many = [object() for _ in range(5000)]  # more than the engine's table has slots
    wanted = [id(value) for value in many[::7]]
    found = engine.dicts_holding([{"x": value} for value in many], wanted)
    assert found == list(range(0, 5000, 7))


def test_what_is_not_a_module_is_left_alone(module, stock) -> None:
    """The sweep looks into modules' dictionaries: no namespaces, no defaults, no getattr."""

    class Watchful(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the sweep asked a lazy module for {name}")

    lazy = Watchful("lazy_module")
    sys.modules["lazy_module"] = lazy
    sys.modules["odd_entry"] = "not a module"  # type: ignore[assignment]
    sys.modules["none_entry"] = None  # type: ignore[assignment]
    try:
        with fastst_patch.patched(**TINY):
            assert module.namespace.safe_open is stock.safe_open
            assert "lazy_module" in sys.modules
    finally:
        for name in ("lazy_module", "odd_entry", "none_entry"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("safetensors", "safe_open"),
        ("safetensors.torch", "safe_open"),
        ("safetensors.numpy", "safe_open"),
        ("transformers.modeling_utils", "safe_open"),
        ("accelerate.utils.modeling", "safe_open"),
        ("accelerate.utils.modeling", "safe_load_file"),
        ("accelerate.utils.offload", "safe_open"),
        ("accelerate.checkpointing", "load_model"),
        ("sentence_transformers.base.modules.module", "load_safetensors_file"),
    ],
)
def test_known_aliases(name, attribute, is_fast, consumer) -> None:
    consumer(name.partition(".")[0])
    program = importlib.import_module(name)
    if not hasattr(program, attribute):
        pytest.skip(f"{name} no longer holds {attribute}")
    before = getattr(program, attribute)
    with fastst_patch.patched(**TINY):
        assert getattr(program, attribute) is not before
        if attribute != "load_model":
            assert is_fast(getattr(program, attribute))
    assert getattr(program, attribute) is before


_LATE = """
import sys, fastst_patch, safetensors
stock = [safetensors.safe_open]  # a bare global would be rebound, as any alias is
with fastst_patch.patched(small_file_bytes=0):
    import safetensors.torch, accelerate.utils.modeling as late
    assert late.safe_open is safetensors.safe_open is not stock[0]
    with fastst_patch.profile() as seen:
        late.safe_load_file(sys.argv[1])
        with late.safe_open(sys.argv[1], "pt") as handle:
            handle.get_tensor("w")
    assert [r.path != "stock" for r in seen.reports] == [True, True], seen.reports
    kept = late.safe_open
assert late.safe_open is safetensors.safe_open is safetensors.torch.safe_open is stock[0]
assert kept(sys.argv[1], "pt").keys() == ["b", "h", "w"]
import accelerate.utils.offload as later
assert later.safe_open is stock[0]
print("fine")
"""


def test_imported_while_patched(sample, tmp_path) -> None:
    """Modules imported later get the patched names, and lose them with everybody else."""
    pytest.importorskip("accelerate")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LATE, sample],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_without_aliases(module, is_fast, stock) -> None:
    with fastst_patch.patched(rebind_aliases=False, **TINY):
        assert module.safe_open is stock.safe_open
        assert is_fast(safetensors.safe_open)
        assert is_fast(safetensors.torch.load_file)
        assert not is_fast(module.safe_open)
    assert module.safe_open is stock.safe_open


# ---------------------------------------------------------------- putting back


def test_captured_references_go_to_stock(is_fast, sample, stock, agree) -> None:
    """What was fetched while patched stays callable for ever, and is stock afterwards."""
    with fastst_patch.patched(**TINY):
        opened, loaded = safetensors.safe_open, safetensors.torch.load_file
        handle = opened(sample, "pt")
        assert is_fast(opened)
        assert is_fast(loaded)
    assert not is_fast(opened)
    assert not is_fast(loaded)
    assert type(opened(sample, "pt")) is stock.safe_open
    agree(lambda: opened("missing", "pt"), lambda: stock.safe_open("missing", "pt"))
    # Opened while patched, used afterwards.
    assert torch.equal(handle.get_tensor("w"), stock.load_file(sample)["w"])
    handle.__exit__(None, None, None)
    with fastst_patch.patched(**TINY):
        assert is_fast(opened)


def test_someone_elses_patch_survives(module, stock) -> None:
    """Only what is still ours is put back."""

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return "theirs"

    fastst_patch.patch(**TINY)
    module.safe_open = theirs
    safetensors.torch.load_file, ours = theirs, safetensors.torch.load_file
    try:
        fastst_patch.unpatch()
        assert module.safe_open is theirs
        assert safetensors.torch.load_file is theirs
        assert module.renamed is stock.safe_open
        assert safetensors.safe_open is stock.safe_open
        assert not fastst_patch.is_patched()
    finally:
        if safetensors.torch.load_file is theirs:
            safetensors.torch.load_file = module.safe_load_file
    assert safetensors.torch.load_file is not ours


def test_someone_wrapped_us(sample, is_fast, stock) -> None:
    """A wrapper put around ours keeps working after we are gone."""
    with fastst_patch.patched(**TINY):
        wrapper = functools.partial(safetensors.safe_open)
        safetensors.safe_open = wrapper
        assert is_fast(wrapper)
    try:
        assert safetensors.safe_open is wrapper
        assert not is_fast(wrapper)
    finally:
        safetensors.safe_open = stock.safe_open


def test_other_frameworks_while_patched(sample, stock, assert_same) -> None:
    """safetensors.numpy shares safe_open, and gets stock's arrays from it."""
    with stock.safe_open(sample, "np") as handle:
        expected = {name: handle.get_tensor(name) for name in ("w", "b")}
    with fastst_patch.patched(**TINY), safetensors.numpy.safe_open(sample, "np") as handle:
        assert_same({name: handle.get_tensor(name) for name in expected}, expected)


# ---------------------------------------------------------------- nesting, threads


# ---------------------------------------------------------------- targets, introspection


def test_it_looks_like_what_it_replaces(targets, stock, outcome) -> None:
    """Signature, name, module, documentation, callable; what inspect and help() show."""
    before = {name: current_object(name) for name in targets}
    with fastst_patch.patched(**TINY):
        for name in targets:
            now, then = current_object(name), before[name]
            assert now is not then
            assert inspect.signature(now) == inspect.signature(then)
            assert (now.__name__, now.__module__) == (then.__name__, then.__module__)
            assert now.__qualname__ == then.__qualname__
            assert now.__doc__ == then.__doc__
            assert callable(now)
            assert inspect.isfunction(now) == inspect.isfunction(then)
            assert isinstance(now, type) == isinstance(then, type)
            assert inspect.getdoc(now) == inspect.getdoc(then)


def test_subclassing(outcome, stock) -> None:
    """Stock's class refuses to be a base; so must what stands for it, with the same error."""

    def subclass() -> Any:
        return type("Mine", (safetensors.safe_open,), {})

    def statement() -> Any:
        class Mine(safetensors.safe_open):
            pass

        return Mine

    for attempt in (subclass, statement):
        theirs = outcome(attempt)
        with fastst_patch.patched(**TINY):
            ours = outcome(attempt)
        assert (ours.kind, ours.error) == (theirs.kind, theirs.error), ours


def test_pickle_while_patched(stock) -> None:
    """References pickle by name, as stock's functions do, for spawned workers for instance."""
    before = safetensors.torch.load_file
    with fastst_patch.patched(**TINY):
        for function in (safetensors.torch.load_file, safetensors.torch.load_model):
            pickled = pickle.dumps(function)
            assert pickle.loads(pickled) is function
        pickled = pickle.dumps(safetensors.torch.load_file)
        assert pickle.loads(pickle.dumps(safetensors.torch.load_file)) is not before
    assert pickle.loads(pickled) is before
