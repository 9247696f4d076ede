"""The world that the blocks of a page run in: models, adapters and files with the names that the page uses, all tiny.

A block runs as it is printed. What it names, a directory such as "meta-llama/Llama-3.1-8B-Instruct" or a file such as
"task.jsonl", is in the current directory, where every loader looks before it asks the Hub.
"""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from peft_safety import GuardSpaceConfig, SafetySubspace
from peft_safety.data import refusal_pairs
from tests.tiny import tiny_llama, tiny_tokenizer

HUB = r"(?:meta-llama|HuggingFaceTB|Qwen|mistralai|google)/[\w.-]*\w"
ALIGNED = re.compile(rf"M|MODEL|BASE|CHAT|{HUB}-(?:Instruct|Chat|it)")
UNALIGNED = re.compile(rf"PRETRAINED|{HUB}")
PROTECTED = re.compile(r"adapter|run/adapter|DIR")
PLAIN = re.compile(r"ADAPTER|A|B|PATCH|patch|lora|stranger")
SUBSPACE = re.compile(r"(?:sub)?space\.safetensors")
ROWS = re.compile(r"[\w./-]+\.jsonl")
PROMPTS = re.compile(r"[\w./-]+\.csv")
JOB = re.compile(r"job\.yaml")
NAME = re.compile(
    r"(?<![\w./-])(?:"
    + "|".join(kind.pattern for kind in (ALIGNED, UNALIGNED, PROTECTED, PLAIN, SUBSPACE, ROWS, PROMPTS, JOB))
    + r")(?![\w/-]|\.\w)"
)
WRITTEN = re.compile(r"""(?:save\w*\(|--out[ =]|output_dir[ =]|out=)\s*["']?([\w./-]+)""")
FOR_PLAIN = re.compile(r"safe_lora_dir|fuse\(")
"""What takes no protected adapter: on such a page an adapter of any name is a plain LoRA."""
TASK = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Color of item {i}?"}],
        "completion": [{"role": "assistant", "content": "red" if i % 2 else "green"}],
    }
    for i in range(128)
]
FUSION = "safe: PATCH\ntasks: [A, B]\nout: FUSED\n"
WIDTH = 96
"""Of the models: more than the directions that methods protect by default."""
DEFAULTS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 4}
"""Of a trainer's arguments: TRL's own are for a GPU and for hours."""


class Store:
    """What is made once for all pages, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cached_property
    def aligned(self) -> Path:
        return self._model("aligned", 0)

    @functools.cached_property
    def unaligned(self) -> Path:
        return self._model("unaligned", 1)

    @functools.cached_property
    def subspace(self) -> Path:
        path = self.root / "subspace.safetensors"
        model, tokenizer = tiny_llama(hidden=WIDTH), tiny_tokenizer()
        options: dict[str, Any] = {"method": "guardspace", "rank": 0.25, "target_modules": "all-linear"}
        SafetySubspace.from_activations(model, refusal_pairs(n=16), tokenizer=tokenizer, **options).save(path)
        return path

    @functools.cached_property
    def protected(self) -> Path:
        config = GuardSpaceConfig(
            r=4, target_modules="all-linear", train="B", a_init="random", subspace=str(self.subspace)
        )
        return self._adapter("protected", config)

    def plain(self, name: str) -> Path:
        """Another one for each name."""
        path = self.root / "plain" / name
        return path if path.exists() else self._adapter(f"plain/{name}", LoraConfig(r=4, target_modules="all-linear"))

    def _model(self, name: str, seed: int) -> Path:
        for part in (tiny_llama(seed, WIDTH), tiny_tokenizer()):
            part.save_pretrained(self.root / name)
        return self.root / name

    def _adapter(self, name: str, config: Any) -> Path:
        """An adapter that changes the aligned model a little, and names it."""
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.aligned), config)
        own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02, generator=own)
        model.save_pretrained(self.root / name)
        return self.root / name

    def furnish(self, code: str) -> None:
        """Make in the current directory what the code of a page names and does not write first."""
        for name in named(code):
            target = Path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if ALIGNED.fullmatch(name):
                target.symlink_to(self.aligned, target_is_directory=True)
            elif UNALIGNED.fullmatch(name):
                target.symlink_to(self.unaligned, target_is_directory=True)
            elif PLAIN.fullmatch(name) or (PROTECTED.fullmatch(name) and FOR_PLAIN.search(code)):
                shutil.copytree(self.plain(name), target)
            elif PROTECTED.fullmatch(name):
                shutil.copytree(self.protected, target)
            elif SUBSPACE.fullmatch(name):
                shutil.copy(self.subspace, target)
            elif ROWS.fullmatch(name):
                target.write_text("".join(json.dumps(row) + "\n" for row in TASK), encoding="utf-8")
            elif PROMPTS.fullmatch(name):
                with target.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([["prompt"], *([f"Question {i}?"] for i in range(8))])
            else:
                target.write_text(FUSION, encoding="utf-8")


def named(code: str) -> list[str]:
    """What code names of all that can be made, without what it writes itself (or into) at its first mention."""
    first: dict[str, int] = {}
    for match in NAME.finditer(code):
        first.setdefault(match[0], match.start())
    written: dict[str, int] = {}
    for match in WRITTEN.finditer(code):
        written.setdefault(match[1], match.start(1))
    end = len(code)
    return [
        name
        for name, place in first.items()
        if all(written.get(str(path), end) > place for path in (Path(name), *Path(name).parents))
    ]


STANDARD: dict[str, Callable[[Store], Any]] = {
    "base": lambda store: AutoModelForCausalLM.from_pretrained(store.aligned),
    "model": lambda store: AutoModelForCausalLM.from_pretrained(store.aligned),
    "tokenizer": lambda _: tiny_tokenizer(),
    "rows": lambda _: [*TASK],
    "held_out_rows": lambda _: TASK[:4],
}
"""Variables that a page may use without making them."""


def provide(code: str, namespace: dict[str, Any], store: Store) -> None:
    """Make those of the standard variables that a block reads before anything sets them."""
    known = {*namespace}
    for statement in ast.parse(code).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        for node in names:
            if isinstance(node.ctx, ast.Load) and node.id in STANDARD.keys() - known:
                namespace[node.id] = STANDARD[node.id](store)
        known |= {node.id for node in names}


def quick_trainers(patch: pytest.MonkeyPatch) -> None:
    """Give the arguments of trainers the `DEFAULTS` above. What a block sets itself stays."""
    import trl

    for kind in (TrainingArguments, trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig):
        patch.setattr(kind, "__init__", _with_defaults(kind.__init__))


def _with_defaults(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def initialize(self: Any, *positional: Any, **given: Any) -> None:
        plain(self, *positional, **{**DEFAULTS, **given})

    return initialize
