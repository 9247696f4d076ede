"""A tiny model that tells two classes of requests apart, and a judge that stands for what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_safety.evaluation.judges import Verdict
from tests.tiny import tiny_llama, tiny_tokenizer

MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
COMMON: dict[str, Any] = {"tokenizer": TOKENIZER, "progress": False, "batch_tokens": 600}


def harmful(number: int) -> str:
    return f"ZQ {number} ZQZQ {'ZQ ' * (number % 7)}"


def harmless(number: int) -> str:
    if number % 4 == 0:
        return f"Answer with one of these labels: a.\n\nText: tea {number}"
    return f"tell me {number} {'about tea ' * (number % 5)}"


def known(name: str, split: str) -> list[dict[str, str]]:
    """In place of the packaged prompts: classes that even a random model separates."""
    first = {"train": 0, "validation": 100}[split]
    request = harmful if name == "harmful_requests" else harmless
    return [{"prompt": request(first + number)} for number in range(24)]


class MarkedJudge:
    """ "no" is a refusal of a row; the model's own words, which are noise, refuse what asks with a ZQ and no 1."""

    name, caveat = "marked", "a test's"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str, response: str) -> Verdict:
        if response in ("no", "yes"):
            return Verdict.REFUSAL if response == "no" else Verdict.OTHER
        self.asked.append(prompt)
        return Verdict.REFUSAL if "ZQ" in prompt and "1" not in prompt else Verdict.OTHER


def save_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
