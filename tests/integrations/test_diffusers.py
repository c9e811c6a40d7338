"""diffusers, patched: a pipeline of random weights, loaded in every way that works on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm
import pytest
import safetensors.torch
import torch
from packaging.version import Version
from torch import nn
from twice import Failed, data_bytes, tensor_bytes, twice, weights_in

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VERSION = Version(diffusers.__version__)
WORDS = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abcdefgh"), *"abcdefgh"]


def _tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def _pipeline() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )
    text = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=16,
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=_tokenizer(),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=10),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pipeline, whole, in shards, and its fp16 variant."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = _pipeline()
    pipeline.save_pretrained(folder / "whole")
    pipeline.save_pretrained(folder / "shards", max_shard_size="40KB")
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder / "fp16", variant="fp16")
    assert len(weights_in(folder / "whole")) == 3
    assert len(weights_in(folder / "shards" / "unet")) > 2
    return folder


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}


def _picture(pipeline: Any, prompt: str = "a b c", **options: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="np",
        generator=torch.Generator().manual_seed(3),
        **options,
    ).images


# ---------------------------------------------------------------- from_pretrained

STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("whole", {}),
    "shards": ("shards", {}),
    "float16": ("whole", {"torch_dtype": torch.float16}),
    "bfloat16 shards": ("shards", {"torch_dtype": torch.bfloat16}),
    "dtype by part": ("whole", {"torch_dtype": {"unet": torch.bfloat16, "default": torch.float32}}),
    "variant": ("fp16", {"variant": "fp16", "torch_dtype": torch.float16}),
    "variant to float32": ("fp16", {"variant": "fp16"}),
    "balanced": ("shards", {"device_map": "balanced"}),  # there being no GPU: as without it
    "cpu": ("shards", {"device_map": "cpu"}),
    "low memory": ("whole", {"low_cpu_mem_usage": True}),
    "not low memory": ("whole", {"low_cpu_mem_usage": False}),
    "safetensors asked for": ("shards", {"use_safetensors": True}),
    "no text encoder": ("whole", {"text_encoder": None}),
}


@pytest.mark.parametrize("style", STYLES)
def test_pipeline(saved, same, style) -> None:
    which, options = STYLES[style]
    if options.get("device_map") == "balanced" and torch.cuda.is_available():
        pytest.skip("balanced puts the parts on the GPUs here, and this test is the CPU's")

    def load(_: Path) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(saved / which, **options)
        usable = all(m.dtype == torch.float32 for m in _models(pipeline).values())
        picture = _picture(pipeline) if usable and pipeline.text_encoder else None
        return pipeline, pipeline.hf_device_map, picture

    ours, theirs = same(load)
    assert theirs.error is None
    parts = ["unet", "vae"] if style == "no text encoder" else ["unet", "vae", "text_encoder"]
    files = [file for part in parts for file in weights_in(saved / which / part)]
    ours.assert_fast(files)


@pytest.mark.parametrize("options", [{"io": "buffered"}, {"tensors": "owned"}], ids=str)
def test_options(saved, tmp_path, options) -> None:
    def load(_: Path) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(saved / "shards")
        return pipeline, _picture(pipeline)

    ours, theirs = twice(load, tmp_path, **options)
    ours.assert_fast(weights_in(saved / "shards"))
    for name, model in _models(theirs.value[0]).items():
        mine = dict(_models(ours.value[0])[name].named_parameters())
        assert all(torch.equal(mine[key], t) for key, t in model.named_parameters())
    assert (ours.value[1] == theirs.value[1]).all()


def test_refused(saved, same, tmp_path) -> None:
    """Options, files and folders that are wrong: stock's exceptions."""
    load = diffusers.DiffusionPipeline.from_pretrained
    whole = saved / "whole"
    styles: tuple[dict[str, Any], ...] = (
        {"device_map": "auto"},
        {"device_map": {"unet": "cpu"}},
        {"device_map": "cpu", "low_cpu_mem_usage": False},
        {"variant": "fp16"},
        {"use_safetensors": False},
    )
    calls = {str(style): lambda _, style=style: load(whole, **style) for style in styles}
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    content = (whole / file).read_bytes()
    for number, spoiled in enumerate((content[:-1], b"", content[:50], b"version https://git-lfs")):
        copy = Path(shutil.copytree(whole, tmp_path / f"spoiled {number}"))
        (copy / file).unlink()
        (copy / file).write_bytes(spoiled)
        calls[copy.name] = lambda _, copy=copy: load(copy)
    _, theirs = same(calls)
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value


def test_models(saved, same, tmp_path) -> None:
    """A part alone: sharded, from a subfolder, with a device map, from bytes, saved again."""
    load = diffusers.UNet2DConditionModel.from_pretrained
    shards, whole = saved / "shards" / "unet", saved / "whole" / "unet"
    styles: tuple[tuple[Path, dict[str, Any]], ...] = (
        (shards, {}),
        (whole, {}),
        (shards, {"device_map": {"": "cpu"}}),
        (shards, {"device_map": "auto"}),
        (shards, {"torch_dtype": torch.float16}),
        (shards, {"low_cpu_mem_usage": False}),
        (whole, {"low_cpu_mem_usage": False}),
        (whole, {"low_cpu_mem_usage": False, "torch_dtype": torch.bfloat16}),
        (shards, {"output_loading_info": True}),
    )
    calls = {f"{a} {o}": lambda _, a=a, o=o: load(a, **o) for a, o in styles}
    calls["subfolder"] = lambda _: load(saved / "shards", subfolder="unet")
    ours, theirs = same(calls)
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    read = [file for folder, _ in styles for file in weights_in(folder)]
    ours.assert_fast(read + weights_in(shards))
    ours, theirs = same(lambda _: load(whole, disable_mmap=True))
    assert theirs.error is None
    assert ours.reports == []  # safetensors.torch.load, which is stock's

    def offloaded(scratch: Path) -> Any:
        device_map = {"": "cpu", "mid_block": "disk"}
        model = load(shards, device_map=device_map, offload_folder=scratch / "offload")
        sample = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 16)
        with torch.no_grad():
            return model, [model(*sample).sample for _ in range(2)]

    ours, theirs = same(offloaded)
    if theirs.error is None:
        mid = sum(
            n
            for f in weights_in(shards)
            for key, n in tensor_bytes(f).items()
            if key.startswith("mid_block.")
        )
        read = sum(map(data_bytes, weights_in(shards)))
        ours.assert_fast(weights_in(shards), read + 2 * mid)

    def saved_again(scratch: Path) -> Any:
        load(shards).save_pretrained(scratch / "again", max_shard_size="40KB")
        return [(f.name, f.read_bytes()) for f in sorted((scratch / "again").iterdir())]

    ours, _ = same(saved_again)
    assert len(ours.value) > 3


def test_names_that_do_not_fit(saved, same, tmp_path) -> None:
    folder = Path(shutil.copytree(saved / "whole" / "unet", tmp_path / "unet"))
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {key: t.clone() for key, t in safetensors.torch.load_file(file).items()}
    del tensors["conv_norm_out.weight"]
    tensors["nobody.asked"] = torch.ones(2)
    file.unlink()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    load = diffusers.UNet2DConditionModel.from_pretrained

    def compare(*styles: dict[str, Any]) -> dict[str, Any]:
        ours, theirs = same({str(x): lambda _, x=x: load(folder, **x) for x in styles})
        ours.assert_fast([file] * len(styles))
        assert theirs.said or any(isinstance(value, Failed) for value in theirs.value.values())
        return ours.value

    compare({}, {"low_cpu_mem_usage": False}, {"output_loading_info": True})
    tensors["conv_out.bias"] = torch.ones(9)
    file.unlink()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    compare({}, {"ignore_mismatched_sizes": True}, {"low_cpu_mem_usage": False})


def test_single_file(saved, same, tmp_path) -> None:
    """One file with diffusers' own names: the configuration comes from a folder."""
    whole = saved / "whole"
    files = {part: weights_in(whole / part)[0] for part in ("unet", "vae")}
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    styles: tuple[dict[str, Any], ...] = (
        {}, {"torch_dtype": torch.float16}, {"low_cpu_mem_usage": False}, {"device": "cpu"}
    )  # fmt: skip

    def load(part: str, options: Any) -> Callable[[Path], Any]:
        return lambda _: classes[part].from_single_file(
            str(files[part]), config=str(whole), subfolder=part, local_files_only=True, **options
        )

    ours, theirs = same({f"{part} {x}": load(part, x) for part in files for x in styles})
    assert all(isinstance(v, nn.Module) for v in theirs.value.values()), theirs.value
    ours.assert_fast([*files.values()] * len(styles))

    def pipeline(_: Path) -> Any:
        encoder = transformers.CLIPTextModel.from_pretrained(whole / "text_encoder")
        found = diffusers.StableDiffusionPipeline.from_single_file(
            str(files["unet"]), config=str(whole), text_encoder=encoder, local_files_only=True,
            tokenizer=_tokenizer(), safety_checker=None,
            vae=diffusers.AutoencoderKL.from_pretrained(whole / "vae"),
        )  # fmt: skip
        return found, _picture(found)

    ours, theirs = same(pipeline)
    assert theirs.error is None, theirs.error
    ours.assert_fast([*files.values(), *weights_in(whole / "text_encoder")])


@pytest.mark.parametrize("half", [False, True])
def test_original_single_file(saved, same, tmp_path, half) -> None:
    """All of Stable Diffusion in one file, with the names it was published with."""
    made = _pipeline()
    if half:
        made.to(dtype=torch.float16)
    parts = {name: model.state_dict() for name, model in _models(made).items()}
    file = tmp_path / "original.safetensors"
    safetensors.torch.save_file(
        ldm.original(parts["unet"], parts["vae"], parts["text_encoder"]), file
    )
    options: dict[str, Any] = {"config": str(saved / "whole"), "local_files_only": True}
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    load = diffusers.StableDiffusionPipeline.from_single_file

    def whole(_: Path) -> Any:
        found = load(str(file), safety_checker=None, **options)
        return found, None if half else _picture(found)

    calls: dict[str, Callable[[Path], Any]] = {
        part: lambda _, part=part: kinds[part].from_single_file(
            str(file), subfolder=part, **options
        )
        for part in kinds
    }
    calls["pipeline"] = whole
    calls["float16"] = lambda _: load(
        str(file), safety_checker=None, torch_dtype=torch.float16, **options
    )
    ours, theirs = same(calls)
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    for name, model in _models(ours.value["float16"]).items():
        for key, tensor in model.state_dict().items():
            wanted = parts[name][key]
            assert torch.equal(tensor, wanted.half() if wanted.is_floating_point() else wanted), key
    ours.assert_fast([file] * len(calls))


# ---------------------------------------------------------------- what is loaded on top


def test_lora(saved, same, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pipeline = _pipeline()
    torch.manual_seed(5)
    for seed, part in enumerate((pipeline.unet, pipeline.text_encoder)):
        names = ["to_q", "to_v"] if seed == 0 else ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        part.add_adapter(config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipeline.text_encoder),
    )
    (file,) = weights_in(tmp_path / "lora")
    whole = saved / "whole"
    # Before 0.40 the file in a folder was not guessed while HF_HUB_OFFLINE is set.
    named = {} if Version("0.40") <= VERSION else {"weight_name": file.name}

    def load(options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(whole)
            plain = _picture(pipeline)
            pipeline.load_lora_weights(tmp_path / "lora", **named, **options)
            adapted = _picture(pipeline)
            assert (adapted != plain).any()
            pipeline.fuse_lora()
            return pipeline, adapted, _picture(pipeline)

        return call

    styles: tuple[dict[str, Any], ...] = ({}, {"adapter_name": "x"}, {"low_cpu_mem_usage": False})
    ours, theirs = same({str(style): load(style) for style in styles})
    assert all(isinstance(value, tuple) for value in theirs.value.values()), theirs.value
    ours.assert_fast([file, *weights_in(whole)] * len(styles))

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / file.name).write_bytes(file.read_bytes()[:-1])

    def fail(folder: Path) -> Callable[[Path], Any]:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(whole)
        options = {"weight_name": file.name, "local_files_only": True}
        return lambda _: pipeline.load_lora_weights(str(folder), **options)

    _, theirs = same({str(folder): fail(folder) for folder in (broken, tmp_path / "missing")})
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value


def test_textual_inversion(saved, same, tmp_path) -> None:
    file = tmp_path / "learned.safetensors"
    torch.manual_seed(6)
    safetensors.torch.save_file({"<thing>": torch.randn(2, 16)}, file)

    def load(_: Path) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(saved / "whole")
        pipeline.load_textual_inversion(str(file))
        return pipeline, _picture(pipeline, "a <thing>"), len(pipeline.tokenizer)

    ours, theirs = same(load)
    assert theirs.error is None, theirs.error
    assert ours.value[2] == len(WORDS) + 2
    ours.assert_fast([file, *weights_in(saved / "whole")])


# ---------------------------------------------------------------- offload


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(
    "groups", [{"offload_type": "leaf_level"},
               {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
)  # fmt: skip
def test_group_offload(saved, same, tmp_path, groups, disk) -> None:
    """CPU to CPU: groups saved to files and loaded again for every forward."""
    cpu = torch.device("cpu")

    def load(scratch: Path) -> Any:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(saved / "shards")
        options = {"offload_to_disk_path": str(scratch / "groups")} if disk else {}
        pipeline.unet.enable_group_offload(cpu, cpu, **groups, **options)
        return [_picture(pipeline) for _ in range(2)]

    ours, theirs = same(load)
    accelerator = getattr(torch, "accelerator", None)  # of torch 2.6
    if Version("0.41") > VERSION and accelerator and not accelerator.is_available():
        pytest.skip(f"diffusers {VERSION} offloads groups only where torch has an accelerator")
    assert theirs.error is None, theirs.error
    pictures = ours.value
    assert (pictures[0] == pictures[1]).all()
    files = weights_in(saved / "shards")
    temporary = weights_in(tmp_path / "patched-0")
    assert bool(temporary) == disk
    if disk:
        opened = [r for r in ours.reports if Path(r.file) in temporary]
        assert len(opened) >= 4 * len(temporary)  # two steps, two pictures
    again = [r for r in ours.reports if Path(r.file) in temporary]
    assert all(r.bytes == data_bytes(r.file) for r in again)
    whole = sum(map(data_bytes, files))
    ours.assert_fast([*files, *temporary], whole + sum(r.bytes for r in again))


def test_cpu_offload(saved, same) -> None:
    """accelerate's hooks under a pipeline; without an accelerator both are refused, or run."""

    def load(name: str) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(saved / "whole")
            getattr(pipeline, name)(device="cpu")
            return _picture(pipeline)

        return call

    names = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
    ours, _ = same({name: load(name) for name in names})
    ours.assert_fast(weights_in(saved / "whole") * 2)
