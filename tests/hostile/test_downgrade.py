"""Ways to read a protected adapter as something less, one row a way: what it computes then, and what is said. None
computes an update that reaches the protected subspace.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from peft_safety import assert_protected, export_lora
from peft_safety.core.projection import leak
from peft_safety.errors import PeftSafetyError
from tests.hostile import tools
from tests.hostile.saver import Small, adapter
from tests.hostile.tools import ADAPTER, SUBSPACE
from tests.hostile.variants import CERTIFICATE, COMMON, METHODS, outputs, save

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("quiet")]
LEAK = 1e-5
PLAIN = LoraConfig(**COMMON)


def load(directory: Path, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(Small(), str(directory), **options)


def relabeled(directory: Path, sealed: bool) -> Path:
    config = tools.manifest(directory) | {"peft_type": "LORA"}
    if not sealed:
        del config["safety_artifact"]
    tools.forge(directory, config)
    return directory


def without(directory: Path, name: str) -> Path:
    (directory / name).unlink()
    return directory


def tensors_alone(directory: Path, model: nn.Module) -> nn.Module:
    """PEFT's own functions, past every check of a directory."""
    set_peft_model_state_dict(model, load_peft_weights(str(directory)))
    return model


def pickled(directory: Path) -> Path:
    torch.save(load_peft_weights(str(directory)), directory / "adapter_model.bin")
    return without(directory, ADAPTER)


def exported(directory: Path) -> Path:
    return export_lora(load(directory), directory.with_name("exported"))


def other() -> nn.Module:
    """A protected model with other bases."""
    return adapter(7)


WAYS: dict[str, tuple[str, Callable[[Path], nn.Module], str]] = {
    # name: the adapter, the way, and what becomes of it: "protected", "plain, the same", or what the refusal says
    "as it is": ("salora", load, "protected, the same"),
    "low_cpu_mem_usage": ("salora", lambda d: load(d, low_cpu_mem_usage=True), "protected, the same"),
    "deepcopy": ("salora", lambda d: deepcopy(load(d)), "protected, the same"),
    "a mixed model": ("salora", lambda d: PeftMixedModel.from_pretrained(Small(), str(d)), "protected, the same"),
    "merged": ("salora", lambda d: load(d).merge_and_unload(), "plain, the same"),
    "exported": ("salora", lambda d: load(exported(d)), "plain, the same"),
    "an exported residual": ("task", lambda d: load(exported(d)), "plain, the same"),
    "relabeled": ("salora", lambda d: load(relabeled(d, True)), "relabeled|plain LoRA"),
    "relabeled, without its seal": ("salora", lambda d: load(relabeled(d, False)), "plain, the same"),
    "a relabeled residual": ("task", lambda d: load(relabeled(d, False)), "plain"),
    "config= of a plain LoRA": ("salora", lambda d: load(d, config=deepcopy(PLAIN)), "plain, the same"),
    "config= of the frozen": ("frozen", lambda d: load(d, config=deepcopy(PLAIN)), "plain, the same"),
    "its config for a new adapter": (
        "salora", lambda d: get_peft_model(Small(), PeftConfig.from_pretrained(str(d))), "protected"),
    "its tensors in a plain model": (
        "salora", lambda d: tensors_alone(d, get_peft_model(Small(), deepcopy(PLAIN))), "plain, the same"),
    "its tensors under other bases": ("salora", lambda d: tensors_alone(d, other()), "protected"),
    "a pickle": ("salora", lambda d: load(pickled(d)), "pickle"),
    "without the bases": ("salora", lambda d: load(without(d, SUBSPACE)), f"{SUBSPACE} is missing"),
    "without the tensors": ("salora", lambda d: load(without(d, ADAPTER)), f"{ADAPTER} is missing"),
    "without the certificate": ("frozen", lambda d: load(without(d, CERTIFICATE)), "plain, the same"),
    "frozen, as it is": ("frozen", load, "protected, the same"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {method: save(method, root) for method in ("salora", "task", "frozen")}


def worst_leak(model: nn.Module, space: Any) -> float:
    """Of the update that the whole layers compute."""
    layers = {name.rpartition(".")[2]: m for name, m in model.named_modules() if name.endswith(("first", "second"))}
    base, worst = Small(), 0.0
    for name, sides in space.items():
        with torch.no_grad():
            eye = torch.eye(base.get_submodule(name).in_features)
            delta = (layers[name](eye) - base.get_submodule(name)(eye)).T
        worst = max([worst, *(leak(basis, delta, side) for side, basis in sides.items())])
    return worst


def is_protected(model: nn.Module) -> bool:
    try:
        assert_protected(model)
    except PeftSafetyError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_less_protection_computes_no_unconstrained_update(
    way: str, good: dict[str, Path], tmp_path: Path
) -> None:
    method, read, becomes = WAYS[way]
    expected = outputs(load(good[method]).eval())
    directory = Path(shutil.copytree(good[method], tmp_path / "adapter"))
    if not becomes.startswith(("protected", "plain")):
        with pytest.raises(PeftSafetyError, match=becomes):
            read(directory)
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = read(directory).eval()
    said = any("holds a protected adapter, loaded as an ordinary" in str(warning.message) for warning in heard)
    assert said == way.startswith("config=")
    same = torch.allclose(outputs(model), expected, atol=1e-5)
    assert same == ("the same" in becomes)
    assert is_protected(model) == becomes.startswith("protected")
    if way == "its tensors under other bases":
        assert worst_leak(model, model.peft_config["default"].subspace.bases) < LEAK
    else:
        assert worst_leak(model, METHODS[method]().subspace.bases) < LEAK or way == "its config for a new adapter"
