"""LoRA's options, each as the arguments of a config, with the model that it is tried on."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

from tests.compatibility.architectures import INVOCATION

SOME = ["q_proj", "v_proj", "down_proj"]

FEATURES: dict[str, dict[str, Any]] = {
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern of names": {"target_modules": r".*\.(q|v)_proj"},
    "some layers": {"target_modules": SOME, "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded layers": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "patterns of rank and alpha": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "r above a layer's width": {"r": 40},
    "rank-stabilized": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "init Gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "init not zero": {"init_lora_weights": False},
    "output embedding": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
    "runtime_config": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
    "activated LoRA": {"alora_invocation_tokens": [INVOCATION], "task_type": "CAUSAL_LM"},
    "experts: gate_up_proj": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "experts: down_proj": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "input embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "convolutions": {"target_modules": ["q_proj", "patch_embedding"]},
    "MultiheadAttention": {"target_modules": ["attention"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "QALoRA": {"use_qalora": True},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False)},
    "KaSA": {"kasa_config": KasaConfig()},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "Arrow": {"arrow_config": ArrowConfig()},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "Megatron": {"megatron_config": {"tensor_model_parallel_size": 1}},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "CorDA": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
}
MODELS = {
    "experts: gate_up_proj": "Qwen3-MoE",
    "experts: down_proj": "Qwen3-MoE",
    "convolutions": "LLaVA",
    "MultiheadAttention": "MultiheadAttention",
}
"""The others are tried on Llama."""
NOT_RUN = ("QALoRA", "Arrow", "Megatron", "LoftQ", "EVA", "CorDA", "LoRA-GA")
"""Plain LoRA asks for more than these tests have (data, a library, another life), so its cell is open."""


OURS = ("GuardSpace B", "GuardSpace window", "GuardSpace A", "SaLoRA", "patch")
BUT_FROZEN = OURS[1:]
UNCONSTRAINED = "no projection constrains"
IN_WEIGHTS = "PEFT adds this update to the weight and calls no `lora_A`, so that only a frozen one is blind."
SHARED = "All experts of a layer share one basis, of the inputs at all tokens that are routed to any of them."
REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "experts: gate_up_proj": (BUT_FROZEN, IN_WEIGHTS, "target_parameters"),
    "experts: down_proj": (BUT_FROZEN, IN_WEIGHTS, "target_parameters"),
    "input embedding": (
        OURS[1:2],
        "Its inputs are tokens: a window of few directions would train few of them.",
        "a window of few directions",
    ),
    "MultiheadAttention": (BUT_FROZEN, IN_WEIGHTS, "only a frozen one is blind|it is no Linear"),
    "bias": (OURS, "A bias changes the output for every input.", "bias='all'"),
    "lora_bias": (OURS, "A bias of `lora_B` is an update of its own, for every input.", "lora_bias"),
    "DoRA": (OURS, "DoRA rescales the rows of W, which changes its outputs on the span too.", "use_dora"),
    "QALoRA": (OURS, "QALoRA pools inputs inside of its own layers.", "use_qalora"),
    "BD-LoRA": (OURS, "BD-LoRA has factors of its own, block-diagonal ones.", "use_bdlora"),
    "KaSA": (OURS, "KaSA rewrites W, and has singular values between the factors.", "kasa_config"),
    "MonteCLoRA": (OURS, "MonteCLoRA samples around the factors, outside of what was certified.", "monteclora_config"),
    "Arrow": (OURS, "Arrow routes between adapters.", "arrow_config"),
    "layer_replication": (OURS, "Replicated layers are not those of the subspace.", "layer_replication"),
    "Megatron": (OURS, "Megatron's parallel layers shard `lora_B`, but not the basis.", "megatron_config"),
    "LoftQ": (OURS, "LoftQ rewrites W.", "loftq_config"),
    "EVA": (OURS, "EVA chooses A itself; for its idea give `task_data`.", "eva_config"),
    "CorDA": (OURS, "CorDA rewrites W.", "corda_config"),
    "PiSSA": (OURS, "PiSSA rewrites W.", "pissa"),
    "OLoRA": (OURS, "OLoRA rewrites W.", "olora"),
    "LoRA-GA": (OURS, "LoRA-GA rewrites W.", "lora_ga"),
}
"""Which methods refuse an option, why, and what the error says."""
LIMITS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "r above a layer's width": (
        OURS[:1],
        "With fewer free directions than r, the other rows of A are zero, with one warning.",
        "fewer directions outside the null space than r",
    ),
    "dropout": (OURS[:3], "While training, dropout moves inputs out of the calibrated span.", ""),
    "output embedding": (OURS, "Where it is tied to the input embedding, merging is refused.", ""),
    "input embedding": (
        ("GuardSpace B", "GuardSpace A", "patch"),
        "Tokens of the calibration data keep their embedding, whatever size is asked for; the others train.",
        "",
    ),
    "convolutions": (
        OURS,
        "Merging is refused with a border other than zeros, and PEFT has none into groups; dilated ones are refused.",
        "",
    ),
    "modules_to_save": (OURS, "These weights train unprotected, with a warning.", UNCONSTRAINED),
    "trainable_token_indices": (OURS, "These rows train unprotected, with a warning.", UNCONSTRAINED),
    "VeLoRA": (
        OURS[:1],
        "Left out, with a warning: a frozen `lora_A` has no gradient whose memory it could save.",
        "VeLoRA compresses the inputs",
    ),
    "activated LoRA": (OURS, "PEFT itself refuses to merge it.", ""),
    "experts: gate_up_proj": (OURS[:1], SHARED, ""),
    "experts: down_proj": (OURS[:1], SHARED, ""),
}
"""Which methods take an option with a limit, what it is, and the warning, if there is one."""


def model_name(feature: str) -> str:
    return MODELS.get(feature, "Llama")


def options_of(feature: str) -> dict[str, Any]:
    return {"target_modules": SOME, **FEATURES[feature]}
