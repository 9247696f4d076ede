"""Other processes: with this package imported in either order, and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_safety import export_lora
from tests.peft import cells

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_llama
here = Path(sys.argv[1])
ids = load_file(here / "ids.safetensors")["ids"]
out = {}
for init in ("lora", "task"):
    model = PeftModel.from_pretrained(tiny_llama(), here / f"plain-{init}")
    with torch.no_grad():
        out[init] = model(input_ids=ids).logits
    try:
        PeftModel.from_pretrained(tiny_llama(), here / f"native-{init}")
        raise SystemExit("the native adapter was loaded without its package")
    except KeyError as error:
        assert "SALORA" in str(error), error
assert not any(name.startswith("peft_safety") for name in sys.modules)
save_file(out, here / "without.safetensors")
"""

WITH = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
if sys.argv[2] == "first":
    import peft_safety
from peft import PeftModel
if sys.argv[2] == "last":
    import peft_safety
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_llama
here = Path(sys.argv[1])
ids = load_file(here / "ids.safetensors")["ids"]
out = {}
for init in ("lora", "task"):
    model = PeftModel.from_pretrained(tiny_llama(), here / f"native-{init}")
    peft_safety.assert_protected(model)
    with torch.no_grad():
        out[init] = model(input_ids=ids).logits
save_file(out, here / f"{sys.argv[2]}.safetensors")
"""


SCRIPTS = {"without": WITHOUT, "first": WITH, "last": WITH}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, subprocess.Popen[str]]]]:
    """Native and exported adapters of both kinds, the logits they must give, and three processes that load them side
    by side.
    """
    here = tmp_path_factory.mktemp("processes")
    save_file({"ids": cells.tokens()}, here / "ids.safetensors")
    out = {}
    for init in cells.INITS:
        model = cells.protected("linear", init, trained=True)
        model.save_pretrained(here / f"native-{init}")
        export_lora(model, here / f"plain-{init}")
        out[init] = cells.logits(model)
    save_file(out, here / "expected.safetensors")
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(here), name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, script in SCRIPTS.items()
    }
    yield here, running
    for process in running.values():
        process.kill()
        process.wait()


def result(
    processes: tuple[Path, dict[str, subprocess.Popen[str]]], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of that process, once it is done, and the expected ones."""
    here, running = processes
    output, _ = running[name].communicate(timeout=240)
    assert running[name].returncode == 0, output
    return load_file(here / f"{name}.safetensors"), load_file(here / "expected.safetensors")


def test_without_the_package_the_export_computes_the_same_and_the_native_adapter_fails_loudly(processes: Any) -> None:
    found, expected = result(processes, "without")
    for init in cells.INITS:
        assert float((found[init] - expected[init]).abs().max()) <= 1e-5
        config = json.loads((processes[0] / f"plain-{init}" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"] == {"lora": 4, "task": 8}[init]


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_fresh_process_loads_the_native_adapter(order: str, processes: Any) -> None:
    found, expected = result(processes, order)
    for init in cells.INITS:
        cells.assert_same_function(found[init], expected[init])
