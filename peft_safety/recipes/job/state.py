"""Which steps of a job are done, in a file of its output directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_safety.core import files
from peft_safety.recipes.job.options import STEPS

FILE_NAME = "job.json"


class State:
    """Facts of the finished steps. A step is done as long as its settings have the digest that they had then."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self.steps: dict[str, Any] = files.read_json(self.path) if self.path.exists() else {}

    def is_done(self, step: str, digest: str) -> bool:
        return bool(self.steps.get(step, {}).get("digest") == digest)

    def facts(self, step: str) -> dict[str, Any]:
        facts: dict[str, Any] = self.steps.get(step, {}).get("facts", {})
        return facts

    def start(self, step: str) -> None:
        """Forget the step and those after it, which build on its result."""
        self.steps = {name: entry for name, entry in self.steps.items() if name in STEPS[: STEPS.index(step)]}

    def finish(self, step: str, digest: str, facts: dict[str, Any], write: bool = True) -> None:
        self.steps[step] = {"digest": digest, "facts": facts}
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.steps, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
