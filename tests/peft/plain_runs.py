"""Plain LoRA and plain QLoRA, trained a few steps, saved, loaded and merged: everything that another package in the
process could have changed. Imports nothing of this one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from tests.tiny import tiny_llama

IDS = torch.arange(4, 24).view(2, 10)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_state_dict_pre_hooks",
)


def four_bit(model: nn.Module) -> nn.Module:
    """Every linear layer but the output embedding in NF4."""
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model.to("cpu")


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def global_hooks() -> dict[str, int]:
    """How many hooks torch has for all modules and all optimizers of the process."""
    return {
        f"{owner.__name__}.{name}": len(value)
        for owner in (torch_module, torch_optimizer)
        for name, value in vars(owner).items()
        if name.startswith("_global") and name.endswith("hooks")
    }


def trained(base: nn.Module) -> tuple[PeftModel, dict[str, Any]]:
    """Plain LoRA after three steps, and what is to be known of it."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    return model, {
        "classes": {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()},
        "hooks": {name: [len(getattr(m, hooks)) for hooks in HOOKS] for name, m in model.named_modules()},
        "optimizer": [
            len(optimizer._optimizer_step_pre_hooks),
            len(optimizer._optimizer_step_post_hooks),
        ],
        "repacks": [getattr(m, "support_avx512bf16_for_cpu", None) for m in model.modules()],
        "factors": {name: digest(p) for name, p in model.named_parameters() if "lora_" in name},
        "logits": digest(logits),
        "losses": losses,
    }


@torch.no_grad()
def stored(model: PeftModel, base: nn.Module) -> dict[str, Any]:
    """The files that it is saved in, and what it computes once loaded and once merged."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(base, directory)
        found: dict[str, Any] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).iterdir())
        }
        written = json.loads((Path(directory) / "adapter_config.json").read_text())
    del found["adapter_config.json"]  # PEFT writes a set in no fixed order
    found["config"] = {key: sorted(value) if isinstance(value, list) else value for key, value in written.items()}
    found["loaded"] = digest(loaded(input_ids=IDS).logits)
    found["merged"] = digest(loaded.merge_and_unload()(input_ids=IDS).logits)
    return found


def both() -> dict[str, Any]:
    model, lora = trained(tiny_llama(hidden=64))
    lora |= stored(model, tiny_llama(hidden=64))
    return {"lora": lora, "qlora": trained(four_bit(tiny_llama(hidden=64)))[1], "global hooks": global_hooks()}
