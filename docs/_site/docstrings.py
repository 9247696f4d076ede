"""Of Griffe, which reads the source for the pages of docs/api/: three habits of this package.

A field of a config is `option(default, help)`; the default may be a constant of the same file; and one line of a
docstring may describe several names, `first, second: ...`, of which Griffe would take the second for a type.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^ +\w+(?:, \w+)+:", re.MULTILINE)
UNBROKEN = "\N{NO-BREAK SPACE}"


class Habits(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            names = SEVERAL.sub(lambda line: line[0].replace(", ", f",{UNBROKEN}"), obj.docstring.value)
            obj.docstring.value = names

    def on_attribute_instance(self, *, node: ast.AST, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or str(value.function) != "option":
            return
        attr.value = value.arguments[0]
        constant = attr.module.members.get(str(attr.value))
        if isinstance(constant, griffe.Attribute):
            attr.value = constant.value
