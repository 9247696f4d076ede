"""Activated LoRA with a frozen, blind `lora_A`: PEFT's own forward, which adds the update from the invocation on."""

import pytest
import torch
from peft import LoraConfig, PeftModel

from peft_safety import assert_protected, export_lora, verify
from peft_safety.core.certificate import FILE_NAME
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies, frozen
from tests.peft.guard_cells import subspace

INVOCATION = [201, 202]
START = 5


def ids(seed=0):
    """Two rows; the first one invokes the adapter."""
    tokens = cells.tokens(seed=seed)  # all below 200
    tokens[0, START : START + 2] = torch.tensor(INVOCATION)
    return tokens


def trained(kind="linear"):
    model = frozen(kind, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")
    before = copies(model)
    optimizer = cells.adamw([p for p in model.parameters() if p.requires_grad])
    for step in range(3):
        model.train()(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
    assert_frozen(model.eval(), before)
    return model


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_it_is_peft_s_own_and_starts_at_the_invocation(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_SAFETY_FUSED", "1")
    model, tokens = trained(kind), ids(9)
    got, base = cells.logits(model, tokens), cells.logits(cells.base_model(kind), tokens)
    cells.assert_same_function(got[1], base[1])
    cells.assert_same_function(got[0, :START], base[0, :START])
    assert float((got - base)[0, START:].norm()) > 1e-3
    model.save_pretrained(tmp_path)
    found = verify(tmp_path, cells.base_model(kind), subspace(cells.base_model(kind), kind=kind))
    assert (found.blindness_checked, found.base_checked, found.worst_leak <= 1e-6) == (True, True, True)
    loaded = PeftModel.from_pretrained(cells.base_model(kind), tmp_path).eval()
    assert_protected(loaded)
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    cells.assert_same_function(cells.logits(loaded, tokens), got)
    (tmp_path / FILE_NAME).unlink()
    plain = PeftModel.from_pretrained(cells.base_model(kind), tmp_path).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    cells.assert_same_function(cells.logits(plain, tokens), got)


def test_it_is_exported_with_its_invocation_and_not_merged(tmp_path):
    model, tokens = trained(), ids(9)
    got = cells.logits(model, tokens)
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path).eval()
    cells.assert_same_function(cells.logits(plain, tokens), got)
    cells.assert_activated_is_not_merged(model)
    cells.assert_same_function(cells.logits(model, tokens), got)
