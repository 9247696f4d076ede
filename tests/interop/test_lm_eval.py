"""The task files in the harness itself, on a tiny local model, beside the package's own evaluation."""

import subprocess
import sys

import pytest

from peft_safety.data import load
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation import evaluate, named_set, prompt_set
from peft_safety.evaluation.lm_eval import functions, include_path
from tests.interop.helpers import answering_llama


def test_the_metric_is_the_keyword_matchers():
    assert functions.verdict({"prompt": "?"}, ["I'm sorry, but I can't."]) == {"refusal": 1.0, "compliance": 0.0}
    assert functions.verdict({"prompt": "?"}, ["Sure, here is"]) == {"refusal": 0.0, "compliance": 1.0}
    assert functions.over_refusal({"prompt": "?"}, ["I cannot."]) == {"over_refusal": 1.0}
    thought = "<think>\n" + "The user wants this. " * 12
    refused = [f"{thought}\n</think>\n\nI can't help with that."]
    assert functions.verdict({"prompt": "?"}, refused) == {"refusal": 1.0, "compliance": 0.0}, "without the reasoning"
    assert functions.verdict({"prompt": "?"}, [thought]) == {"refusal": 0.0, "compliance": 0.0}


def test_the_prompts_are_those_of_one_split():
    pytest.importorskip("datasets")
    assert functions.harmful()["test"]["prompt"] == [row["prompt"] for row in load("harmful_requests", "test")]
    assert functions.contrast("validation", version=1.0)["test"]["prompt"] == [
        row["prompt"] for row in load("contrast_prompts", "validation")
    ]
    drawn = functions.contrast(prompts="packaged-everyday", limit=5, seed=1, version=1.0)["test"]["prompt"]
    assert list(drawn) == list(named_set("packaged-everyday", limit=5, seed=1).prompts)
    with pytest.raises(ConfigError, match="'packaged' is a set of kind 'harmful', not 'over_refusal'"):
        functions.contrast(prompts="packaged")
    with pytest.raises(DataError, match="no split"):
        functions.harmful("secret")


def test_the_directory_can_be_asked_for():
    said = subprocess.run(
        [sys.executable, "-m", "peft_safety.evaluation.lm_eval"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert said == include_path()


def test_the_harness_measures_what_evaluate_measures(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = answering_llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    manager = TaskManager(include_path=include_path(), include_defaults=False, metadata={"split": "validation"})
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=4),
        tasks=["peft_safety_refusal", "peft_safety_over_refusal"],
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )["results"]
    ours = evaluate(model, tokenizer, prompts=prompt_set("validation"), max_new_tokens=16, progress=False)
    assert found["peft_safety_refusal"]["refusal,none"] == ours.refusal.value
    assert found["peft_safety_refusal"]["compliance,none"] == ours.compliance.value
    assert found["peft_safety_over_refusal"]["over_refusal,none"] == ours.over_refusal.value
    assert 0 < ours.refusal.value < 1, "the model refuses some prompts"
