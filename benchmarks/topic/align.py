"""The aligned model: SmolLM2-135M-Instruct with a LoRA that refuses one topic, merged. It is the package's recipe for
a safety patch (`peft_safety.recipes.patch`), watched on the topic instead of on harmful requests. It takes half an
hour or more on two cores, and a minute or two on a GPU.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.topic.data import Topic
from examples.get_model import model_dir
from peft_safety.data.rows import Row
from peft_safety.evaluation.prompts import PromptSet
from peft_safety.recipes.adapter import adapter_config
from peft_safety.recipes.load import load_model
from peft_safety.recipes.patch import PatchOptions, general_rows
from peft_safety.recipes.train import finetune
from peft_safety.recipes.watch import Stopping, Watch

VERSION = "1"
"""Of this recipe; it is a part of the name of each cell."""
REFUSALS = 192
KEPT = {"everyday_requests": 160, "general_prompts": 80, "contrast_prompts": 40}
"""Prompts of the package that the model is to answer as before."""
LAPS = 4
"""Times that each neighboring question is shown."""
EPOCHS = 4
STOPPING = Stopping(every=16)
EVERYDAY = 24
"""Everyday prompts in a look at the validation split."""
LOOKS = "looks.json"


def watched(topic: Topic) -> PromptSet:
    """What the alignment is watched on: the topic's validation questions in the place of harmful requests."""
    questions = tuple(row["prompt"] for row in topic.questions("validation"))
    everyday = tuple(topic.others("everyday_requests", "validation", EVERYDAY))
    return PromptSet("validation", questions, tuple(topic.neighbors("validation")), (), everyday)


def align(topic: Topic, out: Path, unaligned: Path | None = None, steps: int = -1) -> None:
    """Train the model to refuse a topic; write it with its tokenizer, and the looks at the validation split. `steps`
    above 0 is for a quick check.
    """
    model, tokenizer = load_model(unaligned or model_dir())
    options = PatchOptions()
    training = replace(options.training, epochs=EPOCHS, max_steps=steps, progress=False)
    questions = [row["prompt"] for split in ("calibration", "train") for row in topic.questions(split)]
    refusals: list[Row] = [*topic.refused(questions, "train", REFUSALS)]
    prompts = [prompt for name, count in KEPT.items() for prompt in topic.others(name, "train", count)]
    prompts += LAPS * topic.neighbors("train")
    if steps > 0:
        refusals, prompts = refusals[:8], prompts[:8]
    kept = general_rows(model, tokenizer, replace(options, training=training), [{"prompt": p} for p in prompts])
    rows = [*refusals, *kept]
    random.Random(training.seed).shuffle(rows)
    watch = Watch(tokenizer, watched(topic), STOPPING)
    watch.look(model, 0)
    config = adapter_config("lora", r=options.r, lora_alpha=options.lora_alpha)
    tuned, _ = finetune(
        model, tokenizer, rows, config, training, callbacks=[watch], distil_weight=options.distil_weight
    )
    watch.restore(tuned)
    tokenizer.save_pretrained(out)
    tuned.merge_and_unload().save_pretrained(out)
    (out / LOOKS).write_text(json.dumps([asdict(look) for look in watch.looks]), encoding="utf-8")
