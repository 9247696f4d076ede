"""Refusal and over-refusal as tasks of EleutherAI's lm-evaluation-harness, on the package's own prompts.

    lm_eval --model hf --model_args pretrained=M,peft=EXPORTED --include_path "$(python -m
    peft_safety.evaluation.lm_eval)" \\
        --tasks peft_safety_refusal,peft_safety_over_refusal --apply_chat_template

The packaged test split by default; `--metadata '{"split": "validation"}'` while choosing settings. With one task,
`{"prompts": "advbench", "limit": 50}` takes another set: the arguments of `named_set`. Figures of plain greedy
generation as in `evaluate`, by the same keyword matcher: a smoke metric.
"""

from pathlib import Path


def include_path() -> str:
    """The directory for the harness's `--include_path`."""
    return str(Path(__file__).parent)
