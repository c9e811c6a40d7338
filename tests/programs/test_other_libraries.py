"""sentence-transformers, peft, huggingface_hub, timm and torch's own readers, patched."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from twice import Failed, Run, data_bytes, tensor_bytes, weights_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# ---------------------------------------------------------------- sentence-transformers


@pytest.fixture(scope="module")
def sentences() -> Any:
    return pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )


TEXTS = ["A man is eating food.", "A monkey is playing drums.", "", "œuvre 数学 🐧 " * 30]


def _assert_all_expected(ours: Run, minilm: Path) -> None:
    file = minilm / "model.safetensors"
    sizes = tensor_bytes(file)
    if not importlib.metadata.version("transformers").startswith("4."):  # which reads all there is
        del sizes["embeddings.position_ids"]  # of an older transformers: not read
    assert sum(sizes.values()) > 80e6
    ours.assert_fast([file], sum(sizes.values()))


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_minilm(sentences, minilm, same, io) -> None:
    """A real model: the embeddings are equal bit for bit."""

    def load(_: Path) -> Any:
        model = sentences.SentenceTransformer(str(minilm), device="cpu", local_files_only=True)
        return list(model.state_dict()), model.encode(TEXTS), model.encode(TEXTS[0])

    ours, theirs = same(load, io=io)
    assert theirs.error is None
    assert ours.value[1].shape == (4, 384)
    _assert_all_expected(ours, minilm)


def test_minilm_tensors(sentences, minilm, same) -> None:
    ours, _ = same(lambda _: sentences.SentenceTransformer(str(minilm), device="cpu"))
    _assert_all_expected(ours, minilm)


def test_sentence_modules(sentences, same, tmp_path) -> None:
    """Weights beside the transformer's: modules read their own model.safetensors."""
    from sentence_transformers import models

    torch.manual_seed(3)
    dense = models.Dense(16, 8)
    folder = tmp_path / "dense"
    folder.mkdir()
    dense.save(str(folder))
    ours, theirs = same(lambda _: models.Dense.load(str(folder)))
    assert theirs.error is None
    ours.assert_fast(weights_in(folder))

    tokenizer = _tokenizer()
    static = sentences.SentenceTransformer(
        modules=[models.StaticEmbedding(tokenizer, embedding_dim=16), dense], device="cpu"
    )
    static.save(str(tmp_path / "static"))

    def load(_: Path) -> Any:
        model = sentences.SentenceTransformer(str(tmp_path / "static"), device="cpu")
        return model, model.encode(["a b", "c a a"])

    ours, theirs = same(load)
    assert theirs.error is None
    assert len(weights_in(tmp_path / "static")) == 2
    ours.assert_fast(weights_in(tmp_path / "static"))
    wrong = tmp_path / "static" / "1_Dense" / "model.safetensors"
    safetensors.torch.save_file({"linear.weight": torch.ones(8, 16)}, wrong)
    _, theirs = same(load)
    assert theirs.error is not None
    assert "Missing key" in theirs.error[1]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# ---------------------------------------------------------------- peft


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(
        r=2, target_modules=["first", "second"], init_lora_weights=False
    ),
    "dora and a whole layer": lambda peft: peft.LoraConfig(
        r=2, target_modules=["first"], modules_to_save=["second"], use_dora=True
    ),
    "ia3": lambda peft: peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
    "loha": lambda peft: peft.LoHaConfig(r=2, target_modules=["first"], init_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft(same, tmp_path, kind) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(6)
    folder = tmp_path / "adapter"
    peft.get_peft_model(Base(), ADAPTERS[kind](peft)).save_pretrained(folder)
    (file,) = weights_in(folder)
    x = torch.ones(2, 8)

    def load(options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            model = peft.PeftModel.from_pretrained(Base(), folder, **options)
            output = model(x)
            if options.get("is_trainable"):
                output.sum().backward()
            return model, output.detach(), model.merge_and_unload()

        return call

    styles: tuple[dict[str, Any], ...] = (
        {},
        {"is_trainable": True},
        {"adapter_name": "mine"},
        {"torch_device": "cpu"},
        {"autocast_adapter_dtype": False},
        {"low_cpu_mem_usage": True},
    )
    ours, theirs = same({str(style): load(style) for style in styles})
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    ours.assert_fast([file] * len(styles))

    def several(_: Path) -> Any:
        model = peft.PeftModel.from_pretrained(Base(), folder)
        result = model.load_adapter(folder, "other")
        model.set_adapter("other")
        weights = peft.utils.load_peft_weights(str(folder), device="cpu")
        return model, str(result), weights

    ours, theirs = same(several)
    assert theirs.error is None
    ours.assert_fast([file], 3 * data_bytes(file))


def test_peft_adapter_that_does_not_fit(same, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path / "adapter"
    peft.get_peft_model(Base(), ADAPTERS["lora"](peft)).save_pretrained(folder)
    (file,) = weights_in(folder)
    tensors = {key: t.clone() for key, t in safetensors.torch.load_file(file).items()}
    key = next(iter(tensors))
    changes: tuple[Callable[[], Any], ...] = (
        lambda: tensors.update({key: torch.ones(5, 5)}),
        lambda: tensors.pop(key),
        lambda: tensors.update({"base_model.model.third.lora_A.weight": torch.ones(2, 2)}),
    )
    for change in changes:
        change()
        file.unlink()
        safetensors.torch.save_file(tensors, file)

        def load(ignore: bool) -> Callable[[Path], Any]:
            return lambda _: peft.PeftModel.from_pretrained(
                Base(), folder, ignore_mismatched_sizes=ignore
            )

        ours, theirs = same({"strict": load(False), "ignore": load(True)})
        assert isinstance(theirs.value["strict"], Failed) or theirs.said
        ours.assert_fast([file] * 2)
    file.unlink()
    _, theirs = same(lambda _: peft.PeftModel.from_pretrained(Base(), folder))
    assert theirs.error is not None


# ---------------------------------------------------------------- huggingface_hub


def test_hub_mixin(same, tmp_path, capsys) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    class Mine(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 8, tie: bool = False, extra: bool = False) -> None:
            super().__init__()
            self.a = nn.Linear(width, width)
            self.b = nn.Linear(width, width)
            self.norm = nn.BatchNorm1d(width)
            if tie:
                self.b.weight = self.a.weight
            if extra:
                self.c = nn.Linear(2, 2)

    good, bad = {}, {}
    for tie in (False, True):
        folder = tmp_path / f"tied {tie}"
        Mine(tie=tie).save_pretrained(folder)

        def load(options: Any, folder: Path = folder) -> Callable[[Path], Any]:
            return lambda _: Mine.from_pretrained(folder, **options)

        for options in ({}, {"strict": True}, {"map_location": "cpu", "strict": True},
                        {"extra": True}):  # fmt: skip
            good[f"{tie} {options}"] = load(options)
        for options in ({"extra": True, "strict": True}, {"tie": not tie, "strict": True},
                        {"width": 9}, {"map_location": "nowhere"}):  # fmt: skip
            bad[f"{tie} {options}"] = load(options)
    ours, theirs = same(good)
    assert all(isinstance(value, Mine) for value in theirs.value.values()), theirs.value
    ours.assert_fast([f for tie in (False, True) for f in weights_in(tmp_path / f"tied {tie}") * 4])
    _, theirs = same(bad)
    assert any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    (tmp_path / "none").mkdir()
    _, theirs = same(lambda _: Mine.from_pretrained(tmp_path / "none"))
    assert theirs.error is not None


def test_hub_loaders(same, tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    loaders = [getattr(hub, "load_state_dict_from_file", None),
               getattr(hub, "load_torch_model", None)]  # fmt: skip
    if None in loaders:
        pytest.skip("this huggingface_hub has no load_torch_model")
    load_state_dict, load_model = loaders
    torch.manual_seed(7)
    for folder in ("one", "shards"):
        (tmp_path / folder).mkdir()
    hub.save_torch_model(Base(), tmp_path / "one")
    hub.save_torch_model(Base(), tmp_path / "shards", max_shard_size=300)
    shards = weights_in(tmp_path / "shards")
    assert len(shards) > 1

    def load(folder: str, **options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            model = Base()
            return model, load_model(model, tmp_path / folder, **options)

        return call

    styles: tuple[dict[str, Any], ...] = ({}, {"map_location": "cpu"}, {"map_location": "meta"})
    good = {f"{name} {x}": load(name, **x) for name in ("one", "shards") for x in styles}
    ours, theirs = same(good)
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    ours.assert_fast([*weights_in(tmp_path / "one") * 3, *shards * 3])
    places = (None, "cpu", "meta", torch.device("cpu"), "nowhere")
    bad = {f"{x}": load("shards", **x) for x in ({"strict": True}, {"safe": False})}
    same(bad | {repr(x): lambda _, x=x: load_state_dict(shards[0], map_location=x) for x in places})
    shards[0].unlink()
    _, theirs = same(lambda _: load_model(Base(), tmp_path / "shards"))
    assert theirs.error is not None


# ---------------------------------------------------------------- timm


def test_timm(same, tmp_path) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision, which is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}

    def make(**options: Any) -> Any:
        torch.manual_seed(8)
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})

    file = tmp_path / "weights.safetensors"
    model = make(num_classes=5)
    safetensors.torch.save_file(model.state_dict(), file)
    ema = tmp_path / "nested.safetensors"
    safetensors.torch.save_file({f"module.{k}": t for k, t in model.state_dict().items()}, ema)
    x = torch.ones(1, 3, 32, 32)

    def created(path: Path, **options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            found = make(num_classes=5, checkpoint_path=str(path), **options).eval()
            with torch.no_grad():
                return found, found(x)

        return call

    def checkpoint(**options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            more = dict(options)
            found = make(num_classes=more.pop("classes", 5))
            return found, str(timm.models.load_checkpoint(found, str(file), **more))

        return call

    styles: tuple[dict[str, Any], ...] = ({}, {"strict": False}, {"device": "cpu"})
    good = {str(style): checkpoint(**style) for style in styles}
    good |= {str(path): created(path) for path in (file, ema)}
    good["state dict"] = lambda _: timm.models.load_state_dict(str(file))
    ours, theirs = same(good)
    assert not any(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    ours.assert_fast([file] * 5 + [ema])
    wrong: tuple[dict[str, Any], ...] = (
        {"device": torch.device("cpu")},
        {"device": "nowhere"},
        {"classes": 6},
        {"remap": True},  # goes by the order in the file
    )
    _, theirs = same({repr(style): checkpoint(**style) for style in wrong})
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value
    overlay = {"pretrained_cfg_overlay": {"file": str(file), "num_classes": 5}}
    ours, theirs = same(lambda _: make(pretrained=True, num_classes=5, **overlay))
    if theirs.error is None:
        ours.assert_fast([file])


# ---------------------------------------------------------------- torch


def test_torch_load(same, tmp_path) -> None:
    """Newer versions of torch.load read safetensors."""
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(Base().state_dict(), file)
    styles: tuple[dict[str, Any], ...] = (
        {},
        {"map_location": "cpu"},
        {"map_location": torch.device("cpu")},
        {"weights_only": True, "mmap": True},
        {"map_location": {"a": "b"}},
        {"map_location": "nowhere"},
    )
    calls = [lambda _, style=style: torch.load(file, **style) for style in styles]
    ours, theirs = same({str(i): call for i, call in enumerate(calls[:4])})
    if all(isinstance(value, Failed) for value in theirs.value.values()):
        pytest.skip(f"torch {torch.__version__} does not load safetensors by torch.load")
    ours.assert_fast([file] * 4)
    _, theirs = same({str(i): call for i, call in enumerate(calls[4:])})
    assert all(isinstance(value, Failed) for value in theirs.value.values()), theirs.value


def test_distributed_checkpoint(same, tmp_path) -> None:
    """torch.distributed.checkpoint's reader of Hugging Face checkpoints, in one process."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint", reason="torch without it")
    reader = getattr(checkpoint, "HuggingFaceStorageReader", None)
    if reader is None:
        pytest.skip("this torch has no HuggingFaceStorageReader")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    state = Base().state_dict()
    for i, names in enumerate((list(state)[:2], list(state)[2:])):
        part = {name: state[name] for name in names}
        safetensors.torch.save_file(part, folder / f"model-{i}.safetensors")

    def load(_: Path) -> Any:
        found = {name: torch.zeros_like(t) for name, t in state.items()}
        checkpoint.load(found, storage_reader=reader(str(folder)))
        return found

    ours, theirs = same(load)
    assert theirs.error is None
    assert all(torch.equal(t, state[name]) for name, t in ours.value.items())
    ours.assert_fast(weights_in(folder))
