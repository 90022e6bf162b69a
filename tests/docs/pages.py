"""The Markdown pages that are for readers, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "benchmarks/*.md",
        "recipes/*.md",
        "plugins/*.md",
        "runtime/cpp/*.md",
        "exporter/sinkexport/graph/*.md",
    )
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    """A page's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def fences(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """All but fenced blocks."""
    return _FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Anchors that a code host and mkdocs both make of headings."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(text), re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def commands(text: str) -> list[str]:
    """Shell lines that call ``sinkexport``, without comments, pipes before it and redirections after it."""
    blocks = [*fences(text, "sh"), *re.findall(r"(?:^    \S.*\n)+", prose(text), re.MULTILINE)]
    found = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\| *)(sinkexport [a-z].*)", line.strip())
            if match:
                found.append(re.split(r"\s+#|\s[<>|]|;", match[1])[0].strip())
    return found
