"""The orthogonality report on models: against dense brute force, on every kind of base, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, OFTConfig, get_peft_model

from peft_safety import orthogonality_report
from peft_safety.audit import OrthogonalityReport
from peft_safety.audit.report import FIGURES
from peft_safety.core.base_weights import dense_weight, is_conv1d
from peft_safety.core.targets import base_layers
from peft_safety.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedLayerError
from peft_safety.reporting.audit import save_png, show
from tests.peft.cells import INITS, base_model, deltas, logits, perturb, plain, protected, tokens
from tests.tiny import tiny_tokenizer

ROWS = {
    "general": [{"prompt": f"what is {i}", "response": f"it is {i}"} for i in range(5)],
    "harmful": [{"prompt": f"harm {i}", "response": "no"} for i in range(3)],
}


def batches(seed, masked=3):
    """Two tokenized batches; the first positions have no label, the last of the second row no attention."""
    made = []
    for index in range(2):
        ids = tokens(seed=seed + index)
        labels, attention = ids.clone(), torch.ones_like(ids)
        labels[:, :masked] = -100
        attention[1, -2:] = 0
        made.append({"input_ids": ids, "labels": labels, "attention_mask": attention})
    return made


def audit(model, *args, **options) -> OrthogonalityReport:
    return orthogonality_report(model, *args, progress=False, **options)


def check_geometry(model, report, k, adapter="default"):
    """Every row against dense SVDs of dW (as PEFT merges it) and of the (dequantized) weight."""
    updates, layers = deltas(model, adapter), base_layers(model)
    assert [row.name for row in report.modules] == list(updates)
    for row in report.modules:
        delta, w = updates[row.name].double(), dense_weight(layers[row.name], row.name).double()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        kept = min(k, len(s))
        assert row.shape == tuple(w.shape)
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row.relative_norm == pytest.approx(float(delta.norm() / w.norm()), rel=1e-5)
        assert row.right.energy == pytest.approx(float((delta @ vh[:kept].mT).norm() / delta.norm()) ** 2, abs=1e-3)
        assert row.left.energy == pytest.approx(float((u[:, :kept].mT @ delta).norm() / delta.norm()) ** 2, abs=1e-3)
        assert (row.right.energy_null, row.left.energy_null) == (kept / w.shape[1], kept / w.shape[0])
        du, ds, dvh = torch.linalg.svd(delta, full_matrices=False)
        q = min(8, row.rank)
        assert row.right.directions == q
        assert row.right.metric == pytest.approx(float((dvh[:q] @ vh[:8].mT).abs().max()), abs=2e-3)
        assert row.left.metric == pytest.approx(float((du[:, :q].mT @ u[:, :8]).abs().max()), abs=2e-3)
        shares = ds[: row.rank] / ds[: row.rank].sum()
        assert row.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_a_plain_lora_on_every_kind_of_base(kind):
    model = plain(kind)
    report = audit(model, k=6, calibration={"general": batches(0), "harmful": batches(10)})
    check_geometry(model, report, 6)
    assert all(row.general.share > 0 and row.harmful.share > 0 for row in report.modules)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
@pytest.mark.parametrize("init", INITS)
def test_a_protected_adapter_with_and_without_residual(kind, init):
    model = protected(kind, init, trained=True)
    check_geometry(model, audit(model, k=5), 5)
    fresh = audit(protected(kind, init))  # B = 0, or two products that cancel
    assert len(fresh.modules) == len(deltas(model))
    for row in fresh.modules:
        assert (row.rank, row.norm) == (0, 0.0)
        assert math.isnan(row.right.metric)
        assert math.isnan(row.effective_rank)


def test_ranks_and_alphas_by_module_and_rank_stabilised_scaling():
    model = plain(rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 32}, use_rslora=True)
    report = audit(model, k=4)
    check_geometry(model, report, 4)
    assert {row.rank for row in report.modules if row.name.endswith("v_proj")} == {2}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("positions", ["response", "prompt", "all"])
def test_functional_interference_equals_dense_brute_force(kind, positions):
    model = plain(kind)
    with torch.no_grad():
        for layer in base_layers(model).values():
            if is_conv1d(layer):
                layer.bias.normal_(generator=torch.Generator().manual_seed(1))  # it must not count
    data = {"general": batches(0), "harmful": batches(10, masked=5)}
    report = audit(model, calibration=data, positions=positions)
    updates = deltas(model)
    for side, made in data.items():
        inputs, masks = {name: [] for name in updates}, []
        layers = {name: layer for name, layer in base_layers(model).items() if name in updates}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, kept=inputs[name]: kept.append(args[0]))
            for name, layer in layers.items()
        ]
        with model.disable_adapter():
            for batch in made:
                labeled = batch["labels"] != -100
                masks.append(
                    (batch["attention_mask"] != 0)
                    & {"response": labeled, "prompt": ~labeled, "all": torch.ones_like(labeled)}[positions]
                )
                logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        mask = torch.cat(masks)
        for row in report.modules:
            x = torch.cat(inputs[row.name])[mask].double()
            lengths = [
                (x @ m.double().mT).norm(dim=1).mean() for m in (updates[row.name], dense_weight(layers[row.name]))
            ]
            found = getattr(row, side)
            assert found.tokens == int(mask.sum())
            assert found.update == pytest.approx(float(lengths[0]), rel=1e-4)
            assert found.weight == pytest.approx(float(lengths[1]), rel=1e-4)
            assert found.share == pytest.approx(float(lengths[0] / lengths[1]), rel=1e-4)
    row = report.modules[0]
    assert row.interference_ratio == pytest.approx(row.general.share / row.harmful.share)


def test_an_update_that_acts_on_one_kind_of_input_only():
    """dW built from the harmful inputs, general ones projected out: the geometry cannot see that, the functional part
    must.
    """
    model = plain(target_modules=["model.layers.0.self_attn.q_proj"], r=1)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    seen = []
    handle = layer.get_base_layer().register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    general, harmful = torch.tensor([[7, 7, 9, 9]]), torch.tensor([[20, 21, 22, 23]])
    for ids in (general, harmful):
        logits(model, ids)
    handle.remove()
    basis = torch.linalg.svd(seen[0].mT, full_matrices=False).U[:, :2]
    direction = seen[1][0] - basis @ (basis.mT @ seen[1][0])
    layer.lora_A["default"].weight.data.copy_(direction[None])
    data = {kind: [{"input_ids": ids, "labels": ids}] for kind, ids in (("general", general), ("harmful", harmful))}
    (row,) = audit(model, calibration=data).modules
    assert row.general.share < 1e-4 * row.harmful.share
    assert row.interference_ratio < 1e-4


def test_what_else_the_adapter_trains_is_named(capsys):
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5]}, "bias": "lora_only"}
    report = audit(plain(target_modules=["q_proj"], **options))
    assert report.to_json()["environment"]["unconstrained"] == [
        "rows of model.embed_tokens",
        "lm_head",
        "biases (lora_only)",
    ]
    show(report)
    assert "lm_head" in capsys.readouterr().out
    assert "unconstrained" not in audit(plain(target_modules=["q_proj"])).environment


def test_two_adapters_are_compared_where_both_are():
    model = plain()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    model.add_adapter("third", LoraConfig(r=3, target_modules=["lm_head"]))
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    perturb(model, 9, "other")
    report = audit(model)
    one, two = deltas(model), deltas(model, "other")
    assert report.others == ("other",)
    assert list(report.environment["not_compared"]) == ["dora"]
    for row in report.modules:
        if not row.name.endswith("q_proj"):
            assert row.others == {}
            continue
        a, b = one[row.name].double(), two[row.name].double()
        assert row.others == {"other": pytest.approx(abs(float((a * b).sum() / (a.norm() * b.norm()))), abs=1e-6)}
    assert 0 < report.summary["overlap:other"] < 1
    back = {row.name: row.others["default"] for row in audit(model, "other").modules}
    assert back == {row.name: pytest.approx(row.others["other"], rel=1e-9) for row in report.modules if row.others}


def test_the_model_stays_as_it_was():
    model = plain().train()
    before, flags = logits(model.eval()), {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    audit(model, calibration="auto", tokenizer=tiny_tokenizer())
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model.eval()), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base_layers(model).values())


def test_the_packages_own_data_and_rows():
    model = plain()
    report = audit(model, calibration="auto", tokenizer=tiny_tokenizer())
    described = report.environment["calibration"]
    assert "refusal pairs" in described["harmful"]["source"]
    assert all(
        described[kind]["tokens"] == getattr(report.modules[0], kind).tokens > 100 for kind in ("general", "harmful")
    )
    given = audit(model, calibration=ROWS, tokenizer=tiny_tokenizer())
    assert given.environment["calibration"]["general"]["source"] == "given"
    assert given.modules[0].harmful.tokens == 3 * 4  # "n", "o", the end of the turn and of its line


def test_json_is_strict_and_holds_everything():
    model = plain()
    model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").lora_B["default"].weight.data.zero_()
    report = audit(model, k=4, calibration={"general": batches(0), "harmful": batches(10)})
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found == report.to_json()
    rows = {row["name"]: row for row in found["modules"]}
    zero = rows["model.layers.1.self_attn.v_proj"]
    assert (
        zero["right"]["metric"] is zero["right"]["z"] is zero["interference_ratio"] is zero["effective_rank"] is None
    )
    assert (zero["rank"], zero["norm"], zero["general"]["update"]) == (0, 0.0, 0.0)
    full = rows["model.layers.0.self_attn.v_proj"]
    assert full["right"]["null"] == report.modules[1].right.null
    assert len(full["right"]["angles"]) == 4
    assert full["general"]["tokens"] == 32
    assert found["summary"]["z"] == report.summary["z"]
    assert found["environment"]["k"] == 4
    assert "torch" in found["environment"]


def test_kinds_are_told_apart_by_as_much_of_the_name_as_needed():
    assert list(audit(plain()).kinds) == ["q_proj", "v_proj", "down_proj"]
    report = audit(plain("conv1d"))
    assert list(report.kinds) == ["c_attn", "attn.c_proj", "mlp.c_proj"]
    assert all(sorted(row.layer for row in rows) == [0, 1] for rows in report.kinds.values())
    (head,) = audit(plain(target_modules=["lm_head"])).modules
    assert (head.layer, head.kind) == (None, "lm_head")


@pytest.mark.parametrize("measured", [False, True])
def test_the_picture_and_the_table(tmp_path, capsys, measured):
    model = plain(target_modules="all-linear")
    model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").lora_B["default"].weight.data.zero_()
    report = audit(model, k=4, calibration={"general": batches(0), "harmful": batches(10)} if measured else None)
    pixels = imread(save_png(report, tmp_path / "new" / "audit.png"))
    assert pixels.shape[1] > (900 if measured else 700)
    colored = pixels[..., 0] - pixels[..., 2]  # cells are drawn in red and blue, everything else is gray
    assert (colored > 0.1).mean() > 0.02
    assert (colored < -0.1).mean() > 0.02
    show(report)
    text = capsys.readouterr().out
    assert "down_proj (2)" in text
    assert "…" not in text
    assert ("harmful" in text.split("metric:")[0]) == measured
    assert "1 of 14 modules have a zero update" in text
    show(report, every_module=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "_proj" in line]
    assert len(lines) == 2 * 14
    assert [line.split()[0] for line in lines if " - " in line] == 2 * ["1.self_attn.v_proj"]


@pytest.mark.parametrize("every", [False, True])
def test_the_tables_fit_80_columns_and_hold_every_figure(capsys, monkeypatch, every):
    monkeypatch.setenv("COLUMNS", "200")
    measured = audit(plain(), k=4, calibration={"general": batches(0), "harmful": batches(10)})
    others = {
        name: index / 100 for index, name in enumerate(["a", "second", "x" * 45, *(f"task-{i}" for i in range(9))])
    }
    modules = [replace(row, name=row.name.replace("layers.", "layers.3"), others=others) for row in measured.modules]
    show(OrthogonalityReport("default", tuple(modules), tuple(others), measured.environment), every_module=every)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    label = "30.self_attn.q_proj " if every else "all "
    rows = [line.split()[1 if every else 2 :] for line in out.splitlines() if line.startswith(label)]
    assert len(rows[0]) == 8, "of the input side"
    assert sum(map(len, rows)) == len(FIGURES) + len(others)
    assert out.count("overlap with") == len(others)
    assert [float(share) for row in rows for share in row][len(FIGURES) :] == list(others.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"init_lora_weights": "pissa"}, "pissa")],
)
def test_what_is_no_product_on_the_original_weight_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        audit(plain(**options))


def test_other_adapters_and_layers_are_refused():
    with pytest.raises(ConfigError, match="OFTConfig"):
        audit(
            get_peft_model(
                base_model(), OFTConfig(oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False)
            )
        )
    with pytest.raises(UnsupportedLayerError, match="embed_tokens"):
        audit(plain(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ConfigError, match="no adapter 'gone'"):
        audit(plain(), "gone")
    model = plain()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        audit(model)


def test_what_is_not_finite_names_the_module():
    model = plain()
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj: lora_A \(4, 32\)"):
        audit(model)
    model = plain()
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").get_base_layer().weight.data[0, 0] = float(
        "inf"
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj"):
        audit(model)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        audit(model, calibration={"general": batches(0), "harmful": batches(1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": True}, "k=True"),
        ({"positions": "first"}, "positions='first'"),
        ({"calibration": "mine"}, "calibration='mine'"),
        ({"calibration": {"general": []}}, "'harmful'"),
        ({"calibration": ["a"]}, "calibration="),
    ],
)
def test_malformed_requests(options, message):
    with pytest.raises(ConfigError, match=message):
        audit(plain(), **options)


def test_calibration_data_without_a_token_that_counts():
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches(0)]
    with pytest.raises(CalibrationError, match="saw no token"):
        audit(plain(), calibration={"general": batches(0), "harmful": nothing})
    with pytest.raises(CalibrationError, match="no calibration data"):
        audit(plain(), calibration={"general": batches(0), "harmful": []})


def test_a_stacked_input_side_patch_has_no_energy_in_its_basis_and_none_of_its_predecessor():
    from peft_safety import OrthoSafetyPatchConfig, SafetySubspace

    base = base_model()
    space = SafetySubspace.from_weights(base, rank=8, target_modules=["q_proj", "down_proj"], progress=False)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "subspace": space}
    model = perturb(get_peft_model(base, OrthoSafetyPatchConfig(**options)))
    model.add_adapter("second", OrthoSafetyPatchConfig(**options, prior_patches=["default"]))
    model = perturb(model, 1, "second")
    report = audit(model, "second", k=8)
    for row in report.modules:
        assert row.right.energy < 1e-4, (
            "k = 8 right singular vectors of W are the basis, up to how exactly they were found"
        )
        assert row.left.energy > 0.02
        assert row.others["default"] < 1e-6
