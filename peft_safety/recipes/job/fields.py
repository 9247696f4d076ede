"""The fields of TRL's dataclasses that a job takes, as a table that is read in milliseconds: importing TRL takes
seconds. `python -m peft_safety.recipes.job.fields` writes it anew; a test compares it with the installed TRL.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from peft_safety.errors import extra

FILE = Path(__file__).with_name("fields.json")
TYPES = {"list": "list", "dict": "mapping", "bool": "yes/no", "int": "number", "float": "number"}
"""What a type is called in the help; of a union, the first of these that is in it."""


def table() -> dict[str, dict[str, Any]]:
    """Name of a field -> its dataclass ("of"), "type", "default" and the first sentence of its "help"."""
    result: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return result


def installed() -> dict[str, dict[str, Any]]:
    """The same from the installed TRL."""
    with extra("trl", "the table of fields needs TRL"):
        from trl import ModelConfig, ScriptArguments, SFTConfig

    result = {}
    for kind in (ModelConfig, ScriptArguments, SFTConfig):
        hints = get_type_hints(kind)
        for field in fields(kind):
            if field.init:
                default = field.default if field.default_factory is MISSING else field.default_factory()
                described = {"type": type_name(hints[field.name]), "default": _plain(default)}
                result[field.name] = {"of": kind.__name__, **described, "help": first_sentence(field.metadata)}
    return result


def type_name(hint: Any) -> str:
    return next((name for word, name in TYPES.items() if re.search(rf"\b{word}\b", str(hint))), "text")


def first_sentence(metadata: Any) -> str:
    text = " ".join(str(metadata.get("help", "")).replace("%%", "%").split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text, maxsplit=1)[0]


def _plain(default: Any) -> Any:
    if isinstance(default, Enum):
        return default.value
    return None if default is MISSING else default


def write() -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in installed().items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
