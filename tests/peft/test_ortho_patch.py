"""OrthoSafetyPatch: the constraint on either side, the soft penalty, stacking, and the life cycle of a patch."""

import itertools

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_safety import (
    OrthoSafetyPatchConfig,
    SafetySubspace,
    SoftPenaltyCallback,
    assert_protected,
    export_lora,
    merge_quantized,
    verify,
)
from peft_safety.callbacks import SafetyMonitorCallback
from peft_safety.core.base_weights import dense_weight
from peft_safety.core.targets import base_layers
from peft_safety.errors import ConfigError, PeftSafetyError, ProtectionError
from peft_safety.methods.ortho_patch import SoftPenalty
from peft_safety.methods.ortho_patch.config import SIDES
from tests.interop.helpers import token_rows
from tests.peft import cells
from tests.peft.patch_cells import GENERAL, K, config, patched, subspace
from tests.tiny import tiny_llama, tiny_tokenizer

LEAK = 1e-6


def shares(model, space, side, adapter="default"):
    """Largest share of any module's dW in the basis of one side."""
    worst = 0.0
    for name, delta in cells.deltas(model, adapter).items():
        delta, u = delta.double(), space.bases[name][side].double()
        assert float(delta.norm()) > 1e-6, f"{name} was not trained"
        worst = max(worst, float((u.T @ delta if side == "out" else delta @ u).norm() / delta.norm()))
    return worst


@pytest.mark.parametrize("basis", ["weight", "activation", "contrastive"])
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_hard_keeps_a_patch_out_of_the_basis_at_save_load_and_export(side, basis, tmp_path):
    model = patched(side=side, basis=basis)
    cells.train(model, cells.adamw, 20)
    space = model.peft_config["default"].subspace
    assert_protected(model)
    model.save_pretrained(tmp_path / "native")
    found = verify(tmp_path / "native", cells.base_model())
    assert found.method == "ORTHOSAFETYPATCH"
    assert found.worst_leak <= LEAK
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "native").eval()
    assert loaded.peft_config["default"].side == side
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path / "plain").eval()
    assert plain.peft_config["default"].r == 4, "folding keeps the rank"
    for other in (model, loaded, plain):
        for constrained in SIDES[side]:
            assert shares(other, space, constrained) <= LEAK
        torch.testing.assert_close(cells.logits(other), cells.logits(model), atol=1e-5, rtol=1e-5)


def gradient_projection_share(steps=100, k=K):
    """The other form: project the gradient of lora_A, then let AdamW step. Largest share of dW in the basis
    afterwards.
    """
    base = cells.base_model()
    space = subspace(base, k=k)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=cells.LINEAR_TARGETS))
    bases = {name: space.bases[name]["in"] for name, _ in cells.layers_of(model)}
    for name, layer in cells.layers_of(model):
        a, u = layer.lora_A["default"].weight, bases[name]
        a.data -= (a.data @ u) @ u.T
        a.register_hook(lambda g, u=u: g - (g @ u) @ u.T)
    cells.train(model, cells.adamw, steps)
    return shares(model, space, "in")


def test_projected_gradients_leak_where_the_parametrized_form_does_not():
    assert gradient_projection_share() > 0.1


@pytest.mark.parametrize("kind", ["linear", "nf4", "conv1d", "int8"])
def test_hard_mode_leaks_nothing_after_a_hundred_steps(kind):
    base, wanted = cells.base_model(kind), cells.targets(kind)
    torch.manual_seed(0)
    space = SafetySubspace.from_weights(base, rank=K, sides=("in", "out"), target_modules=wanted, progress=False)
    options = {"target_modules": wanted, "fan_in_fan_out": kind == "conv1d"}
    model = get_peft_model(base, config(space, side="both", **options))
    cells.train(model, cells.adamw, 100)
    for side in ("in", "out"):
        assert shares(model, space, side) <= LEAK


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_stacked_patches_are_orthogonal_and_removing_one_leaves_the_others(side, tmp_path):
    model = patched(side=side)
    cells.train(model, cells.adamw, 10)
    space = model.peft_config["default"].subspace
    torch.manual_seed(1)
    model.add_adapter("second", config(space, side=side, prior_patches=["default"]))
    model.set_adapter("second")
    cells.train(model, cells.adamw, 10)
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    model.add_adapter(
        "third", config(space, side=side, safety_rank=0, prior_patches=["default", str(tmp_path / "second")])
    )
    model.set_adapter("third")
    cells.train(model, cells.adamw, 10)

    updates = {name: cells.deltas(model, name) for name in ("default", "second", "third")}
    for one, other in (("default", "second"), ("default", "third"), ("second", "third")):
        for module, delta in updates[one].items():
            d, e = delta.double(), updates[other][module].double()
            assert abs(float((d * e).sum())) <= 1e-6 * float(d.norm() * e.norm()), (one, other, module)
    facts = model.peft_config["third"].subspace.provenance
    d = 16 if side != "in" else 32  # v_proj is 16 x 32
    assert facts["capacity_left"] == d - K - 8
    assert facts["prior_patches"] == ["default", "second"]

    model.base_model.set_adapter(["default", "second", "third"])
    before = cells.deltas(model, "third")
    model.delete_adapter("second")
    model.base_model.set_adapter(["default", "third"])
    kept = cells.logits(model)
    for module, delta in cells.deltas(model, "third").items():
        assert torch.equal(delta, before[module])
    fresh = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    model.save_pretrained(tmp_path / "rest")
    fresh.load_adapter(str(tmp_path / "rest" / "third"), "third")
    fresh.base_model.set_adapter(["default", "third"])
    torch.testing.assert_close(cells.logits(fresh.eval()), kept, atol=1e-6, rtol=1e-6)


def test_a_plain_lora_directory_is_a_prior_patch_too(tmp_path):
    torch.manual_seed(0)
    plain = cells.perturb(get_peft_model(cells.base_model(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])))
    plain.save_pretrained(tmp_path)
    model = patched(prior_patches=[str(tmp_path)])
    cells.train(model, cells.adamw, 10)
    for module, delta in cells.deltas(plain).items():
        other = cells.deltas(model)[module].double()
        assert abs(float((delta.double() * other).sum())) <= 1e-6 * float(delta.norm()) * float(other.norm())
    ranks = {name: sides["in"].shape[1] for name, sides in model.peft_config["default"].subspace.bases.items()}
    assert {ranks[name] for name in ranks if "v_proj" in name} == {K}, (
        "modules that the prior left alone keep their basis"
    )
    assert {ranks[name] for name in ranks if "q_proj" in name} == {K + 3}


def dense_penalty(model, adapter="default"):
    """`sum tr(dW S dW^T) / tr(W S W^T)` with everything dense, and the raw factors that it depends on."""
    space, total, leaves = model.peft_config[adapter].subspace, 0.0, []
    base = base_layers(model)
    for name, layer in cells.layers_of(model, adapter):
        a, b = (
            getattr(layer, factor)[adapter].weight.detach().double().requires_grad_()
            for factor in ("lora_A", "lora_B")
        )
        q, s = space.bases[name]["in"].double(), space.spectra[name]["in"].double()
        moment = q @ torch.diag(s.square()) @ q.T
        delta, w = layer.scaling[adapter] * b @ a, dense_weight(base[name], name).double()
        total = total + (delta @ moment @ delta.T).trace() / (w @ moment @ w.T).trace()
        leaves += [(layer, a, b)]
    return total, leaves


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_the_penalty_and_its_gradient_in_fp64_are_those_of_the_dense_formula(kind):
    base = cells.base_model(kind)
    model = cells.perturb(
        get_peft_model(base, config(subspace(cells.base_model(kind)), mode="soft", reg_lambda=3.0)).double()
    )
    penalty = SoftPenalty(model)
    total, leaves = dense_penalty(model)
    assert penalty.value() == pytest.approx(float(total), rel=1e-9)
    (3.0 * total).backward()
    penalty.add_gradient()
    penalty.add_gradient()  # adds to what is there
    for layer, a, b in leaves:
        for factor, expected in ((layer.lora_A, a.grad), (layer.lora_B, b.grad)):
            found = factor["default"].weight.grad
            torch.testing.assert_close(found, 2 * expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def trainer(model, tmp_path, callbacks, **options):
    rows = token_rows(16)
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    AcceleratorState._reset_state()  # older releases keep the precision of another file's Trainer
    return Trainer(
        model,
        TrainingArguments(**{**arguments, "learning_rate": 1e-2, "use_cpu": True, **options}),
        train_dataset=rows,
        callbacks=callbacks,
    )


OPTIONS = {"plain": {}, "accumulation": {"gradient_accumulation_steps": 2}, "bf16": {"bf16": True}}


@pytest.mark.parametrize(
    ("kind", "option"),
    cells.covering(
        itertools.product(["linear", "nf4"], OPTIONS),
        fast=(("linear", "plain"), ("nf4", "accumulation"), ("linear", "bf16")),
    ),
)
def test_soft_training_shrinks_the_energy_on_the_data_and_leaves_the_loss_alone(kind, option, tmp_path):
    space = subspace(cells.base_model(kind))
    found = {}
    for strength in (1e-6, 100.0):
        torch.manual_seed(0)
        model = get_peft_model(cells.base_model(kind), config(space, mode="soft", reg_lambda=strength))
        run = trainer(model, tmp_path, [SoftPenaltyCallback()], **OPTIONS[option])
        run.train()
        history = [entry for entry in run.state.log_history if "loss" in entry]
        found[strength] = (history[0]["loss"], history[-1]["soft_penalty"], SoftPenalty(model).value())
        assert not run.optimizer.optimizer._optimizer_step_pre_hooks, "the hook goes with the run"
    assert found[1e-6][0] == found[100.0][0], "the user's loss is untouched"
    assert 0 < found[100.0][2] < 0.2 * found[1e-6][2]


def test_the_penalty_is_added_once_a_step_however_many_batches_it_accumulates(tmp_path):
    counts = []

    class Counting(SoftPenaltyCallback):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            inner = self.penalty.add_gradient
            self.penalty.add_gradient = lambda: (counts.append(1), inner())

    model = patched(mode="soft")
    trainer(model, tmp_path, [Counting()], gradient_accumulation_steps=4, max_steps=2).train()
    assert len(counts) == 2


def test_a_run_after_one_that_failed_adds_the_penalty_once(tmp_path, monkeypatch):
    class Fails(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise OSError("disk full")

    counts, inner = [], SoftPenalty.add_gradient
    monkeypatch.setattr(SoftPenalty, "add_gradient", lambda self: (counts.append(1), inner(self)))
    failing = Fails()
    run = trainer(patched(mode="soft"), tmp_path, [SoftPenaltyCallback(), failing], max_steps=2)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    run.remove_callback(failing)
    run.train()
    assert len(counts) == 1 + 2


def test_a_soft_patch_saved_without_its_penalty_warns_and_one_with_it_does_not(tmp_path, recwarn):
    model = patched(mode="soft")
    with pytest.warns(UserWarning, match="without its penalty"):
        model.save_pretrained(tmp_path / "early")
    trainer(model, tmp_path / "run", [SoftPenaltyCallback()]).train()
    recwarn.clear()
    model.save_pretrained(tmp_path / "late")
    assert not [w for w in recwarn if "penalty" in str(w.message)]
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "late", is_trainable=True)
    torch.testing.assert_close(cells.logits(loaded.eval()), cells.logits(model.eval()))
    assert SoftPenalty(loaded).value() == pytest.approx(SoftPenalty(model).value(), rel=1e-5), (
        "the basis comes along, so training can go on"
    )


@pytest.mark.parametrize("mode", ["none", "soft"])
def test_unconstrained_modes_train_like_plain_lora(mode):
    torch.manual_seed(0)
    plain = get_peft_model(cells.base_model(), LoraConfig(r=4, lora_alpha=8, target_modules=cells.LINEAR_TARGETS))
    free = patched(mode=mode)
    for model in (plain, free):
        cells.train(model, cells.adamw, 5)
    assert torch.equal(cells.logits(plain.eval()), cells.logits(free.eval()))
    assert_protected(free)


def test_the_monitor_watches_the_input_side(tmp_path):
    model = patched()
    run = trainer(model, tmp_path, [SafetyMonitorCallback()])
    run.train()
    leaks = [entry["safety_leak"] for entry in run.state.log_history if "safety_leak" in entry]
    assert leaks
    assert max(leaks) <= LEAK
    name = next(name for name, layer in cells.layers_of(model))
    layer = dict(cells.layers_of(model))[name]
    layer.lora_A["default"] = nn.Linear(32, 4, bias=False)
    with pytest.raises(ProtectionError, match="a Linear stands where"):
        assert_protected(model)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_merge_and_unmerge(kind):
    model = cells.perturb(patched(kind))
    before = cells.logits(model)
    if kind == "nf4":
        with pytest.raises(PeftSafetyError, match="would miss"):
            model.merge_adapter()
        merged = merge_quantized(model, dtype=torch.float32, verbose=False).model
        torch.testing.assert_close(merged(input_ids=cells.tokens()).logits, before, atol=1e-3, rtol=1e-3)
        return
    model.merge_adapter()
    torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)


def test_layers_with_one_input_share_one_basis_in_memory_and_on_disk(tmp_path):
    space = SafetySubspace.from_activations(
        tiny_llama(),
        GENERAL,
        tokenizer=tiny_tokenizer(),
        method="ortho_patch",
        rank=4,
        target_modules="all-linear",
        progress=False,
    )
    q, k = (space.bases[f"model.layers.0.self_attn.{p}_proj"]["in"] for p in "qk")
    assert q is k
    path = space.save(tmp_path)
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        stored = [key for key in handle.keys() if key.startswith("basis.")]  # noqa: SIM118
    assert len(stored) == 2 * 4, "q/k/v, o, gate/up and down of two layers"
    loaded = SafetySubspace.load(path)
    assert loaded.digest == space.digest
    assert (
        loaded.bases["model.layers.0.self_attn.q_proj"]["in"] is loaded.bases["model.layers.0.self_attn.v_proj"]["in"]
    )
    assert loaded.provenance == space.provenance
    assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()


def test_auto_estimates_on_the_packages_own_prompts(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base.config._name_or_path = str(tmp_path)
    for basis in ("activation", "contrastive", "weight"):
        model = get_peft_model(
            tiny_llama_at(tmp_path),
            OrthoSafetyPatchConfig(r=2, target_modules=["q_proj"], basis=basis, safety_energy=0.5),
        )
        facts = model.peft_config["default"].subspace.provenance
        assert facts["energy"] == 0.5
        assert_protected(model)
        model.unload()


def tiny_llama_at(path):
    model = tiny_llama()
    model.config._name_or_path = str(path)
    return model


def test_rows_of_prompts_alone_calibrate_on_prompt_tokens():
    bare = [{"prompt": row["prompt"]} for row in GENERAL]
    common = {
        "tokenizer": tiny_tokenizer(),
        "method": "ortho_patch",
        "rank": 4,
        "target_modules": ["q_proj"],
        "progress": False,
    }
    found = SafetySubspace.from_activations(tiny_llama(), bare, **common)
    same = SafetySubspace.from_activations(tiny_llama(), bare, positions="prompt", **common)
    assert found.digest == same.digest
    both = SafetySubspace.from_activations(tiny_llama(), GENERAL, positions="all", **common)
    assert both.provenance["tokens"] > found.provenance["tokens"]
    with pytest.raises(PeftSafetyError, match="0 labeled tokens"):
        SafetySubspace.from_activations(tiny_llama(), bare, positions="response", **common)
    with pytest.raises(ConfigError, match="positions='some'"):
        SafetySubspace.from_activations(tiny_llama(), bare, positions="some", **common)
