"""What the documentation says of the repository, and of the package, is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file

PACKAGE = Path(importlib.util.find_spec("fastst_patch").origin).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}

FOLDERS = r"(?:\.ci|fastst_patch|native|tests|docs|benchmarks|examples|fuzz|tools)"
FILE = re.compile(rf"(?<![\w./-]){FOLDERS}/[\w./-]+\.(?:py|c|h|def|sh|md|json)\b")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")

NETWORK = {
    "aiohttp", "asyncio", "ftplib", "http", "httpx", "requests", "smtplib", "socket",
    "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "xmlrpc",
}  # fmt: skip


@pytest.fixture(scope="module")
def options_page() -> ModuleType:
    path = ROOT / "docs" / "options_page.py"
    spec = importlib.util.spec_from_file_location("options_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_are_named_exist(page: Path) -> None:
    named = set(FILE.findall(TEXT[page]))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(TEXT[page]):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings}


def test_table_says_where_to_change_what() -> None:
    rows = table("## To change X, open Y")
    assert len(rows) >= 20
    assert [row for row in rows if not re.search(r"`[\w./]+`", row)] == []


def test_glossary_is_short_and_sorted() -> None:
    words = [row.split("|")[1].strip() for row in table("## Glossary")]
    assert len(words) <= 30
    assert words == sorted(set(words))


def table(heading: str) -> list[str]:
    """Rows of the first table below a heading of the page about the architecture."""
    text = TEXT[ROOT / "docs" / "architecture.md"].split(f"\n{heading}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_readme_is_short() -> None:
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 150


def test_options_are_those_of_the_code(options_page, tmp_path, monkeypatch) -> None:
    assert options_page.main(["--check"]) == 0
    text = options_page.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "options.md"
    page.write_text(text.replace("### `io`", "### `oi`"), encoding="utf-8")
    monkeypatch.setattr(options_page, "PAGE", page)
    assert options_page.main(["--check"]) == 1
    assert options_page.main([]) == 0
    assert page.read_text(encoding="utf-8") == text


# ---- SECURITY.md: no telemetry, and no network but for URLs that are given ----


def test_no_module_but_sources_imports_a_network_library() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in imported(path) & NETWORK
        if path.parent != PACKAGE / "sources"
    }
    assert found <= {("sharding/groups.py", "socket")}  # for gethostname alone:
    text = (PACKAGE / "sharding" / "groups.py").read_text(encoding="utf-8")
    assert set(re.findall(r"socket\.(\w+)", text)) == {"gethostname"}


def test_nothing_but_messages_between_ranks_is_pickled() -> None:
    codes = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
    found = {(path.relative_to(PACKAGE).as_posix(), name)
             for path in PACKAGE.rglob("*.py") for name in imported(path) & codes}  # fmt: skip
    assert found == {("sharding/channel.py", "pickle")}
    calls = re.compile(r"\btorch\.load\(|(?<![.\w])eval\(|(?<![.\w])exec\(")
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
             if calls.search(path.read_text(encoding="utf-8"))}  # fmt: skip
    # What a user types into a cell; the watcher of `enable`; two texts.
    allowed = {"patching/ipython.py", "cli/enable.py", "cli/doctor.py", "_site/sitecustomize.py"}
    assert found <= allowed


def imported(path: Path) -> set[str]:
    """First parts of the modules that a file imports, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names]  # fmt: skip
    parts = [node.module for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and not node.level]  # fmt: skip
    return {name.split(".")[0] for name in (*whole, *parts)}


OPENS_NO_SOCKET = """
import sys
opened = []
sys.addaudithook(lambda event, _: opened.append(event) if event.startswith("socket.") else None)
import torch
imported = len(opened)
import fastst_patch
fastst_patch.patch()
import safetensors.torch
safetensors.torch.load_file(sys.argv[1])
with fastst_patch.config_context(io="direct"), safetensors.safe_open(sys.argv[1], "pt") as file:
    file.get_tensor("x")
assert set(fastst_patch.stats()["paths"]) & {"mmap", "mmap+readahead"}
print(opened[imported:])
"""


def test_patching_and_loading_open_no_socket(tmp_path: Path, warm_python: Any) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, path)
    done = warm_python.run(OPENS_NO_SOCKET, path, folder=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
