"""Which files the pages link to, and where in the site those from outside of docs/ are."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cfg": "ini", ".txt": "text"}
"""Of source code, which is shown as a page."""


def linked(text: str, page: str) -> list[str]:
    """The files that a page links to, relative to docs/; `page` is the page's own place."""
    links = [link for link in LINK.findall(text) if ":" not in link]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links]


def place(uri: str) -> str:
    """Where in the site a file from outside of docs/ is."""
    path = uri.removeprefix("../")
    if path.endswith(".md"):
        return f"{path[:-3].lower().removesuffix('/readme')}/index.html"
    return f"{path}/index.html" if Path(path).suffix in LANGUAGES else path
