"""Of MkDocs: what pages link to outside of docs/ comes into the site, so that one link works there and on GitHub.

A link `../../benchmarks/results/frontier.png` is, to MkDocs, a file `../benchmarks/results/frontier.png` in docs/. So
files get such names here, and a place of their own in the site: Markdown, notebooks and source code as pages, all else
as it is. No text of a page is changed. While MkDocs imports this file, its folder is on the path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from places import NOTEBOOK, is_shown, linked, page, place

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ALWAYS = ("../SECURITY.md", "../CONTRIBUTING.md", "../CHANGELOG.md")
INSIDE = "../docs/"


class Shown(File):
    """A page made of a file that is not Markdown."""

    def is_documentation_page(self) -> bool:
        return True


class Repository(Files):
    """Files by their names relative to docs/, to which the pages outside of it link by `docs/`."""

    def get_file_from_path(self, path: str) -> File | None:
        return super().get_file_from_path(path.removeprefix(INSIDE))


def on_config(config: MkDocsConfig) -> None:
    if url := os.environ.get("REPO_URL"):
        config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": url, "name": "Source code"}]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    result = Repository(files)
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    wanted = [*ALWAYS, *(uri for page, text in pages for uri in linked(text, page))]
    while wanted:
        uri = wanted.pop()
        if not uri.startswith("../") or result.get_file_from_path(uri) is not None:
            continue
        source = Path(config.docs_dir, uri).resolve()
        root = Path(config.docs_dir).resolve().parent
        if not source.is_file() or root not in source.parents:
            raise PluginError(f"a page links to {uri}, relative to docs/, which is no file of this repository")
        file = outside(uri, source, config)
        result.append(file)
        if uri.endswith((".md", NOTEBOOK)):
            wanted += linked(file.content_string, uri)
    return result


def outside(uri: str, source: Path, config: MkDocsConfig) -> File:
    """A file from outside of docs/."""
    hidden = InclusionLevel.NOT_IN_NAV
    if is_shown(uri):
        text = page(uri, source.read_text(encoding="utf-8"))
        file: File = Shown.generated(config, uri, content=text, inclusion=hidden)
    else:
        file = File(uri, config.docs_dir, config.site_dir, config.use_directory_urls, inclusion=hidden)
    file.dest_uri = place(uri)
    return file
