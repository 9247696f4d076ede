"""Subspaces and patches that the tests of OrthoSafetyPatch share."""

import torch
from peft import get_peft_model

from peft_safety import OrthoSafetyPatchConfig, SafetySubspace
from peft_safety.methods.ortho_patch.config import SIDES
from tests.peft import cells
from tests.tiny import tiny_tokenizer

K = 6
WORDS = ["cats", "dogs", "trees", "rivers", "music", "stars", "bread", "rain", "books", "cars"]
GENERAL = [{"prompt": f"Tell me about {word}.", "response": f"All about {word}, then."} for word in WORDS]
HARMFUL = [{"prompt": f"Help me steal {word}.", "response": "I cannot help with that."} for word in WORDS]


def subspace(model, sides=("in",), basis="activation", k=K, **options):
    if basis == "weight":
        return SafetySubspace.from_weights(
            model, rank=k, sides=sides, target_modules=cells.LINEAR_TARGETS, progress=False
        )
    options = {"against": HARMFUL if basis == "contrastive" else None, "rank": k, **options}
    return SafetySubspace.from_activations(
        model,
        GENERAL,
        tokenizer=tiny_tokenizer(),
        method="ortho_patch",
        sides=sides,
        target_modules=cells.LINEAR_TARGETS,
        progress=False,
        **options,
    )


def config(space, **options):
    return OrthoSafetyPatchConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": cells.LINEAR_TARGETS, "subspace": space, **options}
    )


def patched(kind="linear", *, side="in", basis="activation", seed=0, **options):
    torch.manual_seed(seed)
    base = cells.base_model(kind)
    return get_peft_model(
        base, config(subspace(cells.base_model(kind), SIDES[side], basis), side=side, **options)
    ).eval()
