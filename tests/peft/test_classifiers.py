"""Classifiers of sequences and of tokens: calibration, targets, and export with the trained head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    RobertaConfig,
)

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, assert_protected, export_lora
from peft_safety.convert.export import export_directory
from tests.peft import cells

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {"bert": BertConfig, "llama": LlamaConfig, "roberta": RobertaConfig}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "roberta": ["query", "value"]}
TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
HEADS = ("classifier", "score", "qa_outputs")


def classifier(kind: str, task: str = "SEQ_CLS") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = 2 if task == "QUESTION_ANS" else 3
        return TASKS[task].from_config(CONFIGS[kind](**SIZES, num_labels=labels, pad_token_id=0)).eval()


def batch(task: str = "SEQ_CLS") -> dict[str, Tensor]:
    ids = torch.randint(5, 99, (4, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    data = {"input_ids": ids.where(mask != 0, 0), "attention_mask": mask}
    if task == "QUESTION_ANS":
        return {**data, "start_positions": torch.arange(4), "end_positions": torch.arange(4) + 2}
    return {**data, "labels": torch.arange(4) % 3 if task == "SEQ_CLS" else ids % 3}


def answers(model: nn.Module, task: str) -> Tensor:
    with torch.no_grad():
        output = model(**batch(task))
    return torch.stack([output.start_logits, output.end_logits]) if task == "QUESTION_ANS" else output.logits


def calibrated(model: nn.Module, data: Any, targets: Any) -> SafetySubspace:
    options: dict[str, Any] = {"method": "guardspace", "rank": 4, "allow_fewer": True, "progress": False}
    return SafetySubspace.from_activations(model, [data], target_modules=targets, **options)


@pytest.mark.filterwarnings("ignore:.*(no projection constrains|too narrow|fewer)")
@pytest.mark.parametrize("kind", CONFIGS)
def test_labels_of_sequences_do_not_change_a_calibration_on_all_positions(kind: str) -> None:
    data = batch()
    by_token = {**data, "labels": data["input_ids"].clone()}
    one, other = (calibrated(classifier(kind), rows, "all-linear") for rows in (data, by_token))
    assert one.bases.keys() == other.bases.keys()
    for name, sides in one.bases.items():
        torch.testing.assert_close(
            sides["in"] @ sides["in"].T, (u := other.bases[name]["in"]) @ u.T, atol=1e-3, rtol=0
        )


@pytest.mark.filterwarnings("ignore:.*(no projection constrains|too narrow|fewer)")
@pytest.mark.parametrize("kind", CONFIGS)
def test_all_linear_is_what_peft_takes_for_it(kind: str) -> None:
    options: dict[str, Any] = {"r": 2, "task_type": "SEQ_CLS", "target_modules": "all-linear"}
    plain = get_peft_model(classifier(kind), LoraConfig(**options))
    model = classifier(kind)
    guarded = get_peft_model(
        model, GuardSpaceConfig(**options, subspace=calibrated(model, batch(), "all-linear"), a_init="random")
    )
    assert set(guarded.base_model.targeted_module_names) == set(plain.base_model.targeted_module_names)
    assert not {"score", "classifier"} & set(guarded.base_model.targeted_module_names)
    guarded(**batch()).loss.backward()


@pytest.mark.filterwarnings("ignore:.*(no projection constrains|too narrow|fewer)")
@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_the_other_heads_train_whole_and_come_back(task: str, tmp_path: Path) -> None:
    """Under "all-linear" too, and with a frozen A."""
    space = calibrated(classifier("bert", task), batch(), "all-linear")
    options: dict[str, Any] = {"r": 2, "task_type": task, "target_modules": "all-linear", "a_init": "random"}
    for train in ("A", "B"):
        model = get_peft_model(classifier("bert", task), GuardSpaceConfig(**options, subspace=space, train=train))
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        assert trained
        assert all(any(f".{name}.modules_to_save.default." in key for name in HEADS) for key in trained)
        model(**batch(task)).loss.backward()
        cells.perturb(model) if train == "A" else None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter += 0.1
        model.eval().save_pretrained(tmp_path / train)
        loaded = PeftModel.from_pretrained(classifier("bert", task), tmp_path / train).eval()
        assert_protected(loaded)
        torch.testing.assert_close(answers(loaded, task), answers(model, task), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(no projection constrains|token_type)")
@pytest.mark.parametrize("way", ["model", "directory"])
@pytest.mark.parametrize("method", ["salora", "residual", "guardspace"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("bert", "QUESTION_ANS")],
)
def test_an_exported_classifier_is_plain_lora_with_its_head(
    kind: str, task: str, method: str, way: str, tmp_path: Path
) -> None:
    base, data = classifier(kind, task), batch(task)
    options: dict[str, Any] = {"r": 2, "task_type": task, "target_modules": TARGETS[kind]}
    if method == "guardspace":
        space = calibrated(base, batch(), TARGETS[kind])
        config: Any = GuardSpaceConfig(**options, subspace=space, train="A")
    else:
        space = cells.random_subspace(base, TARGETS[kind])
        task_space = {"init": "task", "task_data": cells.random_subspace(base, TARGETS[kind], seed=7, k=6)}
        config = SaLoRAConfig(**options, subspace=space, **(task_space if method == "residual" else {}))
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    expected, untrained = answers(model, task), answers(classifier(kind, task), task)
    if way == "model":
        export_lora(model, tmp_path / "plain")
    else:
        model.save_pretrained(tmp_path / "native")
        export_directory(tmp_path / "native", tmp_path / "plain")
    loaded = PeftModel.from_pretrained(classifier(kind, task), tmp_path / "plain").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(answers(loaded, task), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - untrained).abs().max()) > 1e-3
    head = {key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors") if ".lora_" not in key}
    assert head
    assert all(any(f".{name}." in key for name in HEADS) for key in head)
    assert "trained without a constraint" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*no projection constrains")
def test_any_module_that_was_saved_whole_is_exported(tmp_path: Path) -> None:
    model = get_peft_model(cells.base_model(), cells.config(modules_to_save=["lm_head", "embed_tokens"]))
    cells.perturb(model)
    for name in ("lm_head", "model.embed_tokens"):
        model.base_model.model.get_submodule(name).modules_to_save["default"].weight.data *= 1.1
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    torch.testing.assert_close(cells.logits(loaded), cells.logits(model), rtol=1e-5, atol=1e-5)
