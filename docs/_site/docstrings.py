"""Of Griffe, which reads the package's source for the pages of docs/api/: two habits of this package.

A field of a config is `option(default, help)`, and "Returns:" may begin a line with its text behind it.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Returns|Raises): (?=\S)", re.MULTILINE)


def apart(text: str) -> str:
    """A docstring whose sections begin on lines of their own; lines that go on are indented already."""
    return SECTION.sub(r"\1:\n    ", text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = apart(obj.docstring.value)

    def on_attribute_instance(self, *, node: ast.AST, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            attr.value = value.arguments[0]
