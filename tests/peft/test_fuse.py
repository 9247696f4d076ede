"""`fuse` on adapters: names and directories, dense and 4-bit bases, learned and without learning, and beside PEFT's
own `add_weighted_adapter`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_safety import fuse
from peft_safety.errors import ConfigError
from peft_safety.methods.somf import FuseOptions, Masks, load_masks, plan_fusion, save_logits
from peft_safety.methods.somf.forward import MaskedAdapters
from peft_safety.methods.somf.inputs import read_inputs
from peft_safety.methods.somf.objectives import Batches, features_of, response_log_probs
from peft_safety.methods.somf.plan import updates_of
from peft_safety.methods.somf.publish import RECORD
from peft_safety.methods.somf.train import train_mask
from tests.peft.cells import base_model
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
LEARN = {"tokenizer": tiny_tokenizer(), "data": PAIRS, "training": QUICK, "progress": False}
CONTINUED = [
    ("element", "ties"),
    ("row", "dare"),
    ("rank", "average"),
    ("module", "task_arithmetic"),
    ("element", "task_arithmetic"),
]


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
    assert report.plan.layout == ("continued" if continued else "independent")
    assert report.run.steps == 3
    assert report.run.trainable_parameters == report.plan.logits > 0
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
    inputs = read_inputs("safe", TASKS, model, options)
    updates = updates_of(inputs, "element", options)
    masked = MaskedAdapters(model, updates, options)
    g = torch.Generator().manual_seed(3)
    hard = {
        name: 400.0 * (torch.rand(value.shape, generator=g) > 0.5) - 200.0 for name, value in masked.logits.items()
    }
    masked.load_logits(hard)
    ids = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with masked.attached(), torch.no_grad():
        found = masked(ids, torch.ones_like(ids)).logits
        masked.mode = "aligned"
        aligned = masked(ids, torch.ones_like(ids)).logits
        masked.mode = "base"
        base = masked(ids, torch.ones_like(ids)).logits
    fuse("safe", TASKS, model=model, mask=hard, adapter_name="fused", progress=False)
    torch.testing.assert_close(found, of_adapter(model, "fused"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aligned, of_adapter(model, "safe"), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(base, logits(model))


@pytest.mark.parametrize(("granularity", "fusion"), CONTINUED)
@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_training_lowers_the_expected_loss(granularity, fusion, objective):
    """Over the noise of twenty steps, before and after: whatever the mask, it learns eight rows."""
    training = replace(QUICK, objective=objective, max_steps=25, batch_size=8, lr=0.3)
    model = family()
    for name in TASKS:
        moved(model, name, 77, 0.1)
    options = FuseOptions(
        granularity=granularity,
        fusion=fusion,
        rescale="none" if granularity == "module" else "mean",
        ties_density=0.6,
        weights=None if fusion == "average" else 1.0,
    )
    masked = MaskedAdapters(
        model, updates_of(read_inputs("safe", TASKS, model, options), granularity, options), options
    )
    rows = PAIRS if objective == "dpo" else ROWS
    before = expected_loss(masked, rows, objective)
    train_mask(masked, tiny_tokenizer(), rows, training)
    assert expected_loss(masked, rows, objective) < before


@torch.no_grad()
def expected_loss(masked, rows, objective):
    """Without DPO's reference, which moves all losses alike: minus the margin."""
    batch = Batches(tiny_tokenizer(), objective)(features_of(rows, tiny_tokenizer(), objective, 128))
    losses = []
    with masked.attached():
        for seed in range(20):
            masked.step_seed = 1000 + seed
            found = response_log_probs(masked(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            losses.append(
                float(-found.mean() if objective == "sft" else (found.chunk(2)[1] - found.chunk(2)[0]).mean())
            )
    return sum(losses) / len(losses)


def test_a_density_target_is_reached():
    training = replace(QUICK, objective="sft", max_steps=40, lr=0.2)
    inputs = {"model": family(), "tokenizer": tiny_tokenizer(), "data": ROWS, "training": training, "progress": False}
    report = fuse("safe", TASKS, target_density=0.8, density_penalty=100.0, **inputs)
    assert report.run.density == pytest.approx(0.8, abs=0.05)
    free = fuse("safe", TASKS, **inputs)
    assert free.run.density < 0.6


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
    logit_file = save_logits(report.logits, tmp_path / "logits.safetensors", {})
    for name, mask in (("two", tmp_path / "one"), ("three", logit_file), ("four", report.logits)):
        fuse("safe", TASKS, model=model, mask=mask, out=tmp_path / name, progress=False)
    first = load_masks(tmp_path / "one")
    for name in ("two", "three", "four"):
        again = load_masks(tmp_path / name)
        assert all(torch.equal(first.values[key], again.values[key]) for key in first)
    fuse("safe", TASKS, model=model, mask=tmp_path / "one", out=tmp_path / "five", progress=False)
    for file in ("adapter_model.safetensors", "adapter_config.json", "safety_masks.safetensors", "README.md"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "five" / file).read_bytes(), file


def test_eight_bit_masks_reload_to_the_same_function(tmp_path):
    model = family()
    report = fuse("safe", TASKS, model=model, export="soft", out=tmp_path / "one", adapter_name="one", **LEARN)
    again = fuse("safe", TASKS, model=model, mask=tmp_path / "one", adapter_name="two", progress=False)
    assert report.masks.levels == 255
    assert torch.equal(of_adapter(model, "one"), of_adapter(model, "two"))
    assert again.record["density"] == report.record["density"]


@pytest.mark.parametrize("continued", [True, False])
def test_a_full_mask_is_no_mask_and_an_empty_one_the_safe_adapter(continued):
    model = family(continued=continued)
    granularity = "element" if continued else "rank"
    shapes = {}
    inputs = read_inputs("safe", TASKS, model, FuseOptions())
    for update in updates_of(inputs, granularity, FuseOptions()).values():
        shapes |= update.shapes
    fuse("safe", TASKS, model=model, adapter_name="fused", method="task_arithmetic")
    for value, name in ((1, "full"), (0, "empty")):
        masks = Masks({key: torch.full(shape, value, dtype=torch.uint8) for key, shape in shapes.items()})
        report = fuse("safe", TASKS, model=model, mask=masks, adapter_name=name, progress=False)
        expected = "fused" if value else "safe"
        torch.testing.assert_close(of_adapter(model, name), of_adapter(model, expected), rtol=1e-4, atol=1e-5)
        assert all(row.density == value and row.kept == pytest.approx(value, abs=1e-6) for row in report.modules)


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
    assert report.record["largest_error"] == 0
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


def test_recompression_states_its_error():
    model = family(continued=False)
    exact = fuse("safe", TASKS, model=model, method="average", adapter_name="exact")
    small = fuse("safe", TASKS, model=model, method="average", adapter_name="small", rank=5)
    assert (exact.record["rank"], small.record["rank"]) == (12, 5)
    whole, part = deltas(model, "exact"), deltas(model, "small")
    for row in small.modules:
        error = float((whole[row.name] - part[row.name]).norm() / whole[row.name].norm())
        assert row.error == pytest.approx(error, rel=1e-3)
        assert error > 0


def test_a_rank_above_the_width_is_compressed_without_loss():
    model = family(continued=False, r=8)  # v_proj has 16 outputs, the sum has rank 24
    report = fuse("safe", TASKS, model=model, method="average", adapter_name="fused")
    ranks = {row.name.rpartition(".")[2]: row.rank for row in report.modules}
    assert ranks == {"q_proj": 24, "v_proj": 16, "down_proj": 24}
    assert report.record["largest_error"] < 1e-6
    parts = {name: deltas(model, name) for name in ("safe", *TASKS, "fused")}
    for module, found in parts["fused"].items():
        torch.testing.assert_close(
            found, parts["safe"][module] + (parts["task0"][module] + parts["task1"][module]) / 2, rtol=1e-3, atol=1e-5
        )


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


def test_the_reference_model_is_a_choice():
    found = {}
    for reference in ("aligned", "base"):
        found[reference] = fuse(
            "safe", TASKS, model=family(), **{**LEARN, "training": replace(QUICK, reference=reference)}
        )
    assert found["aligned"].run.loss != found["base"].run.loss
    assert found["base"].record["mask"]["reference"] == "base"


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_no_safe_adapter_where_the_base_is_aligned(kind):
    model = family(kind, continued=False)
    report = fuse(None, TASKS, model=model, adapter_name="fused", **LEARN)
    assert report.plan.layout == "independent"
    assert report.record["safe"]["name"] == "the base model"
    assert report.record["rank"] == 8


def test_the_card_and_the_header_say_where_it_comes_from(tmp_path):
    from safetensors import safe_open

    places = saved(family(), tmp_path / "in")
    report = fuse(places["safe"], [places[name] for name in TASKS], model=base_model(), out=tmp_path / "out", **LEARN)
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card
    for provenance in (report.record["safe"], *report.record["tasks"]):
        assert provenance["fingerprint"][:16] in card
    for module in report.modules:
        assert f"| {module.name} |" in card
    with safe_open(tmp_path / "out/adapter_model.safetensors", "pt") as handle:
        stored = json.loads(handle.metadata()[RECORD])
    assert stored == json.loads(json.dumps(report.record))
    assert stored["mask"]["objective"] == "dpo"
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "tiny/base"
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert load_masks(tmp_path / "out").record["steps"] == 3


def test_a_fused_adapter_is_a_plain_lora_that_can_be_fused_again(tmp_path):
    places = saved(family(continued=False), tmp_path / "in")
    fuse(places["safe"], [places["task0"]], method="task_arithmetic", out=tmp_path / "first")
    second = fuse(
        places["safe"], [str(tmp_path / "first"), places["task1"]], method="average", out=tmp_path / "second"
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
    assert plan == report.plan
    assert plan.logits == report.run.trainable_parameters
    assert plan.training_bytes == 12 * plan.logits
    assert {row.name: row.rank for row in report.modules} == {row.name: row.rank for row in plan.modules}


def test_layouts_are_told_apart_by_the_factors():
    options = FuseOptions()
    assert read_inputs("safe", TASKS, family(), options).continued
    assert not read_inputs("safe", TASKS, family(continued=False), options).continued
    assert not read_inputs("safe", TASKS, family(), FuseOptions(layout="independent")).continued
    model = family(tasks=1)
    model.add_adapter("other", config(lora_alpha=3))
    copied(model, "safe", "other")
    moved(model, "other", 3, 0.01)
    assert not read_inputs("safe", ["other"], model, options).continued
    with pytest.raises(ConfigError, match="scaling"):
        read_inputs("safe", ["other"], model, FuseOptions(layout="continued"))


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
