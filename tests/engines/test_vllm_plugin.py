"""vLLM's plug-in, over a stand-in: the load format, and processes that are not reached."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import vllm_standin
from engine_standin import LARGEST, Loading, most_held

import fastst_patch
import fastst_plugins
from fastst_patch.config import current
from fastst_patch.patching import notices

# ---- the load format ----


def test_registering_adds_the_format_alone(registered) -> None:
    before = registered.loaders.formats[fastst_plugins.FORMAT]
    fastst_plugins.register_vllm()
    assert registered.loaders.formats[fastst_plugins.FORMAT] is before
    assert not fastst_patch.is_patched()
    assert type(registered.utils.safetensors_weights_iterator) is type(fastst_plugins.register_vllm)


def test_registering_never_raises(vllm, caplog) -> None:
    del vllm.loaders.register_model_loader
    fastst_plugins._watch_loaders.cache_clear()
    fastst_plugins.register_vllm()
    assert "load format 'fastst' is not added" in caplog.text


@pytest.mark.parametrize("patched", [False, True])
def test_format_streams_with_its_options(
    registered, folder, tensors, on_cpu, assert_same, patched, need_o_direct
) -> None:
    need_o_direct(str(folder / "m-1.safetensors"))
    extra = {"io": "direct"}
    with Loading() as seen, fastst_patch.patched() if patched else contextlib.nullcontext():
        ours = registered.load(folder, on_cpu, "fastst", model_loader_extra_config=extra)
    assert registered.utils.asked == []
    assert seen.only.path == "direct"
    assert_same({name: ours[name] for name in tensors}, tensors)


def test_format_goes_to_the_device(registered, folder, cuda, on_cuda) -> None:
    with Loading() as seen:
        registered.load(folder, on_cuda, "fastst")
    assert (seen.only.device, seen.only.path) == ("cuda:0", "ring")


@pytest.mark.parametrize("patched", [False, True])
def test_format_reads_parts_by_our_safe_open(registered, folder, tensors, on_cpu, patched) -> None:
    registered.parallel.sizes["tensor"] = 2
    extra = {"io": "buffered"}
    with (
        fastst_patch.profile() as seen,
        fastst_patch.patched() if patched else contextlib.nullcontext(),
    ):
        ours = registered.load(folder, on_cpu, "fastst", model_loader_extra_config=extra)
    assert set(ours) == set(tensors)
    found = [(report.call, report.path) for report in seen.reports]
    assert found[0] == ("vllm", "stock")
    assert set(found[1:]) == {("safe_open", "buffered")}


def test_options_of_a_load_are_not_those_of_others(registered, folder, on_cpu) -> None:
    registered.parallel.sizes["tensor"] = 2
    extra = {"io": "buffered"}  # which is left to vLLM's loop
    pairs = registered.pairs(folder, on_cpu, "fastst", model_loader_extra_config=extra)
    with fastst_patch.profile() as seen:
        next(pairs)
        assert current().io == "auto"
        list(pairs)
    assert {report.path for report in seen.reports} == {"stock", "buffered"}


def test_format_says_when_there_is_nothing_to_stream(registered, tmp_path, on_cpu) -> None:
    with Loading() as seen:
        registered.load(tmp_path, on_cpu, "fastst")
    assert "is not read by safetensors_weights_iterator" in seen.only.fallback_reason
    told = pytest.raises(fastst_patch.FaststError, match="is not read by")
    with fastst_patch.config_context(fallback="error"), told:
        registered.load(tmp_path, on_cpu, "fastst")


def test_format_obeys_the_switch(registered, folder, tensors, on_cpu, monkeypatch) -> None:
    monkeypatch.setenv("FASTST_ENABLED", "0")
    with Loading() as seen:
        ours = registered.load(folder, on_cpu, "fastst")
    assert set(ours) == set(tensors)
    assert len(registered.utils.asked) == 3
    assert seen.only.fallback_reason == "FASTST_ENABLED is 0"


def test_options_of_the_format_bound_it_too(registered, folder, cuda, on_cuda) -> None:
    extra = {"device_memory_budget": "4KiB", "tensors": "dlpack"}
    pairs = registered.pairs(folder, on_cuda, "fastst", model_loader_extra_config=extra)
    assert 0 < most_held(cuda, pairs) <= 4096 + 2 * LARGEST


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"oi": "direct"}, "unknown option 'oi'"),
        ({"io": "fast"}, "option io='fast': allowed are"),
        ({"num_threads": 4}, "unknown option 'num_threads'"),
        ({"log_level": "info"}, "set FASTST_LOG_LEVEL"),
        ({"fallback": "warn"}, "set FASTST_FALLBACK"),
        (["io"], "give a JSON object"),
        (None, "give a JSON object"),
    ],
)
def test_options_of_the_format_are_checked(registered, extra, text) -> None:
    with pytest.raises(fastst_patch.OptionError) as caught:
        registered.loader("fastst", model_loader_extra_config=extra)
    assert text in str(caught.value)


def test_keys_of_vllms_own_go_on(registered) -> None:
    extra = {"enable_weights_track": False, "threads": 2}
    loader = registered.loader("fastst", model_loader_extra_config=extra)
    assert loader.load_config.model_loader_extra_config == {"enable_weights_track": False}
    assert extra == {"enable_weights_track": False, "threads": 2}


# ---- processes that are not reached ----


def test_nothing_is_said_in_a_single_process(vllm, monkeypatch) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    envs = SimpleNamespace(VLLM_ENABLE_V1_MULTIPROCESSING=False)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    notices.say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastst_patch.patch()


LATER = """
import sys, warnings
warnings.simplefilter("always")
import fastst_patch
fastst_patch.patch()
print("before", flush=True)
import vllm
import vllm.model_executor.model_loader as loaders
print("vllm.load", fastst_patch.is_patched("vllm.load"), list(loaders.formats))
"""


@pytest.mark.parametrize("error", [False, True])
def test_patched_before_vllm_is_imported(tmp_path, error, monkeypatch) -> None:
    monkeypatch.delenv("FASTST_ENABLED", raising=False)
    vllm_standin.write(tmp_path)
    text = LATER.replace('"always"', '"error", fastst_patch.FallbackWarning') if error else LATER
    text = text.replace("import sys, warnings", "import sys, warnings, fastst_patch")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{text}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "vllm.load True ['auto']" in done.stdout
    assert done.stderr.count("patch() does not reach") == (0 if error else 1)
