"""A second aligned model for the attacks: every parameter of SmolLM2-135M-Instruct trained to refuse, on the rows of
the safety patch. A patch of rank 8 is an easy thing to protect; here the refusal is in all weights.

    python -m benchmarks.full_alignment OUT [--lr 3e-5] [--steps N]    (an hour on two busy cores)

Where the patch keeps the model's own answers by their distribution, this one learns them as text.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import parser_of

NAME = "full_alignment.json"
LEARNING_RATE = 3e-5
LOOK_EVERY = 68
"""Steps between two looks at the validation split: a quarter of an epoch."""


def align(model: Any, tokenizer: Any, lr: float = LEARNING_RATE, steps: int = -1, **changes: Any) -> dict[str, Any]:
    """Train `model` in place and keep the weights of its best look at the validation split.

    Args:
        steps: at most; default the two epochs of the patch.
        **changes: of `PatchOptions`: numbers of rows.

    Returns:
        What the run did: options and looks.
    """
    from transformers import Trainer

    from peft_safety.data import refusal_pairs
    from peft_safety.data.chat import Collator, encode_rows
    from peft_safety.evaluation import prompt_set
    from peft_safety.recipes.patch import PatchOptions, general_rows
    from peft_safety.recipes.watch import Watch

    options = replace(PatchOptions(), **changes)
    training = replace(options.training, lr=lr, max_steps=steps)
    kept = [{k: v for k, v in row.items() if k != "distil"} for row in general_rows(model, tokenizer, options)]
    rows = [*refusal_pairs("train", options.harmful, training.seed), *kept]
    random.Random(training.seed).shuffle(rows)
    stopping = replace(options.stopping, every=LOOK_EVERY)
    watch = Watch(tokenizer, prompt_set("validation", options.validation, training.seed), stopping)
    watch.look(model, 0)
    model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training.arguments(scratch, model.device.type == "cuda", save_strategy="no")
        features = encode_rows(tokenizer, rows, training.max_length)
        trainer = Trainer(
            model, arguments, data_collator=Collator(tokenizer, trim=True), train_dataset=features, callbacks=[watch]
        )
        trainer.train()
    watch.restore(model)
    model.requires_grad_(False)
    best = asdict(watch.best) if watch.best else {}
    return {"lr": lr, "rows": len(rows), "looks": [asdict(look) for look in watch.looks], "kept": best}


def main(argv: Sequence[str] | None = None) -> int:
    """Align the model, save it, and print its looks at the validation split."""
    from benchmarks.frontier.bench import Bench
    from examples.get_model import model_dir
    from peft_safety.recipes.load import load_model

    parser = parser_of(__doc__)
    parser.add_argument("out", type=Path, help="directory of the aligned model; it must not exist")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate")
    parser.add_argument("--steps", type=int, default=-1, help="at most; default two epochs")
    given = parser.parse_args(argv)
    if given.out.exists():
        parser.error(f"{given.out} exists. Name another directory.")
    started = time.perf_counter()
    model, tokenizer = load_model(str(model_dir()))
    facts = align(model, tokenizer, given.lr, given.steps)

    def write(staged: Path) -> None:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    Bench.publish(given.out, write)
    for look in facts["looks"]:
        print(look)
    print(f"kept {facts['kept']}; {time.perf_counter() - started:.0f} s; wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
