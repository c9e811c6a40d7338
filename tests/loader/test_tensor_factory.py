"""`LazyTensorFactory`: one file's tensors, of a buffer and on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loader_files import bits, loader_of

from fastst_patch import (
    DType,
    LazyTensorFactory,
    OptionError,
    SafeTensorsMetadata,
    SingleGroup,
    engine,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def expected(paths, stock) -> dict[str, dict[str, Any]]:
    return {path: {n: bits(t) for n, t in stock.load_file(path).items()} for path in paths}


def factory_of(path: str, local: bool = True, **options: Any) -> LazyTensorFactory:
    meta = SafeTensorsMetadata.from_file(path)
    return LazyTensorFactory(meta, "cpu", 0, local, 1, 1, None, "pytorch", **options)


def test_the_files_of_a_buffer(paths, expected, watch) -> None:
    with watch() as seen:
        loader = loader_of(paths)
        buffer = loader.copy_files_to_device()
        (factories,) = buffer.rank_loaders.values()
        assert [factory.lidx for factory in factories] == [0, 1, 2]
        for name, (rank, lidx) in buffer.key_to_rank_lidx.items():
            factory = buffer.rank_loaders[rank][lidx]
            assert factory.metadata is loader.meta[buffer.get_filename(name)][0]
            assert name in factory.tensors
        for path, factory in zip(paths, factories, strict=True):
            assert factory.metadata.src == path
            assert (factory.rank, factory.device, factory.framework) == (0, "cpu", "pytorch")
            found = {name: bits(t.get_raw()) for name, t in factory.tensors.items()}
            assert found == expected[path]
            assert len(factory.tensors) == len(found)
            assert factory.tensors.get("nothing") is None
            factory.free_dev_ptrs()
            factory.free_dev_ptrs()
            assert dict(factory.tensors) == {}
        name = next(iter(expected[paths[0]]))  # freeing a file of a buffer closes nothing
        assert bits(buffer.get_tensor(name)) == expected[paths[0]][name]
        buffer.close()
        loader.close()
    assert buffer.rank_loaders == {}
    for path in paths:
        seen.assert_fast(path)


def test_a_filter_leaves_tensors_out(paths) -> None:
    loader = loader_of(paths)
    loader.set_tensor_filter(lambda name: ".F32." in name)
    with loader.copy_files_to_device() as buffer:
        (factories,) = buffer.rank_loaders.values()
        names = [name for factory in factories for name in factory.tensors]
        assert names == loader.get_keys() != []


def test_a_file_on_its_own(paths, expected) -> None:
    factory = factory_of(paths[0])
    assert dict(factory.tensors) == {}
    with pytest.raises(ValueError, match="submit_io was not called"):
        factory.shuffle(None, "file0.F32.5x6", -1)
    factory.submit_io(False, 1 << 30)
    factory.wait_io()
    assert {n: bits(t.get_raw()) for n, t in factory.tensors.items()} == expected[paths[0]]
    name = "file0.F32.5x6"
    for group in (None, SingleGroup()):
        for wrapped in (
            factory.push(group, name, 3, 0), factory.shuffle(group, name, 1),
            factory.shuffle_multi_cols(group, [name], 0),
        ):  # fmt: skip
            assert bits(wrapped.get_raw()) == expected[paths[0]][name]
    factory.wait_io(DType.F64, noalign=True)
    assert factory.tensors[name].dtype is torch.float64
    kept = factory.tensors[name].get_raw()
    factory.free_dev_ptrs()
    assert dict(factory.tensors) == {}
    assert engine.counters()["files"] == 0
    assert kept.shape == (5, 6)


def test_asking_for_a_name_makes_no_tensor_and_no_list(paths, monkeypatch) -> None:
    """Whoever takes 20,000 tensors one by one would make as many lists of 20,000 names."""
    factory = factory_of(paths[0])
    factory.submit_io(False, 1 << 30)
    name, *others = factory.tensors
    assert len(factory.tensors) == 1 + len(others)
    made: list[str] = []
    wrapped = factory._buffer.get_tensor_wrapped

    def counted(name: str, *arguments: Any) -> Any:
        made.append(name)
        return wrapped(name, *arguments)

    monkeypatch.setattr(factory._buffer, "get_tensor_wrapped", counted)
    monkeypatch.setattr(SafeTensorsMetadata, "names", property(lambda _: pytest.fail("listed")))
    tensors = factory.tensors
    assert name in tensors
    assert "nothing" not in tensors
    assert None not in tensors
    assert made == []
    assert list(factory.tensors[name].shape) == factory.metadata.shape(name)
    assert made == [name]
    factory.free_dev_ptrs()


def test_of_another_rank(paths) -> None:
    factory = factory_of(paths[0], local=False)
    factory.submit_io(True, 1 << 30)
    assert dict(factory.tensors) == {}


class Two:
    """A group of two, as fastsafetensors takes it."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def test_wrong_arguments(paths) -> None:
    meta = SafeTensorsMetadata.from_file(paths[0])
    with pytest.raises(OptionError, match="copier="):
        LazyTensorFactory(meta, "cpu", 0, True, 1, 1, object(), "pytorch")
    for options, text in (
        ({"disable_cache": 1}, "disable_cache=1"),
        ({"local": 0}, "local_rank=0"),
    ):
        with pytest.raises(OptionError, match=text):
            factory_of(paths[0], **options)
    factory = factory_of(paths[0])
    with pytest.raises(OptionError, match="max_copy_block_size=0"):
        factory.submit_io(True, 0)
    factory.submit_io(True, 1 << 20)
    name = "file0.F32.5x6"
    with pytest.raises(ValueError, match="src_rank=1"):
        factory.push(None, name, 0, 1)
    with pytest.raises(ValueError, match="a group of 2"):
        factory.shuffle(Two(), name, 0)
    with pytest.raises(KeyError):
        factory.tensors["nothing"]
    factory.free_dev_ptrs()
