"""transformers, patched: folders, broken files, torch's modes, offload to the disk, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import MODELS, rewrite, transformers
from twice import data_bytes, portrait, tensor_bytes, twice, weights_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# ---------------------------------------------------------------- where the files are


def test_subfolder_and_variant(saved, both, tmp_path) -> None:
    folder = tmp_path / "repository"
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("tied shards"))
    model.save_pretrained(folder / "inside")
    model.half().save_pretrained(folder / "inside", variant="fp16", max_shard_size="20KB")
    auto = transformers.AutoModelForCausalLM
    plain = [f for f in weights_in(folder) if "fp16" not in f.name]
    ours, _ = both(auto, folder, check=False, subfolder="inside")
    ours.assert_fast(plain)
    ours, _ = both(auto, folder, check=False, subfolder="inside", variant="fp16", dtype="auto")
    ours.assert_fast(set(weights_in(folder)) - set(plain))
    assert ours.value[0].dtype == torch.float16
    for options in ({"variant": "fp16"}, {"subfolder": "inside", "variant": "none such"}):
        _, theirs = both(auto, folder, check=False, **options)
        assert theirs.error is not None


def test_classes_and_configs(saved, both) -> None:
    """Auto classes, another config, weights given as a state dict, and files read as bytes."""
    folder = saved("tied shards")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    ours, theirs = both(transformers.AutoModelForCausalLM, folder, config=config)
    assert theirs.said or theirs.value[1]["missing_keys"]  # the head was not saved
    both(transformers.AutoModel, folder)
    both(transformers.AutoModelForCausalLM, folder, attn_implementation="eager")
    both(transformers.AutoModelForCausalLM, folder, num_hidden_layers=1, check=False)
    ours, _ = both(transformers.AutoModelForCausalLM, folder, disable_mmap=True, check=False)
    assert ours.reports == []  # safetensors.torch.load, which is stock's


def test_state_dict_of_a_file(saved, assert_same, tmp_path) -> None:
    """Loaded by safetensors, handed to from_pretrained; and transformers' own small loaders."""
    from transformers.modeling_utils import load_state_dict
    from transformers.trainer_utils import load_sharded_checkpoint

    (file,) = weights_in(saved("qwen3 moe"))
    cls = transformers.Qwen3MoeForCausalLM

    def load(_: Path) -> Any:
        tensors = safetensors.torch.load_file(file)
        config = cls.config_class.from_pretrained(saved("qwen3 moe"))
        return cls.from_pretrained(None, config=config, state_dict=tensors)

    ours, theirs = twice(load, tmp_path)
    ours.assert_fast([file])
    assert_same(portrait(ours.value), portrait(theirs.value))

    for where in ("cpu", "meta"):
        ours, theirs = twice(lambda _, where=where: load_state_dict(str(file), where), tmp_path)
        assert_same(ours.value, theirs.value)
    shards = saved("tied shards")

    def sharded(_: Path) -> Any:
        model = MODELS["tied shards"][0]()
        return model, load_sharded_checkpoint(model, str(shards), strict=False)

    ours, theirs = twice(sharded, tmp_path)
    ours.assert_fast(weights_in(shards))
    assert ours.value[1] == theirs.value[1]
    assert_same(portrait(ours.value[0]), portrait(theirs.value[0]))


@pytest.mark.parametrize(
    "spoil",
    [
        "no shard", "no tensor", "short", "empty", "header", "folder", "text", "pickle asked for",
        "no metadata", "wrong index",
    ],
)  # fmt: skip
def test_spoiled_files(own, both, spoil) -> None:
    """The exception and its text are stock's, whether we or stock opened the files."""
    folder = own("tied shards")
    file = weights_in(folder)[1]
    options: dict[str, Any] = {}
    if spoil == "no shard":
        file.unlink()
    elif spoil == "no tensor":
        rewrite(file, lambda tensors: tensors.popitem())
    elif spoil == "short":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:-100])
    elif spoil == "empty":
        file.unlink()
        file.touch()
    elif spoil == "header":
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:8] + b"{" + content[8:])
    elif spoil == "folder":
        file.unlink()
        file.mkdir()
    elif spoil == "text":
        file.unlink()
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif spoil == "pickle asked for":
        options["use_safetensors"] = False
    elif spoil == "no metadata":
        tensors = {key: t.clone() for key, t in safetensors.torch.load_file(file).items()}
        file.unlink()
        safetensors.torch.save_file(tensors, file)
    else:
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("layers.1", "layers.9"))
    _, theirs = both(transformers.LlamaForCausalLM, folder, check=False, **options)
    assert theirs.error is not None or theirs.value is not None


@pytest.mark.parametrize("where", ["meta", "cpu", "inference", "float64", "deterministic"])
def test_torch_modes(saved, assert_same, tmp_path, where) -> None:
    def load(_: Path) -> Any:
        modes: dict[str, Any] = {"meta": torch.device("meta"), "cpu": torch.device("cpu")}
        auto = transformers.AutoModelForCausalLM
        if where in modes:
            with modes[where]:
                return auto.from_pretrained(saved("mixtral"))
        if where == "inference":
            with torch.inference_mode():
                return auto.from_pretrained(saved("mixtral"))
        if where == "float64":
            torch.set_default_dtype(torch.float64)
        else:
            torch.use_deterministic_algorithms(True)
        try:
            return auto.from_pretrained(saved("mixtral"))
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)

    ours, theirs = twice(load, tmp_path)
    assert (theirs.error is not None) == (where == "meta")
    if theirs.error is not None:
        return
    assert_same(portrait(ours.value), portrait(theirs.value))
    if where in ("cpu", "inference"):  # stock's way of making tensors is what torch shall see
        reasons = {(r.path, r.fallback_reason) for r in ours.reports}
        assert reasons == {("stock", "a torch mode or default device is in force")}
        assert {Path(r.file) for r in ours.reports} == set(weights_in(saved("mixtral")))
    else:
        ours.assert_fast(weights_in(saved("mixtral")))


# ---------------------------------------------------------------- offload


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize("name", ["tied shards", "one file", "mixtral", "qwen3 moe"])
def test_disk_offload(saved, assert_same, tmp_path, name, dtype) -> None:
    """Lazy as stock is: the map's last part stays in the files, opened again on every forward."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk" if name == "one file" else "cpu",
    }
    tokens, forwards = torch.arange(12).view(2, 6), 3

    def load(scratch: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            saved(name), device_map=device_map, offload_folder=scratch, dtype=dtype
        )
        loaded = portrait(model)
        with torch.no_grad():
            return model, loaded, [model(tokens).logits for _ in range(forwards)]

    ours, theirs = twice(load, tmp_path)
    assert theirs.error is None
    assert_same(ours.value[1:], theirs.value[1:])
    assert ours.value[0].hf_device_map == theirs.value[0].hf_device_map
    files = weights_in(saved(name))
    again = {Path(r.file) for r in ours.reports} - set(files)  # merged experts, saved anew
    parts = ("model.layers.1.", "lm_head.") if name == "one file" else ("model.layers.1.",)
    offloaded = [key for key, _ in ours.value[1]["tensors"] if key.startswith(parts)]
    sizes = {  # mixtral's file has other names
        key.replace("block_sparse_moe", "mlp"): size
        for file in files
        for key, size in tensor_bytes(file).items()
    }
    sizes |= {file.name.removesuffix(".safetensors"): data_bytes(file) for file in again}
    read = sum(map(data_bytes, files)) + forwards * sum(sizes[key] for key in offloaded)
    ours.assert_fast({*files, *again}, read)
    assert bool(again) == (name in ("mixtral", "qwen3 moe"))
    assert len(ours.reports) >= len(files) + forwards * (len(offloaded) - 1)


# ---------------------------------------------------------------- adapters


def test_adapters(saved, both, assert_same, tmp_path) -> None:
    """A folder with an adapter only: its base is loaded too; and an adapter loaded afterwards."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(saved("tied shards"))
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path / "adapter"
    peft.get_peft_model(base, config).save_pretrained(folder)
    files = [*weights_in(saved("tied shards")), *weights_in(folder)]
    assert len(weights_in(folder)) == 1
    ours, _ = both(transformers.AutoModelForCausalLM, folder, check=False)
    ours.assert_fast(files)

    def load(_: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(saved("tied shards"))
        model.load_adapter(str(folder), adapter_name="a")
        model.load_adapter(str(folder), adapter_name="b")
        return model

    ours, theirs = twice(load, tmp_path)
    ours.assert_fast(files, sum(map(data_bytes, files)) + data_bytes(files[-1]))
    assert_same(portrait(ours.value), portrait(theirs.value))
