"""from_pretrained(tp_plan="auto") of two ranks under torchrun, over gloo: shards are stock's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT
from warm_python import TORCHRUN, WarmPython

transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5")

from tiny import Saved  # noqa: E402 - which needs transformers, too
from twice import FAST, weights_in  # noqa: E402

from fastst_patch import engine  # noqa: E402

pytestmark = [
    pytest.mark.skipif(engine.native_error() is not None, reason=str(engine.native_error())),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no gloo",
    ),
]

WORLD = 2
RANKS = SUPPORT / "tp_ranks.py"

EXPERTS = {"tp_plan": "auto", "tp_size": 2, "enable_expert_parallel": True}

# Name: model, options of patched(), options of from_pretrained.
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("one file", {}, {}),
    "llama in shards": ("tied shards", {}, {}),
    "llama cast": ("one file", {}, {"dtype": "float32"}),
    "llama buffered": ("one file", {"io": "buffered"}, {}),
    "llama owned": ("tied shards", {"tensors": "owned"}, {}),
    "mixtral": ("mixtral", {}, {}),
    "qwen3 moe": ("qwen3 moe", {}, {}),
    "experts in stacks": ("stacks", {}, {}),  # strided shards: several pieces of a tensor
    "experts in parallel": ("stacks", {}, {"distributed_config": EXPERTS}),
    "experts of files in parallel": ("qwen3 moe", {}, {"distributed_config": EXPERTS}),
    "one by one": ("one file", {}, {}),
    "verified": ("one file", {"verify": True}, {}),
    "no sharing of reads": ("one file", {"io": "mmap"}, {}),
}


# A rank that comes late finds the file cached by the other: then it plans nothing. So who reads
# what is looked at where ranks are told that it is not cached.
COLD: dict[str, dict[str, Any]] = {
    "cold": {"force": False},
    "cold, cast": {"force": False, "dtype": "bfloat16"},
    "as if cold": {"force": True},
    "as if cold, cast": {"force": True, "dtype": "bfloat16"},
}


class Ran:
    """What the ranks left."""

    def __init__(self, folder: Path, log: str) -> None:
        paths = [folder / f"rank{rank}.json" for rank in range(WORLD)]
        self._found = [json.loads(p.read_text()) if p.exists() else {} for p in paths]
        self._log = log

    def __call__(self, name: str) -> list[Any]:
        """What each rank returned in a case."""
        for rank, found in enumerate(self._found):
            assert name in found, f"rank {rank} did not finish {name!r}\n{self._log}"
            assert found[name]["error"] is None, f"rank {rank}: {found[name]['error']}"
        return [found[name]["value"] for found in self._found]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several turns."""
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("big")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as transformers holds them: all of a layer in one tensor."""
    path = tmp_path_factory.mktemp("stacks")
    folder = Saved(tmp_path_factory)("qwen3 moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(path, save_original_format=False)
    (file,) = weights_in(path)
    names = engine.read_layout(engine.open_file(str(file))).names
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    return path


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, big: Path, stacks: Path, warm_python: WarmPython
) -> Ran:
    """All cases, in one torchrun."""
    saved, folder = Saved(tmp_path_factory), tmp_path_factory.mktemp("ranks")
    broken = tmp_path_factory.mktemp("broken")
    for file in saved("one file").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (file,) = weights_in(broken)
    Path(file).write_bytes(Path(file).read_bytes()[:-64])
    cases = [
        {"name": name, "call": "one_by_one" if name == "one by one" else "same", "arguments": {
            "folder": str(stacks if model == "stacks" else saved(model)),
            "options": options, "load_options": more}}
        for name, (model, options, more) in SAME.items()
    ]  # fmt: skip
    cases.append({"name": "failing", "call": "failing", "arguments": {
        "folder": str(saved("one file")), "broken": str(broken)}})  # fmt: skip
    (file,) = weights_in(big)
    cases += [
        {"name": name, "call": "cold", "arguments": {
            "folder": str(big), "file": str(file), **more}}
        for name, more in COLD.items()
    ]  # fmt: skip
    job = folder / "job.json"
    job.write_text(json.dumps({"folder": str(folder), "cases": cases}))
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    arguments = ["--standalone", "--nproc-per-node", WORLD, RANKS, job]
    done = warm_python.run(
        TORCHRUN, *arguments, folder=folder, environment=environment, limit_s=400
    )
    said = done.stdout + done.stderr
    found = Ran(folder, said)
    assert done.returncode == 0, said
    return found


@pytest.mark.parametrize("name", SAME)
def test_shards_and_logits_are_stocks(ran: Callable[[str], list[Any]], name: str) -> None:
    """Compared in the ranks, tensor by tensor, bit for bit; here who did it."""
    _, options, more = SAME[name]
    for found in ran(name):
        assert found["sharded"] > 0
        assert found["after"] == 0  # unpatched, nothing of ours is left
        assert found["reports"]
        assert {r["call"] for r in found["reports"]} == {"safe_open"}
        assert {r["path"] for r in found["reports"]} <= FAST, found["reports"]
        assert {r["why"] for r in found["reports"]} == {None}
        assert (found["asked"] > 0) is (name != "one by one")
        left = options.get("verify") or "dtype" in more or "tensors" in options
        left = left or options.get("io") == "buffered" or name == "one by one"
        assert (found["views"] > 0) is not left


def test_each_rank_reports_its_own_part(ran: Callable[[str], list[Any]], big: Path) -> None:
    """Bytes are those of the shards: together the file, and what every rank has whole."""
    (file,) = weights_in(big)
    layout = engine.read_layout(engine.open_file(str(file)))
    whole = sum(layout.nbytes(i) for i, name in enumerate(layout.names) if "norm" in name)
    for name in COLD:
        told = [sum(r["bytes"] for r in found["reports"]) for found in ran(name)]
        assert told == [(layout.data_bytes + whole) // WORLD] * WORLD
        tensors = [sum(r["tensors"] for r in found["reports"]) for found in ran(name)]
        assert tensors == [len(layout.names)] * WORLD


@pytest.mark.parametrize("name", ["as if cold", "as if cold, cast"])
def test_ranks_read_ahead_in_turn(ran: Callable[[str], list[Any]], big: Path, name: str) -> None:
    found = ran(name)
    assert found[0]["sum"] != found[1]["sum"]
    (file,) = weights_in(big)
    layout = engine.read_layout(engine.open_file(str(file)))
    needed: set[tuple[int, int]] = set()
    for rank, one in enumerate(found):
        assert one["plans"]
        for plan in one["plans"]:
            assert (plan["turn"], plan["turns"]) == (rank, WORLD)
            assert plan["alone"]
            assert plan["shared"]
            needed |= {(b, e) for b, e in plan["alone"] + plan["shared"]}
            asked = sum(e - b for b, e in plan["alone"] + plan["shared"])
            assert sum(size for _, size in plan["extents"]) == asked
    covered = at = layout.data_begin
    for begin, end in sorted(needed):
        assert begin <= covered, (begin, covered)  # both ranks' together: the file, no gap
        covered = max(covered, end)
    assert covered == at + layout.data_bytes


@pytest.mark.parametrize("name", ["cold", "cold, cast"])
def test_storage_is_read_once(ran: Callable[[str], list[Any]], big: Path, name: str) -> None:
    found = ran(name)
    if not found[0]["evicted"]:
        pytest.skip("this file system keeps the file cached")
    (file,) = weights_in(big)
    size = Path(file).stat().st_size
    assert "mmap+readahead" in {r["path"] for one in found for r in one["reports"]}
    total = sum(one["storage"] for one in found)
    if total == 0:
        pytest.skip("the kernel does not count what this file system reads")
    assert total <= 1.05 * size, [one["storage"] for one in found]


def test_a_rank_that_fails_leaves_the_others_alone(ran: Callable[[str], list[Any]]) -> None:
    """As with stock: it raises stock's error, the other loads, and both go on in step."""
    for rank, one in enumerate(ran("failing")):
        assert one["patched"] == one["stock"]
        assert (one["patched"] == "loaded") is (rank == 0)
        assert one["patched gathered"] == one["stock gathered"]
        assert "safetensor" in one["patched gathered"][1].lower()
