"""Other packages that put functions of their own in safetensors' place, before ours or after it."""

from __future__ import annotations

import functools
import itertools
import logging
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from patch_targets import TINY
from wrappers import REAL, STANDINS, package

import fastst_patch
from fastst_patch.errors import FallbackWarning
from fastst_patch.patching import notices, others, patcher
from fastst_patch.stock import unwrapped

NAMED = ("warming", "streaming", *REAL)  # those that replace safetensors' own names


@pytest.fixture
def theirs(request, tmp_path_factory, monkeypatch) -> Iterator[Any]:
    """A package of that name."""
    monkeypatch.setattr(patcher, "say_once", notices.say_once.__wrapped__)
    with package(request.param, tmp_path_factory.mktemp("theirs")) as found:
        yield found


@pytest.fixture
def alias(stock) -> Iterator[types.ModuleType]:
    """A library that has imported safetensors' names before anybody patched."""
    made = types.ModuleType("a_library")
    made.safe_open, made.load_file = safetensors.safe_open, safetensors.torch.load_file
    made.calls = []
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


PLACES = (
    (safetensors, "safe_open"),
    (safetensors.torch, "safe_open"),
    (safetensors.numpy, "safe_open"),
    (sys.modules["safetensors._safetensors_rust"], "safe_open"),
    (safetensors.torch, "load_file"),
    (safetensors.torch, "load_model"),
)


def _now(*modules: types.ModuleType) -> list[Any]:
    more = [(module, name) for module in modules for name in ("safe_open", "load_file")]
    return [getattr(module, name) for module, name in (*PLACES, *more)]


def _is(found: list[Any], wanted: list[Any]) -> bool:
    return all(one is other for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("theirs", [*NAMED, "around_alias"], indirect=True)
@pytest.mark.parametrize(
    "order",
    sorted(
        order
        for order in set(itertools.permutations(["+ours", "-ours", "+theirs", "-theirs"]))
        if order.index("+ours") < order.index("-ours")
        and order.index("+theirs") < order.index("-theirs")
    ),
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore::fastst_patch.FallbackWarning")
def test_each_order_of_patching_and_undoing(theirs, order, alias) -> None:
    """Ours puts back exactly what was there, theirs included."""
    stock = _now(alias)
    steps: dict[str, Callable[[], Any]] = {
        "+ours": fastst_patch.patch, "-ours": fastst_patch.unpatch,
        "+theirs": theirs.patch, "-theirs": theirs.unpatch,
    }  # fmt: skip
    stood: list[Any] = []
    for step in order:
        before = _now(alias)
        steps[step]()
        if step == "+ours":
            assert not _is(_now(alias), before)
            stood = before
        if step == "-ours" and order.index("+ours") == order.index("-ours") - 1:
            assert _is(_now(alias), stood)
    # What they took from us, and put back after we had gone, passes calls on to stock.
    assert _is([unwrapped(one) for one in _now(alias)], stock)
    fastst_patch.patch()
    assert not _is(_now(alias), stock)
    fastst_patch.unpatch()
    assert _is(_now(alias), stock)


def _calls(sample: str, raw: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Calls of load_file and safe_open; they take these two."""
    raw.write(b"nonsense", "broken.safetensors")
    broken = str(raw.folder / "broken.safetensors")

    def opened(open_: Any, *args: Any, **kwargs: Any) -> Any:
        with open_(*args, **kwargs) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return handle.keys(), handle.metadata(), tensors

    return {
        "load_file": lambda load, _: load(sample),
        "load_file, device": lambda load, _: load(sample, device="cpu"),
        "load_file, positional": lambda load, _: load(sample, "cpu"),
        "load_file, path": lambda load, _: load(Path(sample)),
        "load_file, missing": lambda load, _: load("missing.safetensors"),
        "load_file, broken": lambda load, _: load(broken),
        "load_file, folder": lambda load, _: load(str(raw.folder)),
        "load_file, arguments": lambda load, _: load(sample, nonsense=1),
        "load_file, number": lambda load, _: load(7.5),
        "safe_open": lambda _, open_: opened(open_, sample, "pt"),
        "safe_open, named": lambda _, open_: opened(open_, sample, framework="pt", device="cpu"),
        "safe_open, numpy": lambda _, open_: opened(open_, sample.replace("model", "plain"), "np"),
        "safe_open, missing": lambda _, open_: opened(open_, "missing", "pt"),
        "safe_open, broken": lambda _, open_: opened(open_, broken, "pt"),
        "safe_open, arguments": lambda _, open_: opened(open_, sample),
        "safe_open, framework": lambda _, open_: opened(open_, sample, "nonsense"),
    }


FAST = {"load_file", "load_file, device", "load_file, positional", "load_file, path", "safe_open",
        "safe_open, named"}  # fmt: skip


@pytest.mark.parametrize("theirs", NAMED, indirect=True)
@pytest.mark.filterwarnings("ignore::fastst_patch.FallbackWarning")
def test_over_theirs_it_is_as_stock(theirs, sample, raw, stock, agree, watch) -> None:
    """Whatever theirs would have given, and theirs does not run where ours serves the call."""
    raw.tensors({"x": torch.arange(3)}, "plain.safetensors")
    url = "http://127.0.0.1:9/x.safetensors"
    theirs.patch()
    try:
        with fastst_patch.patched(**TINY):
            for name, call in _calls(sample, raw).items():
                with watch() as seen:
                    agree(
                        partial(call, safetensors.torch.load_file, safetensors.safe_open),
                        partial(call, stock.load_file, stock.safe_open),
                    )
                if name in FAST:
                    seen.assert_fast(sample)
            model = torch.nn.Module()
            for name, tensor in stock.load_file(sample).items():
                model.register_buffer(name, torch.zeros_like(tensor))
            assert not any(safetensors.torch.load_model(model, sample))
            if theirs.__name__ == "streaming":
                assert safetensors.torch.load_file(url) == {"url": url}
                assert safetensors.safe_open(url, "pt") == f"streamed {url}"
            with safetensors.safe_open(sample, "pt") as handle:  # as of the class beneath
                assert isinstance(handle, safetensors.safe_open)
                assert type(handle.get_slice("w")[:1]) is torch.Tensor
            assert getattr(theirs, "read", []) == []
    finally:
        theirs.unpatch()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # theirs
@pytest.mark.parametrize("theirs", ["warming", "cattensors"], indirect=True)
def test_under_theirs_it_is_as_theirs_alone(theirs, sample, raw, outcome, agree, watch) -> None:
    """Their reading comes first, and ours serves the call that they pass on."""
    calls = _calls(sample, raw)
    raw.tensors({"x": torch.arange(3)}, "plain.safetensors")
    theirs.patch()
    alone = (safetensors.torch.load_file, safetensors.safe_open)
    expected = {name: outcome(partial(call, *alone)) for name, call in calls.items()}
    theirs.unpatch()

    def again(found: Any) -> Any:
        if found.error is not None:
            raise found.error(found.text)
        return found.value

    with fastst_patch.patched(**TINY):
        theirs.patch()
        both = (safetensors.torch.load_file, safetensors.safe_open)
        try:
            for name, call in calls.items():
                if "unexpected keyword argument 'backend'" in expected[name].text:
                    continue  # safetensors 0.8's load_file does not work over cattensors 0.2.0
                with watch() as seen:
                    agree(partial(call, *both), partial(again, expected[name]), text=False)
                if name in FAST:
                    seen.assert_fast(sample)
            status = fastst_patch.patch_map()["safetensors.torch.load_file"]
            assert not status.patched
            assert f"{theirs.__name__}." in str(status.reason)
            assert (status.wraps, status.wrapped_by, status.lost) == (None, None, None)
        finally:
            theirs.unpatch()


def _storage_bytes() -> int:
    """What this process has made the kernel fetch from storage."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


@pytest.mark.parametrize("theirs", ["warming", "cattensors"], indirect=True)
@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("call", ["load_file", "safe_open"])
@pytest.mark.filterwarnings("ignore::fastst_patch.FallbackWarning")
def test_no_file_is_read_twice(theirs, first, call, checkpoint, on_disk, evict, watch) -> None:
    """Theirs reads nothing beneath ours; over ours it reads first, and ours finds it cached."""
    file, size = str(checkpoint), checkpoint.stat().st_size
    patches = [theirs.patch, partial(fastst_patch.patch, **TINY)]
    for patch in patches if first == "theirs" else patches[::-1]:
        patch()
    try:
        evict(checkpoint)
        before = _storage_bytes()
        with watch() as seen:
            if call == "load_file":
                tensors = safetensors.torch.load_file(file)
            else:
                with safetensors.safe_open(file, "pt") as handle:
                    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            assert sum(tensor.sum().item() for tensor in tensors.values()) != 0
        read = _storage_bytes() - before
    finally:
        if first == "theirs":
            fastst_patch.unpatch()
        theirs.unpatch()
        fastst_patch.unpatch()
    seen.assert_fast(file)
    assert seen.paths(file) == ["mmap+readahead" if first == "theirs" else "mmap"]
    assert read < 1.5 * size
    assert getattr(theirs, "read", []) in ([], [file] * (first == "ours"))


@pytest.mark.parametrize("theirs", ["around_alias"], indirect=True)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_wrapper_around_an_alias_calls_ours(
    theirs, first, alias, sample, is_fast, stock, recwarn
) -> None:
    if first == "theirs":
        theirs.patch()
        theirs_alone = alias.safe_open
    with fastst_patch.patched(**TINY):
        if first == "ours":
            theirs.patch()
        alias.calls.clear()
        assert is_fast(alias.safe_open)
        assert alias.calls == [(sample,)]  # theirs was asked, too
        assert alias.safe_open.marked
        assert fastst_patch.is_patched("safetensors.safe_open")
        if first == "theirs":
            assert alias.safe_open is theirs_alone
            found = fastst_patch.patch_map()["safetensors.safe_open"].aliases
            assert "a_library.safe_open" in found
    assert not is_fast(alias.safe_open)
    theirs.unpatch()
    assert unwrapped(alias.safe_open) is stock.safe_open
    assert not [one for one in recwarn if issubclass(one.category, FallbackWarning)]


_BEFORE_THE_IMPORT = """
import sys
sys.path.insert(0, sys.argv[2])
import safetensors
stock = [safetensors.safe_open]
import warming
warming.patch()
import fastst_patch
import safetensors.torch
from fastst_patch.dropin.handle import FastHandle
with fastst_patch.patched(small_file_bytes=0), fastst_patch.profile() as seen:
    with safetensors.safe_open(sys.argv[1], "pt") as handle:
        assert type(handle) is FastHandle and isinstance(handle, stock[0])
        assert {n for n in dir(stock[0]) if n[0] != "_"} <= set(dir(FastHandle))
        names = [handle.keys(), list(handle.get_tensors())]
    names.append(list(safetensors.torch.load_file(sys.argv[1])))
    assert fastst_patch.load_file(sys.argv[1]).keys() == set(names[2])
assert [report.path for report in seen.reports] == ["mmap"] * 3, seen.reports
assert warming.read == []
warming.unpatch()
with stock[0](sys.argv[1], "pt") as handle:
    assert names == [handle.keys(), *[list(handle.get_tensors())] * 2], names
assert fastst_patch.get_original("safetensors.safe_open") is stock[0]
print("fine")
"""


@pytest.mark.skipif(not hasattr(safetensors.safe_open, "get_tensors"), reason="safetensors < 0.8")
def test_theirs_before_the_import_of_ours(sample, tmp_path) -> None:
    """What ours knows of stock, it does not learn from theirs."""
    (tmp_path / "warming.py").write_text(STANDINS["warming"], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BEFORE_THE_IMPORT, sample, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


# ---------------------------------------------------------------- what is said


def _said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in said if issubclass(one.category, FallbackWarning)]


@pytest.fixture
def unknown(monkeypatch) -> Iterator[Any]:
    """A function of a program that nobody knows, in the place of load_file."""
    original = safetensors.torch.load_file
    module: dict[str, Any] = {"__name__": "a_program.loading", "asked": [], "original": original}
    exec(
        "def counting(filename, *args, **kwargs):\n"
        "    asked.append(filename)\n"
        "    return original(filename, *args, **kwargs)\n",
        module,
    )
    safetensors.torch.load_file = module["counting"]
    notices.say_once.cache_clear()
    yield module
    notices.say_once.cache_clear()
    safetensors.torch.load_file = original


def test_what_is_lost_is_said_once(unknown, sample, stock, is_fast) -> None:
    (text,) = _said(fastst_patch.patch)
    assert text == (
        "fastst_patch: a_program.loading.counting stood in the place of"
        " safetensors.torch.load_file, and loads that fastst_patch speeds up do not call it. To"
        " keep what it does, call patch() before it is put there, or leave"
        " safetensors.torch.load_file out of patch()'s targets."
    )
    status = fastst_patch.patch_map()["safetensors.torch.load_file"]
    assert (status.patched, status.wraps) == (True, "a_program.loading.counting")
    assert f"fastst_patch: {status.lost}" == text
    assert "over a_program.loading.counting" in str(fastst_patch.PatchReport({"": status}))
    fastst_patch.config()
    safetensors.torch.load_file(sample)
    assert unknown["asked"] == []
    fastst_patch.unpatch()
    assert safetensors.torch.load_file is unknown["counting"]
    assert _said(fastst_patch.patch) == []
    fastst_patch.unpatch()


def test_patching_that_may_not_warn_changes_nothing(unknown) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for how in (fastst_patch.patch, fastst_patch.patched().__enter__):
            with pytest.raises(FallbackWarning):
                how()
            assert safetensors.torch.load_file is unknown["counting"]
            assert not fastst_patch.is_patched()


def test_their_target_can_be_left_out(unknown, is_fast, sample) -> None:
    with fastst_patch.patched("safetensors.safe_open", **TINY):
        assert _said(lambda: safetensors.torch.load_file(sample)) == []
        assert unknown["asked"] == [sample]
        assert is_fast(safetensors.safe_open)


def test_they_may_come_later(unknown, sample, watch, stock) -> None:
    """Over ours, and known to be there when it says what it wraps."""
    safetensors.torch.load_file = unknown["original"]
    with fastst_patch.patched(**TINY):
        ours = safetensors.torch.load_file
        unknown["original"] = ours
        unknown["counting"].__wrapped__ = ours
        safetensors.torch.load_file = unknown["counting"]
        with watch() as seen:
            safetensors.torch.load_file(sample)
        seen.assert_fast(sample)
        assert unknown["asked"] == [sample]
        status = fastst_patch.patch_map()["safetensors.torch.load_file"]
        assert status.patched
        assert (status.wraps, status.lost) == (None, None)
        assert status.wrapped_by == "a_program.loading.counting"
    assert safetensors.torch.load_file is unknown["counting"]
    safetensors.torch.load_file(sample)


@pytest.mark.parametrize("theirs", REAL, indirect=True)
def test_nothing_is_said_where_nothing_is_lost(theirs, caplog) -> None:
    theirs.patch()
    try:
        caplog.set_level(logging.INFO, "fastst_patch")
        assert _said(fastst_patch.patch) == []
        for name in ("safetensors.safe_open", "safetensors.torch.load_file"):
            status = fastst_patch.patch_map()[name]
            assert (status.patched, status.lost) == (True, None)
            assert str(status.wraps).startswith(theirs.__name__)
            assert f"{name}: over {status.wraps}: {others.KNOWN[theirs.__name__]}" in caplog.text
    finally:
        fastst_patch.unpatch()
        theirs.unpatch()


@pytest.mark.filterwarnings("ignore::fastst_patch.FallbackWarning")
def test_a_wrapper_that_wraps_itself(unknown, sample, is_fast) -> None:
    unknown["counting"].__wrapped__ = unknown["counting"]
    with fastst_patch.patched(**TINY):
        assert is_fast(safetensors.torch.load_file)
    assert safetensors.torch.load_file is unknown["counting"]


def test_makers() -> None:
    import wrapt

    @functools.wraps(len)
    def around(*args: Any) -> Any:
        return len(*args)

    here = f"{__name__}.around"
    assert others.maker(around) == here
    assert others.maker(wrapt.FunctionWrapper(len, around)) == here
    assert others.maker(functools.partial(around)) == "functools.partial"
    assert others.maker(safetensors.safe_open) == "builtins.safe_open"
    assert others.maker(Path.read_text) == "pathlib.read_text"
    assert others.package_of(torch.nn.Module) == "torch"


@pytest.mark.parametrize("theirs", STANDINS, indirect=True)
def test_stand_ins_leave_nothing(theirs, alias) -> None:
    before = _now(alias)
    theirs.patch()
    assert not _is(_now(alias), before)
    theirs.unpatch()
    assert _is(_now(alias), before)
