"""Which files the pages link to, where in the site those from outside of docs/ are, and how they are shown."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
NOTEBOOK = ".ipynb"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cfg": "ini", ".txt": "text"}
"""Of source code. It is shown as a page, and so is a notebook."""


def linked(text: str, page: str) -> list[str]:
    """The files that a page links to, relative to docs/; `page` is the page's own place."""
    links = [link for link in LINK.findall(text) if ":" not in link]
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links]


def is_shown(uri: str) -> bool:
    """Whether a page is made of a file that is not Markdown."""
    return Path(uri).suffix in {NOTEBOOK, *LANGUAGES}


def place(uri: str) -> str:
    """Where in the site a file from outside of docs/ is."""
    path = uri.removeprefix("../")
    if path.endswith(".md"):
        return f"{path[:-3].lower().removesuffix('/readme')}/index.html"
    return f"{path}/index.html" if is_shown(uri) else path


def page(uri: str, text: str) -> str:
    """Source code, or the cells of a notebook without what they print, as Markdown."""
    suffix = Path(uri).suffix
    if suffix != NOTEBOOK:
        return f"# `{uri.removeprefix('../')}`\n\n{_fenced(text, LANGUAGES[suffix])}"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(_fenced(source, "python") if kind == "code" else source for kind, source in cells)


def _fenced(text: str, language: str) -> str:
    return f"`````{language}\n{text.rstrip()}\n`````\n"
