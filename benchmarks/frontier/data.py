"""Prompt sets beside the package's own: where they come from, and which of their rows belong to which split."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_safety.data import read_jsonl
from peft_safety.errors import DataError

LIMIT = 48
"""Prompts of each further set: what a measurement of a minute allows on two cores."""
HELD_OUT = 320
"""Rows of AdvBench from here on are never trained or calibrated on; those of 160 to 319 serve as validation."""
DEFAULT_DIR = Path("../shared/data")
FILES = ("advbench.jsonl", "xstest.jsonl")
TASK_FILES = {"train": "banking_intents_train.jsonl", "test": "banking_intents_test.jsonl"}


@dataclass(frozen=True)
class Sets:
    """Further prompts by split and name, and which of them are harmless."""

    prompts: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    safe: tuple[str, ...] = ("xstest_safe",)

    def of(self, split: str) -> dict[str, tuple[str, ...]]:
        """The sets of one split."""
        return dict(self.prompts.get(split, {}))

    def hashes(self) -> dict[str, str]:
        """What a cell's name depends on."""
        return {f"{split}/{name}": fingerprint(rows) for split, sets in self.prompts.items() for name, rows in sets.items()}


def fingerprint(prompts: Sequence[str]) -> str:
    """A short hash of texts in order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]


def resolve(given: str | None) -> Path | None:
    """The directory of the public sets: the one given, the usual one if it is there, or a Hub data set (`hub:owner/name`) that holds the same files.

    Raises:
        DataError: no such directory, or the Hub is not in reach.
    """
    if given is None:
        return DEFAULT_DIR if all((DEFAULT_DIR / name).is_file() for name in FILES) else None
    if given.startswith("hub:"):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(given[4:], repo_type="dataset", allow_patterns=["*.jsonl"]))
        except (OSError, ValueError) as error:
            raise DataError(f"{given}: {error}. Give a data set repository that holds {', '.join(FILES)}, or a directory.") from error
    path = Path(given)
    if not path.is_dir():
        raise DataError(f"--data {given} is no directory. Give the one that holds {', '.join(FILES)}, or leave it out for the package's own prompts alone.")
    return path


def public_sets(folder: Path | None, limit: int = LIMIT) -> Sets:
    """AdvBench, XSTest-unsafe and XSTest-safe from `folder`, `limit` prompts each, other ones for validation than for test.

    Raises:
        DataError: a missing or malformed file.
    """
    if folder is None:
        return Sets()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {missing[0]}. Give a directory that holds {', '.join(FILES)}, or leave --data out for the package's own prompts alone."
        )
    advbench = [row["prompt"] for row in read_jsonl(folder / "advbench.jsonl", ("prompt",))]
    xstest = read_jsonl(folder / "xstest.jsonl", ("prompt", "label"))
    halves = {label: _halves([row["prompt"] for row in xstest if row["label"] == label]) for label in ("unsafe", "safe")}
    adv = {"validation": advbench[HELD_OUT // 2 : HELD_OUT], "test": advbench[HELD_OUT:]}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for split in ("validation", "test"):
        sets = {"advbench": adv[split], "xstest_unsafe": halves["unsafe"][split], "xstest_safe": halves["safe"][split]}
        if empty := [name for name, rows in sets.items() if not rows]:
            raise DataError(f"{folder} has no {split} rows for {empty[0]}. The files are those of its README: 521 rows of AdvBench, 450 of XSTest.")
        found[split] = {name: tuple(random.Random(0).sample(rows, min(limit, len(rows)))) for name, rows in sets.items()}
    return Sets(found)


def _halves(rows: Sequence[str]) -> dict[str, list[str]]:
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    return {"validation": shuffled[: len(shuffled) // 2], "test": shuffled[len(shuffled) // 2 :]}


def banking(folder: Path) -> list[dict[str, Any]]:
    """The banking intents as one task: a sixth of its training file is for validation.

    Raises:
        DataError: a missing or malformed file.
    """
    train, test = (read_jsonl(folder / TASK_FILES[name], ("text", "label")) for name in ("train", "test"))
    random.Random(0).shuffle(train)
    cut = len(train) // 6
    splits = {"validation": train[:cut], "train": train[cut:], "test": test}
    return [{**row, "split": split} for split, rows in splits.items() for row in rows]


def task_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """A short hash of a task."""
    return fingerprint([f"{row['text']}\t{row['label']}\t{row['split']}" for row in rows])
