"""Prints the directory for the harness's `--include_path`."""

from peft_safety.evaluation.lm_eval import include_path

print(include_path())
