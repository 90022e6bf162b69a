"""What mkdocs needs to make a site of the files as they lie in the repository: pages outside docs/, and their links.

A link in a page goes to a file beside it, as on a code host. On the site it goes to that file's page; a link to a file
that has no page becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "running-benchmarks.md",
    "exporter/sinkexport/graph/README.md": "graph.md",
    "findings/README.md": "findings.md",
    "plugins/README.md": "kernels.md",
    "recipes/README.md": "recipes.md",
    "runtime/cpp/README.md": "cpp.md",
}
"""File of the repository -> page of the site; files of docs/ are pages of their own name."""

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page to pages."""
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pieces = _FENCE.split(markdown)
    return "".join(
        piece if number % 2 else _LINK.sub(lambda match: _link(match, source, page.file.src_uri), piece)
        for number, piece in enumerate(pieces)
    )


def _link(match: re.Match[str], source: str, page: str) -> str:
    text, target = match.groups()
    if target.startswith(("#", "http://", "https://", "mailto:")):
        return match[0]
    path, _, anchor = target.partition("#")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if file in PAGES:
        found = PAGES[file]
    elif file.startswith("docs/"):
        found = file.removeprefix("docs/")
    elif (ROOT / file).exists():
        return text.removeprefix("!")[1:-1]  # a source file has no page
    else:
        return match[0]  # a link to nothing: mkdocs names it
    relative = posixpath.relpath(found, posixpath.dirname(page) or ".")
    return f"{text}({relative}{'#' + anchor if anchor else ''})"
