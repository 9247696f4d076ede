"""A tiny model before and after its alignment, and an adapter on it, for Safe LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_llama

IDS = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def aligned_llama(hidden=32):
    """The tiny model after a low-rank change of every linear weight."""
    model = tiny_llama(hidden=hidden)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                m, n = module.weight.shape
                module.weight += 0.02 * torch.randn(m, 6, generator=g) @ torch.randn(6, n, generator=g)
    return model


def trained(model, seed=3, **options):
    """A plain LoRA with a random, non-zero update."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    peft_model = get_peft_model(model, config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=g))
    return peft_model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def dense_expectation(name, b):
    before, after = tiny_llama().get_submodule(name).weight, aligned_llama().get_submodule(name).weight
    v = (after - before).detach().double()
    return v @ (v.mT @ b.double()) / v.norm()


def four_bit(path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32)
