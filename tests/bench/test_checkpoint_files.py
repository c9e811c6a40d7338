"""What the bench measures: the checkpoints it writes, and the files it is given."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastst_patch.bench import checkpoint, checkpoint_files, hardware
from fastst_patch.bench.failures import UsageError

# ---- checkpoints --------------------------------------------------------


def test_checkpoint_is_what_stock_reads(transformer):
    specs = checkpoint.transformer_specs(300_000)
    tensors = load_file(transformer)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        spec.name: spec.shape for spec in specs
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert int.from_bytes(transformer.read_bytes()[:8], "little") % 8 == 0


def test_checkpoint_is_the_same_every_time(transformer, tmp_path):
    again = tmp_path / "again.safetensors"
    checkpoint.write_checkpoint(again, checkpoint.transformer_specs(300_000), lambda _: None)
    assert again.read_bytes() == transformer.read_bytes()


def test_no_two_blocks_of_a_checkpoint_are_alike():
    stream = checkpoint._noise()
    digests = {hashlib.sha256(next(stream)[:4096]).digest() for _ in range(500)}
    assert len(digests) == 500  # 2 GB worth


@pytest.mark.parametrize("budget", [10**6, 10**8, checkpoint.LARGEST])
def test_transformer_fits_its_budget(budget):
    specs = checkpoint.transformer_specs(budget)
    assert len({spec.name for spec in specs}) == len(specs) == 147
    assert 0.6 * budget < sum(spec.nbytes for spec in specs) <= budget


def test_moe_has_as_many_tensors_as_asked():
    specs = checkpoint.moe_specs(18_867)
    assert len({spec.name for spec in specs}) == 18_867


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt, SystemExit])
def test_checkpoint_is_removed_whatever_ends_it(tmp_path, ending):
    def use():
        with checkpoint.temporary_checkpoint(tmp_path, checkpoint.moe_specs(3)) as path:
            assert path.exists()
            raise ending

    with pytest.raises(ending):
        use()
    assert not list(tmp_path.iterdir())


def test_checkpoint_is_removed_when_writing_is_interrupted(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    context = checkpoint.temporary_checkpoint(tmp_path, checkpoint.moe_specs(3), interrupt)
    with pytest.raises(KeyboardInterrupt), context:
        pass
    assert not list(tmp_path.iterdir())


def test_checkpoint_is_never_put_in_memory(tmp_path, monkeypatch):
    in_memory = hardware.Filesystem("/", "tmpfs", "tmpfs")
    monkeypatch.setattr(hardware, "filesystem", lambda path: in_memory)
    with pytest.raises(UsageError, match=r"tmpfs is memory.*--dir"):
        checkpoint.pick_directory(None)
    with pytest.raises(UsageError, match=str(tmp_path)):
        checkpoint.pick_directory(str(tmp_path))


def test_too_small_a_machine_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "memory_available", lambda: 10**8)
    with pytest.raises(UsageError, match="25 MB"):
        checkpoint.budget(tmp_path)


# ---- files --------------------------------------------------------------


def test_folder_means_its_safetensors_sorted(transformer):
    shard = transformer.with_name("a.safetensors")
    shard.write_bytes(transformer.read_bytes())
    transformer.with_name("notes.txt").write_text("no")
    assert [file.name for file in checkpoint_files.expand([str(transformer.parent)])] == [
        "a.safetensors",
        "model.safetensors",
    ]


def test_index_decides_what_belongs_to_a_model(transformer):
    transformer.with_name("other.safetensors").write_bytes(transformer.read_bytes())
    index = {"weight_map": {"x": transformer.name, "y": transformer.name}}
    transformer.with_name(checkpoint_files.INDEX_NAME).write_text(json.dumps(index))
    assert [file.name for file in checkpoint_files.expand([str(transformer.parent)])] == [
        transformer.name
    ]


def test_file_named_twice_counts_once(transformer):
    assert len(checkpoint_files.expand([str(transformer), str(transformer.parent)])) == 1


def test_order_is_by_offset(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.zeros(4, dtype=torch.int8), "a": torch.zeros(4)}, path)
    described = checkpoint_files.describe(path)
    assert described.order == ("a", "b")  # the wider dtype lies first
    assert described.tensor_bytes == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"abc", "not a safetensors file"),
        ((10**6).to_bytes(8, "little") + b"{}", "first 8 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "no tensors"),
    ],
)
def test_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        checkpoint_files.expand([str(path)])
    assert str(path) in str(caught.value)


def test_bad_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no \*\.safetensors"):
        checkpoint_files.expand([str(tmp_path)])
    index = tmp_path / checkpoint_files.INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(UsageError, match=r"not there: gone\.safetensors"):
        checkpoint_files.expand([str(tmp_path)])
    index.write_text("[]")
    with pytest.raises(UsageError, match="not an index"):
        checkpoint_files.expand([str(tmp_path)])
