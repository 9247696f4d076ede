"""What `test_processes.py` does in processes of their own, where PEFT is imported before this package or after it.

    python -m tests.peft.other_process last|first DIRECTORY

Prints JSON, and writes the logits of the adapters in the directory. Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN = ("plain-lora", "plain-task", "relabeled", "relabeled-task", "frozen")
NATIVE = ("native-lora", "native-task")


def outputs(here: Path, names: tuple[str, ...], check: Callable[[Any], object] = lambda model: None) -> dict[str, Any]:
    """The logits of each adapter on the tiny model, and its updates by layer, `<adapter>/<layer>`."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from tests.tiny import tiny_llama

    ids, result = load_file(here / "ids.safetensors")["ids"], {}
    for name in names:
        model = PeftModel.from_pretrained(tiny_llama(), here / name)
        check(model)
        with torch.no_grad():
            result[name] = model(input_ids=ids).logits
            for layer, module in model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    own = layer.removeprefix("base_model.model.")
                    result[f"{name}/{own}"] = module.get_delta_weight("default").contiguous()
    return result


def refusal(here: Path, name: str) -> str:
    """The KeyError of an adapter that must not load."""
    try:
        outputs(here, (name,))
    except KeyError as error:
        return str(error)
    return "loaded"


def ours() -> list[str]:
    return sorted(name for name in sys.modules if name.partition(".")[0] == "peft_safety")


def last(here: Path) -> dict[str, Any]:
    """PEFT alone, then with this package."""
    from safetensors.torch import save_file

    from tests.peft import plain_runs

    facts: dict[str, Any] = {"before": plain_runs.both()}
    logits = outputs(here, PLAIN)
    facts |= {"refused": [refusal(here, name) for name in NATIVE], "loaded before": ours()}
    import peft_safety

    facts |= {"after": plain_runs.both(), "loaded after": ours()}
    save_file(logits | outputs(here, NATIVE, peft_safety.assert_protected), here / "last.safetensors")
    return facts


def first(here: Path) -> dict[str, Any]:
    """This package first. Others ask whether PEFT can be found before anyone imports it (transformers does); that must
    not use up the hook.
    """
    import peft_safety

    heavy = sorted({"torch", "peft", "transformers"} & set(sys.modules))
    assert importlib.util.find_spec("peft") is not None
    import peft
    from safetensors.torch import save_file

    registered = "SALORA" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    from peft_safety.layers import protected_leaves
    from tests.interop.helpers import protected_llama

    save_file(outputs(here, NATIVE, peft_safety.assert_protected), here / "first.safetensors")
    return {"heavy": heavy, "registered": registered, "leaves": len(list(protected_leaves(protected_llama())))}


if __name__ == "__main__":
    print(json.dumps({"last": last, "first": first}[sys.argv[1]](Path(sys.argv[2]))))
