"""GuardSpace with `lora_A` in a window outside the null space: blind without bases, and trainable, on every road."""

import copy
import itertools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from peft_safety import GuardSpaceConfig, SafetySubspace, TaskDirectionsCallback, assert_protected, export_lora, verify
from peft_safety.convert.export import export_directory
from peft_safety.convert.merge import merge_quantized
from peft_safety.core.adapter_dir import seal
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST
from peft_safety.core.projection import leak, principal_cosines
from peft_safety.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    LossyMergeError,
    ProtectionError,
    SubspaceError,
)
from peft_safety.layers import protected_leaves
from tests.peft import cells
from tests.peft.frozen_cells import OPTIMIZERS, M, frozen, lora_a, windowed
from tests.peft.guard_cells import HARMFUL, TASK, batches, calibrated_inputs, config, guarded, subspace
from tests.peft.left_out_cells import TOWER, adapted, guard, with_tower
from tests.peft.test_frozen import COMBINATIONS
from tests.peft.test_guardspace import BLIND, blindness, trainer

LEAK = 1e-6


def assert_blind(model, space, adapter="default"):
    """Every stored `lora_A` against the null space itself."""
    for name, weight in lora_a(model, adapter).items():
        assert float(weight.detach().norm()) > 0.01
        assert leak(space.bases[cells.canonical(name)]["in"], weight.detach(), "in") <= LEAK, name


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    cells.covering(
        itertools.product(cells.BASES, OPTIMIZERS),
        fast=(("linear", "adamw"), ("conv1d", "sgd"), ("nf4", "adamw8bit"), ("int8", "muon")),
    ),
)
def test_the_update_is_zero_on_the_calibrated_span_after_a_hundred_steps(kind, optimizer):
    inputs, space = calibrated_inputs(cells.base_model(kind), kind), subspace(cells.base_model(kind), kind=kind)
    model = windowed(kind, space=space)
    before = {name: weight.detach().clone() for name, weight in lora_a(model).items()}
    cells.train(model, OPTIMIZERS[optimizer], 100)
    strayed = max(leak(leaf.basis, leaf.raw().detach(), "window") for _, leaf in protected_leaves(model))
    assert not optimizer.startswith("adamw") or strayed > 1e-3, "AdamW moves single elements, out of the window"
    assert blindness(model, space, inputs) <= BLIND
    assert_blind(model, space)
    assert all(float((w.detach() - before[n]).norm() / before[n].norm()) > 1e-3 for n, w in lora_a(model).items())
    assert_protected(model)


@pytest.mark.parametrize("a_init", ["task", "random"])
@pytest.mark.parametrize("window", [M, 64])
def test_half_of_the_dimensions_and_a_window_as_wide_as_the_complement(window, a_init):
    space = subspace(cells.base_model(), rank=0.5, allow_fewer=True)
    model = windowed(space=space, window=window, a_init=a_init)
    cells.train(model, cells.adamw, 20)
    assert_blind(model, space)
    for name, leaf in protected_leaves(model):
        n, k = space.bases[cells.canonical(name).removesuffix(".lora_A.default")]["in"].shape
        assert leaf.basis.shape == (n, min(window, n - k))


def test_it_starts_from_the_frozen_forms_directions_without_changing_the_function():
    space = subspace(cells.base_model())
    model = windowed(space=space)
    assert torch.equal(cells.logits(model), cells.logits(cells.base_model()))
    for name, weight in lora_a(frozen(space=space)).items():
        own = lora_a(model)[name].detach()
        assert float((own @ own.mT - weight @ weight.mT).abs().max()) <= 1e-6, "orthogonal rows of the same norm"
        cosines = principal_cosines(*(torch.linalg.qr(a.mT).Q for a in (own, weight.detach())))
        assert float(cosines.min()) > 0.99, "iterated with fewer columns"


@torch.no_grad()
def loss(model):
    return float(sum(model(input_ids=(ids := cells.tokens(seed=seed)), labels=ids).loss for seed in range(8))) / 8


def test_it_learns_both_factors():
    model = windowed()
    before, start = loss(model), copy.deepcopy(model)
    cells.train(model, cells.adamw, 60)
    assert loss(model) < before - 0.05
    assert all(not torch.equal(w, lora_a(start)[n]) for n, w in lora_a(model).items())


@pytest.mark.parametrize("a_init", ["task", "random"])
def test_layers_of_one_input_share_a_window_and_the_bases_are_let_go(a_init, tmp_path):
    names = ["q_proj", "k_proj", "v_proj", "down_proj"]
    subspace(cells.base_model(), target_modules=names).save(tmp_path / "space")
    model = windowed(space=str(tmp_path / "space"), target_modules=names, a_init=a_init)
    leaves = {name.partition("layers.0.")[2]: leaf for name, leaf in protected_leaves(model)}
    q, k, v = (leaves[f"self_attn.{part}_proj.lora_A.default"].basis for part in "qkv")
    assert q is k is v
    held = model.peft_config["default"].subspace
    assert {tuple(sides) for sides in held.bases.values()} == {("window",)}
    assert held.provenance["null_space"] == SafetySubspace.load(tmp_path / "space").digest
    assert 0 < held.provenance["window_leak"] <= LEAK


@pytest.mark.parametrize("kind", cells.BASES)
def test_a_life_from_training_to_export(kind, tmp_path):
    space = subspace(cells.base_model(kind), kind=kind)
    model = windowed(kind, space=space)
    cells.train(model, cells.adamw, 10)
    model.eval().save_pretrained(tmp_path / "native")
    fields = json.loads((tmp_path / "native" / MANIFEST).read_text())
    assert (fields["peft_type"], fields["train"], fields["window"]) == ("GUARDSPACE", "window", M)
    found = verify(tmp_path / "native", cells.base_model(kind))
    assert (found.protected, found.blindness_checked, found.worst_leak <= LEAK) == ((M,), False, True)
    space.save(tmp_path / "space")
    found = verify(tmp_path / "native", cells.base_model(kind), tmp_path / "space")
    assert (found.blindness_checked, found.worst_leak <= LEAK) == (True, True)
    other = space.randomized()
    with pytest.raises(ProtectionError, match="was made with subspace"):
        verify(tmp_path / "native", subspace=other)
    loaded = PeftModel.from_pretrained(cells.base_model(kind), tmp_path / "native", is_trainable=True)
    cells.assert_same_factors(loaded, model)
    assert torch.equal(cells.logits(loaded.eval()), cells.logits(model))
    cells.train(loaded, cells.adamw, 3)
    assert_blind(loaded, space)
    export_lora(model, tmp_path / "plain")
    export_directory(tmp_path / "native", tmp_path / "again")
    for name in ("plain", "again"):
        plain = PeftModel.from_pretrained(cells.base_model(kind), tmp_path / name).eval()
        assert type(plain.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(cells.logits(plain), cells.logits(model), atol=2e-5, rtol=2e-5)
        assert blindness(plain, space, calibrated_inputs(cells.base_model(kind), kind)) <= BLIND


def test_merged_unmerged_and_never_into_four_bits():
    model = windowed(trained=True)
    before = cells.logits(model)
    model.merge_adapter()
    torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)
    quantized = windowed("nf4", trained=True)
    before = cells.logits(quantized)
    with pytest.raises(LossyMergeError, match="would miss"):
        quantized.merge_adapter()
    merged = merge_quantized(quantized, dtype=torch.float32, verbose=False)
    torch.testing.assert_close(cells.logits(merged.model), before, atol=1e-3, rtol=1e-3)
    assert max(row.leak for row in merged.modules) <= 1e-4, "outside the window; what rounding W + dW lets through"


def test_a_trainer_resumes_as_the_same_run(tmp_path):
    space = subspace(cells.base_model())
    whole = windowed(space=space)
    trainer(whole, tmp_path / "whole", save_steps=2).train()
    rest = windowed(space=space, a_init="random")
    run = trainer(rest, tmp_path / "rest", save_strategy="no")
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(cells.logits(whole.eval()), cells.logits(rest.eval()))
    assert rest.peft_config["default"].subspace_id == whole.peft_config["default"].subspace_id
    assert max(entry["safety_leak"] for entry in run.state.log_history if "safety_leak" in entry) <= LEAK


def test_an_adapter_of_another_form_is_neither_resumed_nor_swapped_in(tmp_path):
    model = windowed()
    guarded(trained=True).save_pretrained(tmp_path / "bases")
    frozen().save_pretrained(tmp_path / "frozen")
    before = cells.logits(model)
    with pytest.raises(ArtifactError, match="constrained on sides"):
        model.load_adapter(str(tmp_path / "bases"), "default")
    with pytest.raises(ArtifactError, match="a config without an adapter"):
        model.load_adapter(str(tmp_path / "frozen"), "default")
    with pytest.raises(ConfigError, match="constrained on sides"):
        hotswap_adapter(model, str(tmp_path / "bases"), "default", torch_device="cpu")
    assert torch.equal(cells.logits(model), before)
    assert_protected(model)


def test_hotswap_brings_the_window_along(tmp_path):
    one, other = windowed(trained=True), windowed(trained=True, seed=1, a_init="random")
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(one, str(tmp_path / "other"), "default", torch_device="cpu")
    assert one.peft_config["default"].subspace_id == other.peft_config["default"].subspace_id
    assert_protected(one)
    torch.testing.assert_close(cells.logits(one), cells.logits(other), atol=1e-6, rtol=1e-6)
    space = subspace(cells.base_model())
    padded = windowed(space=space)
    prepare_model_for_compiled_hotswap(padded, target_rank=6)
    cells.train(padded, cells.adamw, 3)
    assert_blind(padded, space)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combinations_in_one_window(kind, tmp_path):
    space = subspace(cells.base_model())
    model = windowed(space=space)
    model.add_adapter("second", config(model.peft_config["default"].subspace, train="window"))
    for name in ("default", "second"):
        model.set_adapter(name)
        cells.train(model, cells.adamw, 5)
    options = {"density": 0.5} if "svd" in kind or kind not in ("linear", "cat") else {}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", combination_type=kind, **options)
    assert_blind(model, space, "sum")
    model.save_pretrained(tmp_path / "all")
    assert verify(tmp_path / "all" / "sum", subspace=space).blindness_checked


def test_combinations_of_two_windows_are_refused():
    space = subspace(cells.base_model())
    model = windowed(space=space)
    model.add_adapter("second", config(space, train="window", window=M, a_init="random"))
    model.add_adapter("projected", config(space))
    for other in ("second", "projected"):
        with pytest.raises(ConfigError, match="share one safety subspace"):
            model.add_weighted_adapter(["default", other], [1, 1], "sum")


def test_further_adapters_take_the_window_and_start_in_it(tmp_path):
    space = subspace(cells.base_model())
    given = config(space, train="window", window=M, task_data=batches(TASK))
    model = get_peft_model(cells.base_model(), given)
    model.add_adapter("users", given)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "adapter")
    loaded.add_adapter("own", loaded.peft_config["default"])
    loaded.add_adapter("path", config(str(tmp_path / "adapter"), train="window", r=2))
    expected = lora_a(model)
    for holder, name in ((model, "users"), (loaded, "own"), (loaded, "path")):
        assert holder.peft_config[name].subspace_id == model.peft_config["default"].subspace_id
        for module, weight in lora_a(holder, name).items():
            assert torch.equal(weight, expected[module][: len(weight)])
    loaded.delete_adapter("default")
    loaded.set_adapter("own")
    cells.train(loaded, cells.adamw, 3)
    with loaded.disable_adapter():
        torch.testing.assert_close(cells.logits(loaded), cells.logits(cells.base_model()), rtol=0, atol=0)
    assert_blind(loaded, space, "own")
    twin = copy.deepcopy(loaded)
    cells.train(twin, cells.adamw, 3)
    assert_blind(twin, space, "own")
    assert_protected(loaded)


def test_transformers_own_loader_and_injection_without_a_peft_model(tmp_path):
    model = windowed(trained=True)
    model.save_pretrained(tmp_path / "adapter")
    loaded = cells.base_model()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_protected(loaded)
    torch.testing.assert_close(cells.logits(loaded), cells.logits(model), atol=1e-6, rtol=1e-6)
    space = subspace(cells.base_model())
    injected = inject_adapter_in_model(config(space, train="window", a_init="random"), cells.base_model())
    assert_protected(injected)
    assert_blind(injected, space)


def test_patterns_of_ranks_and_a_rank_above_the_window(tmp_path):
    space = subspace(cells.base_model())
    model = windowed(space=space, window=2, rank_pattern={"down_proj": 12}, alpha_pattern={"q_proj": 3})
    assert {leaf.basis.shape[1] for _, leaf in protected_leaves(model)} == {12}, "no rank exceeds the window"
    cells.train(model, cells.adamw, 5)
    model.eval().save_pretrained(tmp_path)
    assert verify(tmp_path, subspace=space).ranks == (4, 12)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path).eval()
    assert torch.equal(cells.logits(loaded), cells.logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_keep_the_window_in_fp32(dtype, tmp_path):
    space = subspace(cells.base_model())
    model = windowed(space=space, trained=True).to(dtype)
    assert {leaf.basis.dtype for _, leaf in protected_leaves(model)} == {torch.float32}
    assert_protected(model)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path, subspace=space).worst_leak < 1e-2, "what rounding to 16 bits lets through"


def test_a_changed_factor_and_a_changed_window_are_noticed(tmp_path):
    space = subspace(cells.base_model())
    model = windowed(space=space, trained=True)
    model.save_pretrained(tmp_path / "factor")
    tensors = load_file(tmp_path / "factor" / ADAPTER_FILE)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key] + 0.01}, tmp_path / "factor" / ADAPTER_FILE)
    with pytest.raises(ArtifactError, match="its sha256 differs"):
        verify(tmp_path / "factor")
    seal(tmp_path / "factor")  # by somebody who can compute hashes
    for read in (verify, lambda path: PeftModel.from_pretrained(cells.base_model(), path)):
        with pytest.raises(ArtifactError, match="out of its window"):
            read(tmp_path / "factor")
    forged = {name: {"window": sides["in"]} for name, sides in space.bases.items()}
    own = model.peft_config["default"].subspace
    inside = SafetySubspace(forged, None, own.fingerprints, own.provenance)
    get_peft_model(cells.base_model(), config(inside, train="window")).save_pretrained(tmp_path / "window")
    assert not verify(tmp_path / "window").blindness_checked
    with pytest.raises(ProtectionError, match="of its norm into the null space"):
        verify(tmp_path / "window", subspace=space)
    leaf = next(leaf for _, leaf in protected_leaves(model))
    leaf.basis = leaf.basis.flip(1)
    with pytest.raises(ProtectionError, match="its basis"):
        assert_protected(model)


def test_a_window_is_no_null_space():
    own = windowed().peft_config["default"].subspace
    with pytest.raises(SubspaceError, match="no 'in' basis"):
        get_peft_model(cells.base_model(), config(own))


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "all"])
def test_a_size_that_is_none(window):
    with pytest.raises(ConfigError, match="window="):
        GuardSpaceConfig(train="window", window=window)


def test_what_does_not_go_together(tmp_path):
    space = subspace(cells.base_model())
    for options in ({"init": "guardspace"}, {"combine": "salora"}):
        with pytest.raises(ConfigError, match="train='A'"):
            config(space, train="window", **options)
    with pytest.warns(UserWarning, match="random directions"):
        get_peft_model(cells.base_model(), config(space, train="window"))
    with pytest.raises(CalibrationError, match="rows that the subspace was"):
        windowed(space=space, task_data=batches(HARMFUL))
    few = [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}]
    with pytest.raises(CalibrationError, match=r"tokens.* cannot give 8 directions"):
        windowed(space=space, task_data=few)
    with pytest.raises(SubspaceError, match="no 'in' basis"):
        windowed(space=cells.random_subspace(cells.base_model(), cells.LINEAR_TARGETS))
    run = trainer(windowed(space=space), tmp_path)
    event = {"model": run.model, "train_dataloader": run.get_train_dataloader()}
    with pytest.raises(ConfigError, match="no frozen factor"):
        TaskDirectionsCallback().on_train_begin(None, TrainerState(), None, **event)


@pytest.mark.filterwarnings("ignore:.*left out of the")
def test_layers_that_the_null_space_leaves_out_get_no_window(tmp_path):
    space, given = guard(with_tower()), {"r": 4, "train": "window", "a_init": "random"}
    model = get_peft_model(with_tower(), GuardSpaceConfig(**given, subspace=space, target_modules="all-linear"))
    assert adapted(model) == set(space.bases) == set(model.peft_config["default"].subspace.bases)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path, with_tower(), space).blindness_checked
    with pytest.raises(SubspaceError, match="leaves out every layer"):
        get_peft_model(with_tower(), GuardSpaceConfig(**given, subspace=space, target_modules=TOWER))


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    model, space = windowed(trained=True), subspace(cells.base_model())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(cells.logits(compiled), cells.logits(model), rtol=1e-5, atol=1e-6)
    cells.train(compiled, cells.adamw, 2)
    model.eval()
    torch.testing.assert_close(cells.logits(compiled), cells.logits(model), rtol=1e-5, atol=1e-6)
    assert_blind(model, space)
    torch._dynamo.reset()
