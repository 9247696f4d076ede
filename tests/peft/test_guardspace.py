"""GuardSpace: an update that is zero on the calibrated inputs, through training and the whole life cycle, on every
base.
"""

import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_safety import GuardSpaceConfig, assert_protected, calibrate, export_lora, merge_quantized, verify
from peft_safety.calibration.coverage import coverage
from peft_safety.callbacks import SafetyMonitorCallback
from peft_safety.convert.export import export_directory
from peft_safety.core.base_weights import dense_weight
from peft_safety.core.plain_lora import MANIFEST
from peft_safety.core.targets import base_layers
from peft_safety.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    PeftSafetyError,
    ProtectionError,
    SubspaceError,
)
from peft_safety.layers import protected_leaves
from tests.interop.helpers import token_rows
from tests.peft import cells
from tests.peft.guard_cells import HARMFUL, TASK, K, batches, calibrated_inputs, config, guarded, subspace
from tests.tiny import tiny_llama, tiny_tokenizer

LEAK = 1e-6
BLIND = 1e-5
"""Bound on `||dW x|| / (||dW|| ||x||)` for x in the calibrated span."""
INITS = ("lora", "guardspace")


@torch.no_grad()
def blindness(model, space, inputs):
    """Largest `||dW x|| / (||dW|| ||x||)` over the layers, x the calibrated inputs projected onto the span, and its
    basis vectors themselves.
    """
    worst = 0.0
    for name, delta in cells.deltas(model).items():
        delta, q = delta.double(), space.bases[name]["in"].double()
        assert float(delta.norm()) > 1e-6, f"{name} was not trained"
        x = torch.cat([inputs[name].double() @ q @ q.T, q.T])
        worst = max(worst, float(((x @ delta.T).norm(dim=1) / x.norm(dim=1)).max() / delta.norm()))
    return worst


@pytest.mark.parametrize(
    ("kind", "init"),
    cells.covering(
        itertools.product(cells.BASES, INITS),
        fast=(("linear", "lora"), ("conv1d", "guardspace"), ("nf4", "guardspace"), ("int8", "lora")),
    ),
)
def test_the_update_is_zero_on_the_calibrated_span_after_a_hundred_steps(kind, init):
    inputs = calibrated_inputs(cells.base_model(kind), kind)
    model = guarded(kind, init=init)
    cells.train(model, cells.adamw, 100)
    space = model.peft_config["default"].subspace
    assert blindness(model, space, inputs) <= BLIND
    free = {name: (q := space.bases[name]["in"], x - x @ q @ q.T)[1] for name, x in inputs.items()}
    seen = max(
        float((free[name] @ delta.T).norm() / (free[name].norm() * delta.norm()))
        for name, delta in cells.deltas(model).items()
    )
    assert seen > 0.01, "the same figure outside the span"


def test_plain_lora_sees_those_inputs():
    inputs = calibrated_inputs(cells.base_model())
    space = subspace(cells.base_model())
    torch.manual_seed(0)
    model = get_peft_model(cells.base_model(), LoraConfig(r=4, lora_alpha=8, target_modules=cells.LINEAR_TARGETS))
    cells.train(model, cells.adamw, 100)
    assert blindness(model, space, inputs) > 0.05


@pytest.mark.parametrize("both", [False, True], ids=["in", "in+out"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_a_life_from_training_to_export(kind, init, both, tmp_path):
    model = guarded(kind, init=init, both=both)
    before = cells.logits(cells.base_model(kind))
    assert torch.equal(cells.logits(model), before), "initialization changes no bit of the function"
    cells.train(model, cells.adamw, 20)
    model.eval()
    assert_protected(model)
    model.save_pretrained(tmp_path / "native")
    found = verify(tmp_path / "native", cells.base_model(kind))
    assert (found.method, found.worst_leak <= LEAK) == ("GUARDSPACE", True)
    loaded = PeftModel.from_pretrained(cells.base_model(kind), tmp_path / "native").eval()
    assert torch.equal(cells.logits(loaded), cells.logits(model))
    settings = loaded.peft_config["default"]
    assert (settings.init, settings.combine) == (init, "salora" if both else None)
    assert settings.init_data is None
    export_lora(model, tmp_path / "plain")
    export_directory(tmp_path / "native", tmp_path / "again")
    for name in ("plain", "again"):
        plain = PeftModel.from_pretrained(cells.base_model(kind), tmp_path / name).eval()
        assert plain.peft_config["default"].r == (4 if init == "lora" else 8)
        assert type(plain.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(cells.logits(plain), cells.logits(model), atol=2e-5, rtol=2e-5)
    space = model.peft_config["default"].subspace
    for name, delta in cells.deltas(loaded).items():
        for side in ("in", "out") if both else ("in",):
            u, d = space.bases[name][side].double(), delta.double()
            assert float((u.T @ d if side == "out" else d @ u).norm() / d.norm()) <= LEAK


@pytest.mark.parametrize("init", INITS)
def test_merge_and_unmerge(init):
    for kind in ("linear", "nf4"):
        model = guarded(kind, init=init, trained=True)
        before = cells.logits(model)
        if kind == "nf4":
            with pytest.raises(PeftSafetyError, match="would miss"):
                model.merge_adapter()
            torch.testing.assert_close(
                merge_quantized(model, dtype=torch.float32, verbose=False).model(input_ids=cells.tokens()).logits,
                before,
                atol=1e-3,
                rtol=1e-3,
            )
            continue
        model.merge_adapter()
        torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(cells.logits(model), before, atol=1e-5, rtol=1e-5)


def trainer(model, path, **options):
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "report_to": "none",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    settings = TrainingArguments(output_dir=str(path), **{**arguments, **options})
    return Trainer(model, settings, train_dataset=token_rows(32), callbacks=[SafetyMonitorCallback()])


@pytest.mark.parametrize("init", INITS)
def test_a_resumed_run_is_the_same_run(init, tmp_path):
    whole = guarded(init=init)
    trainer(whole, tmp_path / "whole", save_steps=2).train()
    rest = guarded(init=init)
    run = trainer(rest, tmp_path / "rest", save_strategy="no")
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(cells.logits(whole.eval()), cells.logits(rest.eval()))
    assert max(entry["safety_leak"] for entry in run.state.log_history if "safety_leak" in entry) <= LEAK


def test_hotswap_brings_the_basis_along_and_refuses_residuals_and_other_sides(tmp_path):
    one = guarded(trained=True)
    space = subspace(cells.base_model(), TASK)
    torch.manual_seed(1)
    other = cells.perturb(get_peft_model(cells.base_model(), config(space)), 1)
    other.save_pretrained(tmp_path / "other")
    hotswap_adapter(one, str(tmp_path / "other"), "default", torch_device="cpu")
    assert one.peft_config["default"].subspace.digest == space.digest
    assert_protected(one)
    torch.testing.assert_close(cells.logits(one), cells.logits(other), atol=1e-6, rtol=1e-6)
    guarded(trained=True, init="guardspace").save_pretrained(tmp_path / "residual")
    guarded(trained=True, both=True).save_pretrained(tmp_path / "both")
    for name, said in (("residual", "a residual"), ("both", "constrained on sides")):
        with pytest.raises(ConfigError, match=said):
            hotswap_adapter(one, str(tmp_path / name), "default", torch_device="cpu")
    assert_protected(one)
    with pytest.raises(ConfigError, match="a residual"):
        prepare_model_for_compiled_hotswap(guarded(init="guardspace"), target_rank=8)


def test_resuming_from_an_adapter_of_other_sides_is_refused(tmp_path):
    guarded(trained=True, both=True).save_pretrained(tmp_path)
    model = guarded()
    with pytest.raises(ArtifactError, match="constrained on sides"):
        model.load_adapter(str(tmp_path), "default")


def test_a_replaced_leaf_is_noticed():
    model = guarded(init="guardspace")
    layer = dict(cells.layers_of(model))[next(name for name, _ in cells.layers_of(model))]
    layer.lora_A["default"] = nn.Linear(32, 4, bias=False)
    with pytest.raises(ProtectionError, match="a Linear stands where"):
        assert_protected(model)


@pytest.mark.parametrize(
    "change",
    [
        {"combine": "salora"},
        {"combine": "odd"},
        {"init": "guardspace"},
        {"init": "odd"},
        {"peft_type": "SALORA"},
        {"peft_type": "LORA"},
        {"k": -1},
    ],
    ids=str,
)
def test_an_edited_config_is_refused(change, tmp_path):
    guarded(trained=True).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ArtifactError, ConfigError)):
        PeftModel.from_pretrained(cells.base_model(), tmp_path / "a")
    shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("preconditioner", ["root", "moment"])
def test_the_published_initialization_starts_where_the_data_are_not(preconditioner):
    model = guarded(init="guardspace", preconditioner=preconditioner)
    inputs = calibrated_inputs(cells.base_model())
    base = base_layers(model)
    for name, layer in cells.layers_of(model):
        a, b = (getattr(layer, factor)["default"].initial for factor in ("lora_A", "lora_B"))
        w, x = dense_weight(base[name], name), inputs[name]
        assert float(a.norm()) > 0
        assert float(b.norm()) > 0
        share = float((x @ (b @ a).T).square().sum() / (x @ w.T).square().sum())
        assert share < 0.02, name
        q = model.peft_config["default"].subspace.bases[name]["in"]
        assert float((a @ q).norm() / a.norm()) <= LEAK, "the initial factor is projected too"


def test_auto_calibrates_on_each_basis_and_combines(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    digests = set()
    for options in (
        {},
        {"basis": "general"},
        {"basis": "both"},
        {"positions": "prompt"},
        {"combine": "salora", "combine_rank": 4},
        {"init": "guardspace"},
    ):
        base = tiny_llama()
        base.config._name_or_path = str(tmp_path)
        before = cells.logits(base)
        model = get_peft_model(
            base,
            GuardSpaceConfig(
                r=2, target_modules=["q_proj", "down_proj"], safety_rank_pattern={"down_proj": 0.1}, **options
            ),
        ).eval()
        assert torch.equal(cells.logits(model), before)
        assert_protected(model)
        space = model.peft_config["default"].subspace
        assert {space.rank(name, "in") for name in space.bases if "q_proj" in name} == {8}, "a quarter of 32"
        assert {space.rank(name, "in") for name in space.bases if "down_proj" in name} == {6}, "a tenth of 64"
        outputs = {space.rank(name, "out") for name in space.bases if "out" in space.bases[name]}
        assert outputs == ({4} if "combine" in options else set())
        assert all(("out" in sides) == ("combine" in options) for sides in space.bases.values())
        digests.add(space.digest)
    assert len(digests) == 5, "every choice but the init gives other bases"


def test_an_energy_is_capped_and_has_other_values_by_kind():
    config = GuardSpaceConfig(
        target_modules=["q_proj", "down_proj"],
        safety_rank=0.25,
        safety_energy=0.99999,
        safety_rank_pattern={"down_proj": 0.4},
    )
    space = calibrate(tiny_llama(), config, HARMFUL, tokenizer=tiny_tokenizer(), progress=False)
    ranks = {kind: {space.rank(n, "in") for n in space.bases if n.endswith(kind)} for kind in ("q_proj", "down_proj")}
    assert ranks["q_proj"] == {8}, "a quarter of 32"
    assert all(1 <= k < 16 for k in ranks["down_proj"]), "of 64"
    assert all(row.covered >= 0.4 for row in coverage(space) if row.name.endswith("down_proj"))
    facts = space.provenance
    assert (facts["rank"], facts["energy"], facts["per_kind"]) == (0.25, 0.99999, {"down_proj": 0.4})


def test_modules_of_one_input_and_one_size_share_a_basis():
    space = subspace(tiny_llama(), target_modules="all-linear", per_kind={"k_proj": 3})
    q, k, v = (space.bases[f"model.layers.0.self_attn.{p}_proj"]["in"] for p in "qkv")
    assert q is v
    assert (q.shape[1], k.shape[1]) == (K, 3)
    torch.testing.assert_close(q[:, :3] @ q[:, :3].T, k @ k.T)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"basis": "evil"}, "basis='evil'"),
        ({"positions": "some"}, "positions='some'"),
        ({"combine": "all"}, "combine='all'"),
        ({"init": "task"}, "init='task'"),
        ({"preconditioner": "cube"}, "preconditioner='cube'"),
        ({"basis": "general", "positions": "response"}, "positions='response' finds none"),
        ({"basis": "both", "positions": "response"}, "positions='response' finds none"),
        ({"safety_rank": 1.5, "safety_energy": 0.5}, "safety_rank=1.5"),
        ({"safety_rank": 4, "safety_energy": 2}, "safety_energy=2"),
        ({"safety_rank": 1.0}, "safety_rank=1.0"),
        ({"safety_rank": 0.0}, "safety_rank=0.0"),
        ({"safety_rank": float("nan")}, "safety_rank=nan"),
        ({"safety_rank": "half"}, "safety_rank='half'"),
        ({"safety_rank": 0}, "safety_rank=0"),
        ({"safety_rank": 2.5}, "safety_rank=2.5"),
        ({"safety_rank": True}, "safety_rank=True"),
        ({"safety_energy": 0.0}, "safety_energy=0.0"),
        ({"safety_energy": 1.5}, "safety_energy=1.5"),
        ({"safety_energy": True}, "safety_energy=True"),
        ({"safety_rank_pattern": {"down_proj": 2.0}}, r"safety_rank_pattern\['down_proj'\]=2.0"),
        ({"safety_rank_pattern": {"down_proj": 0}}, r"safety_rank_pattern\['down_proj'\]=0"),
        ({"safety_rank_pattern": {"down_proj": 4}, "safety_energy": 0.5}, r"pattern\['down_proj'\]=4"),
        ({"safety_rank_pattern": [0.5]}, "Map the ends of module names"),
        ({"safety_rank_pattern": {3: 0.5}}, "Map the ends of module names"),
        ({"combine_rank": 0}, "combine_rank=0"),
        ({"combine_rank": 0.5}, "combine_rank=0.5"),
        ({"task_data": []}, "task_data is a list without rows"),
        ({"task_data": "rows.jsonl"}, "task_data is a str"),
        ({"init_data": 5}, "init_data is a int"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        GuardSpaceConfig(**options)


def test_bases_that_cannot_be_meant_are_refused():
    base = cells.base_model()
    for size in ({"rank": 32}, {"rank": 33}):
        with pytest.raises(ConfigError, match="leaves nothing to train"):
            subspace(base, **size)
    with pytest.raises((SubspaceError, CalibrationError), match=r"nothing to train|smaller"):
        subspace(base, rank=None, energy=1.0)
    with pytest.raises(CalibrationError, match="tokens cannot span rank=20"):
        subspace(base, [{"prompt": "a"}], rank=20, max_length=4)
    repeated = [{"prompt": "aaaaaa aaaaaa", "response": "aaaaaaa"}] * 30
    with pytest.raises(CalibrationError, match="directions only"):
        subspace(base, repeated, rank=31)
    with pytest.raises(ConfigError, match="no target module is of that kind"):
        subspace(base, per_kind={"odd": 3})
    with pytest.raises(SubspaceError, match="no 'in' basis"):
        get_peft_model(cells.base_model(), config(cells.random_subspace(base, cells.LINEAR_TARGETS)))
    with pytest.raises(SubspaceError, match="no 'out' basis"):
        get_peft_model(cells.base_model(), config(subspace(base), combine="salora"))
    with pytest.raises(SubspaceError, match="on the same side"):
        subspace(base).beside(subspace(base))


def test_a_failed_injection_leaves_the_model_as_it_was():
    base = cells.base_model()
    before, names = cells.logits(base), [name for name, _ in base.named_modules()]
    with pytest.raises(CalibrationError, match="that the subspace was calibrated on"):
        get_peft_model(base, config(subspace(cells.base_model()), task_data=batches()))
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(cells.logits(base), before)
    assert not list(protected_leaves(base))


def test_the_guard_warns_of_a_task_inside_the_null_space_and_only_then(recwarn):
    space = subspace(cells.base_model())
    get_peft_model(cells.base_model(), config(space, task_data=batches(TASK)))
    assert not [w for w in recwarn if "null space" in str(w.message)]
    wide = subspace(cells.base_model(), rank=31, allow_fewer=True)
    with pytest.warns(
        UserWarning, match=r"the task lies inside the null space: the update sees .* of its energy .* at model\.layers"
    ):
        get_peft_model(cells.base_model(), config(wide, task_data=batches(TASK)))
