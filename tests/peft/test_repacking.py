"""On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights at a forward in eval mode, and no gradient passes
through them then.
"""

import copy
import logging

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core import base_weights as weights
from peft_safety.evaluation.generate import generate
from peft_safety.recipes.train import TrainOptions, finetune
from tests.peft import cells
from tests.tiny import tiny_llama, tiny_tokenizer

HIDDEN = 64  # narrower layers are not repacked
IDS = torch.arange(5, 29).reshape(2, 12)
TARGETS = ["q_proj", "up_proj"]  # gradients must pass through the other layers as well

repacks = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16, so bitsandbytes repacks nothing"
)


def four_bit(repacks=True):
    model = cells.quantized(tiny_llama(hidden=HIDDEN), "nf4")
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = repacks
    return model


def packed(model):
    return sum(
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        for layer in model.modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    )


def evaluate(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    model.train(was)


def gradient(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return torch.cat(
        [(torch.zeros_like(factor) if factor.grad is None else factor.grad).flatten() for factor in factors]
    )


def adapted(model, config):
    torch.manual_seed(0)
    return get_peft_model(model, config)


def salora():
    space = SafetySubspace.from_weights(
        four_bit(False), rank=4, sides=("out",), target_modules=TARGETS, progress=False
    )
    return SaLoRAConfig(r=4, target_modules=TARGETS, subspace=space)


@repacks
def test_bitsandbytes_still_loses_gradients():
    """If this fails, all of this may go."""
    right = gradient(adapted(four_bit(False), LoraConfig(r=4, target_modules=TARGETS)))
    model = four_bit()
    evaluate(model)
    assert packed(model) == 14
    wrong = gradient(adapted(model, LoraConfig(r=4, target_modules=TARGETS)))
    assert torch.cosine_similarity(wrong, right, dim=0) < 0.99


@repacks
@pytest.mark.parametrize("when", ["before", "between"])
def test_an_evaluation_does_not_take_gradients_away(when):
    config = salora()
    right = gradient(adapted(four_bit(False), copy.deepcopy(config)))
    model = four_bit()
    if when == "before":
        evaluate(model)
        assert packed(model) == 14
    model = adapted(model, config)
    if when == "between":
        evaluate(model)
    found = gradient(model)
    assert packed(model) == 0
    assert torch.cosine_similarity(found, right, dim=0) > 0.999


@repacks
def test_weights_that_were_packed_keep_their_values():
    model, other = four_bit(), four_bit(False)
    evaluate(model)
    assert packed(model) == 14
    weights.stay_unpacked(model)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            torch.testing.assert_close(
                weights.dense_weight(layer), weights.dense_weight(other.get_submodule(name)), rtol=0.005, atol=0
            )  # scales in bf16


@repacks
def test_this_packages_own_evaluation_and_recipe_repack_nothing():
    model, tokenizer = four_bit(), tiny_tokenizer()
    generate(model, tokenizer, ["Hello there"], max_new_tokens=2, progress=False)
    assert packed(model) == 0
    evaluate(model)
    rows = [{"prompt": "Hello there", "response": "Good day."}] * 2
    tuned, _ = finetune(
        model, tokenizer, rows, LoraConfig(r=4, target_modules=TARGETS), TrainOptions(batch_size=2, progress=False)
    )
    evaluate(tuned)
    assert packed(tuned) == 0


def test_models_with_protected_adapters_only_and_said_once(caplog):
    """On any CPU: what a layer may do is a flag."""
    weights._say_unpacked.cache_clear()
    config = salora()
    plain = adapted(four_bit(), LoraConfig(r=4, target_modules=TARGETS))
    with caplog.at_level(logging.WARNING):
        ours = [adapted(four_bit(), config) for _ in range(2)]
    may = [
        {m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
        for model in (plain, *ours)
    ]
    assert may == [{True}, {False}, {False}]
    assert sum("packed format" in record.message for record in caplog.records) == 1
