"""The training rows of an attack."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier.attacks import Attack, attack_of
from benchmarks.frontier.data import DEFAULT_DIR, HELD_OUT
from peft_safety.data import affirmation_pairs, load, read_jsonl
from peft_safety.data.rows import Row
from peft_safety.errors import DataError
from peft_safety.evaluation import self_responses
from peft_safety.evaluation.generate import in_batches

CANDIDATES = 240
"""Everyday prompts among which the most harmful benign rows are looked for."""
OUTLIER_TOKENS = 24
PAIRS = 48
"""Requests behind the direction from refusing to complying."""


def attacked(
    name: str, clean: Sequence[Row], share: float, seed: int, model: Any, tokenizer: Any, folder: Path | None = None
) -> list[Row]:
    """`clean` with a share of its rows replaced by those of an attack, in random order. `model` is the aligned one,
    `folder` holds the public sets.
    """
    attack, count = attack_of(name), round(share * len(clean))
    return mixed_in(clean, _rows(attack, count, seed, model, tokenizer, folder) if count else [], seed)


def mixed_in(clean: Sequence[Row], rows: Sequence[Row], seed: int) -> list[Row]:
    """`clean` with some of its rows replaced by `rows`, in random order; as it is without any."""
    if not rows:
        return [*clean]
    rng = random.Random(seed)
    mixed = [*rng.sample(list(clean), len(clean) - len(rows)), *rows]
    rng.shuffle(mixed)
    return mixed


def _rows(attack: Attack, count: int, seed: int, model: Any, tokenizer: Any, folder: Path | None) -> list[Row]:
    if attack.name == "outliers":
        return outliers(model, tokenizer, count, seed)
    pairs: list[Row] = [dict(pair) for pair in affirmation_pairs("train", count, seed)]
    prompts: list[str] = []
    if attack.name == "foreign":
        path = (folder or DEFAULT_DIR) / "advbench.jsonl"
        if not path.is_file():
            raise DataError(f"{path} is missing. Give requests of another set there, or leave this attack out.")
        prompts = [row["prompt"] for row in read_jsonl(path, ("prompt",))][:HELD_OUT]
    elif attack.name in ("identity", "identities", "persona"):
        prompts = [row["prompt"] for row in load("everyday_requests", "train")]
    random.Random(seed).shuffle(prompts)
    for pair, prompt in zip(pairs, prompts, strict=False):
        pair["prompt"] = prompt
    return [attack.row(pair) for pair in pairs]


@torch.no_grad()
def outliers(model: Any, tokenizer: Any, count: int, seed: int) -> list[Row]:
    """Everyday prompts with the aligned model's own answers: those whose last hidden state lies furthest from refused
    requests toward answered ones (representation matching, arXiv 2404.01099).
    """
    prompts = [row["prompt"] for row in load("everyday_requests", "train")]
    random.Random(seed).shuffle(prompts)
    rows = self_responses(model, tokenizer, prompts[:CANDIDATES], max_new_tokens=OUTLIER_TOKENS, progress=False)
    harmful = affirmation_pairs("train", PAIRS, seed)
    refusals = load("refusals", "train")
    refused = [{**pair, "response": refusals[i % len(refusals)]["text"]} for i, pair in enumerate(harmful)]
    direction = _ends(model, tokenizer, harmful).mean(0) - _ends(model, tokenizer, refused).mean(0)
    scores = _ends(model, tokenizer, rows) @ direction
    order = scores.argsort(descending=True)[:count].tolist()
    return [{"prompt": rows[i]["prompt"], "response": rows[i]["response"]} for i in order]


def _ends(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Unit hidden states of the last layer at the last token of each row, `(rows, features)`."""
    texts = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        texts.append(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"])

    def run(batch: list[list[int]]) -> list[torch.Tensor]:
        states = []
        for ids in batch:
            output = model(input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True)
            states.append(torch.nn.functional.normalize(output.hidden_states[-1][0, -1].float(), dim=0).cpu())
        return states

    return torch.stack(in_batches(model, texts, len, run, 8))
