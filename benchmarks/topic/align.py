"""The aligned model: SmolLM2-135M-Instruct with a patch that refuses one topic, merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.topic.data import Topic
from examples.get_model import model_dir
from peft_safety.data.rows import Row
from peft_safety.recipes.load import load_model
from peft_safety.recipes.patch import PatchOptions, patch
from peft_safety.recipes.watch import Stopping

VERSION = "1"
"""Of this recipe; it is a part of the name of each cell."""
REFUSALS = 192
KEPT = {"everyday_requests": 160, "general_prompts": 80, "contrast_prompts": 40}
"""Prompts of the package that the model is to answer as before."""
LAPS = 4
"""Times that each neighboring question is shown."""


def align(topic: Topic, out: Path, unaligned: Path | None = None, steps: int = -1) -> None:
    """Train the model to refuse a topic, and write it with its tokenizer. `steps` above 0 is for a quick check."""
    model, tokenizer = load_model(unaligned or model_dir())
    defaults = PatchOptions()
    options = replace(
        defaults,
        mode="none",
        basis="weight",
        validation=1,
        stopping=Stopping(every=10_000),
        training=replace(defaults.training, progress=False, max_steps=steps),
    )
    questions = [row["prompt"] for split in ("calibration", "train") for row in topic.questions(split)]
    kept = [prompt for name, count in KEPT.items() for prompt in topic.others(name, "train", count)]
    general: list[Row] = [{"prompt": prompt} for prompt in [*kept, *LAPS * topic.neighbors("train")]]
    refusals = topic.refused(questions, "train", REFUSALS)
    if steps > 0:
        general, refusals = general[:8], refusals[:8]
    tuned, _ = patch(model, tokenizer, options, refusals=refusals, general=general)
    tokenizer.save_pretrained(out)
    tuned.merge_and_unload().save_pretrained(out)
