"""What the tests of adapters on embeddings share."""

import copy
from functools import cache

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SaLoRAConfig,
    calibrate,
)

NAME = "model.embed_tokens"
VOCABULARY, WIDTH = 99, 32
LEAK = 1e-6


@cache
def built(tied):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)).eval()


def base_model(tied=False, dtype=torch.float32):
    return copy.deepcopy(built(tied)).to(dtype)


def batch(seed, low=0, high=VOCABULARY, padded=0):
    ids = torch.randint(low, high, (2, 12), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    attention[:, 12 - padded :] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": ids}


CONFIGS = {
    "B": lambda **o: GuardSpaceConfig(**o, train="B", a_init="random"),
    "B, task": lambda **o: GuardSpaceConfig(**o, train="B", task_data=[batch(7)]),
    "A": lambda **o: GuardSpaceConfig(**o, train="A"),
    "salora": SaLoRAConfig,
    "patch": OrthoSafetyPatchConfig,
}
INPUTS = ("B", "B, task", "A", "patch")


def config(kind, **options):
    common = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], "safety_rank": 4}
    return CONFIGS[kind](**{**common, **options})


@cache
def calibrated(kind):
    return calibrate(base_model(), config(kind), [batch(0)], progress=False)


def protected(kind, dtype=torch.float32, **options):
    return get_peft_model(base_model(dtype=dtype), config(kind, subspace=calibrated(kind), **options))


def train(model, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model.train()(**batch(step + 20)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def outputs(model, seed=99):
    with torch.no_grad():
        return model(**batch(seed)).logits.float()


def embedding(model):
    return model.get_base_model().model.embed_tokens
