"""A frozen, blind `lora_A` on parameters whose inputs no hook on a module gets: both products of fused experts, plain
matrices, and the projections of PyTorch's attention.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_safety import (
    GuardSpaceConfig,
    SafetySubspace,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    export_lora,
    verify,
)
from peft_safety.calibration.moments import collect
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.parameters import parts_of
from peft_safety.core.targets import target_layers
from peft_safety.errors import CalibrationError, ConfigError, ProtectionError, SubspaceError, UnsupportedLayerError
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies
from tests.peft.test_frozen_experts import EXPERTS, KINDS, base_model

LEAK = 1e-5


class Sublayer(nn.Module):
    """A matrix that its own forward multiplies by, as `x W^T`, or the other way round."""

    def __init__(self, swapped=False):
        super().__init__()
        self.swapped = swapped
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x):
        return torch.tanh(x) @ (self.weight if self.swapped else self.weight.T)


class Tiny(nn.Module):
    """An embedding, attention, cross attention, a matrix, a linear layer, a head."""

    def __init__(self, batch_first=True, swapped=False):
        super().__init__()
        self.embed = nn.Embedding(99, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=batch_first, bias=False)
        self.sub = Sublayer(swapped)
        self.head = nn.Linear(32, 99)
        self.batch_first = batch_first

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        y = x + self.attention(x, x, x, need_weights=False)[0]
        y = y + self.cross(y, x, torch.sin(x))[0]
        y = y + self.sub(y)
        logits = self.head(y if self.batch_first else y.transpose(0, 1))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def tiny(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny(**options).eval()


def batch(seed, padded=0):
    ids = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


MOE = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "attention": (tiny, {"target_modules": ["attention", "cross"]}, 4),
    "attention, time first": (lambda: tiny(batch_first=False), {"target_modules": ["attention", "cross"]}, 4),
    "a matrix": (tiny, {"target_modules": ["attention"], "target_parameters": ["sub.weight"]}, 3),
    "the weight of a linear layer": (tiny, {"target_modules": [], "target_parameters": ["head.weight"]}, 1),
    "down_proj": (base_model, {"target_modules": [], "target_parameters": ["experts.down_proj"]}, 2),
    "both, and a router": (
        base_model,
        {**MOE, "target_parameters": [*MOE["target_parameters"], "gate.weight"]},
        2 + 4 + 2,
    ),
    **{f"both of {kind}": (lambda kind=kind: base_model(kind), MOE, 6) for kind in KINDS},
}


def config(**options):
    given = {"r": 2, "lora_alpha": 4, "train": "B", "a_init": "random", "safety_rank": 6}
    return GuardSpaceConfig(**{**given, **options})


def made(case):
    make, options, _ = CASES[case]
    torch.manual_seed(0)
    space = calibrate(make(), config(**options), [batch(0)], progress=False)
    return make(), config(subspace=space, **options), space


def train(model):
    optimizer = cells.adamw([p for p in model.parameters() if p.requires_grad])
    for step in range(3):
        model.train()(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=batch(5)["input_ids"])["logits"]


def leak_of(layer, basis):
    """What the update does on the calibrated span, as a share of what it does: with `x`, its axis of inputs."""
    delta = layer.get_delta_weight("default")
    inputs = delta.mT if getattr(layer, "parameter_name", None) and layer.in_features != delta.shape[-1] else delta
    transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    inputs = delta.mT if transposed else inputs
    return float((inputs @ basis).norm() / inputs.norm())


@pytest.mark.parametrize("case", CASES)
def test_the_life_of_an_adapter(case, tmp_path):
    from peft_safety.layers.adapters import adapter_layers

    base, settings, space = made(case)
    before_logits = logits(base)
    model = get_peft_model(base, settings)
    layers = adapter_layers(model, "default")
    assert len(layers) == CASES[case][2]
    before = copies(model)
    train(model)
    assert_frozen(model, before)
    assert_protected(model)
    for name, layer in layers.items():
        assert leak_of(layer, space.bases[name]["in"]) <= LEAK, name
    assert float((logits(model) - before_logits).norm()) > 1e-3, "it has learned something"
    model.save_pretrained(tmp_path)
    found = verify(tmp_path, CASES[case][0](), space)
    assert (found.modules, found.blindness_checked, found.base_checked) == (len(layers), True, True)
    loaded = PeftModel.from_pretrained(CASES[case][0](), tmp_path).eval()
    assert_protected(loaded)
    cells.assert_same_function(logits(loaded), logits(model))
    (tmp_path / FILE_NAME).unlink()
    plain = PeftModel.from_pretrained(CASES[case][0](), tmp_path).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    cells.assert_same_function(logits(plain), logits(model))
    cells.assert_same_function(logits(loaded.merge_and_unload().eval()), logits(model))


@pytest.mark.parametrize("case", ["attention", "attention, time first", "both of qwen3"])
def test_a_model_blind_to_all_its_calibration_data_computes_the_same_on_them(case):
    """All that the targeted layer sees of them is in the span, so the output is the base's."""
    make, options, _ = CASES[case]
    first = (
        {"target_modules": ["attention"]}
        if "attention" in case
        else {"target_parameters": ["0.mlp.experts.down_proj"]}
    )
    options = {**options, **first, **({"target_modules": []} if "both" in case else {})}
    data = {**batch(0), "input_ids": batch(0)["input_ids"][:1, :5], "attention_mask": torch.ones(1, 5)}
    data["labels"] = data["input_ids"]
    whole = {"safety_rank": None, "safety_energy": 1.0}
    space = calibrate(make(), config(**options, **whole), [data], progress=False)
    model = train(get_peft_model(make(), config(subspace=space, **options, **whole)))
    with torch.no_grad():
        expected = make()(input_ids=data["input_ids"])["logits"]
        torch.testing.assert_close(model(input_ids=data["input_ids"])["logits"], expected, rtol=1e-4, atol=1e-4)
        other = batch(7)["input_ids"]
        assert float((model(input_ids=other)["logits"] - make()(input_ids=other)["logits"]).norm()) > 1e-3


@pytest.mark.parametrize("batch_first", [True, False])
def test_only_the_positions_that_count_are_in_the_moments_of_attention(batch_first):
    """Time first, the rows of a layer's output projection are in another order than the batch's positions."""
    data, model = batch(0, padded=3), tiny(batch_first=batch_first)
    layers = target_layers(model, ["attention"], packed=True)
    assert set(layers) == {"attention", "attention.base_layer.out_proj"}
    moments = collect(model, layers, [data], positions="all", progress=False)
    assert not moments.loose
    with torch.no_grad():
        x = model.embed(data["input_ids"])
        q, k, v = nn.functional.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias).chunk(3, -1)
        heads = [t.view(3, 7, 4, 8).transpose(1, 2) for t in (q, k, v)]
        inner = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 7, 32)
    chosen = data["attention_mask"].bool()
    for name, rows in (("attention", x[chosen]), ("attention.base_layer.out_proj", inner[chosen])):
        rows = rows.double()
        torch.testing.assert_close(moments.moment(name), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_query_key_and_value_all_count():
    model = tiny()
    moments = collect(model, target_layers(model, ["cross"], packed=True), [batch(0)], positions="all", progress=False)
    with torch.no_grad():
        x = model.embed(batch(0)["input_ids"])
        y = x + model.attention(x, x, x)[0]
    rows = torch.cat([x, torch.sin(x), y]).reshape(-1, 32).double()
    torch.testing.assert_close(moments.moment("cross"), rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_tokens_of_padding_do_not_count(kind, implementation):
    """And the model's results, and the implementation that it was set to, are as before."""
    model, padded = base_model(kind), batch(0, padded=3)
    model.config._experts_implementation = implementation
    expected = model(**{k: v for k, v in padded.items() if k != "labels"}).logits
    layers = target_layers(model, [], target_parameters=["1.mlp.experts.down_proj"], packed=True)
    moments = collect(model, layers, [padded], positions="all", progress=False)
    assert not moments.loose
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(model(**{k: v for k, v in padded.items() if k != "labels"}).logits, expected)
    seen = {}
    owner = model.get_submodule(EXPERTS)
    handle = owner.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    model(**{k: v for k, v in padded.items() if k != "labels"})
    handle.remove()
    x, routes, _ = seen["args"]
    chosen, total = padded["attention_mask"].bool().reshape(-1), torch.zeros(24, 24, dtype=torch.float64)
    with torch.no_grad():
        for token, expert in ((t, e) for t in chosen.nonzero().flatten() for e in routes[t]):
            up = owner.gate_up_proj[expert]
            product = x[token] @ (up if owner.is_transposed else up.T)
            product = product + owner.gate_up_proj_bias[expert] if owner.has_bias else product
            row = owner._apply_gate(product[None])[0].double()
            total += row.outer(row)
    torch.testing.assert_close(moments.moment(EXPERTS), total, rtol=1e-4, atol=1e-5)


def test_calibration_leaves_no_hook_and_the_fused_attention_as_it_was():
    model, fused = tiny(), torch.backends.mha.get_fastpath_enabled()
    expected = logits(model)
    calibrate(
        model, config(target_modules=["attention"], target_parameters=["sub.weight"]), [batch(0)], progress=False
    )
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() is fused
    assert torch.equal(logits(model), expected)


def test_inputs_on_the_side_of_the_outputs_are_refused_by_calibration_and_by_injection():
    model, options = tiny(swapped=True), {"target_modules": [], "target_parameters": ["sub.weight"]}
    with pytest.raises(UnsupportedLayerError, match=r"sub: weight .*lora_A is on their side"):
        calibrate(model, config(**options), [batch(0)], progress=False)
    space = SafetySubspace({"sub": {"in": torch.linalg.qr(torch.randn(32, 6))[0]}})
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedLayerError, match=r"sub: weight .*not calibrated on its products"):
        get_peft_model(model, config(subspace=space, **options))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("options", [CASES["attention"][1], CASES["a matrix"][1]])
@pytest.mark.parametrize("make", [lambda **o: config(**{**o, "train": "A"}), SaLoRAConfig])
def test_other_forms_refuse_them(make, options):
    with pytest.raises((ConfigError, UnsupportedLayerError), match="only a frozen one is blind"):
        get_peft_model(
            tiny(), make(subspace=calibrate(tiny(), config(**options), [batch(0)], progress=False), **options)
        )


@pytest.mark.parametrize("case", ["attention", "a matrix", "both of qwen3"])
def test_without_data_it_is_refused(case):
    make, options, _ = CASES[case]
    with pytest.raises((CalibrationError, ConfigError)):
        calibrate(make(), config(**options), [], progress=False)
    other = SafetySubspace({"head": {"in": torch.linalg.qr(torch.randn(32, 6))[0]}})
    with pytest.raises(SubspaceError, match="no 'in' basis"):
        get_peft_model(make(), config(subspace=other, **options))


def test_a_changed_factor_is_refused():
    base, settings, _ = made("attention")
    model = get_peft_model(base, settings)
    inner = model.get_base_model().attention.base_layer.out_proj
    inner.lora_A["default"].weight.data += 1
    with pytest.raises(ProtectionError, match=r"attention\.base_layer\.out_proj .*has changed"):
        assert_protected(model)


def test_no_flag_trains_it_and_16_bits_keep_it_in_fp32():
    base, settings, space = made("attention")
    model = get_peft_model(base.bfloat16(), settings)
    attention = model.get_base_model().attention
    for layer in (attention, attention.base_layer.out_proj):
        assert layer.lora_A["default"].weight.dtype == torch.float32
        layer.lora_A["default"].weight.requires_grad_(True)
        layer.lora_B["default"].weight.data.normal_()
    model.train()(**batch(0))["loss"].backward()
    for layer in (attention, attention.base_layer.out_proj):
        assert layer.lora_A["default"].weight.grad is None
        assert bool(layer.lora_B["default"].weight.grad.any())
    model.eval()(**batch(0))
    assert leak_of(attention, space.bases["attention"]["in"]) <= LEAK


def test_what_takes_one_product_for_a_layer_refuses_attention(tmp_path):
    base, settings, _ = made("attention")
    with pytest.raises(UnsupportedLayerError, match="single parameters"):
        export_lora(get_peft_model(base, settings), tmp_path / "plain")


def test_a_layer_that_no_token_reaches_is_left_out_whole():
    class Skipping(Tiny):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return {"logits": self.head(self.embed(input_ids)), "loss": None}

    torch.manual_seed(0)
    model = Skipping().eval()
    space = calibrate(model, config(target_modules=["head", "attention"]), [batch(0)], progress=False)
    assert set(space.left_out) == {"attention", "attention.base_layer.out_proj"}
    with pytest.warns(UserWarning, match="attention"):
        adapted = get_peft_model(model, config(subspace=space, target_modules=["head", "attention"]))
    attention = adapted.get_base_model().attention
    assert type(attention) is nn.MultiheadAttention
    assert isinstance(attention.out_proj, nn.Linear)
    assert not any("lora" in name for name, _ in attention.named_modules())


def test_parts_have_the_names_that_peft_gives_their_factors():
    model = base_model()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **MOE))
    keys = {name for name in adapted.state_dict() if ".layers.1.mlp" in name and "lora_A" in name}
    prefix = "base_model.model."
    parts = parts_of(EXPERTS, model.get_submodule(EXPERTS), ("gate_up_proj", "down_proj"))
    assert {f"{prefix}{name}.lora_A.default.weight" for name in parts} == keys
    assert {name: part.parameter for name, part in parts.items()} == {
        EXPERTS: "down_proj",
        f"{EXPERTS}.base_layer": "gate_up_proj",
    }
