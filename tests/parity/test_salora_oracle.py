"""SaLoRA against the outputs of the public reference code (commit of 2025-10-23), within the bounds of the design
notes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from peft_safety import SafetySubspace, SaLoRAConfig, assert_protected
from peft_safety.core.projection import leak, project_out, top_left_singular
from peft_safety.methods.salora import task_aware_factors

ORACLE = Path(__file__).parents[3] / "shared" / "oracles" / "salora.safetensors"
pytestmark = pytest.mark.skipif(
    not ORACLE.is_file(), reason="the oracle files of the design notes are not beside this checkout"
)
RANK, SAFETY_RANK, TASK_RANK, SAMPLES = 4, 6, 8, 12
TRAINED = "model.layers.1.self_attn.q_proj"
"""The module whose training steps the oracle records: summed squares for one step's gradients; mean squares, AdamW, lr
0.01, no decay for eight steps.
"""


@pytest.fixture(scope="module")
def oracle():
    with safe_open(str(ORACLE), framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()} | {"meta": handle.metadata()}  # noqa: SIM118


@pytest.fixture
def model(oracle):
    found = LlamaForCausalLM(LlamaConfig(**json.loads(oracle["meta"]["config"]))).eval()
    found.load_state_dict(
        {key.removeprefix("in.base."): value for key, value in oracle.items() if key.startswith("in.base.")}
    )
    return found


def modules(oracle) -> list[str]:
    return sorted(key.removesuffix(".U_C") for key in oracle if key.endswith(".U_C"))


def batches(oracle, kind):
    return [
        {"input_ids": oracle[f"in.{kind}.{i}.ids"], "labels": oracle[f"in.{kind}.{i}.labels"]} for i in range(SAMPLES)
    ]


def given_subspace(oracle):
    return SafetySubspace({name: {"out": oracle[f"{name}.U_C"]} for name in modules(oracle)})


def complement(u):
    return torch.eye(u.shape[0]) - u @ u.mT


def test_the_complement_is_the_reference_projector(oracle):
    for name in modules(oracle):
        torch.testing.assert_close(complement(oracle[f"{name}.U_C"]), oracle[f"{name}.C"], rtol=0, atol=1e-6)


def test_estimated_from_activations_the_projector_is_the_reference_one(oracle, model):
    subspace = SafetySubspace.from_activations(
        model, batches(oracle, "safe"), rank=SAFETY_RANK, target_modules=["q_proj", "v_proj"], progress=False
    )
    for name in modules(oracle):
        torch.testing.assert_close(complement(subspace.bases[name]["out"]), oracle[f"{name}.C"], rtol=0, atol=5e-3)


def test_task_aware_factors_from_activations_are_the_reference_ones(oracle):
    for name in modules(oracle):
        weight, x = oracle[f"in.base.{name}.weight"], oracle[f"{name}.X_task"]
        u, _ = top_left_singular(weight, x.mT @ x, TASK_RANK)
        b, a = task_aware_factors(weight, u, RANK)
        torch.testing.assert_close(b @ a, oracle[f"{name}.B0"] @ oracle[f"{name}.A0"], rtol=0, atol=1e-3)


def inject_given(oracle, model):
    """The protected model with the reference's own U_C, A0 and B0 as its initial factors."""
    config = SaLoRAConfig(
        r=RANK,
        lora_alpha=RANK,
        subspace=given_subspace(oracle),
        target_modules=["q_proj", "v_proj"],
        init="task",
        task_data=given_subspace(oracle),
    )
    peft_model = get_peft_model(model, config)
    for name in modules(oracle):
        layer = peft_model.base_model.model.get_submodule(name)
        layer.lora_A["default"].set_initial(oracle[f"{name}.A0"])
        layer.lora_B["default"].set_initial(oracle[f"{name}.B0"])
    return peft_model


def test_at_initialization_the_function_is_the_base_models(oracle, model):
    ids = oracle["init.ids"]
    bare = model(ids).logits
    protected = inject_given(oracle, model)(ids).logits
    assert torch.equal(protected, bare)
    torch.testing.assert_close(protected, oracle["init.logits"], rtol=0, atol=1e-5)


def test_the_residual_is_the_reference_residual(oracle, model):
    inject_given(oracle, model)
    for name in modules(oracle):
        layer = model.get_submodule(name)
        frozen = layer.lora_B["default"].initial @ layer.lora_A["default"].initial
        torch.testing.assert_close(layer.get_base_layer().weight - frozen, oracle[f"{name}.W_res"], rtol=0, atol=1e-6)


def test_forward_gradients_and_delta_of_one_module(oracle, model):
    peft_model = inject_given(oracle, model)
    layer = model.get_submodule(TRAINED)
    leaf_a, leaf_b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        leaf_a.weight.copy_(oracle["train.module.A"])
        leaf_b._parameters["weight"].copy_(oracle["train.module.B"])
    y = layer(oracle["train.module.x"])
    torch.testing.assert_close(y, oracle["train.module.y"], rtol=0, atol=2e-6)
    (y - oracle["train.module.tgt"]).square().sum().backward()
    for leaf, key in ((leaf_a, "train.module.gA"), (leaf_b, "train.module.gB")):
        bound = 2e-5 * float(oracle[key].abs().max())
        torch.testing.assert_close(leaf._parameters["weight"].grad, oracle[key], rtol=0, atol=bound)
    torch.testing.assert_close(leaf_b.weight, oracle["train.module.fold_B"], rtol=0, atol=1e-6)
    frozen = leaf_b.initial @ leaf_a.initial
    torch.testing.assert_close(
        layer.get_delta_weight("default") + frozen, oracle["train.module.delta"], rtol=0, atol=1e-6
    )
    assert_protected(peft_model)


def test_eight_adamw_steps_follow_the_reference_trajectory(oracle, model):
    inject_given(oracle, model)
    layer = model.get_submodule(TRAINED)
    leaf_a, leaf_b = layer.lora_A["default"], layer.lora_B["default"]
    optimizer = torch.optim.AdamW(
        [leaf_a._parameters["weight"], leaf_b._parameters["weight"]], lr=0.01, weight_decay=0.0
    )
    losses = []
    for _ in range(8):
        loss = (layer(oracle["train.module.x"]) - oracle["train.module.tgt"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    u = oracle[f"{TRAINED}.U_C"]
    torch.testing.assert_close(torch.tensor(losses), oracle["train.adamw8.loss"], rtol=0, atol=2e-6)
    torch.testing.assert_close(leaf_a.weight, oracle["train.adamw8.A"], rtol=0, atol=2e-6)
    # The reference's raw B leaves the complement; what counts, and what agrees, is C B.
    torch.testing.assert_close(leaf_b.weight, project_out(u, oracle["train.adamw8.B"]), rtol=0, atol=2e-6)
    assert leak(u, oracle["train.adamw8.B"]) > 0.01
    assert leak(u, leaf_b.weight) <= 1e-6
