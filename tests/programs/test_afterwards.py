"""What people do with a model afterwards: it was loaded patched, and patching has ended.

Each thing is done to stock's model too, and must come to the same.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import shutil
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from twice import one_thread, portrait, twice, weights_in

import fastst_patch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOKENS = torch.arange(12).view(2, 6)


class Plain(nn.Module):
    """Parameters and buffers are the loaded tensors themselves: load_state_dict(assign=True)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.linear = nn.Linear(16, 96)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv(self.embed(tokens).transpose(1, 2)))
        return self.linear(hidden.transpose(1, 2).relu())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama", max_shard_size="20KB")
    (folder / "plain").mkdir()
    safetensors.torch.save_file(Plain().state_dict(), folder / "plain" / "model.safetensors")
    return folder


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "llama": lambda folder: transformers.LlamaForCausalLM.from_pretrained(folder / "llama"),
    "plain": lambda folder: _plain(folder / "plain" / "model.safetensors"),
}


def _plain(file: Path) -> nn.Module:
    with torch.device("meta"):
        model = Plain()
    model.load_state_dict(safetensors.torch.load_file(file), assign=True)
    return model.eval()


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with one_thread():
        yield


class Pool:
    """Models of a kind, ours and theirs, many at a time: patching takes longer than loading."""

    COUNT = 40

    def __init__(self, saved: Path, factory: pytest.TempPathFactory) -> None:
        self._saved = saved
        self._factory = factory
        self._pairs: dict[str, list[Any]] = {kind: [] for kind in LOADERS}

    def take(self, kind: str) -> list[Any]:
        pairs = self._pairs[kind]
        if not pairs:
            ours, theirs = twice(
                lambda _: [LOADERS[kind](self._saved) for _ in range(self.COUNT)],
                self._factory.mktemp("pool"),
            )
            ours.assert_fast(weights_in(self._saved / kind) * self.COUNT)
            pairs += map(list, zip(ours.value, theirs.value, strict=True))
        return pairs.pop()


@pytest.fixture(scope="module")
def pool(saved, tmp_path_factory) -> Pool:
    return Pool(saved, tmp_path_factory)


@pytest.fixture(params=LOADERS)
def models(request, pool) -> list[Any]:
    """Ours and theirs; nothing is patched any more, and nothing of the loading is left."""
    pair = pool.take(request.param)
    assert not fastst_patch.is_patched()
    gc.collect()
    return pair


def _logits(model: nn.Module) -> torch.Tensor:
    output = model(TOKENS)
    return output if isinstance(output, torch.Tensor) else output.logits


def _is_plain(model: nn.Module) -> bool:
    return isinstance(model, Plain)


# ---------------------------------------------------------------- saving


def test_save(models, stock, assert_same, tmp_path) -> None:
    """By every writer: the same files, byte for byte."""
    for which, model in zip(("ours", "theirs"), models, strict=True):
        folder = tmp_path / which
        folder.mkdir()
        safetensors.torch.save_model(model, str(folder / "save_model.safetensors"))
        torch.save(model.state_dict(), folder / "archive.pt")
        torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
        if _is_plain(model):
            safetensors.torch.save_file(model.state_dict(), folder / "save_file.safetensors")
        else:
            model.save_pretrained(folder / "one")
            model.save_pretrained(folder / "shards", max_shard_size="10KB")
            model.half().save_pretrained(folder / "half", variant="fp16")
    found = [
        sorted(p for p in (tmp_path / w).rglob("*") if p.is_file()) for w in ("ours", "theirs")
    ]
    assert [p.relative_to(tmp_path / "ours") for p in found[0]] == [
        p.relative_to(tmp_path / "theirs") for p in found[1]
    ]
    for mine, other in zip(*found, strict=True):
        if mine.name == "legacy.pt":
            _same_but_for_addresses(model, mine.stat().st_size, other.stat().st_size)
        else:
            assert mine.read_bytes() == other.read_bytes(), mine
    for mmap in (False, True):
        loaded = [torch.load(tmp_path / w / "archive.pt", mmap=mmap) for w in ("ours", "theirs")]
        assert_same(*map(dict, loaded))


@pytest.mark.parametrize("models", ["llama"], indirect=True)
def test_save_and_load_again(models, tmp_path, assert_same) -> None:
    """A round trip that starts and ends patched, or ends with stock."""
    ours = models[0]
    ours.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    cls = type(ours)
    again, theirs = twice(lambda _: cls.from_pretrained(tmp_path / "again"), tmp_path)
    again.assert_fast(weights_in(tmp_path / "again"))
    assert_same(portrait(again.value), portrait(theirs.value))
    assert_same(dict(again.value.state_dict()), dict(ours.state_dict()))


def test_over_its_own_files(saved, tmp_path, warm_python) -> None:
    """Saved over what it was loaded from, in a program of its own: it ends as with stock."""
    script = """
        import sys, pathlib, fastst_patch, torch, safetensors.torch
        if sys.argv[2] == "patched":
            fastst_patch.patch()
        file = sys.argv[1]
        tensors = safetensors.torch.load_file(file)
        changed = {name: t + 1 for name, t in tensors.items()}
        print(sum(float(t.double().sum()) for t in changed.values()))
        sys.stdout.flush()
        safetensors.torch.save_file({**tensors, "embed.weight": changed["embed.weight"]}, file)
        print("saved", sum(float(t.double().sum()) for t in safetensors.torch.load_file(
            file).values()))
    """
    ends = []
    for which in ("stock", "patched"):
        file = tmp_path / f"{which}.safetensors"
        shutil.copy(saved / "plain" / "model.safetensors", file)
        done = warm_python.run(textwrap.dedent(script), file, which, folder=tmp_path, quiet=True)
        ends.append((done.returncode, done.stdout, done.stderr.replace(which, "")))
        ends[-1] += (file.read_bytes(),) if file.exists() else (b"",)
    assert ends[0] == ends[1]
    assert ends[0][1]


# ---------------------------------------------------------------- copying


def test_copies(models, assert_same) -> None:
    """deepcopy, pickle and clone own what they hold, and no more than stock's do."""
    for copied in (
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_written(m), weights_only=False),
    ):
        made = [copied(model) for model in models]
        assert_same(*map(portrait, made))
        with torch.no_grad():
            for parameter in made[0].parameters():
                parameter.zero_()
        assert any(p.any() for p in models[0].parameters())
    assert_same(*map(portrait, models))
    _same_but_for_addresses(models[0], *(len(pickle.dumps(model)) for model in models))


def _same_but_for_addresses(model: nn.Module, *sizes: int) -> None:
    """Torch names storages by their address, as text: of 8 to 14 digits in the heap, 15 elsewhere.

    A tensor that wrote what it shares with others would write kilobytes more.
    """
    named = 3 * len(model.state_dict())  # in the index, with the tensor, and with the bytes
    named *= 15 - 8
    assert abs(sizes[0] - sizes[1]) <= named, sizes


def _written(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_share_memory(models, assert_same) -> None:
    shared = [model.share_memory() for model in models]
    assert all(p.is_shared() for p in shared[0].parameters())
    assert_same(*map(portrait, shared))
    assert torch.equal(*map(_logits, shared))


def test_files_and_models_go(saved, tmp_path, assert_same) -> None:
    """The files are deleted under the model; the map goes with its last tensor."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    ours, theirs = twice(lambda _: [load(folder) for load in LOADERS.values()], tmp_path)
    ours.assert_fast(weights_in(folder))
    shutil.rmtree(folder)
    for mine, other in zip(ours.value, theirs.value, strict=True):
        assert_same(portrait(mine), portrait(other))
        assert torch.equal(_logits(mine), _logits(other))
    maps = Path("/proc/self/maps")
    assert str(folder) in maps.read_text()
    survivor = next(iter(ours.value[1].parameters()))
    expected = survivor.detach().clone()
    del mine, other, theirs
    ours.value = None
    gc.collect()
    assert torch.equal(survivor, expected)
    assert str(folder) in maps.read_text()
    del survivor
    gc.collect()
    assert str(folder) not in maps.read_text()


# ---------------------------------------------------------------- training


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _logits(model).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    ],
    ids=["sgd", "foreach", "fused"],
)
def test_gradient_steps(models, saved, assert_same, make) -> None:
    content = {file: file.read_bytes() for file in weights_in(saved)}
    losses = []
    for model in models:
        torch.manual_seed(1)
        losses.append(_train(model, make(model.parameters())))
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]
    assert_same(*map(portrait, models))
    assert {file: file.read_bytes() for file in weights_in(saved)} == content


def test_frozen_and_checkpointed(models, assert_same) -> None:
    """Part of it frozen, gradients clipped and accumulated, EMA and SWA kept beside it."""
    averages = []
    for model in models:
        torch.manual_seed(1)
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(2):
            _logits(model).square().mean().backward()
            _logits(model).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            average.update_parameters(model)
        averages.append(average)
    assert_same(*map(portrait, models))
    assert_same(*map(portrait, averages))


# ---------------------------------------------------------------- changing


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "and back": lambda m: m.half().float(),
    "cpu": lambda m: m.cpu(),
    "to cpu": lambda m: m.to("cpu", torch.float32, non_blocking=True),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: [
        t.data.zero_() for t in (*m.to_empty(device="cpu").parameters(), *m.buffers())
    ],
    "in place": lambda m: [p.data.mul_(2).add_(1) for p in m.parameters()],
    "data": lambda m: [setattr(p, "data", p.data[..., :1]) for p in m.parameters()],
    "zero": lambda m: [t.zero_() for t in m.state_dict().values()],
    "requires_grad": lambda m: m.requires_grad_(False),
    "load_state_dict": lambda m: m.load_state_dict(
        {k: t + 1 for k, t in m.state_dict().items()}
    ),
    "its own": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "vector": lambda m: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters()
    ),
    "pruned": lambda m: [
        torch.nn.utils.prune.l1_unstructured(x, "weight", 0.5)
        for x in m.modules() if isinstance(x, nn.Linear)
    ],
    "parametrized": lambda m: [
        torch.nn.utils.parametrizations.weight_norm(x)
        for x in m.modules() if isinstance(x, nn.Linear)
    ],
    "resized": lambda m: None if _is_plain(m) else m.resize_token_embeddings(100),
    "untied": lambda m: None if _is_plain(m) else setattr(
        m.lm_head, "weight", nn.Parameter(m.lm_head.weight.clone())),
    "storages": lambda m: [
        p.untyped_storage().copy_(p.clone().untyped_storage()) for p in m.parameters()
    ],
    "swapped": lambda m: [
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() + 1)) for p in m.parameters()
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes(models, assert_same, agree, saved, change) -> None:
    content = {file: file.read_bytes() for file in weights_in(saved)}

    def changed(model: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            torch.manual_seed(1)
            result = CHANGES[change](model)
            return None if isinstance(result, (nn.Module, list)) else str(type(result))

        return run

    agree(changed(models[0]), changed(models[1]))
    assert_same(*map(portrait, models))
    with torch.no_grad():
        agree(lambda: _logits(models[0]), lambda: _logits(models[1]))
    assert {file: file.read_bytes() for file in weights_in(saved)} == content


def test_quantized(models) -> None:
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("this torch has no quantized engine")
    outputs = []
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        outputs.append(_logits(small).detach())
    assert torch.equal(*outputs)


# ---------------------------------------------------------------- compiling


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("models", "backend"),
    [("plain", "eager"), ("plain", "aot_eager"), ("llama", "eager")],
    indirect=["models"],
)
def test_compile(models, assert_same, backend) -> None:
    outputs = []
    for model in models:
        compiled = torch.compile(model, backend=backend, fullgraph=_is_plain(model))
        with torch.no_grad():
            outputs += [_logits(compiled), _logits(model)]
        if _is_plain(model):
            model.train()
            _logits(compiled).square().mean().backward()
        torch._dynamo.reset()
    assert all(torch.equal(one, outputs[0]) for one in outputs)
    assert_same(*map(portrait, models))


@pytest.mark.parametrize("models", ["plain"], indirect=True)
def test_traced_and_exported(models) -> None:
    sizes, outputs = [], []
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, (TOKENS,))
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
            with zipfile.ZipFile(buffer) as archive:  # code has other names every time
                records = [one for one in archive.infolist() if "/data/" in one.filename]
            sizes.append([one.file_size for one in records])
            buffer.seek(0)
            outputs.append(torch.jit.load(buffer)(TOKENS))
        exported = torch.export.export(model, (TOKENS,)).module()
        outputs.append(exported(TOKENS))
        doubled = {k: t * 2 for k, t in model.state_dict().items() if t.is_floating_point()}
        outputs.append(torch.func.functional_call(model, doubled, (TOKENS,)))
    assert sizes[0] == sizes[1] != []
    assert all(torch.equal(a, b) for a, b in zip(outputs[:3], outputs[3:], strict=True))
