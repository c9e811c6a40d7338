"""C files call and include downwards only: the layers of ``native/``, read from its sources."""

from __future__ import annotations

import graphlib
import re
from pathlib import Path

import pytest

NATIVE = next(
    folder / "native" for folder in Path(__file__).parents if (folder / "native").is_dir()
)

# Folders and their rows from the top down, files without "fst_"; what a file calls and includes is
# in its own row or below.
FOLDERS = {
    ".": (("bench", "engine"),),
    "job": (("job",), ("pool",), ("chunk",), ("queue",), ("numa",)),
    "device": (("transfer",), ("gds", "ring"), ("gpu",)),
    "io": (("io_buffered", "io_direct", "io_memory"), ("io_cache",), ("fill_mode", "pieces")),
    "tensor": (("python",), ("batch",), ("arena",)),
    "file": (("header",), ("file", "header_lex"), ("feed",)),
    "base": (("memory", "pages"), ("base", "sys")),
}
LAYERS = tuple(row for rows in FOLDERS.values() for row in rows)

_NO_CODE = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""", re.DOTALL | re.VERBOSE
)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(?:\w+/)?fst_(\w+)\.h"', re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.MULTILINE)
_DEFINED = re.compile(r"\b(\w+)\s*\([^;]*\)\s*$")


def _blank(found: re.Match[str]) -> str:
    return '""' if found[0].startswith('"') else " "


def external_functions(source: str) -> set[str]:
    """Functions that a C file defines for others: not ``static``, with a body at file scope."""
    code = _DIRECTIVE.sub("", _NO_CODE.sub(_blank, source))
    found, depth, begin = set(), 0, 0
    for mark in re.finditer(r"[{};]", code):
        if depth == 0 and mark[0] != "}":
            head = code[begin : mark.start()]
            defined = _DEFINED.search(head) if mark[0] == "{" else None
            if defined and "=" not in head and not re.search(r"\bstatic\b", head):
                found.add(defined[1])
        depth += {"{": 1, "}": -1, ";": 0}[mark[0]]
        if depth == 0:
            begin = mark.end()
    return found


def uses(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    """For each file, the files that it calls or includes, and by which name."""
    owner = {name: file for file, text in sources.items() for name in external_functions(text)}
    graph: dict[str, dict[str, str]] = {file: {} for file in sources}
    for file, text in sources.items():
        names = set(re.findall(r"\b\w+\b", _NO_CODE.sub(_blank, text))) & owner.keys()
        used = {owner[name]: name for name in sorted(names)}
        used |= {header: f"fst_{header}.h" for header in _INCLUDE.findall(text)}
        graph[file] = {other: name for other, name in used.items() if other in sources}
        graph[file].pop(file, None)
    return graph


def upward(graph: dict[str, dict[str, str]], layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Uses of a higher layer, in words."""
    rank = {file: row for row, files in enumerate(layers) for file in files}
    return [
        f"fst_{file}.c uses {name} of fst_{other}.c, which is above it"
        for file, used in sorted(graph.items())
        for other, name in sorted(used.items())
        if rank[other] < rank[file]
    ]


def files_of(folder: str) -> list[str]:
    """The files of a folder, from the top down."""
    return [file for row in FOLDERS[folder] for file in row]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Each C file with its own header, since what a header includes comes along."""
    return {
        path.stem.removeprefix("fst_"): "".join(
            part.read_text(encoding="utf-8")
            for part in (path, path.with_suffix(".h"))
            if part.exists()
        )
        for path in NATIVE.rglob("fst_*.c")
    }


def test_every_file_is_in_one_row_of_its_folder():
    listed = [NATIVE / folder / f"fst_{file}.c" for folder in FOLDERS for file in files_of(folder)]
    assert sorted(listed) == sorted(NATIVE.rglob("fst_*.c"))


def test_no_file_uses_a_layer_above_its_own(sources):
    assert upward(uses(sources), LAYERS) == []


def test_no_files_use_each_other_in_a_circle(sources):
    graphlib.TopologicalSorter(uses(sources)).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int fst_a(void) { return 0; }", {"fst_a"}),
        ("fst_x *fst_a(int b,\n        int c) {\n if (c) { b(); } }", {"fst_a"}),
        ("static int a(void) {}\nint fst_b(void) {}", {"fst_b"}),
        ("int fst_a(void);\nint b = c(d);", set()),
        ("/* int fst_a(void) {} */ // int fst_b(void) {}", set()),
        ('const char *s = "int fst_a(void) {";\nint fst_b(void) {}', {"fst_b"}),
        ("#define FST_A(b) { b() }\nstruct c { int (*d)(int); };\nint fst_e(void) {}", {"fst_e"}),
        ("static const struct { int a; } b[] = {{f(1)}};", set()),
    ],
)
def test_external_functions_are_found(text, expected):
    assert external_functions(text) == expected


def test_upward_uses_are_found():
    top = '#include "below/fst_low.h"\nint fst_top(void) { return fst_low(); }'
    assert upward(uses({"top": top, "low": "int fst_low(void) {}"}), (("top",), ("low",))) == []
    low = "int fst_low(void) { return fst_top(); }"
    graph = uses({"top": top, "low": low})
    assert upward(graph, (("top",), ("low",))) == [
        "fst_low.c uses fst_top of fst_top.c, which is above it"
    ]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
    assert uses({"top": top, "low": "/* fst_top() */ int fst_low(void) {}"})["low"] == {}
    included = uses({"top": top, "low": '#include "fst_top.h"\nint fst_low(void) {}'})
    assert included["low"] == {"top": "fst_top.h"}
