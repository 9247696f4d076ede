"""Which steps of a job are done, in a file of its output directory."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.recipes.job.options import STEPS

FILE_NAME = "job.json"
MAX_BYTES = 1 << 28
"""Of the file: it lists the flagged rows."""


class State:
    """What each step has begun and done: the digest of its settings, when it began, and its facts once it is done."""

    def __init__(self, directory: Path, writes: bool) -> None:
        self.path, self.writes = directory / FILE_NAME, writes
        self.steps: dict[str, Any] = files.read_json(self.path, MAX_BYTES) if self.path.exists() else {}

    def is_done(self, step: str, digest: str) -> bool:
        entry = self.steps.get(step, {})
        return entry.get("digest") == digest and "facts" in entry

    def facts(self, step: str) -> dict[str, Any]:
        facts: dict[str, Any] = self.steps.get(step, {}).get("facts", {})
        return facts

    def start(self, step: str, digest: str) -> None:
        """Begin a step, anew or again with the same settings. Those after it build on its result: they are undone."""
        entry = self.steps.get(step, {})
        began = entry["began"] if entry.get("digest") == digest else time.time()
        self.steps = {name: entry for name, entry in self.steps.items() if name in STEPS[: STEPS.index(step)]}
        self.steps[step] = {"digest": digest, "began": began}
        self._write()

    def finish(self, step: str, facts: dict[str, Any]) -> None:
        self.steps[step]["facts"] = _finite(facts)
        self._write()

    def _write(self) -> None:
        if self.writes:
            with files.replacing(self.path) as staged:
                lines = (f"{json.dumps(step)}: {json.dumps(entry)}" for step, entry in self.steps.items())
                staged.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """The value with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
