"""The world that the blocks of a page run in: the models, files and variables that it names, all tiny.

A block is run as it is printed. What it names, a directory such as "meta-llama/Llama-3.1-8B-Instruct" or a file such
as "task.jsonl", is there in the current directory, where every loader looks before it asks the Hub.
"""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from peft_safety import GuardSpaceConfig, SafetySubspace
from peft_safety.data import refusal_pairs
from tests.tiny import tiny_llama, tiny_tokenizer

HUB_MODEL = re.compile(r"(?<![\w./-])(?:meta-llama|HuggingFaceTB|Qwen|mistralai|google)/[\w.-]*\w")
MODELS = ("M", "MODEL", "BASE", "CHAT", "PRETRAINED")
PROTECTED = ("adapter", "run/adapter", "ADAPTER", "PATCH/adapter")
PLAIN = ("A", "B", "plain_adapter")
SUBSPACES = ("subspace.safetensors",)
WRITTEN = re.compile(r"""(?:save\w*\(|--out[ =]|output_dir[ =]|out=)\s*["']?([\w./-]+)""")
ROWS = [{"prompt": f"Color of item {i}?", "completion": " red" if i % 2 else " green"} for i in range(64)]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
"""Defaults of a trainer's arguments, in place of TRL's own, which are for a GPU."""


class Store:
    """What is made once for all pages, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _once(self, name: str, make: Callable[[Path], Any]) -> Path:
        path = self.root / name
        if not path.exists():
            make(path)
        return path

    @functools.cached_property
    def model(self) -> Path:
        return self._once("model", lambda path: [part.save_pretrained(path) for part in (tiny_llama(), tiny_tokenizer())])

    @functools.cached_property
    def subspace(self) -> Path:
        def make(path: Path) -> None:
            pairs = refusal_pairs(n=16)
            made = SafetySubspace.from_activations(
                tiny_llama(), pairs, tokenizer=tiny_tokenizer(), method="guardspace", rank=0.25, target_modules="all-linear"
            )
            made.save(path)

        return self._once("subspace.safetensors", make)

    @functools.cached_property
    def protected(self) -> Path:
        return self._adapter("protected", GuardSpaceConfig(
            r=4, target_modules="all-linear", train="B", subspace=str(self.subspace), a_init="random"
        ))

    @functools.cached_property
    def plain(self) -> Path:
        return self._adapter("plain", LoraConfig(r=4, target_modules="all-linear"))

    def _adapter(self, name: str, config: Any) -> Path:
        """An adapter that moves the model a little, and names the model that it is for."""
        base = tiny_llama()
        base.config._name_or_path = base.name_or_path = str(self.model)
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(base, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
        return self._once(name, model.save_pretrained)

    def furnish(self, code: str) -> None:
        """Put what a page's code names into the current directory, without what the page writes itself first."""
        for path in named(code):
            target = Path(path)
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in MODELS or HUB_MODEL.fullmatch(path):
                target.symlink_to(self.model, target_is_directory=True)
            elif path in SUBSPACES:
                shutil.copy(self.subspace, target)
            elif path in PROTECTED or path in PLAIN:
                shutil.copytree(self.protected if path in PROTECTED else self.plain, target)
            elif path.endswith(".jsonl"):
                target.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
            elif path.endswith(".csv"):
                with target.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([["prompt"], *([row["prompt"]] for row in ROWS)])


def named(code: str) -> list[str]:
    """Models, adapters and files of rows that the code names, in their order, without those that it writes first."""
    known = "|".join(map(re.escape, (*MODELS, *PROTECTED, *PLAIN, *SUBSPACES)))
    pattern = rf"(?<![\w./-])(?:{known}|[\w./-]+\.(?:jsonl|csv)|{HUB_MODEL.pattern})(?![\w/-])"
    first: dict[str, int] = {}
    for match in re.finditer(pattern, code):
        first.setdefault(match[0], match.start())
    made = {match[1]: match.start(1) for match in reversed([*WRITTEN.finditer(code)])}
    return [path for path, place in first.items() if made.get(path) != place]


def _trainer() -> Any:
    from trl import SFTConfig, SFTTrainer

    model = get_peft_model(tiny_llama(), GuardSpaceConfig(r=4, target_modules="all-linear", task_data=ROWS[:8]))
    return SFTTrainer(model, args=SFTConfig(output_dir="run", max_steps=1), train_dataset=_data(), processing_class=tiny_tokenizer())


def _data() -> Any:
    from datasets import Dataset

    return Dataset.from_list(ROWS)


STANDARD: dict[str, Callable[[], Any]] = {
    "base": tiny_llama,
    "model": tiny_llama,
    "tokenizer": tiny_tokenizer,
    "rows": lambda: [*ROWS],
    "train_rows": lambda: [*ROWS],
    "held_out_rows": lambda: [*ROWS[:4]],
    "trainer": _trainer,
}
"""Variables that a page may use without making them."""


def provide(code: str, namespace: dict[str, Any], names: Iterable[str] = tuple(STANDARD)) -> None:
    """Make those of the standard variables that a block reads and nobody has set."""
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for variable in names:
        if variable in read and variable not in namespace:
            namespace[variable] = STANDARD[variable]()


def without_gpu(patch: pytest.MonkeyPatch) -> None:
    """Give the arguments of trainers the defaults of `CPU`. A block that sets one of them itself keeps its own."""
    import trl
    from transformers import TrainingArguments

    for kind in (TrainingArguments, *(value for key, value in vars(trl).items() if key.endswith("Config"))):
        _with_defaults(kind, patch)


def _with_defaults(kind: type, patch: pytest.MonkeyPatch) -> None:
    plain = kind.__init__

    @functools.wraps(plain)
    def initialize(self: Any, *positional: Any, **given: Any) -> None:
        plain(self, *positional, **{**CPU, **given})

    patch.setattr(kind, "__init__", initialize)
