"""A frozen, blind `lora_A` on the fused parameters of experts, which PEFT reaches by `target_parameters`."""

import copy
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from peft_safety import (
    GuardSpaceConfig,
    SaLoRAConfig,
    assert_protected,
    calibrate,
    export_lora,
    merge_quantized,
    orthogonality_report,
    verify,
)
from peft_safety.core import base_weights as weights
from peft_safety.core.certificate import FILE_NAME
from peft_safety.core.parameters import ParameterOf, input_parameter
from peft_safety.errors import ConfigError, SubspaceError, UnsupportedLayerError
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies, lora_a

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = "model.layers.1.mlp.experts"
LEAK = 1e-6


def gpt_oss():
    from transformers import GptOssConfig

    return GptOssConfig(**SIZES, **HEADS, head_dim=8, num_local_experts=4, num_experts_per_tok=2)


KINDS = {
    "mixtral": lambda: MixtralConfig(**SIZES, **HEADS, num_local_experts=4),
    "qwen3": lambda: Qwen3MoeConfig(
        **SIZES, **HEADS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt-oss, transposed": gpt_oss,
}


@cache
def built(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)  # gpt-oss leaves its parameters as they are allocated
    try:
        layer = model.get_submodule(EXPERTS)
    except AttributeError:  # transformers 4 calls Mixtral's otherwise
        pytest.skip("this transformers has no fused experts there")
    if input_parameter(layer) is None:
        pytest.skip("this transformers has no fused experts")
    return model


def base_model(kind="qwen3"):
    return copy.deepcopy(built(kind))


def batch(seed):
    ids = torch.randint(5, 99, (3, 17), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def config(**options):
    common = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    return GuardSpaceConfig(**{**common, "train": "B", "task_data": [batch(1)], "safety_rank": 6, **options})


def calibrated(kind="qwen3"):
    return calibrate(base_model(kind), config(), [batch(0)], progress=False)


def frozen(kind="qwen3", **options):
    torch.manual_seed(0)
    space = calibrated(kind)
    return get_peft_model(base_model(kind), config(subspace=space, **options)), space


def train(model, optimizer=cells.adamw, parameters=None):
    chosen = optimizer([p for p in model.parameters() if p.requires_grad] if parameters is None else parameters)
    for step in range(3):
        model(**batch(step)).loss.backward()
        chosen.step()


@torch.no_grad()
def update(model, x, name=EXPERTS):
    """What the adapter adds to the outputs of a layer of experts, each of them asked."""
    layer = model.get_base_model().get_submodule(name)
    routes = torch.arange(4).repeat(len(x), 1), torch.full((len(x), 4), 0.25)
    return layer(x, *routes) - layer.get_base_layer()(x, *routes)


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch(5)["input_ids"]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_blind_and_the_adapter_is_a_plain_lora(kind, tmp_path):
    model, space = frozen(kind)
    a = lora_a(model)[f"base_model.model.{EXPERTS}"]
    assert a.shape == (4 * 2, 32)
    assert all(torch.equal(rows, a[:2]) for rows in a.split(2)), "the task's directions, once for each expert"
    before = copies(model)
    train(model.train())
    assert_frozen(model.eval(), before)
    q = space.bases[EXPERTS]["in"]
    seen, other = (update(model, x).norm() for x in (torch.randn(5, 6) @ q.mT, torch.randn(5, 32)))
    assert float(seen) <= 1e-5 * float(other)
    assert float(other) > 1e-3
    model.save_pretrained(tmp_path)
    found = verify(tmp_path, base_model(kind), space)
    assert (found.modules, found.blindness_checked, found.base_checked) == (4, True, True)
    assert found.worst_leak <= LEAK
    loaded = PeftModel.from_pretrained(base_model(kind), tmp_path).eval()
    assert_protected(loaded)
    cells.assert_same_function(logits(loaded), logits(model))
    (tmp_path / FILE_NAME).unlink()
    plain = PeftModel.from_pretrained(base_model(kind), tmp_path).eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    cells.assert_same_function(logits(plain), logits(model))
    expected, own = (m.get_base_model().get_submodule(EXPERTS).get_delta_weight("default") for m in (plain, loaded))
    torch.testing.assert_close(own, expected)
    cells.assert_same_function(logits(loaded.merge_and_unload().eval()), logits(model))


def test_no_road_trains_it():
    model, _ = frozen()
    before = copies(model)
    for weight in lora_a(model).values():
        weight.requires_grad_(True)
    train(model.train(), parameters=list(model.parameters()))
    experts = model.get_base_model().get_submodule(EXPERTS)
    experts.get_delta_weight("default").sum().backward()
    assert bool(experts.lora_B["default"].weight.grad.any())
    for name, weight in lora_a(model).items():
        assert weight.grad is None
        assert torch.equal(weight, before[name])
        weight.requires_grad_(False)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert_frozen(model, before)


def test_half_precision_keeps_it_in_fp32_and_is_cast_at_run_time(tmp_path):
    space = calibrated()
    model = get_peft_model(base_model().bfloat16(), config(subspace=space))
    a = lora_a(model)[f"base_model.model.{EXPERTS}"]
    assert a.dtype == torch.float32
    train(model.train())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = parameter.data.bfloat16()  # as TRL casts what trains
    model.eval().save_pretrained(tmp_path)
    assert verify(tmp_path, subspace=space).worst_leak <= LEAK
    expected = logits(model).float()
    torch.testing.assert_close(logits(model.merge_and_unload()).float(), expected, atol=0.1, rtol=0.1)


def test_beside_a_second_adapter_and_a_plain_one(tmp_path):
    model, space = frozen()
    train(model.train())
    model.add_adapter("second", config(subspace=space, a_init="random", task_data=None))
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2))
    assert_protected(model)
    model.set_adapter("plain")
    before = copies(model), lora_a(model, "plain")[f"base_model.model.{EXPERTS}"].detach().clone()
    train(model)
    assert not torch.equal(lora_a(model, "plain")[f"base_model.model.{EXPERTS}"], before[1]), "that one trains"
    assert all(torch.equal(weight, before[0][name]) for name, weight in lora_a(model).items())
    model.save_pretrained(tmp_path)
    assert verify(tmp_path / "second", subspace=space).worst_leak <= LEAK
    with pytest.raises(ValueError, match="add_weighted_adapter does not support"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_patterns_and_all_linear_beside_it(tmp_path):
    space = calibrate(base_model(), config(target_modules="all-linear"), [batch(0)], progress=False)
    options = {"rank_pattern": {"experts.gate_up_proj": 3}, "target_modules": "all-linear", "a_init": "random"}
    own = config(subspace=space, **options, task_data=None)
    model = get_peft_model(base_model(), own)
    assert lora_a(model)[f"base_model.model.{EXPERTS}"].shape == (4 * 3, 32)
    model.peft_config["default"]._partial = True  # then the modules are stored by their full names
    stored = model.peft_config["default"].to_dict()
    assert stored["target_parameters"] == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    assert stored["rank_pattern"] == dict.fromkeys(stored["target_parameters"], 3)
    assert not any("experts" in name for name in stored["target_modules"])
    train(model.train())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert_protected(loaded)
    cells.assert_same_function(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_parameters": ["experts.down_proj"]}, r"mlp\.experts: .*basis is \(32, 6\), the layer has 24"),
        (
            {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            r"mlp\.experts\.base_layer.*no 'in' basis",
        ),
        ({"target_parameters": ["gate.weight"]}, r"mlp\.gate.*: no 'in' basis"),
        ({"target_parameters": None, "target_modules": ["gate"]}, r"mlp\.gate.*: no 'in' basis"),
    ],
)
def test_a_parameter_whose_inputs_were_not_seen_is_refused(options, says):
    model, space = base_model(), calibrated()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(SubspaceError, match=says):
        get_peft_model(model, config(subspace=space, **options))
    assert [name for name, _ in model.named_modules()] == names
    assert logits(model).isfinite().all(), "and the model is as it was"


@pytest.mark.parametrize(
    "make", [lambda **o: config(**{**o, "train": "A"}), SaLoRAConfig, lambda **o: config(**{**o, "train": "window"})]
)
def test_other_forms_refuse_it(make):
    with pytest.raises(ConfigError, match="target_parameters is not supported"):
        make(target_parameters=["experts.gate_up_proj"])


def test_the_subspace_must_have_the_experts_of_this_model():
    with pytest.raises(SubspaceError, match=r"mlp\.experts: no 'in' basis"):
        get_peft_model(
            base_model(),
            config(subspace=calibrate(base_model(), config(target_parameters=None), [batch(0)], progress=False)),
        )
    other = base_model()
    other.get_submodule(EXPERTS).gate_up_proj.data.normal_()
    with pytest.raises(SubspaceError, match=r"mlp\.experts: this subspace belongs to other base weights"):
        get_peft_model(other, config(subspace=calibrated()))
    assert weights.shape(ParameterOf(base_model().get_submodule(EXPERTS), "gate_up_proj")) == (48, 32)


def test_an_offloaded_model_gives_the_same_subspace():
    from accelerate import cpu_offload

    model = base_model()
    for block in model.model.layers:
        cpu_offload(block, execution_device=torch.device("cpu"))
    assert model.get_submodule(EXPERTS).gate_up_proj.is_meta
    found, expected = calibrate(model, config(), [batch(0)], progress=False), calibrated()
    assert found.digest == expected.digest
    assert torch.equal(found.fingerprints[EXPERTS], expected.fingerprints[EXPERTS])


def test_what_takes_one_product_for_a_layer_refuses_it(tmp_path):
    model, _ = frozen()
    for call in (
        lambda: export_lora(model, tmp_path / "plain"),
        lambda: merge_quantized(model, verbose=False),
        lambda: orthogonality_report(model, "default"),
    ):
        with pytest.raises((ConfigError, UnsupportedLayerError), match=r"experts|target_parameters"):
            call()
