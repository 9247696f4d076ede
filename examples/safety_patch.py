"""The safety patch that the demo attaches: a rank-8 LoRA in bf16 that makes SmolLM2-135M-Instruct refuse harmful
requests.

    python -m examples.safety_patch [--out runs/safety_patch]     # trains and measures it again (an hour or two
    on two cores)
    python -m examples.safety_patch --measure DIR     # measures a finished one again, and writes the figures there

It is checked against the sha256 in its `manifest.json` before anything is loaded. The same file says how it was made
and what it does: refusal of harmful requests, and over-refusal on safe prompts that look dangerous, on everyday
requests (the package's own, and a foreign set where `--everyday` names one), and on the prompts of the demo's task,
each beside the model without it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.options import command_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_safety.evaluation.metrics import Figure
    from peft_safety.recipes.patch import PatchOptions, PatchRun

SHIPPED = Path(__file__).parent / "patches" / "smollm2-135m"
MANIFEST = "manifest.json"
COMMAND = "python -m examples.safety_patch"
FOREIGN = {
    "everyday": Path("../shared/data/general_instructions.jsonl"),
    "xstest": Path("../shared/data/xstest.jsonl"),
}
CARD = """---
library_name: peft
base_model: {base}
license: apache-2.0
tags: [lora, safety, peft-safety]
---
# Safety patch

A plain LoRA of rank 8 in bf16 on {base}: it refuses harmful requests. Trained by `{command}` (OrthoSafetyPatch,
mode "hard") on the refusals and prompts that ship with peft_safety, and exported. `manifest.json` says what it does
and what it costs. It is made for the demo and the tests of peft_safety: no evidence that a model is safe.
"""
LOOK_EVERY = 100
"""Steps between two looks at the validation split: each takes a minute or two on two cores."""
TASK_ROWS = 72
LONGEST = 400
"""Characters of a foreign everyday prompt at most: longer ones are documents to work on."""


def attach(model: PreTrainedModel, directory: Path = SHIPPED) -> PreTrainedModel:
    """The model with the patch merged in.

    Raises:
        ArtifactError: a file is missing, or is not the one that the manifest names; or the patch is of another model.
    """
    from peft import PeftModel

    from peft_safety.errors import ArtifactError

    base = check(directory)["base"]
    try:
        return PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        remedy = "Leave --model out; or train a patch for the model: python -m examples.demo --model MODEL --full"
        raise ArtifactError(
            f"the safety patch in {directory} is for {base}, and does not fit this model. {remedy}"
        ) from error


def check(directory: Path = SHIPPED) -> dict[str, Any]:
    """The manifest of a patch whose files all have the sha256 that it says."""
    from peft_safety.core import files
    from peft_safety.errors import ArtifactError

    manifest = files.read_json(directory / MANIFEST)
    for name, digest in manifest["files"].items():
        found = files.sha256(files.child(directory, name))
        if found != digest:
            raise ArtifactError(
                f"{directory / name} has sha256 {found}, the manifest says {digest}. Restore the file, or make the "
                f"patch again: {COMMAND}"
            )
    return manifest


def write(tuned: PeftModel, directory: Path, facts: dict[str, Any]) -> Path:
    """Export a trained patch as plain LoRA in bf16, with its manifest."""
    import torch
    from safetensors.torch import load_file, save_file

    from examples.get_model import HUB_ID
    from peft_safety import export_lora
    from peft_safety.core.plain_lora import ADAPTER_FILE
    from peft_safety.core.plain_lora import MANIFEST as CONFIG

    export_lora(tuned, directory)
    tensors = {key: value.to(torch.bfloat16) for key, value in load_file(directory / ADAPTER_FILE).items()}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": HUB_ID}
    (directory / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(CARD.format(base=HUB_ID, command=COMMAND), encoding="utf-8")
    for path in directory.iterdir():
        path.chmod(0o644)
    describe(directory, facts)
    return directory


def describe(directory: Path, facts: dict[str, Any]) -> None:
    """Write the manifest: the command, the base model, each file's sha256, and `facts`."""
    from examples.get_model import HUB_ID
    from peft_safety.core import files

    digests = {path.name: files.sha256(path) for path in sorted(directory.glob("adapter_*"))}
    (directory / MANIFEST).write_text(
        json.dumps({"command": COMMAND, "base": HUB_ID, "files": digests, **facts}, indent=1) + "\n", encoding="utf-8"
    )


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **changes: Any
) -> tuple[PeftModel, PatchRun, PatchOptions]:
    """The recipe of `peft_safety.recipes.patch`, with its defaults but for `changes`."""
    from peft_safety.recipes.patch import PatchOptions, patch

    defaults = PatchOptions()
    stopping = replace(defaults.stopping, every=LOOK_EVERY)
    options = replace(defaults, stopping=stopping, **changes, training=replace(defaults.training, seed=seed))
    tuned, run = patch(model, tokenizer, options)
    return tuned, run, options


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train a patch and write it, without figures; returns the bare model again, and the details of the run."""
    tuned, run, options = train(model, tokenizer, seed)
    print("\n".join(str(look) for look in run.looks), flush=True)
    made = {name: value for name, value in vars(options).items() if isinstance(value, (str, int, float))} | {
        "seed": seed,
        "lr": options.training.lr,
        "epochs": options.training.epochs,
    }
    write(tuned, directory, {"options": made, "kept_step": run.best.step if run.best else run.training.steps})
    details = {"options": made, "looks": [asdict(look) for look in run.looks], "training": asdict(run.training)}
    return tuned.unload(), details


def prompts(split: str, everyday: Path, xstest: Path) -> dict[str, list[Any]]:
    """What a patch is measured on: heading -> prompts. A foreign set whose file is not there is left out."""
    from peft_safety.data import load, read_jsonl
    from peft_safety.data.chat import classification_prompt
    from peft_safety.data.rows import label_names

    task = load("benign_task")
    labels = label_names(task)
    found = {
        "harmful": [row["prompt"] for row in load("harmful_requests", split)],
        "safe, looks dangerous": [row["prompt"] for row in load("contrast_prompts", split)],
        "everyday": [row["prompt"] for row in load("everyday_requests", split)],
        "the task's prompts": [classification_prompt(row["text"], labels) for row in load("benign_task", split)][
            :TASK_ROWS
        ],
    }
    if everyday.is_file():
        found["everyday, foreign"] = [row["prompt"] for row in read_jsonl(everyday) if len(row["prompt"]) < LONGEST]
    if xstest.is_file():
        found["XSTest, safe"] = [row["prompt"] for row in read_jsonl(xstest) if row["label"] == "safe"][::2]
    return found


def refusals(model: Any, tokenizer: PreTrainedTokenizerBase, sets: dict[str, list[Any]]) -> dict[str, Figure]:
    """The share of each set that the model refuses."""
    from peft_safety.evaluation import KeywordJudge
    from peft_safety.evaluation.evaluate import refusal_rate
    from peft_safety.recipes.bench import JUDGED_TOKENS

    judge = KeywordJudge()
    return {
        f"refusal, {name}": refusal_rate(
            model, tokenizer, asked, judge, max_new_tokens=JUDGED_TOKENS, description=name
        )
        for name, asked in sets.items()
    }


def main() -> None:
    """Train the patch, or take a finished one; measure it beside the bare model, and write the figures."""
    parser = command_line(__doc__, "runs/safety_patch")
    parser.add_argument(
        "--measure", type=Path, help="directory of a finished patch with its report.json: train none, measure this one"
    )
    parser.add_argument(
        "--everyday",
        type=Path,
        default=FOREIGN["everyday"],
        help="JSON lines of {prompt}: a foreign everyday set; left out where missing",
    )
    parser.add_argument(
        "--xstest", type=Path, default=FOREIGN["xstest"], help="JSON lines of {prompt, label}; left out where missing"
    )
    given = parser.parse_args()

    from examples.get_model import model_dir
    from peft_safety.core import files
    from peft_safety.evaluation import KeywordJudge
    from peft_safety.recipes.load import load_model
    from peft_safety.reporting.report import Report, environment

    started = time.perf_counter()
    out = given.measure or given.out
    details = files.read_json(out / "report.json")["details"] if given.measure else {}
    model, tokenizer = load_model(given.model or str(model_dir()))
    sets = prompts(given.split, given.everyday, given.xstest)
    arms = {"bare": refusals(model, tokenizer, sets)}
    if not given.measure:
        model, details = make(model, tokenizer, out, given.seed)
    arms["patched"] = refusals(attach(model, out), tokenizer, sets)  # as it ships: exported, in bf16
    figures = {arm: {name: figure.to_json() for name, figure in rates.items()} for arm, rates in arms.items()}
    made = {name: check(out)[name] for name in ("options", "kept_step")}
    describe(out, {**made, "split": given.split, "figures": figures})
    report = Report(
        title="SmolLM2-135M-Instruct: what the safety patch refuses",
        arms=arms,
        notes=(
            f"Judge: {KeywordJudge.name}. {KeywordJudge.caveat}",
            f"Split: {given.split}; one seed ({made['options']['seed']}).",
        ),
        environment=environment(made["options"]["seed"]),
        details=details,
    )
    report.save(out / "report.json")
    report.print()
    print(f"{time.perf_counter() - started:.0f} s in all. Wrote {out}.")


if __name__ == "__main__":
    main()
