"""`fuse` on adapters: names and directories, dense and 4-bit bases, learned and without learning, and beside PEFT's
own `add_weighted_adapter`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_safety import fuse
from peft_safety.data.chat import row_losses
from peft_safety.errors import ConfigError
from peft_safety.methods.somf import FuseOptions, Masks, load_masks, plan_fusion, save_masks
from peft_safety.methods.somf.adapters import AdapterFusion
from peft_safety.methods.somf.fusing import RECORD
from peft_safety.methods.somf.train import Batches, features_of, train_mask
from tests.peft.cells import base_model, covering
from tests.peft.fusion_cells import (
    PAIRS,
    QUICK,
    ROWS,
    config,
    copied,
    deltas,
    family,
    logits,
    moved,
    of_adapter,
    saved,
)
from tests.tiny import tiny_llama, tiny_tokenizer

TASKS = ["task0", "task1"]
LEARN = {"tokenizer": tiny_tokenizer(), "data": PAIRS, "training": QUICK}


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize("continued", [True, False])
def test_a_mask_is_learned_on_every_kind_of_base(kind, continued, tmp_path):
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if kind == "conv1d" else {}
    model = family(kind, continued, **targets)
    tokenizer = tiny_tokenizer()
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    options = {**LEARN, "tokenizer": tokenizer, "data": [{**row, "prompt": row["prompt"][:8]} for row in PAIRS]}
    training = QUICK if kind != "conv1d" else replace(QUICK, max_length=64)
    report = fuse(
        "safe", TASKS, model=model, out=tmp_path / "out", adapter_name="fused", **{**options, "training": training}
    )
    assert report.facts["layout"] == ("continued" if continued else "independent")
    assert report.run.steps == 3
    assert report.mask_entries == sum(value.numel() for value in report.logits.values()) > 0
    assert any(float(value.abs().max()) > 0 for value in report.logits.values())
    for name, parameter in model.named_parameters():
        if name in state:
            assert torch.equal(parameter, state[name]), name
            assert parameter.requires_grad == flags[name], name
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert model.active_adapters == ["safe"]
    loaded = PeftModel.from_pretrained(base_model(kind), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), of_adapter(model, "fused"), rtol=0, atol=1e-5)
    assert not torch.allclose(of_adapter(model, "fused"), of_adapter(model, "safe"))


def test_in_training_the_model_computes_what_is_exported():
    """With masks that are nearly hard, the hooks give the logits of the exported adapter."""
    model = family()
    options = FuseOptions(temperature=0.01)
    masked = AdapterFusion("safe", TASKS, model, options).masked(model)
    g = torch.Generator().manual_seed(3)
    hard = {
        name: 400.0 * (torch.rand(value.shape, generator=g) > 0.5) - 200.0 for name, value in masked.logits.items()
    }
    with torch.no_grad():
        for name, logit in masked.logits.items():
            logit.copy_(hard[name])
    ids = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with masked.attached(), torch.no_grad():
        found = masked(ids, torch.ones_like(ids)).logits
        aligned = masked.reference(ids, torch.ones_like(ids)).logits
    fuse("safe", TASKS, model=model, mask=hard, adapter_name="fused")
    torch.testing.assert_close(found, of_adapter(model, "fused"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aligned, of_adapter(model, "safe"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "granularity"),
    covering(
        itertools.product(["dpo", "sft"], ["element", "row", "rank", "module"]),
        fast=(("dpo", "element"), ("sft", "row"), ("sft", "rank"), ("dpo", "module")),
    ),
)
def test_training_lowers_the_expected_loss(objective, granularity):
    """Over the noise of twenty steps, before and after: whatever the mask, it learns eight rows."""
    training = replace(QUICK, objective=objective, max_steps=25, batch_size=8, lr=0.3)
    model = family()
    for name in TASKS:
        moved(model, name, 77, 0.1)
    rescale = "none" if granularity == "module" else "mean"
    options = FuseOptions(granularity=granularity, rescale=rescale, weights=1.0)
    masked = AdapterFusion("safe", TASKS, model, options).masked(model)
    rows = PAIRS if objective == "dpo" else ROWS
    before = expected_loss(masked, rows, objective)
    train_mask(masked, tiny_tokenizer(), rows, training)
    assert expected_loss(masked, rows, objective) < before


@torch.no_grad()
def expected_loss(masked, rows, objective):
    """Without DPO's reference, which moves all losses alike: minus the margin."""
    batch = Batches(tiny_tokenizer())(features_of(rows, tiny_tokenizer(), objective, 128))
    losses = []
    with masked.attached():
        for seed in range(20):
            masked.step_seed = 1000 + seed
            found = row_losses(masked(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            losses.append(
                float(found.mean() if objective == "sft" else (found.chunk(2)[0] - found.chunk(2)[1]).mean())
            )
    return sum(losses) / len(losses)


def test_directories_and_names_give_the_same(tmp_path):
    model = family()
    places = saved(model, tmp_path)
    by_name = fuse("safe", TASKS, model=model, **LEARN)
    by_directory = fuse(places["safe"], [places[name] for name in TASKS], model=base_model(), **LEARN)
    same = {}
    for name, logit in by_name.logits.items():  # two trainings, of factors in memory and of factors in files
        torch.testing.assert_close(by_directory.logits[name], logit, rtol=1e-3, atol=1e-4)
        same[name] = torch.equal(by_name.masks.values[name], by_directory.masks.values[name])
    assert sum(same.values()) >= 0.9 * len(same), "a logit near 0 may fall on either side"
    for name, pair in by_name.factors.items():
        for kind, one, other in zip("AB", pair, by_directory.factors[name], strict=True):
            if same[f"{name}.lora_{kind}"]:
                torch.testing.assert_close(one, other)


def test_two_exports_of_one_mask_are_bit_identical(tmp_path):
    model = family()
    report = fuse("safe", TASKS, model=model, out=tmp_path / "one", **LEARN)
    logit_file = save_masks(report.logits, tmp_path / "logits.safetensors", {})
    for name, mask in (("two", tmp_path / "one"), ("three", logit_file), ("four", report.logits)):
        fuse("safe", TASKS, model=model, mask=mask, out=tmp_path / name)
    first = load_masks(tmp_path / "one")
    for name in ("two", "three", "four"):
        again = load_masks(tmp_path / name)
        assert all(torch.equal(first.values[key], again.values[key]) for key in first.values)
    fuse("safe", TASKS, model=model, mask=tmp_path / "one", out=tmp_path / "five")
    for file in ("adapter_model.safetensors", "adapter_config.json", "safety_masks.safetensors", "README.md"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "five" / file).read_bytes(), file


@pytest.mark.parametrize("continued", [True, False])
def test_a_full_mask_is_no_mask_and_an_empty_one_the_safe_adapter(continued):
    model = family(continued=continued)
    shapes = plan_fusion("safe", TASKS, model=model).mask_shapes
    fuse("safe", TASKS, model=model, adapter_name="fused", method="task_arithmetic")
    for value, name in ((1, "full"), (0, "empty")):
        masks = Masks({key: torch.full(shape, value, dtype=torch.uint8) for key, shape in shapes.items()})
        report = fuse("safe", TASKS, model=model, mask=masks, adapter_name=name)
        expected = "fused" if value else "safe"
        torch.testing.assert_close(of_adapter(model, name), of_adapter(model, expected), rtol=1e-4, atol=1e-5)
        assert report.record["density"] == value


def test_independent_adapters_of_other_ranks_are_one_exact_lora(tmp_path):
    model = get_peft_model(base_model(), config(r=2, lora_alpha=8), adapter_name="safe")
    moved(model, "safe", 1, 0.1)
    for index, rank in enumerate((3, 5)):
        model.add_adapter(f"task{index}", config(r=rank, use_rslora=index == 1))
        moved(model, f"task{index}", 5 + index, 0.1)
    report = fuse(
        "safe",
        TASKS,
        model=model,
        method="task_arithmetic",
        weights=(0.5, 2.0),
        adapter_name="fused",
        out=tmp_path / "out",
    )
    assert report.record["rank"] == 10
    parts = {name: deltas(model, name) for name in ("safe", *TASKS, "fused")}
    for module, found in parts["fused"].items():
        torch.testing.assert_close(
            found,
            parts["safe"][module] + 0.5 * parts["task0"][module] + 2.0 * parts["task1"][module],
            rtol=1e-4,
            atol=1e-6,
        )
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), of_adapter(model, "fused"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("continued", [True, False])
def test_half_precision_factors_stay_what_they_are(dtype, continued, tmp_path):
    model = family(continued=continued)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    report = fuse("safe", TASKS, model=model, out=tmp_path / "out", **LEARN)
    assert {factor.dtype for pair in report.factors.values() for factor in pair} == {dtype}
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "out")).eval()
    assert bool(torch.isfinite(logits(loaded)).all())


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_no_safe_adapter_where_the_base_is_aligned(kind):
    model = family(kind, continued=False)
    report = fuse(None, TASKS, model=model, adapter_name="fused", **LEARN)
    assert report.facts["layout"] == "independent"
    assert report.record["safe"]["name"] == "the base model"
    assert report.record["rank"] == 8


def test_the_card_and_the_record_say_where_it_comes_from(tmp_path):
    places = saved(family(), tmp_path / "in")
    report = fuse(places["safe"], [places[name] for name in TASKS], model=base_model(), out=tmp_path / "out", **LEARN)
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card
    for provenance in (report.record["safe"], *report.record["tasks"]):
        assert provenance["fingerprint"] in card
    stored = json.loads((tmp_path / "out" / RECORD).read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["masks"].keys() == report.masks.values.keys()
    assert stored["mask"]["objective"] == "dpo"
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "tiny/base"
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert load_masks(tmp_path / "out").record["steps"] == 3


def test_a_fused_adapter_is_a_plain_lora_that_can_be_fused_again(tmp_path):
    places = saved(family(continued=False), tmp_path / "in")
    fuse(places["safe"], [places["task0"]], method="task_arithmetic", out=tmp_path / "first")
    second = fuse(
        places["safe"], [str(tmp_path / "first"), places["task1"]], method="task_arithmetic", out=tmp_path / "second"
    )
    assert second.record["tasks"][0]["name"] == "first"
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "second"))
    for name, found in deltas(loaded, "default").items():
        a, b = second.factors[name]
        torch.testing.assert_close(found, b @ a)


def test_the_plan_is_what_happens(tmp_path):
    places = saved(family(), tmp_path)
    plan = plan_fusion(places["safe"], [places[name] for name in TASKS], granularity="row")
    report = fuse(places["safe"], [places[name] for name in TASKS], model=base_model(), granularity="row", **LEARN)
    assert plan.facts == report.facts
    assert plan.mask_shapes == {name: tuple(value.shape) for name, value in report.logits.items()}
    assert plan.record["training_bytes"] == 12 * plan.mask_entries
    assert plan.masks is None
    assert not plan.factors


def test_layouts_are_told_apart_by_the_factors():
    def layout(tasks, model, **options):
        return plan_fusion("safe", tasks, model=model, **options).facts["layout"]

    assert layout(TASKS, family()) == "continued"
    assert layout(TASKS, family(continued=False)) == "independent"
    assert layout(TASKS, family(), layout="independent") == "independent"
    model = family(tasks=1)
    model.add_adapter("other", config(lora_alpha=3))
    copied(model, "safe", "other")
    moved(model, "other", 3, 0.01)
    assert layout(["other"], model) == "independent"
    with pytest.raises(ConfigError, match="scaling"):
        layout(["other"], model, layout="continued")


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = family()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        found.append(fuse("safe", TASKS, model=model, **LEARN))
    for name, value in found[0].logits.items():
        torch.testing.assert_close(value, found[1].logits[name], rtol=1e-4, atol=1e-5)


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuse("safe", TASKS, model=family(), **LEARN)
    assert list(Path(tmp_path).iterdir()) == []
