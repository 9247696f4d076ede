"""GuardSpace with a frozen, blind `lora_A`: a plain LoRA on every road, whose A never changes."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from peft_safety import GuardSpaceConfig, assert_protected, export_lora, verify
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST
from peft_safety.core.projection import leak
from peft_safety.errors import ArtifactError, CalibrationError, ConfigError, ProtectionError
from peft_safety.layers import FrozenLinear
from tests.peft import cells
from tests.peft.frozen_cells import OPTIMIZERS, assert_frozen, copies, frozen, lora_a
from tests.peft.guard_cells import HARMFUL, TASK, batches, calibrated_inputs, config, subspace
from tests.peft.test_guardspace import BLIND, blindness, trainer

LEAK = 1e-6


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    cells.covering(
        itertools.product(cells.BASES, OPTIMIZERS),
        fast=(("linear", "muon"), ("conv1d", "sgd"), ("nf4", "adamw"), ("int8", "adamw8bit")),
    ),
)
def test_the_update_is_zero_on_the_calibrated_span_after_a_hundred_steps(kind, optimizer):
    inputs = calibrated_inputs(cells.base_model(kind), kind)
    model = frozen(kind)
    before = copies(model)
    cells.train(model, OPTIMIZERS[optimizer], 100)
    assert_frozen(model, before)
    space = model.peft_config["default"].subspace
    assert blindness(model, space, inputs) <= BLIND
    assert all(leak(space.bases[cells.canonical(name)]["in"], a, "in") <= LEAK for name, a in before.items())


@torch.no_grad()
def loss(model):
    return float(sum(model(input_ids=(ids := cells.tokens(seed=seed)), labels=ids).loss for seed in range(8))) / 8


@pytest.mark.parametrize("a_init", ["task", "random"])
def test_it_learns(a_init):
    model = frozen(a_init=a_init)
    before = loss(model)
    cells.train(model, cells.adamw, 60)
    assert loss(model) < before - 0.05


def roads(model):
    """Everything in PEFT that sets `requires_grad`."""
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    model.set_requires_grad("default", True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def test_no_flag_trains_it():
    model = frozen()
    before = copies(model)
    roads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()
    model(input_ids=cells.tokens(), labels=cells.tokens()).loss.backward()
    assert all(weight.grad is None for weight in lora_a(model).values())
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in lora_a(model).items())
    model.set_adapter("default")
    assert_frozen(model, before)


def test_preparing_for_kbit_training_before_and_after():
    base = prepare_model_for_kbit_training(cells.base_model("nf4"), use_gradient_checkpointing=False)
    space = subspace(cells.base_model("nf4"), kind="nf4")
    model = get_peft_model(base, config(space, "nf4", train="B", task_data=batches(TASK)))
    before = copies(model)
    cells.train(model, cells.adamw, 3)
    assert_frozen(model, before)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.set_adapter("default")
    cells.train(model, cells.adamw, 3)
    assert_frozen(model, before)


def test_a_factor_that_zero_3_leaves_out_is_refused_or_saved_from_its_copy(tmp_path):
    model = frozen()
    trained = {name: value for name, value in model.state_dict().items() if "lora_B" in name}
    for weight in lora_a(model).values():
        weight.ds_id = 0
    with pytest.raises(ProtectionError, match="ZeRO-3"):
        model.save_pretrained(tmp_path, state_dict=trained)
    for layer in (module for module in model.modules() if isinstance(module, FrozenLinear)):
        layer.whole = layer.weight.detach().clone()
    model.save_pretrained(tmp_path, state_dict=trained)
    assert verify(tmp_path, subspace=model.peft_config["default"].subspace).blindness_checked


def test_it_is_a_plain_lora_for_whoever_reads_it(tmp_path):
    model = frozen()
    cells.train(model, cells.adamw, 10)
    model.eval().save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    assert fields["peft_type"] == "LORA"
    assert set(fields) == set(LoraConfig().to_dict()), "not a field that plain LoRA does not know"
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {MANIFEST, ADAPTER_FILE, FILE_NAME, "README.md"}
    (tmp_path / "adapter" / FILE_NAME).rename(tmp_path / FILE_NAME)
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    assert not any(isinstance(module, FrozenLinear) for module in plain.modules())
    cells.assert_same_function(cells.logits(plain), cells.logits(model))


def test_saved_loaded_and_trained_on(tmp_path):
    model = frozen()
    cells.train(model, cells.adamw, 10)
    before = copies(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter", is_trainable=True)
    assert isinstance(loaded.peft_config["default"], GuardSpaceConfig)
    assert_frozen(loaded, before)
    cells.assert_same_function(cells.logits(loaded.eval()), cells.logits(model))
    cells.train(loaded, cells.adamw, 5)
    assert_frozen(loaded, before)
    loaded.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again").modules == len(before)
    loaded.add_adapter("ref", loaded.peft_config["default"])
    assert all(torch.equal(w, before[n]) for n, w in lora_a(loaded, "ref").items())
    assert_protected(loaded)
    loaded.save_pretrained(tmp_path / "both")
    assert verify(tmp_path / "both" / "ref").modules == len(before)


def test_resuming_onto_a_live_adapter(tmp_path):
    space = subspace(cells.base_model())
    model = frozen(space=space, a_init="random")
    cells.train(model, cells.adamw, 5)
    model.save_pretrained(tmp_path / "adapter")
    live = frozen(space=space)
    live.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    assert_frozen(live, copies(model))
    cells.assert_same_function(cells.logits(live.eval()), cells.logits(model.eval()))
    other = frozen(space=subspace(cells.base_model(), TASK), task_data=batches(HARMFUL))
    before = copies(other)
    with pytest.raises(ConfigError, match="another null space"):
        other.load_adapter(str(tmp_path / "adapter"), "default")
    assert_frozen(other, before)


def test_bases_from_a_file_are_let_go_and_a_copy_needs_none(tmp_path):
    subspace(cells.base_model()).save(tmp_path / "space")
    given = config(str(tmp_path / "space"), train="B", task_data=batches(TASK))
    model = get_peft_model(cells.base_model(), given)
    assert model.peft_config["default"].subspace == str(tmp_path / "space")
    (tmp_path / "space" / "safety_subspace.safetensors").unlink()
    model.add_adapter("from_its_config", model.peft_config["default"])
    model.add_adapter("from_the_users_config", given)
    for name in ("from_its_config", "from_the_users_config"):
        assert all(torch.equal(weight, lora_a(model)[module]) for module, weight in lora_a(model, name).items())
    assert_protected(model)
    model.save_pretrained(tmp_path / "adapter")
    assert verify(tmp_path / "adapter" / "from_its_config").worst_leak <= LEAK


def test_a_trainer_resumes(tmp_path):
    whole = frozen()
    trainer(whole, tmp_path / "whole", max_steps=6, save_steps=3).train()
    resumed = frozen(a_init="random", space=whole.peft_config["default"].subspace)
    trainer(resumed, tmp_path / "resumed", max_steps=6, save_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert_frozen(resumed, copies(whole))
    cells.assert_same_function(cells.logits(resumed.eval()), cells.logits(whole.eval()))


def test_transformers_own_loader(tmp_path):
    model = frozen()
    cells.train(model, cells.adamw, 5)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = cells.base_model()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))


def test_injected_without_a_peft_model():
    space = subspace(cells.base_model())
    model = inject_adapter_in_model(config(space, train="B", a_init="random"), cells.base_model())
    assert_protected(model)
    assert all(leak(space.bases[name]["in"], a, "in") <= LEAK for name, a in lora_a(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_are_the_same_factor(dtype, tmp_path):
    model = frozen().to(dtype)
    assert_protected(model)
    model.save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", subspace=model.peft_config["default"].subspace)
    assert found.blindness_checked
    assert 1e-6 < found.worst_leak < 1e-2, "what rounding to 16 bits lets through"


def test_trained_factors_in_another_dtype():
    model = frozen()
    for parameter in model.parameters():  # as TRL does on a quantized base
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    before = copies(model)
    assert all(weight.dtype == torch.float32 for weight in before.values())
    cells.train(model, cells.adamw, 3)
    assert_frozen(model, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cells.train(model, cells.adamw, 3)
    assert_frozen(model, before)


COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune", "ties_svd", "dare_ties")


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combinations_stay_blind(kind, tmp_path):
    space = subspace(cells.base_model())
    model = frozen(space=space)
    cells.train(model, cells.adamw, 5)
    model.add_adapter("second", config(space, train="B", a_init="random"))
    model.set_adapter("second")
    cells.train(model, cells.adamw, 5)
    options = {"density": 0.5} if "svd" in kind or kind not in ("linear", "cat") else {}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", combination_type=kind, **options)
    for name, weight in lora_a(model, "sum").items():
        assert leak(space.bases[name.removeprefix("base_model.model.")]["in"], weight, "in") <= LEAK
    model.set_adapter("sum")
    assert_protected(model)
    model.save_pretrained(tmp_path / "all")
    assert verify(tmp_path / "all" / "sum", subspace=space).blindness_checked


def test_a_combination_with_another_null_space_is_refused():
    model = frozen()
    other = config(subspace(cells.base_model(), TASK), train="B", a_init="random")
    model.add_adapter("second", other)
    with pytest.raises(ConfigError, match="share one safety subspace"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    model.add_adapter("trained", config(model.peft_config["default"].subspace))
    with pytest.raises(ConfigError, match="share one safety subspace"):
        model.add_weighted_adapter(["default", "trained"], [1, 1], "sum")


def test_merge_export_and_deepcopy(tmp_path):
    model = frozen()
    cells.train(model, cells.adamw, 5)
    model.eval()
    twin = copy.deepcopy(model)
    cells.train(twin, cells.adamw, 5)
    assert_frozen(twin, copies(model))
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path / "plain").eval()
    cells.assert_same_function(cells.logits(plain), cells.logits(model))
    before = cells.logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(cells.logits(merged), before, atol=1e-5, rtol=1e-5)


def test_the_certificate_and_the_subspace(tmp_path):
    model = frozen()
    space = model.peft_config["default"].subspace
    model.save_pretrained(tmp_path / "adapter")
    found = verify(tmp_path / "adapter")
    assert (found.blindness_checked, found.method) == (False, "GUARDSPACE, frozen A")
    space.save(tmp_path / "space")
    found = verify(tmp_path / "adapter", cells.base_model(), tmp_path / "space")
    assert found.blindness_checked
    assert found.worst_leak <= LEAK
    wider = subspace(cells.base_model(), HARMFUL, target_modules="all-linear")
    wider.save(tmp_path / "wider")
    assert len(wider.bases) > found.modules
    again = frozen(subspace=tmp_path / "wider")
    again.save_pretrained(tmp_path / "again")
    for source in (wider, tmp_path / "wider"):  # an adapter is of the bases of its own modules, wherever they are
        assert verify(tmp_path / "again", subspace=source).blindness_checked
    with pytest.raises(ProtectionError, match="was made with subspace"):
        verify(tmp_path / "adapter", subspace=subspace(cells.base_model(), TASK))


def damaged(tmp_path, change):
    frozen().save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "adapter" / ADAPTER_FILE, metadata={"format": "pt"})
    return tmp_path / "adapter"


def nudge(tensors):
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = tensors[key] + 1e-3


def drop(tensors):
    for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
        del tensors[key]


@pytest.mark.parametrize("change", [nudge, drop])
def test_a_factor_changed_elsewhere_is_noticed(change, tmp_path):
    directory = damaged(tmp_path, change)
    for read in (verify, lambda path: PeftModel.from_pretrained(cells.base_model(), path)):
        with pytest.raises(ArtifactError, match=r"not the one|modules, but"):
            read(directory)


def test_a_factor_changed_in_memory_is_not_saved(tmp_path):
    model = frozen()
    model.save_pretrained(tmp_path / "adapter")
    kept = (tmp_path / "adapter" / ADAPTER_FILE).read_bytes()
    next(iter(lora_a(model).values())).data += 1e-3
    with pytest.raises(ProtectionError, match="has changed"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / ADAPTER_FILE).read_bytes() == kept
    replaced = frozen()
    layer = next(m for m in replaced.modules() if isinstance(m, LoraLayer))
    layer.lora_A["default"] = torch.nn.Linear(layer.in_features, 4, bias=False)
    with pytest.raises(ProtectionError, match="frozen lora_A"):
        assert_protected(replaced)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "peft_safety.certificate.v1"}', "no json"])
def test_a_malformed_certificate(text, tmp_path):
    frozen().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / FILE_NAME).write_text(text)
    with pytest.raises(ArtifactError):
        PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter")


def test_another_base_model(tmp_path):
    frozen().save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "copy")
    with pytest.raises(ArtifactError, match="Load the base model") as told:
        PeftModel.from_pretrained(cells.base_model(cells.WIDE), tmp_path / "copy")
    both = "layers.0.mlp.down_proj has (4, 64) in the adapter and (4, 128) in the model (6 of 6 modules differ)"
    assert both in str(told.value)


def test_a_config_by_itself_keeps_its_name(tmp_path):
    config("auto", train="B", a_init="random").save_pretrained(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["peft_type"] == "GUARDSPACE"
    assert GuardSpaceConfig.from_pretrained(tmp_path).train == "B"


def test_what_does_not_go_together():
    space = subspace(cells.base_model())
    for options in ({"init": "guardspace"}, {"combine": "salora"}):
        with pytest.raises(ConfigError, match="train='A'"):
            config(space, train="B", **options)
    with pytest.raises(ConfigError, match="train='C'"):
        config(space, train="C")
    with pytest.warns(UserWarning, match="random directions"):
        get_peft_model(cells.base_model(), config(space, train="B"))
    with pytest.raises(CalibrationError, match="rows that the subspace was"):
        frozen(space=space, task_data=batches(HARMFUL))
    with pytest.raises(CalibrationError, match="2 tokens, patches or frames cannot give 4 directions"):
        frozen(space=space, task_data=[{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}])
