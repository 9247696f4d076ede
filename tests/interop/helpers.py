"""What the interop tests share: a random subspace, an adapter on the tiny model, questions about both, and a tiny
model that answers.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core.projection import leak, orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.layers import protected_leaves
from tests.tiny import tiny_llama, tiny_tokenizer

README = Path(__file__).resolve().parents[2] / "README.md"
MAX_LEAK = 1e-6


def readme_code(model: Path) -> str:
    """The README's code on another model, and on the CPU, where TRL's default of bf16 has to be turned off."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    cpu = 'SFTConfig(output_dir="run", use_cpu=True, bf16=False, report_to="none"'
    for printed, here in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(model),
        'SFTConfig(output_dir="run"': cpu,
    }.items():
        assert block.count(printed) == 1
        block = block.replace(printed, here)
    return str(block)


def random_subspace(model: nn.Module, rank: int = 4, seed: int = 0) -> SafetySubspace:
    """Random orthonormal output bases for every linear layer: what a calibration would give, in milliseconds."""
    generator = torch.Generator().manual_seed(seed)
    layers = target_layers(model, "all-linear")
    return SafetySubspace(
        {
            name: {"out": orthonormalize(torch.randn(layer.out_features, rank, generator=generator))}
            for name, layer in layers.items()
        }
    )


def salora_config(seed: int = 0, **options: Any) -> SaLoRAConfig:
    """A protected config for `tiny_llama`."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return SaLoRAConfig(subspace=random_subspace(tiny_llama(), seed=seed), **options)


def protected_llama(seed: int = 0, **options: Any) -> nn.Module:
    """`tiny_llama` under a protected adapter whose lora_A is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(tiny_llama(), salora_config(seed, **options))


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the raw trainable parameters, read past every hook."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def largest_leak(model: nn.Module) -> float:
    """Largest `||U^T B|| / ||B||` of what the forwards compute with, in fp64; fails if there is nothing to measure or
    nothing was trained.
    """
    weights = [
        (leaf.basis, leaf.projected().detach()) for _, leaf in protected_leaves(model) if leaf.basis is not None
    ]
    assert weights
    assert all(weight.abs().max() > 0 for _, weight in weights), "an untrained factor leaks nothing"
    return max(leak(basis, weight) for basis, weight in weights)


def token_rows(count: int = 16, length: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random token rows of one length, ready for the Trainer's default collator."""
    ids = torch.randint(4, 200, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in ids]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    """Equal names, and equal bits or values within `rtol`, `atol`."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], **({"rtol": 0, "atol": 0} | tolerance), msg=lambda text, name=name: f"{name}: {text}"
        )


def answering_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model that refuses some prompts and answers others, by the share of "e" in the prompt, and its tokenizer.

    Attention averages over the context; each token of the two answers, in which no character comes twice, is followed
    by the next one.
    """
    tokenizer, model = tiny_tokenizer(), tiny_llama(hidden=264, layers=1)
    start, end, letter, *answers = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "<|im_end|>", "e", "Ican't", "Sure")
    )
    share = 263  # a feature that no token has
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(264)[: model.config.vocab_size])
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, letter] = attention.o_proj.weight[share, 0] = 1.0
        for answer, source, weight in zip(answers, (start, share), (1.0, 0.8), strict=True):
            model.lm_head.weight[answer[0], source] = weight
            for here, following in pairwise(answer + end):
                model.lm_head.weight[following, here] = 100.0
    return model.eval(), tokenizer
