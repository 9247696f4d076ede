"""Of Griffe, which reads the source for the pages of docs/api/: a field of a config is `option(default, help)`,
and the default may be a constant of the same file.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Defaults(griffe.Extension):
    def on_attribute_instance(self, *, node: ast.AST, attr: griffe.Attribute, **kwargs: Any) -> None:
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or str(value.function) != "option":
            return
        attr.value = value.arguments[0]
        constant = attr.module.members.get(str(attr.value))
        if isinstance(constant, griffe.Attribute):
            attr.value = constant.value
