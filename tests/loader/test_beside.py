"""Beside fastsafetensors itself: the same calls have the same results, or errors of one type."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from loader_files import DTYPES, SHAPES, bits, write

import fastst_patch

fast = pytest.importorskip("fastsafetensors", minversion="0.5.0", reason="not installed, or older")

BOTH = (fast, fastst_patch)
LACKING = ("C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # in fastsafetensors


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    entries = {
        f"{dtype}.{'x'.join(map(str, shape))}": (dtype, shape)
        for dtype in DTYPES
        for shape in SHAPES
        if dtype not in LACKING and (dtype != "F4" or (shape and shape[-1] % 2 == 0))
    }
    return write(tmp_path_factory.mktemp("beside") / "m.safetensors", entries)


def agree(call: Callable[[Any], Any]) -> Any:
    """The common result of a call with each package; our errors may be of a subclass."""
    found = []
    for package in BOTH:
        try:
            found.append(call(package))
        except Exception as error:
            found.append(type(error))
    theirs, ours = found
    if isinstance(theirs, type) and isinstance(ours, type):
        assert issubclass(ours, theirs)
    else:
        assert ours == theirs
    return ours


def of_frame(frame: Any) -> tuple[Any, ...]:
    return frame.dtype.value, *(
        list(getattr(frame, name)) for name in ("shape", "data_offsets", "strides", "offsets")
    ), frame.sliced  # fmt: skip


def framework() -> Any:
    from fastsafetensors.frameworks import get_framework_op

    return get_framework_op("pytorch")


def test_experts() -> None:
    for numbers in itertools.product(range(9), range(-1, 5), range(-1, 5)):
        agree(lambda package, numbers=numbers: package.owned_expert_range(*numbers))
    names = ["a.experts.3.b", "a.experts.7.w", "experts.1.a", "a.experts.", "shared_experts.1.w"]
    agree(lambda package: list(map(package.expert_parallel_filter(8, 2, 0), names)))


def test_headers(path) -> None:
    attributes = ("src", "metadata", "header_length", "size_bytes", "aligned")

    def described(package: Any) -> Any:
        meta = package.SafeTensorsMetadata.from_file(path, framework())
        frames = [(name, of_frame(frame)) for name, frame in meta.tensors.items()]
        kept = set(list(meta.tensors)[::3])
        ranges = [meta.select_byte_ranges(kept.__contains__, gap) for gap in (0, 10, 100, 4096)]
        return [getattr(meta, name) for name in attributes], frames, ranges

    assert len(agree(described)[1]) > 100


def test_frames() -> None:
    entry = {"dtype": "F32", "shape": [5, 6], "data_offsets": [0, 120]}
    bounds = [None, -9, -5, -2, 0, 1, 4, 9]
    indices = [slice(*some) for some in itertools.product(bounds, bounds, (None, 2, -1, -3, 0))]
    indices += [*range(-7, 7), True, "a", None, (), (slice(None), 1), (1, 2, 3), (1, "a")]
    for index in indices:
        agree(lambda package, index=index: of_frame(package.TensorFrame.from_buffer(entry)[index]))
    for shape in ([1.5], [-1], (1, 2), [True], [0], []):
        other = {**entry, "shape": shape}
        agree(lambda package, other=other: of_frame(package.TensorFrame.from_buffer(other)))


DATA = [
    {},
    {"loader": "3fs", "a": 1, "base": {"x": 1, "framework": "t"}, "debug": {"debug_log": True}},
    {"parallel": {"queue_size": 3, "use_pipeline": True, "z": 1}},
    {"parallel": {"max_concurrent_producers": 2}},
    {"max_batch_bytes": 7, "use_pipeline": True},
]


@pytest.mark.parametrize("data", DATA, ids=str)
def test_configurations(data) -> None:
    def made(package: Any) -> Any:
        config = package.LoaderConfig.from_dict(data)
        asked = config.create_parallel_kwargs(), config.get_extension_config("base")
        return dataclasses.asdict(config), asked

    agree(made)


@pytest.mark.parametrize("copier", [None, "gds", "nogds", "fgds", "unified"])
def test_arguments_of_a_configuration(copier) -> None:
    given = {"max_threads": 3} if copier is None else {"copier_type": copier, "use_fgds": True}
    agree(lambda package: package.SafeTensorsFileLoader.process_extension_config(given))


CALLS = ["AutoLoader", "SafeTensorsFileLoader", "ParallelLoader", "fastsafe_open", "LoaderConfig"]


@pytest.mark.parametrize("name", CALLS)
def test_signatures(name) -> None:
    """Equal names, order and defaults; ours also has its options, and a default of ``pg``."""
    theirs, ours = (
        {
            key: found.default
            for key, found in inspect.signature(getattr(package, name)).parameters.items()
            if found.kind is not found.VAR_KEYWORD and key != "pg"
        }
        for package in BOTH
    )
    assert list(ours.items()) == list(theirs.items())


def test_loaders(path) -> None:
    def loaded(package: Any) -> Any:
        loader = package.SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [path]})
        meta, rank = loader.meta[path]
        before = list(loader.meta), rank, list(loader.frames) == list(meta.tensors)
        buffer = loader.copy_files_to_device()
        ((_, (factory,)),) = buffer.rank_loaders.items()
        tensors = {name: bits(tensor.get_raw()) for name, tensor in factory.tensors.items()}
        buffer.close()
        loader.close()
        after = buffer.rank_loaders, loader.meta, dict(loader.frames)
        return before, buffer.key_to_rank_lidx, tensors, after

    agree(loaded)
