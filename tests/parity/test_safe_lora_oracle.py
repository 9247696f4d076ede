"""Parity of Safe LoRA with the outputs of the unmodified reference code (`methods.md`: |dB| <= 1e-6 max|B|, cos
1e-5).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from peft_safety.core.plain_lora import Factors
from peft_safety.methods.safe_lora.config import RepairOptions
from peft_safety.methods.safe_lora.repair import repair
from tests.stored import TensorWeights

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "safelora.safetensors"
pytestmark = pytest.mark.skipif(not ORACLE.exists(), reason="the oracles are not beside this checkout")


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("thr_0.3", {"threshold": 0.3}),
        ("thr_0.5", {"threshold": 0.5}),
        ("num_3", {"select": "number", "num_modules": 3}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scenario(scenario, options, dtype):
    with safe_open(ORACLE, "pt") as handle:
        order = json.loads(handle.metadata()["order"])
        scaling = float(handle.metadata()["lora_alpha"]) / float(handle.metadata()["r"])
        factors = {
            n: Factors(handle.get_tensor(f"in.lora.{n}.lora_A"), handle.get_tensor(f"in.lora.{n}.lora_B"), scaling)
            for n in order
        }
        chosen = RepairOptions(**options, progress=False, dtype=dtype)
        base, aligned = (
            TensorWeights(side, {n: handle.get_tensor(f"in.{side}.{n}.weight") for n in order})
            for side in ("base", "aligned")
        )
        new, report = repair(factors, base, aligned, chosen)
        projected = {order[i] for i, flag in enumerate(handle.get_tensor(f"{scenario}.projected").tolist()) if flag}
        cosines = handle.get_tensor(f"{scenario}.cos")
        for name, module, cos in zip(order, report.modules, cosines.tolist(), strict=True):
            assert module.name == name
            assert abs(module.cos - cos) <= 1e-5
            if "threshold" in options and abs(cos - options["threshold"]) <= 1e-4:
                continue
            assert module.selected == (name in projected), name
            expected = handle.get_tensor(f"{scenario}.B.{name}")
            found = new.get(name, factors[name].b)
            assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max()) + 1e-12, name
