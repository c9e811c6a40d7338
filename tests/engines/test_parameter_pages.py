"""Huge pages are asked for parameters before an engine fills them, as long as that is quick."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_standin import Loading
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine
from fastst_patch.integrations import parameter_pages
from fastst_patch.integrations.parameter_pages import HUGE_PAGE, PIECE, SLOW, in_huge_pages

QUICK = 1000


class Asked:
    """In the place of the engine's function: notes calls, and answers as told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bool]] = []
        self.answers: list[int | None] = []

    def __call__(self, address: int, nbytes: int, *, fill: bool) -> int | None:
        self.calls.append((address, nbytes, fill))
        return self.answers.pop(0) if fill and self.answers else QUICK

    @property
    def samples(self) -> list[int]:
        return [address for address, _, fill in self.calls if fill]


@pytest.fixture
def asked(monkeypatch) -> Asked:
    found = Asked()
    monkeypatch.setattr(parameter_pages.engine, "ask_for_huge_pages", found)
    return found


class Wrapper(torch.Tensor):
    """A tensor around others, such as a quantized one: it has no memory of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def parameter(nbytes: int) -> torch.Tensor:
    """Memory that begins with a huge page, and that nobody has touched."""
    whole = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    ahead = -whole.data_ptr() % HUGE_PAGE
    return whole[ahead : ahead + nbytes]


def pairs(*names: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.zeros(1)) for name in names)


def advised(address: int) -> bool:
    """Whether the kernel was asked for huge pages at an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        area = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if area:
            found = int(area[1], 16) <= address < int(area[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no such memory")


def test_pages_are_asked_for_before_the_first_tensor_of_a_layer(asked) -> None:
    parameters = {
        "model.layers.0.qkv.weight": parameter(2 * HUGE_PAGE),
        "model.layers.1.qkv.weight": parameter(2 * HUGE_PAGE),
        "lm_head.weight": parameter(2 * HUGE_PAGE),
    }
    first, second, head = (one.data_ptr() for one in parameters.values())
    seen = []
    for name, _ in in_huge_pages(
        pairs("language.layers.0.q.weight", "language.layers.0.k.weight", "model.lm_head.weight",
              "norm.weight"),
        parameters,
    ):  # fmt: skip
        seen.append((name.rsplit(".", 2)[-2], asked.samples))
    assert seen == [
        ("q", [first]),
        ("k", [first]),
        ("lm_head", [first, head]),
        ("norm", [first, head]),
    ]
    assert second not in asked.samples


def test_each_piece_is_sampled_and_the_rest_is_advice(asked) -> None:
    memory = parameter(2 * PIECE + HUGE_PAGE)
    list(in_huge_pages(pairs("0.w"), {"0.w": memory}))
    at = memory.data_ptr()
    assert asked.calls == [
        (at, HUGE_PAGE, True), (at + HUGE_PAGE, PIECE - HUGE_PAGE, False),
        (at + PIECE, HUGE_PAGE, True), (at + PIECE + HUGE_PAGE, PIECE - HUGE_PAGE, False),
        (at + 2 * PIECE, HUGE_PAGE, True), (at + 2 * PIECE + HUGE_PAGE, 0, False),
    ]  # fmt: skip


@pytest.mark.parametrize("slow", [SLOW + 1, None])
def test_ever_fewer_pieces_are_tried_while_it_is_slow(asked, slow) -> None:
    memory = parameter(20 * PIECE)
    asked.answers = [slow, slow, slow, QUICK]
    list(in_huge_pages(pairs("0.w"), {"0.w": memory}))
    tried = [(address - memory.data_ptr()) // PIECE for address in asked.samples]
    assert tried == [0, 2, 6, 14, 15, 16, 17, 18, 19]
    advice = [
        (address - memory.data_ptr()) // PIECE for address, _, fill in asked.calls if not fill
    ]
    assert advice == [14, 15, 16, 17, 18, 19]


def test_only_whole_pages_of_plain_memory_on_the_cpu(asked) -> None:
    memory = parameter(4 * HUGE_PAGE)
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, memory.shape, dtype=torch.uint8)
    parameters = {
        "0.ragged": memory[100 : 3 * HUGE_PAGE],
        "0.small": parameter(HUGE_PAGE),
        "0.meta": torch.empty(4 * HUGE_PAGE, dtype=torch.uint8, device="meta"),
        "0.transposed": parameter(4 * HUGE_PAGE).view(4, -1).t(),
        "0.wrapper": wrapper,
    }
    list(in_huge_pages(pairs("0.w"), parameters))
    inner = memory.data_ptr() + HUGE_PAGE
    assert asked.calls == [(inner, HUGE_PAGE, True), (inner + HUGE_PAGE, HUGE_PAGE, False)]


def test_the_kernel_is_asked_and_content_stays() -> None:
    memory = parameter(3 * HUGE_PAGE)
    memory[5] = 7
    list(in_huge_pages(pairs("0.w"), {"0.w": memory}))
    assert memory[5] == 7
    if engine.ask_for_huge_pages(memory.data_ptr(), HUGE_PAGE, fill=True) is None:
        pytest.skip("this kernel has no huge pages, or fills none ahead")
    assert advised(memory.data_ptr())


def test_closing_closes_the_load_and_lets_go_of_parameters() -> None:
    memory, closed = parameter(2 * HUGE_PAGE), []

    def load() -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from pairs("0.w", "1.w")
        finally:
            closed.append(True)

    gone = weakref.ref(memory)
    found = in_huge_pages(load(), {"1.w": memory})
    del memory
    next(found)
    found.close()
    assert closed == [True]
    gc.collect()
    assert gone() is None


def test_a_load_of_vllms_asks_for_the_parameters_of_its_model(vllm, tmp_path, asked) -> None:
    save_file({"0.w": torch.zeros(3), "1.w": torch.ones(3)}, tmp_path / "m.safetensors")
    model = torch.nn.ModuleList([torch.nn.Module()])
    model[0].weight = torch.nn.Parameter(parameter(2 * HUGE_PAGE).view(torch.int8), False)
    loader = vllm.loader()
    config = SimpleNamespace(model=str(tmp_path), prefix="")
    with Loading() as seen, fastst_patch.patched():
        for name, _ in loader.get_all_weights(config, model):
            assert asked.samples == [model[0].weight.data_ptr()], name
    assert seen.only.tensors == 2
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert loader is not None
    assert gone() is None, "the loader keeps the parameters"
