"""Plain LoRA and plain QLoRA, trained a few steps in a process of their own. Prints JSON: everything that another
package in the process could have changed.

python -m tests.peft.plain_runs [MODULE]    # imported first
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
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


def facts(base: nn.Module) -> dict[str, Any]:
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
    return {
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


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    runs = {"lora": facts(tiny_llama(hidden=64)), "qlora": facts(four_bit(tiny_llama(hidden=64)))}
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "peft_safety")
    print(json.dumps({"loaded": loaded, "global hooks": global_hooks(), **runs}))


if __name__ == "__main__":
    main()
