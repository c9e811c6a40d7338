"""Which calls take the fast path, what the options make of those that do not, and verify."""

from __future__ import annotations

import functools
import io
import logging
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from fake_path import FakePath
from reported import reported

import fastst_patch
from fastst_patch import engine, stock
from fastst_patch.dropin.eligibility import check_descriptors, check_move, path_of, same, verified
from fastst_patch.errors import Fallback
from fastst_patch.files import cpu

# Positional and keyword arguments after the file name.
ARGUMENTS: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    *(((), {}), (("pt",), {}), (("torch",), {}), (("pytorch",), {}), ((), {"framework": "pt"})),
    *((("np",), {}), (("numpy",), {}), (("tf",), {}), (("tensorflow",), {}), (("jax",), {})),
    *((("flax",), {}), (("mlx",), {}), (("paddle",), {}), (("PT",), {}), (("",), {})),
    *(((3,), {}), ((None,), {}), ((b"pt",), {}), (("xx", "bad"), {}), (("pt", "cpu", "mmap"), {})),
    *((("pt", "cpu"), {}), (("pt", None), {}), (("pt",), {"device": "cpu"})),
    *((("pt",), {"device": None}), (("pt", "cpu"), {"device": "cpu"}), (("pt",), {"foo": 1})),
    *((("pt",), {"foo": 1, "device": "bad"}), (("xx",), {"foo": 1}), (("pt",), {"filename": "x"})),
    *(
        (("pt", device), {})
        for device in (
            *("cpu:0", "CPU", "", " cpu", "gpu", "meta", "disk", "cuda", "cuda:0", "cuda:1"),
            *("cuda:x", "cuda:", "cuda:-1", "cuda:0:1", "cuda:99999999999999999999", "cuda0"),
            *("mps", "mps:0", "mps:1", "mps:x", "npu", "npu:0", "xpu", "xpu:1", "xla", "xla:0"),
            *("mlu", "musa", "hpu", "hpu:y", "vulkan", "privateuseone", "cpu\0", "cuda:+1"),
            *(0, 1, -1, 2**63, 2**64, True, False, 1.0, b"cpu", [], (), {}, object, "cuda: 0"),
            *(torch.device("cpu"), torch.device("cuda", 0), torch.float32, FakePath("cpu")),
        )
    ),
    *((("np", device), {}) for device in ("cpu", None, "cuda", "cuda:1", "mps", 0, 1, "bad")),
    *(
        (("pt", *device), {"backend": backend})
        for device in ((), ("cpu",), ("cuda",), ("bad",))
        for backend in ("mmap", "pread", "foo", "", None, 1, "MMAP", b"mmap")
    ),
)


@pytest.mark.parametrize("entry", ["safe_open", "handle", "load_file"])
@pytest.mark.parametrize("exists", [True, False])
def test_arguments(sample, stock, fast, agree, tmp_path, entry, exists) -> None:
    """Every accepted form gives the same answers, every other one the same exception."""
    path = sample if exists else str(tmp_path / "missing")
    if entry == "handle" and stock.handle is None:
        pytest.skip(f"safetensors {safetensors.__version__} has no _safe_open_handle")

    def call(loaders: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if entry == "load_file":
            return loaders.load_file(path, *args[1:], **kwargs)
        if entry == "handle":
            with open(sample, "rb") as file:
                return loaders.handle(file, *args, **kwargs)
        return loaders.safe_open(path, *args, **kwargs)

    uses: tuple[Callable[[Any], Any], ...] = (
        lambda h: h.keys(),
        lambda h: h.offset_keys(),
        lambda h: h.metadata(),
        lambda h: h.get_slice("w").get_shape(),
        lambda h: h.get_tensor("w"),
        lambda h: h.get_tensor("h"),
        lambda h: h.get_slice("w")[2:4, :7],
        lambda h: h.get_slice("w")[-1],
        lambda h: h.get_tensors(),
        lambda h: h.__exit__(None, None, None),
        lambda h: h.keys(),
    )
    for args, kwargs in ARGUMENTS:
        ours, theirs = agree(*(functools.partial(call, x, args, kwargs) for x in (fast, stock)))
        if theirs is not None and entry != "load_file":
            for use in uses:
                agree(functools.partial(use, ours), functools.partial(use, theirs))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((), {"framework": "pt"}),
        ((), {"filename": "x"}),
        ((), {"filename": "{path}", "framework": "pt"}),
        ((), {"framework": "pt", "device": "cpu", "filename": "{path}", "backend": "mmap"}),
        (("{path}", "pt", "cpu", "mmap", 1), {}),
    ],
)
def test_argument_counts(sample, stock, fast, agree, args, kwargs) -> None:
    args = tuple(sample if a == "{path}" else a for a in args)
    kwargs = {k: sample if v == "{path}" else v for k, v in kwargs.items()}
    agree(lambda: fast.safe_open(*args, **kwargs), lambda: stock.safe_open(*args, **kwargs))
    kwargs.pop("framework", None)
    agree(lambda: fast.load_file(*args, **kwargs), lambda: stock.load_file(*args, **kwargs))


def test_what_goes_to_stock_says_so(sample, stock, fast, watch) -> None:
    newer = hasattr(stock.safe_open, "get_tensors")  # backend came with it, in 0.8
    pread, mapped = ({"backend": "pread"}, {"backend": "mmap"}) if newer else ({"device": 0}, {})
    for args, kwargs in ((("np",), {}), (("pt",), pread), (("pt", "cuda"), {})):
        with watch() as seen, fast.safe_open(sample, *args, **kwargs) as handle:
            handle.keys()
        seen.assert_stock(sample)
    for args, kwargs in ((("pt",), {}), (("torch", "cpu"), mapped), (("pt", None), {})):
        with watch() as seen, fast.safe_open(sample, *args, **kwargs) as handle:
            handle.get_tensor("w")
        seen.assert_fast(sample)


def test_small_files_go_to_stock(checkpoint: Path) -> None:
    report = reported(checkpoint, small_file_bytes=checkpoint.stat().st_size)
    assert (report.path, report.fallback_reason) == ("stock", "the file is small")
    assert reported(checkpoint, small_file_bytes=checkpoint.stat().st_size - 1).path != "stock"
    with fastst_patch.config_context(small_file_bytes="1GiB", fallback="error"):
        fastst_patch.load_file(checkpoint)  # by design, hence no error


@pytest.mark.parametrize("call", ["load_file", "safe_open"])
def test_fallback_policies(checkpoint: Path, call: str) -> None:
    def run() -> None:
        if call == "load_file" and stock.BACKENDS:
            fastst_patch.load_file(checkpoint, backend="pread")
        elif call == "load_file":
            with torch.inference_mode():
                fastst_patch.load_file(checkpoint)
        else:
            fastst_patch.safe_open(checkpoint, "pt", "npu")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    with fastst_patch.config_context(fallback="warn"):
        with pytest.warns(fastst_patch.FallbackWarning, match=r"pread|npu|mode"):
            run()
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="left to stock"):
            run()
        with pytest.raises(FileNotFoundError):  # stock's own error comes first
            fastst_patch.load_file(checkpoint.with_name("absent"))
        fastst_patch.load_file(checkpoint)


def test_verify_compares_with_stock(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reported(checkpoint, verify=True)
    right = cpu.HostFile.all_tensors

    def wrong(self: cpu.HostFile) -> dict[str, torch.Tensor]:
        found = right(self)
        found["w2"][5, 5] += 1
        return found

    monkeypatch.setattr(cpu.HostFile, "all_tensors", wrong)
    with caplog.at_level(logging.ERROR, "fastst_patch"):
        reported(checkpoint, verify=True)  # stock's tensors are handed out
    assert "w2" in caplog.text
    with fastst_patch.config_context(verify=True, fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="w2"):
            fastst_patch.load_file(checkpoint)


# ---- the parts ----


def test_paths_of_callers() -> None:
    class Named(str):
        pass

    for name in ("a", Path("a"), FakePath("a"), Named("a")):
        assert path_of(name) == "a"
    for other in (b"a", FakePath(b"a"), 3, None, io.BytesIO()):
        with pytest.raises(Fallback, match="no str"):
            path_of(other)


def test_same_means_dtype_shape_and_bytes() -> None:
    t = torch.tensor([0.0, float("nan")])
    assert same(t, t.clone())
    assert same(torch.zeros(0, 3), torch.zeros(0, 3))
    assert same(torch.zeros(4, 2).T, torch.zeros(2, 4))
    for other in (None, t.double(), t.reshape(1, 2), torch.tensor([-0.0, float("nan")])):
        assert not same(other, t)


def test_a_result_in_another_order_is_not_verified(caplog: pytest.LogCaptureFixture) -> None:
    a, b, empty = torch.ones(1), torch.ones(2), torch.ones(0)
    theirs = {"a": a, "e": empty, "b": b}
    ours = {"e": empty, "a": a, "b": b}  # empty tensors may stand anywhere
    assert verified(fastst_patch.config(), "path", ours, theirs) is ours
    for wrong in ({"b": b, "a": a, "e": empty}, {"a": a, "b": b}, {**ours, "c": empty}):
        assert verified(fastst_patch.config(), "path", wrong, theirs) is theirs
        assert "differs from stock's" in caplog.text
        caplog.clear()


def test_very_many_handles_go_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    check_descriptors()
    monkeypatch.setattr(engine, "open_files", lambda: 1 << 40)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(Fallback, match="very many handles"):
        check_descriptors()


def test_integrations_move_nothing_under_verify_or_a_mode() -> None:
    check_move(fastst_patch.config())
    with fastst_patch.config_context(verify=True) as config, pytest.raises(Fallback):
        check_move(config)
    with torch.inference_mode(), pytest.raises(Fallback, match="torch mode"):
        check_move(fastst_patch.config())
