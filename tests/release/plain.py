"""Run by the Python of a fresh environment that holds the wheel without any extra: what the plugin is for has to work.

Arguments: a directory with `tiny.py` (a tiny model), and one to write to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch

import peft_safety
from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SafeLoRAConfig,
    SafetySubspace,
    SaLoRAConfig,
    apply_safe_lora,
    calibrate,
    export_lora,
    merge_quantized,
    verify,
)
from peft_safety.data import calibration_rows

sys.path.append(sys.argv[1])
from tiny import tiny_llama, tiny_tokenizer

out = Path(sys.argv[2])
assert "site-packages" in str(peft_safety.__file__), peft_safety.__file__
options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
rows, tokens = calibration_rows("guardspace", "harmful")[:8], torch.arange(4, 20).reshape(2, 8)
subspace = SafetySubspace.from_activations(
    tiny_llama(),
    rows,
    tokenizer=tiny_tokenizer(),
    method="guardspace",
    rank=4,
    target_modules="all-linear",
    progress=False,
)
aligned, unaligned = out / "aligned", out / "unaligned"
tiny_llama().save_pretrained(aligned)
tiny_llama(seed=1).save_pretrained(unaligned)
configs = [
    GuardSpaceConfig(subspace=subspace, **options),
    OrthoSafetyPatchConfig(subspace=subspace, **options),
    SaLoRAConfig(safety_rank=4, **options),
    SafeLoRAConfig(unaligned=unaligned, aligned=aligned, **options),
]
for config in configs:
    model, name = tiny_llama(), type(config).__name__
    if isinstance(config, SaLoRAConfig):
        config.subspace = calibrate(model, config, rows, tokenizer=tiny_tokenizer(), progress=False)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    if isinstance(config, SafeLoRAConfig):
        apply_safe_lora(adapted, unaligned, aligned)
        adapted.save_pretrained(out / name)
        verify(out / name)
        print(name)
        continue
    adapted.save_pretrained(out / name)
    assert verify(out / name).worst_leak < 1e-5, name
    export_lora(adapted, out / f"{name}-plain")
    plain = peft.PeftModel.from_pretrained(tiny_llama(), out / f"{name}-plain").eval()
    wanted = adapted(input_ids=tokens).logits.detach()
    torch.testing.assert_close(plain(input_ids=tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    merged = merge_quantized(adapted, to="16bit", verbose=True).model
    torch.testing.assert_close(merged(input_ids=tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    print(name)
print("plain install works")
