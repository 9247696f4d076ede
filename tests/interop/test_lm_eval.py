"""The task files in the harness itself, on a tiny local model, beside the package's own evaluation."""

import subprocess
import sys

import pytest
import torch

from peft_safety.data import load
from peft_safety.errors import DataError
from peft_safety.evaluation import evaluate, prompt_set
from peft_safety.evaluation.lm_eval import functions, include_path
from tests.tiny import tiny_llama, tiny_tokenizer

REFUSAL = "Ican't"
"""A refusal in which no character comes twice."""


@pytest.fixture
def refuser(tmp_path):
    """A model that refuses everything: each token is followed by what comes after it in the refusal, and the prompt's
    last one by its first.
    """
    tokenizer, model = tiny_tokenizer(), tiny_llama(hidden=264, layers=1)
    start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"][-1]
    said = tokenizer(REFUSAL + "<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(264)[: model.config.vocab_size])
        for here, following in zip([start, *said], said, strict=False):
            model.lm_head.weight[following, here] = 1.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model.eval(), tokenizer


def test_the_metric_is_the_keyword_matchers():
    assert functions.verdict({"prompt": "?"}, ["I'm sorry, but I can't."]) == {"refusal": 1.0, "compliance": 0.0}
    assert functions.verdict({"prompt": "?"}, ["Sure, here is"]) == {"refusal": 0.0, "compliance": 1.0}
    assert functions.over_refusal({"prompt": "?"}, ["I cannot."]) == {"over_refusal": 1.0}


def test_the_prompts_are_those_of_one_split():
    pytest.importorskip("datasets")
    assert functions.harmful()["test"]["prompt"] == [row["prompt"] for row in load("harmful_requests", "test")]
    assert functions.contrast("validation", version=1.0)["test"]["prompt"] == [
        row["prompt"] for row in load("contrast_prompts", "validation")
    ]
    with pytest.raises(DataError, match="no split"):
        functions.harmful("secret")


def test_the_directory_can_be_asked_for():
    said = subprocess.run(
        [sys.executable, "-m", "peft_safety.evaluation.lm_eval"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert said == include_path()


def test_the_harness_measures_what_evaluate_measures(refuser):
    pytest.importorskip("lm_eval", reason="needs the lm-eval extra")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, model, tokenizer = refuser
    manager = TaskManager(include_path=include_path(), include_defaults=False, metadata={"split": "validation"})
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4),
        tasks=["peft_safety_refusal", "peft_safety_over_refusal"],
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )["results"]
    ours = evaluate(model, tokenizer, prompts=prompt_set("validation"), max_new_tokens=16, progress=False)
    assert found["peft_safety_refusal"]["refusal,none"] == ours.refusal.value
    assert found["peft_safety_refusal"]["compliance,none"] == ours.compliance.value == 0
    assert found["peft_safety_over_refusal"]["over_refusal,none"] == ours.over_refusal.value
    assert ours.refusal.value == 1, "the model refuses everything"
