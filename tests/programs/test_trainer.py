"""transformers' Trainer, patched: it goes on from its checkpoints as with stock."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import transformers
from twice import FAST, data_bytes, weights_in

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(6) * (i + 1)) % 90
        return {"input_ids": tokens, "labels": tokens}


def _model() -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = _model()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def _trainer(folder: Path, model: Any, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=1, logging_steps=1, report_to=[],
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, seed=5, learning_rate=0.01,
        save_total_limit=STEPS, **options,
    )  # fmt: skip
    data = Sentences()
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def _state(trainer: Any) -> Any:
    """Weights, moments of the optimizer, the rate, and the losses on the way."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = trainer.lr_scheduler.state_dict()
    moments = trainer.optimizer.state_dict()["state"]
    return trainer.model, moments, rate["_last_lr"], losses, trainer.state.global_step


def _named(state: Any) -> dict[str, torch.Tensor]:
    moments = {f"{i} {key}": t for i, found in state[1].items() for key, t in found.items()}
    return state[0].state_dict() | moments


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Any]:
    """A run without a break: its folder with a checkpoint after each step, and how it ended."""
    found: dict[Any, Any] = {}

    def train(make: Callable[[], Any]) -> Any:
        if make not in found:
            folder = tmp_path_factory.mktemp("trained")
            trainer = _trainer(folder, make())
            trainer.train()
            found[make] = folder, _state(trainer)
        return found[make]

    return train


@pytest.mark.parametrize("make", [_model, _adapted])
@pytest.mark.parametrize("step", [1, 3])
def test_resume(trained, same, make, step) -> None:
    folder, unbroken = trained(make)
    checkpoint = folder / f"checkpoint-{step}"
    files = {file.name for file in checkpoint.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= files

    def resume(scratch: Path) -> Any:
        trainer = _trainer(scratch, make())
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return _state(trainer)

    ours, theirs = same(resume)
    assert theirs.error is None, theirs.error
    assert ours.value[4] == STEPS
    assert len(ours.value[1]) > 0
    assert ours.value[2:] == unbroken[2:]
    for name, tensor in _named(unbroken).items():
        assert torch.equal(_named(ours.value)[name], tensor), name
    ours.assert_fast(weights_in(checkpoint))


def test_best_model_at_the_end(same) -> None:
    def train(scratch: Path) -> Any:
        options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
        trainer = _trainer(scratch / "run", _model(), load_best_model_at_end=True,
                           greater_is_better=True, **options)  # fmt: skip
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint).name
        return trainer.model, best

    ours, theirs = same(train)
    assert theirs.error is None, theirs.error
    assert ours.value[1] == "checkpoint-1"
    (report,) = ours.reports
    file = Path(report.file)
    assert (file.parent.name, file.name) == ("checkpoint-1", "model.safetensors")
    assert report.path in FAST
    assert report.fallback_reason is None
    assert report.bytes == data_bytes(file)


def test_broken_checkpoints(trained, same, tmp_path) -> None:
    """The exceptions are stock's."""
    folder, _ = trained(_model)
    spoiled = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", spoiled)
    (file,) = weights_in(spoiled)
    content = file.read_bytes()
    file.unlink()

    def resume(scratch: Path) -> Any:
        trainer = _trainer(scratch, _model())
        trainer.train(resume_from_checkpoint=str(spoiled))

    _, theirs = same(resume)
    assert theirs.error is not None
    file.write_bytes(content[:-5])
    _, theirs = same(resume)
    assert theirs.error is not None
    assert "SafetensorError" in theirs.error[0].__name__
