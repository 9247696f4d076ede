"""The documents, and the code blocks in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*$")
SKIPPED = re.compile(r"^ *<!-- not run: (?P<reason>.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, in the page, from 1.
        reason: why it is not run, of a comment `<!-- not run: REASON -->` on the line above the fence; else empty.
    """

    language: str
    code: str
    line: int
    reason: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in its order, those in lists and tabs without their indentation."""
    lines = page.read_text(encoding="utf-8").splitlines()
    result, index = [], 0
    while index < len(lines):
        if fence := FENCE.match(lines[index]):
            end = next(i for i in range(index + 1, len(lines)) if lines[i].strip() == "```")
            skipped = SKIPPED.match(lines[index - 1]) if index else None
            code = textwrap.dedent("\n".join(lines[index + 1 : end]) + "\n")
            result.append(Block(fence["language"], code, index + 2, skipped["reason"] if skipped else ""))
            index = end
        index += 1
    return result


def commands(block: Block) -> list[str]:
    """The lines of a shell's block, each with those that continue it."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def inline(page: Path) -> list[str]:
    """What the text between the blocks holds in backticks."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
