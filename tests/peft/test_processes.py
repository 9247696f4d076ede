"""Other processes: with this package imported in either order, and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Native and exported adapters of both kinds, and the logits they must give."""
    here = tmp_path_factory.mktemp("processes")
    from safetensors.torch import save_file

    save_file({"ids": cells.tokens()}, here / "ids.safetensors")
    out = {}
    for init in cells.INITS:
        model = cells.protected("linear", init, trained=True)
        model.save_pretrained(here / f"native-{init}")
        export_lora(model, here / f"plain-{init}")
        out[init] = cells.logits(model)
    save_file(out, here / "expected.safetensors")
    return here


def run(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_package_the_export_computes_the_same_and_the_native_adapter_fails_loudly(saved: Path) -> None:
    run(WITHOUT, str(saved))
    found, expected = load_file(saved / "without.safetensors"), load_file(saved / "expected.safetensors")
    for init in cells.INITS:
        assert float((found[init] - expected[init]).abs().max()) <= 1e-5
        config = json.loads((saved / f"plain-{init}" / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"] == {"lora": 4, "task": 8}[init]


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_fresh_process_loads_the_native_adapter(order: str, saved: Path) -> None:
    run(WITH, str(saved), order)
    found, expected = load_file(saved / f"{order}.safetensors"), load_file(saved / "expected.safetensors")
    assert all(torch.equal(found[init], expected[init]) for init in cells.INITS)
