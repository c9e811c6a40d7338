"""``%load_ext fastst_patch`` in a real IPython shell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import fastst_patch
from fastst_patch import engine

interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


@pytest.fixture(scope="module")
def one_shell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        traitlets = pytest.importorskip("traitlets.config")
        config = traitlets.Config()
        config.HistoryManager.enabled = False
        yield interactiveshell.InteractiveShell(config=config)


@pytest.fixture
def shell(one_shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({f"t{i}": torch.arange(1000) + i for i in range(4)}, path)
    one_shell.push({"path": str(path), "safetensors": safetensors})
    assert one_shell.run_cell("%load_ext fastst_patch").success
    yield one_shell
    assert one_shell.run_cell("%unload_ext fastst_patch").success
    one_shell.reset()


def rows(text: str) -> list[list[str]]:
    """Cells of the table's rows, without totals."""
    lines = text.split("fastst_patch: ", 1)[1].splitlines()[1:]
    return [line.split() for line in lines[2:] if ".safetensors  " in line]


def test_patched_while_loaded(shell: Any) -> None:
    assert fastst_patch.is_patched()
    shell.run_cell("%load_ext fastst_patch")
    shell.run_cell("%reload_ext fastst_patch")
    assert fastst_patch.is_patched()
    shell.run_cell("%unload_ext fastst_patch")
    assert not fastst_patch.is_patched()
    assert shell.find_magic("fastst_profile", "line") is None
    assert shell.find_magic("fastst_profile", "cell") is None
    shell.run_cell("%load_ext fastst_patch")
    assert fastst_patch.is_patched()


def test_what_others_patched_stays(shell: Any) -> None:
    fastst_patch.patch()
    shell.run_cell("%unload_ext fastst_patch")
    assert fastst_patch.is_patched()
    fastst_patch.unpatch()
    shell.run_cell("%load_ext fastst_patch")


def test_cell(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("earlier = safetensors.safe_open(path, 'pt'); earlier.get_tensor('t0');")
    capsys.readouterr()
    done = shell.run_cell(
        "%%fastst_profile\n"
        "x = safetensors.torch.load_file(path)\n"
        "kept = safetensors.safe_open(path, 'pt')\n"
        "safetensors.safe_open(path, 'pt', backend='pread')\n"
        "len([kept.get_tensor(n) for n in kept.keys()]), len(x)"
    )
    assert done.success
    assert done.result == (4, 4)
    text = capsys.readouterr().out
    found = sorted([cells[1], *cells[3:6]] for cells in rows(text))
    assert found == [
        ["load_file", "mmap", "1", "4"],
        ["safe_open", "mmap", "1", "4"],  # kept, and still open
        ["safe_open", "stock", "1", "0"],
    ]
    assert "backend 'pread' is not accelerated" in text
    assert shell.user_ns["x"].keys() == {"t0", "t1", "t2", "t3"}
    shell.run_cell("%%fastst_profile\nkept.get_tensor('t0');")
    (cells,) = rows(capsys.readouterr().out)
    assert cells[4:6] == ["1", "1"]  # what the handle did before is not counted again


def test_cell_that_raises(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = shell.run_cell("%%fastst_profile\nsafetensors.torch.load_file(path)\n1 / 0")
    assert isinstance(done.error_in_exec, ZeroDivisionError)
    assert len(rows(capsys.readouterr().out)) == 1
    assert not isinstance(shell.run_cell("%%fastst_profile\n1 /").error_in_exec, type(None))
    assert shell.run_cell("%%fastst_profile -v\n1").error_in_exec is not None


def test_line(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = shell.run_cell("n = %fastst_profile len(safetensors.torch.load_file(path))")
    assert done.success
    assert shell.user_ns["n"] == 4
    assert len(rows(capsys.readouterr().out)) == 1
    shell.run_cell("%fastst_profile y = 1")
    assert "no safetensors loads" in capsys.readouterr().out
    assert shell.user_ns["y"] == 1


def test_line_alone_is_for_its_cell(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = shell.run_cell("%fastst_profile\nz = safetensors.torch.load_file(path)\nprint('end')")
    assert done.success
    text = capsys.readouterr().out
    assert text.index("end\n") < text.index("fastst_patch: ")
    assert len(rows(text)) == 1
    shell.run_cell("z = safetensors.torch.load_file(path)")
    assert "fastst_patch:" not in capsys.readouterr().out  # it was for that cell only


def test_magics_inside(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.run_cell("%%fastst_profile\n%time w = safetensors.torch.load_file(path)").success
    assert len(rows(capsys.readouterr().out)) == 1
