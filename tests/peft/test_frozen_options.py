"""LoRA's own options with the two forms that need no bases (`train="B"` and `"window"`): each works, or is refused by
name before the model is changed.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraRuntimeConfig, VeloraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen3MoeConfig

from peft_safety import GuardSpaceConfig, SafetySubspace, assert_protected, merge_quantized, verify
from peft_safety.core.certificate import read_certificate
from peft_safety.errors import ConfigError, LossyMergeError, SubspaceError, UnsupportedLayerError
from tests.peft import cells
from tests.peft.frozen_cells import assert_frozen, copies, frozen, lora_a
from tests.peft.guard_cells import TASK, batches, config, subspace

LEAK = 1e-6
FORMS = ("B", "window")
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]

WORKS = {
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "not zero at the start": {"init_lora_weights": False},
    "some layers": {"layers_to_transform": [1], "exclude_modules": ["down_proj"]},
    "head targeted": {"target_modules": ["q_proj", "lm_head"]},
    "head trained": {"modules_to_save": ["lm_head"]},
    "rows of tokens": {"trainable_token_indices": [5, 6]},
    "offload": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
}


@pytest.mark.filterwarnings("ignore:modules_to_save and trainable_token_indices")
@pytest.mark.parametrize("train", FORMS)
@pytest.mark.parametrize("option", WORKS)
def test_an_option_that_works(option, train, tmp_path):
    space = subspace(cells.base_model(), target_modules=TARGETS)
    torch.manual_seed(0)
    options = {"train": train, "window": 8, "task_data": batches(TASK), **WORKS[option]}
    model = get_peft_model(cells.base_model(), config(space, **options))
    before = copies(model)
    cells.train(model, cells.adamw, 5)
    assert_frozen(model, before) if train == "B" else assert_protected(model)
    model.eval().save_pretrained(tmp_path)
    found = verify(tmp_path, cells.base_model(), space)
    assert (found.blindness_checked, found.base_checked, found.worst_leak <= LEAK) == (True, True, True)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path).eval()
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded), cells.logits(model))


def test_what_trains_without_a_constraint_is_named_once_and_certified(tmp_path):
    space = subspace(cells.base_model(), target_modules=TARGETS)
    free = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 6]}}
    with pytest.warns(UserWarning, match="no projection constrains") as caught:
        model = get_peft_model(cells.base_model(), config(space, train="B", a_init="random", **free))
    said = [str(warning.message) for warning in caught if "no projection constrains" in str(warning.message)]
    assert len(said) == 1
    named = "lm_head, 2 rows of embed_tokens"
    assert f"({named})" in said[0]
    model.save_pretrained(tmp_path)
    assert read_certificate(tmp_path).settings["unconstrained"] == named
    assert verify(tmp_path, cells.base_model(), space).blindness_checked


ONLY_FROZEN = ("parameters of experts",)
"""Refused for a window only; for a frozen A see test_frozen_experts.py."""
REFUSED = {
    "bias of lora_B": ({"lora_bias": True}, "lora_bias"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "parameters of experts": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "replicated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "Megatron": ({"megatron_config": {"tensor_model_parallel_size": 1}}, "megatron_config"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "LoftQ": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "EVA": ({"eva_config": EvaConfig()}, "eva_config"),
    "CorDA": ({"corda_config": CordaConfig()}, "corda_config"),
    **{f"init {i}": ({"init_lora_weights": i}, i) for i in ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")},
}


@pytest.mark.parametrize(
    ("option", "train"), [(o, form) for o in REFUSED for form in FORMS if form == "window" or o not in ONLY_FROZEN]
)
def test_an_option_that_is_refused(option, train):
    options, says = REFUSED[option]
    with pytest.raises(ConfigError, match=says):
        GuardSpaceConfig(train=train, **options)


def test_velora_is_left_out_and_changes_nothing_with_a_frozen_a():
    config = VeloraConfig(num_groups=4)
    with pytest.warns(UserWarning, match="so velora_config is left out"):
        model = frozen(velora_config=config)
    assert model.peft_config["default"].velora_config is None
    assert not any("velora" in name for name in model.state_dict())
    other = frozen()
    for each in (model, other):
        cells.train(each, cells.adamw, 5)
    cells.assert_same_function(cells.logits(model.eval()), cells.logits(other.eval()))


def test_half_precision_inputs_that_peft_does_not_cast():
    space = subspace(cells.base_model())
    model = get_peft_model(
        cells.base_model().bfloat16(), config(space, train="B", a_init="random"), autocast_adapter_dtype=False
    )
    expected = cells.logits(model)
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(cells.logits(model), expected)


def test_a_window_on_an_embedding_is_refused():
    space = subspace(cells.base_model(), target_modules=["q_proj"])
    model = cells.base_model()
    names = [name for name, _ in model.named_modules()]
    own = config(space, train="window", a_init="random", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens: Embedding\(260, 32.* leave it out"):
        get_peft_model(model, own)
    assert [name for name, _ in model.named_modules()] == names


def tied(train):
    """A model whose head is also its embedding, with an adapter on the head."""
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()
    space = subspace(base, target_modules=["q_proj", "lm_head"])
    options = {"target_modules": ["q_proj", "lm_head"], "train": train, "a_init": "random"}
    return get_peft_model(base, config(space, **options)), space


@pytest.mark.filterwarnings("ignore:Model.*with .tie_word_embeddings", "ignore:Setting .save_embedding_layers.")
@pytest.mark.parametrize("train", FORMS)
def test_a_tied_head_trains_and_is_not_merged(train, tmp_path):
    model, space = tied(train)
    cells.train(model, cells.adamw, 5)
    model.eval().save_pretrained(tmp_path)
    assert verify(tmp_path, subspace=space).worst_leak <= LEAK
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.weight
    before = cells.logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: merge_quantized(model, verbose=False)):
        with pytest.raises(LossyMergeError, match=r"lm_head: its weight \(260, 32\) is tied to .*embed_tokens"):
            merge()
    assert torch.equal(cells.logits(model), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16),
        lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2),
    ],
    ids=["LoRA+", "LoRA-FA"],
)
def test_optimizers_of_peft(make):
    model = frozen()
    before = copies(model)
    cells.train(model, lambda _: make(model), 5)
    assert_frozen(model, before)
    assert all(bool(layer.lora_B["default"].weight.any()) for _, layer in cells.layers_of(model))


EXPERTS = {
    "mixtral": lambda sizes: MixtralConfig(**sizes, num_local_experts=4),
    "qwen3": lambda sizes: Qwen3MoeConfig(
        **sizes, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}


@pytest.mark.parametrize("train", FORMS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_all_linear_layers_of_a_mixture_of_experts(kind, train, tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = AutoModelForCausalLM.from_config(EXPERTS[kind]({**sizes, **heads}))
    ids = torch.randint(5, 99, (3, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    options = {"rank": 4, "target_modules": "all-linear", "progress": False, "allow_fewer": True}
    space = SafetySubspace.from_activations(base, [batch], method="guardspace", **options)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    own = GuardSpaceConfig(r=2, target_modules="all-linear", subspace=space, train=train, a_init="random")
    with pytest.warns(UserWarning, match=r"mlp\.experts\) are no linear layers, and get no adapter"):
        model = get_peft_model(base, own)
    assert {name.rpartition(".")[2] for name in lora_a(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(base.config)
    fresh.load_state_dict(state)
    assert_protected(PeftModel.from_pretrained(fresh, tmp_path))
    assert verify(tmp_path, subspace=space).worst_leak <= LEAK
    named = config(space, train=train, a_init="random", target_modules=["q_proj", "gate"])
    refused = "no 'in' basis" if train == "B" else "only a frozen one is blind"
    with pytest.raises((SubspaceError, UnsupportedLayerError), match=rf"mlp\.gate.*{refused}"):
        get_peft_model(AutoModelForCausalLM.from_config(base.config), named)


def test_every_option_of_this_peft_has_a_row():
    rows = {name for options in (*WORKS.values(), *(o for o, _ in REFUSED.values())) for name in options}
    ours = {"r", "lora_alpha", "fan_in_fan_out", "inference_mode", "task_type", "peft_type", "ensure_weight_tying"}
    beside = {"layers_pattern", "megatron_core", "qalora_group_size"}  # say nothing without another option
    hub = {"auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    elsewhere = {
        "alora_invocation_tokens",
        "use_bdlora",
        "kasa_config",
        "arrow_config",
        "velora_config",
        "monteclora_config",
        "lora_ga_config",
    }
    assert set(LoraConfig.__dataclass_fields__) <= rows | ours | beside | hub | elsewhere
