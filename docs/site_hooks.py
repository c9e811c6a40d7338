"""MkDocs hooks: files of the repository that pages link to, and the README's table of results.

Pages link to files outside docs/ as `../benchmarks/...`, which works where the repository is
browsed. The site gets a copy of each such file under the same path.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(?<=\]\()\.\./(?=[\w/.-]+\))")
LINK = re.compile(r"\]\(([\w/.-]+\.(?:png|md))\)")
RESULTS = "<!-- results of README.md -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that the added pages show."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for page in pages:
        for link in re.findall(r"\]\(\.\./([\w/.-]+)\)", page.read_text(encoding="utf-8")):
            _add(files, config, ROOT / link)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links out of docs/ at the copies, and put in the README's table."""
    if RESULTS in markdown:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        begin, end = readme.index("<!-- results:"), readme.index("<!-- end of results -->")
        markdown = markdown.replace(RESULTS, readme[readme.index("\n", begin) : end])
    return OUTSIDE.sub("", markdown) if "/" not in page.file.src_uri else markdown


def _add(files: Files, config: MkDocsConfig, path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    if files.get_file_from_path(place) is not None:
        return
    files.append(File.generated(config, place, abs_src_path=str(path)))
    if path.suffix == ".md":
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            if (path.parent / link).is_file():
                _add(files, config, path.parent / link)
