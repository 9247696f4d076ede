"""llama.cpp's own converter on adapters of ours: the GGUF file holds the update that PEFT computes, and it is blind.

The converter comes from the source distribution of llama-cpp-python, which `make nightly` fetches into `.llama_cpp`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, export_lora
from peft_safety.convert.serving import serving_commands
from peft_safety.core.projection import leak, orthonormalize
from peft_safety.core.targets import target_layers
from tests.interop.helpers import MAX_LEAK, random_subspace
from tests.tiny import tiny_llama

gguf = pytest.importorskip("gguf")

ROOT = Path(os.environ.get("LLAMA_CPP_DIR", Path(__file__).resolve().parents[2] / ".llama_cpp"))
CONVERTERS = sorted(ROOT.rglob("convert_lora_to_gguf.py"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTERS, reason=f"no convert_lora_to_gguf.py under {ROOT}: make nightly fetches it"),
]


def subspace() -> SafetySubspace:
    """Random bases of the inputs."""
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(tiny_llama(), "all-linear")
    return SafetySubspace(
        {
            name: {"in": orthonormalize(torch.randn(layer.in_features, 4, generator=generator))}
            for name, layer in layers.items()
        }
    )


def trained(kind: str) -> PeftModel:
    common = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {
        "frozen": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="B", a_init="random"),
        "window": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="window", window=8, a_init="random"),
        "projected": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="A"),
        "residual": lambda: SaLoRAConfig(
            **common,
            subspace=random_subspace(tiny_llama()),
            init="task",
            task_data=random_subspace(tiny_llama(), rank=8, seed=5),
            rank_pattern={"down_proj": 6},
        ),
    }
    model = get_peft_model(tiny_llama(), configs[kind]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def converted(adapter: Path, base: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in the GGUF file, by the module's name in transformers, with what llama.cpp scales them by."""
    command = shlex.split(serving_commands(adapter, "llama.cpp")[0])
    command = [sys.executable, str(CONVERTERS[0]), *command[2:], "--base", str(base)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert run.returncode == 0, run.stderr
    reader = gguf.GGUFReader(f"{adapter}.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)).float() for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    result = {}
    for module in target_layers(tiny_llama(), "all-linear"):
        name = names.get_name(module)
        a, b = tensors.pop(f"{name}.weight.lora_a"), tensors.pop(f"{name}.weight.lora_b")
        if name.endswith(("attn_q", "attn_k")):
            heads = 4 if name.endswith("q") else 2
            b = b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)  # undoes the converter's order
        result[module] = a, b * alpha / b.shape[1]
    assert not tensors, "nothing but the factors"
    return result


@pytest.mark.parametrize("kind", ["frozen", "window", "projected", "residual"])
def test_the_gguf_file_holds_the_update_that_peft_computes(tmp_path: Path, kind: str) -> None:
    model, adapter, base = trained(kind), tmp_path / "adapter", tmp_path / "base"
    tiny_llama().save_pretrained(base)
    if kind == "frozen":
        model.save_pretrained(adapter)
    else:
        export_lora(model, adapter, server="llama.cpp")
    reference = PeftModel.from_pretrained(tiny_llama(), adapter)
    space = subspace()
    for module, (a, b) in converted(adapter, base).items():
        expected = reference.get_base_model().get_submodule(module).get_delta_weight("default").detach()
        assert expected.abs().max() > 1e-4, "an untrained factor compares nothing"
        torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-7)
        if kind != "residual":
            assert leak(space.bases[module]["in"], b @ a, "in") <= MAX_LEAK
