"""Layers that are narrower than the LoRA rank or the subspace, and advice that can be followed."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
)

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
)
from peft_safety.errors import ConfigError
from tests.peft.left_out_cells import ALL, GATES, adapted, batch, guard, moe
from tests.tiny import tiny_llama

# --- narrow layers
# ---


def test_a_rank_above_a_layers_width_trains_saves_and_loads(tmp_path):
    space = guard(moe())
    assert set(GATES) <= set(space.bases)
    model = get_peft_model(moe(), GuardSpaceConfig(r=8, subspace=space, target_modules="all-linear"))
    assert set(GATES) <= adapted(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch()).loss.backward()
    optimizer.step()
    assert_protected(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch()).logits, model.eval()(**batch()).logits)
        assert not torch.equal(model(**batch()).logits, moe()(**batch()).logits)


@pytest.mark.parametrize("train", ["A", "B", "window"])
@pytest.mark.parametrize("options", [{"r": 40}, {"r": 4, "rank_pattern": {"down_proj": 70}}], ids=str)
def test_a_rank_above_every_layers_width_trains_saves_and_loads(train, options, tmp_path):
    space = SafetySubspace.from_activations(tiny_llama(), [batch()], method="guardspace", rank=4, **ALL)
    own = GuardSpaceConfig(subspace=space, target_modules="all-linear", train=train, a_init="random", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(tiny_llama(), own)
    few = [w for w in caught if "fewer directions outside the null space than r" in str(w.message)]
    assert len(few) == (train == "B"), "one warning for all layers"
    if train == "B":
        a = model.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight
        free = a.shape[1] - 4
        assert bool(a[:free].any(dim=1).all()) or a.shape[0] <= free
        assert not bool(a[free:].any())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch()).loss.backward()
    optimizer.step()
    assert_protected(model)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)


def test_the_published_start_of_a_layer_narrower_than_r_leaves_the_function_alone_and_trains():
    space = guard(moe())
    model = get_peft_model(
        moe(),
        GuardSpaceConfig(r=8, subspace=space, target_modules="all-linear", init="guardspace", init_data=[batch()]),
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, moe()(**batch()).logits)
    gate = model.get_base_model().get_submodule(GATES[0])
    assert float(gate.lora_B["default"].weight.abs().max()) > 0  # its one component
    model(**batch()).loss.backward()
    assert float(gate.lora_B["default"].weight.grad.abs().min()) > 0  # and the other seven learn


def test_one_output_keeps_no_complement_and_is_left_out_of_output_side_subspaces():
    with pytest.warns(UserWarning, match=r"2 of 16 target layers .*single feature.*shared_expert_gate"):
        space = SafetySubspace.from_activations(moe(), [batch()], rank=8, **ALL)
    assert space.left_out == dict.fromkeys(GATES, "narrow")
    with pytest.warns(UserWarning, match=r"2 of 16 .*left out of the adapter"):
        model = get_peft_model(moe(), SaLoRAConfig(r=8, subspace=space, target_modules="all-linear"))
    assert adapted(model) == set(space.bases)
    with pytest.warns(UserWarning, match="single feature"):
        both = SafetySubspace.from_weights(moe(), rank=4, sides=("in", "out"), **ALL)
    with pytest.warns(UserWarning, match=r"left out of the adapter"):
        model = get_peft_model(
            moe(), OrthoSafetyPatchConfig(r=4, side="both", subspace=both, target_modules="all-linear")
        )
    assert adapted(model) == set(space.bases)


@pytest.mark.filterwarnings("ignore:.*left out of the")
def test_input_and_output_side_meet_where_both_have_a_basis(tmp_path):
    inside, outside = guard(moe()), SafetySubspace.from_activations(moe(), [batch()], rank=8, **ALL)
    for both in (inside.beside(outside), outside.beside(inside)):
        assert both.left_out == dict.fromkeys(GATES, "narrow")
        model = get_peft_model(
            moe(), GuardSpaceConfig(r=4, combine="salora", subspace=both, target_modules="all-linear")
        )
        assert adapted(model).isdisjoint(GATES)
        assert_protected(model)


@pytest.mark.parametrize(
    ("size", "held"),
    [({"rank": 4}, [1, 2, 3]), ({"rank": 0.5}, [1, 2, 2]), ({"energy": 0.999999}, [1, 2, 3])],
    ids=str,
)
@pytest.mark.parametrize("labels", [2, 3, 4])
def test_a_head_protects_what_it_can(size, held, labels):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = labels
    model = LlamaForSequenceClassification(config).eval()
    for layer in model.model.layers:  # of low rank, so that any energy leaves something of them
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
            linear.weight.data[8:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        space = SafetySubspace.from_activations(model, [batch(rows=16)], allow_fewer=True, **size, **ALL)
    assert space.rank("score") == held[labels - 2]
    assert len([w for w in caught if "too narrow" in str(w.message)]) == (size == {"rank": 4} and labels < 5)
    model = get_peft_model(model, SaLoRAConfig(r=4, subspace=space, target_modules="all-linear"))
    assert "score" in adapted(model)
    assert_protected(model)


def test_advice_can_be_followed():
    gate = {"target_modules": ["shared_expert_gate"], "progress": False}
    with pytest.raises(
        ConfigError, match=r"single feature leaves no direction free. Use other target_modules"
    ) as error:
        SafetySubspace.from_activations(moe(), [batch()], rank=4, **gate)
    assert "from 1 to 0" not in str(error.value)
    with pytest.raises(ConfigError, match="from 1 to 31") as error:
        SafetySubspace.from_activations(moe(), [batch()], rank=32, **ALL)
    with pytest.warns(UserWarning, match="left out"):
        SafetySubspace.from_activations(moe(), [batch(rows=16)], rank=31, allow_fewer=True, **ALL)


@pytest.mark.filterwarnings("ignore:.*left out of the")
def test_very_narrow_inputs_keep_a_direction_free():
    model = nn.Module()
    model.embed, model.wide = nn.Embedding(300, 64), nn.Linear(64, 64)
    model.one, model.two, model.back = nn.Linear(1, 64), nn.Linear(2, 64), nn.Linear(64, 2)
    model.forward = lambda input_ids, attention_mask: model.one(
        model.two(model.back(model.wide(model.embed(input_ids))))[..., :1]
    )
    targets = ["wide", "one", "two", "back"]
    for size in ({"rank": 0.01}, {"rank": 0.9}, {"rank": 8}):
        space = guard(model, target_modules=targets, **size)
        assert space.left_out == {"one": "narrow"}
        assert space.rank("two", "in") == 1


def test_a_task_of_few_words_starts_salora_in_the_directions_that_it_has():
    """Two distinct tokens: the first layer sees two directions, and no option could allow fewer."""
    ids = torch.tensor([[5, 6] * 6])
    task = [{"input_ids": ids, "labels": ids}]
    space = SafetySubspace.from_activations(tiny_llama(), [batch()], rank=4, target_modules=["q_proj"])
    config = SaLoRAConfig(r=4, subspace=space, target_modules=["q_proj"], init="task", task_data=task, task_rank=8)
    with pytest.warns(UserWarning, match="span 2 directions"):
        model = get_peft_model(tiny_llama(), config)
    assert_protected(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch()).logits, tiny_llama()(**batch()).logits)
