"""Other processes: PEFT without this package, and this package imported before PEFT or after it. Each of the two
starts once for all tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_safety import SafetySubspace, export_lora
from peft_safety.core.adapter_dir import MANIFEST
from peft_safety.core.projection import leak
from tests.peft import cells
from tests.peft.frozen_cells import frozen
from tests.peft.guard_cells import subspace
from tests.peft.other_process import NATIVE, PLAIN

ROOT = Path(__file__).parents[2]
LEAK = 1e-5


@cache
def blind() -> SafetySubspace:
    """What the frozen adapter is blind to."""
    return subspace(cells.base_model())


class Done(NamedTuple):
    """What a process said, the logits and updates that it computed, and the logits that every adapter must give."""

    facts: dict[str, Any]
    computed: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Two processes that load native, exported and relabeled adapters, side by side."""
    here = tmp_path_factory.mktemp("processes")
    save_file({"ids": cells.tokens()}, here / "ids.safetensors")
    expected = {}
    for init in cells.INITS:
        model = cells.protected("linear", init, trained=True)
        model.save_pretrained(here / f"native-{init}")
        export_lora(model, here / f"plain-{init}")
        expected[f"native-{init}"] = expected[f"plain-{init}"] = cells.logits(model)
        config = json.loads((here / f"plain-{init}" / MANIFEST).read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"] == {"lora": 4, "task": 8}[init]
    for native, name in (("native-lora", "relabeled"), ("native-task", "relabeled-task")):
        shutil.copytree(here / native, here / name)
        config = (here / name / MANIFEST).read_text()
        (here / name / MANIFEST).write_text(config.replace('"SALORA"', '"LORA"'))
    expected["relabeled"] = expected["native-lora"]
    model = frozen(space=blind(), a_init="random")
    cells.train(model, cells.adamw, 2)
    model.eval()
    model.save_pretrained(here / "frozen")
    expected["frozen"] = cells.logits(model)
    # with the fused path switched on, which is for protected adapters only
    switches = {"PYTHONPATH": str(ROOT), "PEFT_SAFETY_FUSED": "1", "PEFT_SAFETY_BACKEND": "reference"}
    running = {
        order: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.peft.other_process", order, str(here)],
            cwd=ROOT,
            env=os.environ | switches,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in ("last", "first")
    }
    done = {}
    for order, process in running.items():
        out, error = process.communicate(timeout=280)
        assert process.returncode == 0, error[-3000:]
        done[order] = Done(json.loads(out.splitlines()[-1]), load_file(here / f"{order}.safetensors"), expected)
    return done


def test_plain_lora_and_qlora_are_the_same_with_and_without_this_package(processes: dict[str, Done]) -> None:
    facts = processes["last"].facts
    assert facts["loaded before"] == []
    assert "peft_safety.registry.registration" in facts["loaded after"]
    before = facts["before"]
    assert len(set(before["lora"]["losses"])) == 3
    assert {"adapter_model.safetensors", "config", "loaded", "merged"} <= before["lora"].keys()
    assert "peft.tuners.lora.bnb.Linear4bit" in before["qlora"]["classes"].values()
    assert "ProtectedLinear" not in json.dumps(before)
    assert facts["after"] == before


def test_without_the_package_the_export_computes_the_same(processes: dict[str, Done]) -> None:
    _, found, expected = processes["last"]
    for name in PLAIN:
        if name != "relabeled-task":  # as plain LoRA it lacks the start that a residual is added to
            assert float((found[name] - expected[name]).abs().max()) <= 1e-5, name


def test_without_the_package_a_native_adapter_fails_loudly_and_all_others_are_still_constrained(
    processes: dict[str, Done],
) -> None:
    facts, found, _ = processes["last"]
    assert facts["refused"] == ["'SALORA'"] * 2
    own = cells.config().subspace
    for adapter in PLAIN:
        space = blind() if adapter == "frozen" else own
        updates = {name.partition("/")[2]: d for name, d in found.items() if name.startswith(f"{adapter}/")}
        assert updates.keys() == space.bases.keys(), adapter
        for layer, sides in space.bases.items():
            assert all(0 < leak(basis, updates[layer], side) < LEAK for side, basis in sides.items()), (adapter, layer)


@pytest.mark.parametrize("order", ["first", "last"])
def test_another_process_loads_the_native_adapter(order: str, processes: dict[str, Done]) -> None:
    _, found, expected = processes[order]
    for name in NATIVE:
        cells.assert_same_function(found[name], expected[name])


def test_importing_the_package_first_is_light_and_registers_when_peft_comes(processes: dict[str, Done]) -> None:
    assert processes["first"].facts == {"heavy": [], "registered": True, "leaves": 14}
