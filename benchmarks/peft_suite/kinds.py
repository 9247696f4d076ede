"""What becomes of PEFT's tests where it is not what plain LoRA does: each kind has a reason, which
docs/compatibility.md gives.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """A kind of typed error: what its messages say, and why it is right."""

    name: str
    says: str
    reason: str


class Difference(NamedTuple):
    """What is so by design in one arm (empty: in each): tests that plain LoRA passes and that expect the contrary."""

    name: str
    arm: str
    tests: str
    reason: str


KINDS = (
    Refusal("DoRA", r"use_dora is not supported", "DoRA rescales the rows of W, and so its outputs on the span."),
    Refusal(
        "MultiheadAttention",
        r"MultiheadAttention.*cannot be protected",
        "PEFT adds the update to the weight and calls no `lora_A`, so that only a frozen one is blind.",
    ),
    Refusal(
        "experts: target_parameters",
        r"target_parameters is not supported|kind of this layer does not say|cannot be protected: PEFT",
        "PEFT adds the update to the weight, so that only a frozen A is blind; and PEFT has `lora_A` on the side of "
        "the outputs of some (Llama 4), or of a side that nobody knows without a calibration.",
    ),
    Refusal("lora_bias", r"lora_bias is not supported", "Such a bias is an update of its own, for every input."),
    Refusal("BD-LoRA", r"use_bdlora is not supported", "It has factors of its own, block-diagonal ones."),
    Refusal("QALoRA", r"use_qalora is not supported", "It pools inputs inside of its own layers."),
    Refusal("KaSA", r"kasa_config is not supported", "It rewrites W, and has singular values between the factors."),
    Refusal(
        "MonteCLoRA", r"monteclora_config is not supported", "It samples around the factors, where nothing is checked."
    ),
    Refusal(
        "Arrow", r"arrow_config is not supported", "Arrow's own adapter routes between others, and has no factors."
    ),
    Refusal("layer_replication", r"layer_replication is not supported", "Replicated layers are not the subspace's."),
    Refusal("Megatron", r"megatron_config is not supported", "Its layers shard `lora_B`, but not the basis."),
    Refusal(
        "rewriting initializations",
        r"(loftq|corda|lora_ga|eva)_config is not supported|init_lora_weights=",
        "They rewrite W, which the subspace was computed from; EVA chooses A itself.",
    ),
    Refusal(
        "embeddings",
        r"Embedding.*cannot be protected",
        "A window of few directions would train few tokens; `max_norm` rewrites W in the forward.",
    ),
    Refusal(
        "convolutions",
        r"Conv[123]d.*cannot be protected",
        "PEFT does not dilate `lora_A`, which would see other patches than the layer; a class of its own may too.",
    ),
    Refusal("bias", r"bias='", "It trains biases of the base layers, which no projection constrains."),
    Refusal(
        "tying of adapters",
        r"with ensure_weight_tying",
        "An embedding and the head that shares its weight have inputs of different kinds, and so different bases.",
    ),
    Refusal("merging of tied weights", r"tied", "The merge would change the other module that uses the weight, too."),
    Refusal(
        "low-level tuner",
        r"builds no layers that can be protected|built by itself",
        "Only the injection into a model puts the protection in; a layer that is built past it would lack it.",
    ),
    Refusal(
        "no layer matches",
        r"gave no LoRA layer|Give a list of names that the model has",
        "As in PEFT, with a remedy in the message.",
    ),
    Refusal(
        "combinations",
        r"do not share one safety subspace",
        "A sum of adapters with different bases is in the complement of neither.",
    ),
    Refusal(
        "beside an ordinary adapter",
        r"the ordinary adapters .* used together",
        "The sum of both is not constrained, so it is not merged.",
    ),
    Refusal("ranks, alphas, dropout", r"is no rank|lora_alpha=|lora_dropout=", "These numbers make no update."),
    Refusal(
        "a layer class of the user's own", r"under MyLora", "Nobody knows what its forward does with the factors."
    ),
    Refusal(
        "a factor that was overwritten",
        r"has changed, and may see protected inputs|holds NaN or Inf|may reach",
        "A frozen A with other values may see protected inputs; one that is not finite, or overflows, is broken.",
    ),
    Refusal(
        "layers of a single feature",
        r"one of its modules, has no basis",
        "Protected, it has nothing left to train. Beside other layers it is left out, with a warning.",
    ),
    Refusal(
        "another base model",
        r"belongs to other base weights|the model has no such module|not those of the model.s layers|"
        r"would replace the model.s own|, the model has",
        "A basis of outputs means nothing on other weights, or on a weight into which something was merged; and no "
        "file replaces a base weight that its config does not name.",
    ),
    Refusal(
        "loading onto another adapter",
        r"Load it under a new name|Use another adapter_name",
        "A swap in place needs the same modules, as each has its basis.",
    ),
    Refusal(
        "an alpha by a regular expression",
        r"a regular expression says the alpha",
        "A regular expression of a stored config is not run, since a stranger's can take forever.",
    ),
    Refusal("a config of another kind", r"is not a \w+Config", "It is not what its name says."),
    Refusal(
        "files that are incomplete",
        r"missing|is not the file that was saved|do not fit rank|has lora_A |expected \['lora_A",
        "What lacks a factor or was changed on the disk is neither saved nor loaded.",
    ),
)
"""The first one that fits counts."""
DIFFERENCES = (
    Difference(
        "lora_A takes no gradient",
        "frozen",
        r"requires_grad|layer_indexing|gradient_checkpointing|test_(training|inference_mode)|status_with|nb_(params|trainable)|riemannian"
        r"|model_with_injected_layers|lora_plus_embedding|test_model_target_parameters",
        "It is made blind once, and then frozen; tests that expect its gradient, or count it, fail.",
    ),
    Difference(
        "VeLoRA is left out",
        "frozen",
        r"^test_velora|velora_config-",
        "A frozen A has no gradient whose memory it could save.",
    ),
    Difference(
        "the rows of A are ours",
        "frozen",
        r"test_lora_((linear|conv2d)_(init_)?(default|gaussian)|init_orthogonal|embedding_(default|gaussian))",
        "They lie outside of the null space, so they have another distribution.",
    ),
    Difference(
        "a constrained or frozen factor stays fp32",
        "frozen",
        r"adapter_dtype|test_disable_input_dtype_casting_|arrow_forward_float16",
        "Rounded to bf16, A would reach 1e-3 of its norm into the null space. Code that casts or stacks factors "
        "itself may expect one dtype.",
    ),
    Difference(
        "a constrained factor is projected",
        "salora",
        r"key_mapping_save_(new_load_new|old_load_old)_lora|inject_from_state_dict_model_with_weight|"
        r"prefix_removal_is_undone|velora_backward_matches_manual",
        "Values, or gradients, that a test writes by hand are not what the layer then holds.",
    ),
    Difference(
        "the first B of an embedding is projected",
        "salora",
        r"test_lora_embedding_(default|gaussian)",
        "It starts in the complement of the protected outputs, so it has another distribution.",
    ),
    Difference(
        "a projected factor moves less than the tolerance",
        "salora",
        r"test_only_params_are_updated\[Embedding",
        "With two steps of these tests, what the projection leaves of an update is below their threshold.",
    ),
    Difference(
        "saved as safetensors",
        "",
        r"_pickle\[",
        "With `safe_serialization=False`, too, with a warning: nothing here reads pickles, which can run code.",
    ),
    Difference(
        "the model holds a copy of the config",
        "",
        r"from_pretrained_config_construction|::test_lora_conversion\[",
        "Injection writes its results there, and the user's own config can be used again.",
    ),
    Difference(
        "conversion gives a plain LoRA",
        "",
        r"test_fixed_rank_lora_config",
        "PEFT's conversion of other adapters makes a `LoraConfig`, which these tests take for ours.",
    ),
    Difference(
        '"all-linear" means linear layers',
        "",
        r"qwen3_moe_all_linear_target_modules_works",
        "Fused experts and routers get no adapter, with a warning; `target_parameters` names what can be protected.",
    ),
    Difference(
        "equal A and weights of unequal sign",
        "frozen",
        r"weighted_adapter_with_different_scaling\[.*weights4",
        "The adapters share A, so their weighted sum is another one than that of independent factors.",
    ),
)
REASONS = {kind.name: kind.reason for kind in (*KINDS, *DIFFERENCES)}
