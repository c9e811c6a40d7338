"""Libraries that load a model from a folder of stand-ins, from a web server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from fault_server import Remote, since, status
from kept_files import settled
from places import SUPPORT
from streamed_models import (
    NEEDS,
    a_llama,  # noqa: F401 - a fixture
    a_server,  # noqa: F401 - a fixture
    digest,
    home,  # noqa: F401 - a fixture
    load_in_child,
)

import fastst_patch
import fastst_patch.bench.remote
from fastst_patch import bench
from fastst_patch.cli import launcher
from fastst_patch.cli.main import main
from fastst_patch.config import child_environment
from fastst_patch.sources.base import RemoteChangedError, RemoteError

transformers = pytest.importorskip("transformers", minversion="5.0", reason=NEEDS)

pytestmark = pytest.mark.filterwarnings("ignore::fastst_patch.sources.base.RemoteWarning")


def assert_streamed(seen: Any) -> None:
    assert seen.reports
    assert {report.path for report in seen.reports} == {"http"}, seen.reports


# ---- transformers


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}], ids=["plain", "cast"])
def test_transformers(served, sharded, options) -> None:
    kind = transformers.AutoModelForCausalLM
    expected = digest(kind.from_pretrained(sharded, **options))
    folder = fastst_patch.remote(served.put(sharded))
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        assert digest(model) == expected
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    del model
    assert_streamed(seen)


def test_transformers_finds_the_dtype(served, sharded, tmp_path) -> None:
    folder = tmp_path / "half"
    model = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="20KB")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    path = fastst_patch.remote(served.put(folder))
    with fastst_patch.patched():
        found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert found.dtype is torch.float16
    assert digest(found) == digest(model)


def test_a_child_process(served, sharded) -> None:
    expected = digest(transformers.AutoModelForCausalLM.from_pretrained(sharded))
    folder = fastst_patch.remote(served.put(sharded))
    done = load_in_child(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]
    plain = load_in_child(folder, FASTST_ENABLED="0")
    assert plain.returncode != 0
    assert "holds no weights" in plain.stderr
    assert "fastst_patch.patch()" in plain.stderr


SPAWN = """
import multiprocessing, sys
sys.path.insert(0, {support!r})

def load(path, answers):
    from transformers import AutoModelForCausalLM
    from streamed_models import digest
    answers.put(digest(AutoModelForCausalLM.from_pretrained(path)))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=load, args=(sys.argv[1], answers))
    child.start()
    print(answers.get(timeout=120))
    child.join()
"""


def test_a_spawned_child(served, sharded, tmp_path) -> None:
    expected = digest(transformers.AutoModelForCausalLM.from_pretrained(sharded))
    folder = fastst_patch.remote(served.put(sharded))
    script = tmp_path / "script.py"
    script.write_text(SPAWN.format(support=str(SUPPORT)))
    done = subprocess.run(
        [sys.executable, str(script), folder], capture_output=True, text=True, check=False,
        env={**os.environ, **child_environment({}, launcher._site())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]


def test_to_a_device(served, sharded, pretrained_to_cuda) -> None:
    kind = transformers.AutoModelForCausalLM
    expected = digest(kind.from_pretrained(sharded))
    folder = fastst_patch.remote(served.put(sharded))
    with fastst_patch.profile() as seen:
        model = kind.from_pretrained(folder, device_map={"": "cuda:0"})
    assert digest(model) == expected
    streamed = [report for report in seen.reports if report.call == "from_pretrained"]
    assert {(report.device, report.fallback_reason) for report in streamed} == {("cuda:0", None)}
    assert sum(report.tensors for report in streamed) == len(model.state_dict())


# ---- other libraries


def test_accelerate(served, sharded, consumer) -> None:
    accelerate = consumer("accelerate")
    config = transformers.AutoConfig.from_pretrained(sharded)
    expected = digest(transformers.AutoModelForCausalLM.from_pretrained(sharded))
    folder = fastst_patch.remote(served.put(sharded))
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        model = accelerate.load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})
    assert digest(model) == expected
    assert_streamed(seen)


def test_accelerate_offloads_to_disk(served, sharded, consumer, tmp_path) -> None:
    accelerate = consumer("accelerate")
    config = transformers.AutoConfig.from_pretrained(sharded)
    stock = transformers.AutoModelForCausalLM.from_pretrained(sharded)
    tokens = torch.arange(8).reshape(1, 8)
    folder = fastst_patch.remote(served.put(sharded), cache=str(tmp_path / "cache"))
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    with fastst_patch.patched():
        model = accelerate.load_checkpoint_and_dispatch(
            model,
            folder,
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=str(tmp_path / "offload"),
        )
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(tokens).logits, stock(tokens).logits)


def test_sentence_transformers(served, minilm) -> None:
    sentences = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    stock = sentences.SentenceTransformer(str(minilm), device="cpu")
    folder = fastst_patch.remote(served.put(minilm))
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        model = sentences.SentenceTransformer(folder, device="cpu", local_files_only=True)
        assert digest(model) == digest(stock)
        assert (model.encode(["a sentence"]) == stock.encode(["a sentence"])).all()
    del model
    assert_streamed(seen)


def test_diffusers(served, tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path / "whole")
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    for name in ("whole", "shards"):
        folder = fastst_patch.remote(served.put(tmp_path / name, name))
        with fastst_patch.patched(), fastst_patch.profile() as seen:
            found = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert digest(found.unet) == digest(unet)
        assert_streamed(seen)


def test_torch_checkpoint(served, sharded) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(checkpoint, "HuggingFaceStorageReader"):
        pytest.skip("this torch has no HuggingFaceStorageReader")
    stock = transformers.AutoModelForCausalLM.from_pretrained(sharded)
    folder = fastst_patch.remote(served.put(sharded))
    state = {
        name: torch.zeros_like(tensor)
        for path in sharded.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    with fastst_patch.patched():
        checkpoint.load(state, checkpoint.HuggingFaceStorageReader(folder), no_dist=True)
    theirs = stock.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())


def test_the_explicit_loader_and_ranks(served, sharded) -> None:
    folder = Path(fastst_patch.remote(served.put(sharded)))
    files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    expected = {
        name: tensor
        for path in sorted(sharded.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    loader = fastst_patch.ParallelLoader(None, files, device="cpu", use_tqdm_on_load=False)
    walked = {name: tensor.clone() for name, tensor in loader.iterate_weights()}
    for found in (walked, fastst_patch.load_sharded(folder)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- single calls


@pytest.fixture
def stand_in(served, sample, tmp_path) -> str:
    served.files["/m/sample.safetensors"] = Remote(Path(sample).read_bytes())
    return fastst_patch.remote(served.url("/m/sample.safetensors"))


def test_calls_of_safetensors(stand_in, sample, assert_same) -> None:
    expected = safetensors.torch.load_file(sample)
    with fastst_patch.patched():
        assert_same(safetensors.torch.load_file(stand_in), expected)
        assert_same(safetensors.torch.load_file(filename=Path(stand_in)), expected)
        with safetensors.safe_open(stand_in, framework="pt") as handle:
            assert sorted(handle.keys()) == sorted(expected)
            assert torch.equal(handle.get_tensor("w"), expected["w"])
            assert torch.equal(handle.get_slice("w")[3:5], expected["w"][3:5])
        with safetensors.safe_open(stand_in, "np") as handle:
            assert handle.get_tensor("b").tolist() == expected["b"].tolist()
    assert_same(fastst_patch.load_file(stand_in), expected)


def test_one_range_for_a_slice(served, raw, tmp_path) -> None:
    path = raw.tensors({"a": torch.arange(2 << 20, dtype=torch.int16).reshape(1024, -1)})
    served.files["/m/big.safetensors"] = Remote(Path(path).read_bytes())
    url = served.url("/m/big.safetensors")
    folder = fastst_patch.remote(url)
    served.requests.clear()
    with fastst_patch.patched(), safetensors.safe_open(folder, "pt") as handle:
        rows = handle.get_slice("a")[900:910]
    assert torch.equal(rows, safetensors.torch.load_file(path)["a"][900:910])
    assert len(served.asked_for("big.safetensors")) == 2  # the header, and the rows


def test_calls_that_stock_would_do(stand_in) -> None:
    with fastst_patch.patched():
        for options in ({"device": "mps"}, {"device": "meta"}):
            with pytest.raises(Exception) as caught:
                safetensors.torch.load_file(stand_in, **options)
            assert "stand-in: this file holds no weights" not in str(caught.value)


def test_unpatched_stock_refuses(stand_in) -> None:
    for call in (
        lambda: safetensors.torch.load_file(stand_in),
        lambda: safetensors.safe_open(stand_in, "pt"),
        lambda: safetensors.numpy.load_file(stand_in),
        lambda: safetensors.torch.load(Path(stand_in).read_bytes()),
    ):
        with pytest.raises(safetensors.SafetensorError, match=r"fastst_patch\.patch\(\)"):
            call()


def test_a_changed_file_is_told(served, stand_in) -> None:
    remote = served.files["/m/sample.safetensors"]
    served.files["/m/sample.safetensors"] = Remote(remote.content[:-1] + b"x")
    with fastst_patch.patched(), pytest.raises(RemoteChangedError, match="make the folder again"):
        safetensors.torch.load_file(stand_in)
    again = fastst_patch.remote(served.url("/m/sample.safetensors"))
    assert again != stand_in
    assert fastst_patch.load_file(again).keys() == {"w", "b", "h"}


def test_errors_of_the_network_are_told(served, stand_in) -> None:
    served.faults = since(0, status(403))
    with fastst_patch.patched(), pytest.raises(PermissionError) as caught:
        safetensors.torch.load_file(stand_in)
    assert isinstance(caught.value, RemoteError)
    with fastst_patch.patched(), pytest.raises(PermissionError):
        safetensors.safe_open(stand_in, "np")


def test_a_local_file_costs_nothing_more(raw, monkeypatch) -> None:
    from fastst_patch.sources import standin

    monkeypatch.setattr(standin, "find", lambda fd: pytest.fail("looked into a valid file"))
    path = raw.tensors({"w": torch.ones(100)})
    with fastst_patch.patched(), fastst_patch.profile() as seen:
        safetensors.torch.load_file(path)
    assert {report.path for report in seen.reports} <= {"mmap", "mmap+readahead"}


# ---- cache


def test_the_second_load_is_local(served, sharded, tmp_path) -> None:
    kind = transformers.AutoModelForCausalLM
    expected = digest(kind.from_pretrained(sharded))
    url = served.put(sharded)
    folder = fastst_patch.remote(url, cache=str(tmp_path / "cache"))
    with fastst_patch.patched():
        with fastst_patch.profile() as first:
            assert digest(kind.from_pretrained(folder)) == expected
        assert_streamed(first)
        settled()
        served.requests.clear()
        served.sent = 0
        with fastst_patch.profile() as second:
            assert digest(kind.from_pretrained(folder)) == expected
    assert {report.path for report in second.reports} <= {"mmap", "mmap+readahead"}
    names = [path.name for path in sharded.glob("*.safetensors")]
    assert {name: served.asked_for(name) for name in names} == {
        name: ["bytes=0-0"] for name in names
    }
    assert served.sent == len(names)


def test_a_url_is_cached_and_a_change_is_noticed(served, sample, tmp_path, assert_same) -> None:
    served.files["/m.safetensors"] = Remote(Path(sample).read_bytes())
    url = served.url("/m.safetensors")
    expected = safetensors.torch.load_file(sample)
    with fastst_patch.patched(remote_cache=str(tmp_path / "cache")):
        for path in ("http", "mmap"):
            with fastst_patch.profile() as seen:
                assert_same(safetensors.torch.load_file(url), expected)
            assert seen.reports[0].path.startswith(path)
            settled()
        other = {"w": torch.zeros(3)}
        served.files["/m.safetensors"] = Remote(safetensors.torch.save(other))
        assert_same(safetensors.torch.load_file(url), other)


# ---- the command


def test_the_command_prints_the_folder(served, sharded, capsys) -> None:
    url = served.put(sharded)
    assert main(["remote", url]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == fastst_patch.remote(url)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ftp://host/m"], 1, "s3://"),
        (["s3://b/m", "--revision", "v1"], 2, "revision"),
        (["s3://b/m", "-o", "storage_options=nonsense"], 2, "storage_options"),
        (["/no/such/folder"], 1, "/no/such/folder"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, code, says, capsys) -> None:
    assert main(["remote", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert says in line


def test_no_secret_is_printed(served, sharded, capsys) -> None:
    url = served.put(sharded).replace("http://", "http://user:hunter2@")
    served.faults = since(0, status(403))
    assert main(["remote", f"{url}?sig=hunter3"]) == 1
    printed = capsys.readouterr()
    assert "hunter" not in printed.out + printed.err


def test_doctor_of_a_url(served, sharded, sample, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    served.files["/m.safetensors"] = Remote(Path(sample).read_bytes())
    url = served.url("/m.safetensors")
    assert main(["doctor", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "works here" in lines[0]
    for word in ("reachable", "auth: granted", "ranges: served", "changes: are noticed",
                 "latency", "weights: 3 tensors"):  # fmt: skip
        assert len([line for line in lines if f"{url}: {word}" in line]) == 1, word
    assert main(["doctor", served.put(sharded)]) == 0
    assert "files, " in capsys.readouterr().out
    served.faults = since(0, status(403))
    assert main(["doctor", f"{url}?sig=hunter2", "--json"]) == 1
    text = capsys.readouterr().out
    found = json.loads(text)
    assert "403" in found["problems"][0]
    assert "hunter2" not in text


def test_doctor_of_stand_ins(served, sharded, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = fastst_patch.remote(served.put(sharded))
    assert main(["doctor", folder]) == 0
    count = len(list(sharded.glob("*.safetensors")))
    printed = capsys.readouterr().out
    assert f"{folder}: {count} files, for remote ones: name the URL to see what is there" in printed
    assert "cached" not in printed.partition(folder)[2].partition("\n")[0]


def test_doctor_of_a_url_that_leads_nowhere(capsys) -> None:
    assert main(["doctor", "http://127.0.0.1:9/m.safetensors"]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().out


def test_bench_of_a_url(served, sharded, tmp_path, capsys) -> None:
    url = served.put(sharded)
    report = tmp_path / "report.json"
    arguments = ["--repeat", "1", "--dir", str(tmp_path), "--json", str(report)]
    assert main(["bench", url, *arguments]) == 0
    found = json.loads(report.read_text())
    assert [row["loader"] for row in found["results"]] == [
        "streamed", "downloaded, then stock", "bytes alone",
    ]  # fmt: skip
    assert found["results"][0]["path"] == "http"
    assert found["bytes"] == sum(p.stat().st_size for p in sharded.glob("*.safetensors"))
    assert "Too few rounds" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("fastst-bench")] == []


def test_bench_of_stand_ins(served, sharded, tmp_path, capsys) -> None:
    """It measures what they stand for, with what the URL held in this process."""
    url = served.put(sharded)
    folder = fastst_patch.remote(f"{url}?sig=1")
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert bench.remote.with_urls([folder]) == [f"{url}/{name}?sig=1" for name in names]
    assert bench.remote.with_urls([f"{folder}/{names[0]}", url]) == [f"{url}/{names[0]}?sig=1", url]
    assert bench.remote.with_urls([str(sharded), "/none"]) == [str(sharded), "/none"]
    for path in (f"{folder}/{names[0]}", str(sharded / names[1])):
        os.symlink(path, tmp_path / os.path.basename(path))
    assert main(["bench", str(tmp_path)]) == 2
    assert "not both" in capsys.readouterr().err
    served.files.clear()
    assert main(["bench", folder]) == 1
    assert "no such file" in capsys.readouterr().err


def test_bench_of_a_url_and_a_path(served, sample, capsys) -> None:
    assert main(["bench", served.url("/m.safetensors"), sample]) == 2
    assert "not both" in capsys.readouterr().err
