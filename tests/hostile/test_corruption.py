"""Whatever happens to the bytes of an adapter, it loads as the function that was saved, or not at all."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from peft_safety.errors import PeftSafetyError
from tests.hostile import tools
from tests.tiny import tiny_llama

FILES = (tools.MANIFEST, tools.ADAPTER, tools.SUBSPACE)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory = tools.save_good(tmp_path_factory.mktemp("good") / "task", init="task")
    config = tools.manifest(directory) | {
        "base_model_name_or_path": "tiny/" + "llama" * 200
    }  # a free field, so that some damage changes nothing
    (directory / tools.MANIFEST).write_text(tools.json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def expected(good: Path) -> Tensor:
    return PeftModel.from_pretrained(tiny_llama(), str(good))(tools.tokens()).logits


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, list[tuple[float, int]], float]:
    """Which file, what happens to it, flips as (where, which bits), and how much of it stays."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "truncate", "insert"]))
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
    return draw(st.sampled_from([FILES[0], *FILES])), kind, flips, draw(st.floats(0, 1, exclude_max=True))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damage=damages())
def test_a_corrupted_adapter_is_refused_or_computes_what_was_saved(
    damage: tuple, good: Path, base: nn.Module, expected: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, kind, flips, keep = damage
    directory = Path(shutil.copytree(good, tmp_path_factory.mktemp("corrupt") / "adapter"))
    content = bytearray((directory / name).read_bytes())
    if kind == "truncate":
        del content[int(len(content) * keep) :]
    for where, bits in flips:
        if kind == "flip":
            content[int(where * len(content))] ^= bits
        if kind == "insert":
            content.insert(int(where * len(content)), bits)
    assume(bytes(content) != (directory / name).read_bytes())
    (directory / name).write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tools.unchanged(base):
            try:
                model = PeftModel.from_pretrained(base, str(directory))
            except PeftSafetyError:
                return
            found = model(tools.tokens()).logits
            model.unload()
            vars(base).pop("peft_config", None)
            base.requires_grad_(True)
    assert name == tools.MANIFEST, "a tensor file has a hash"
    assert torch.equal(found, expected)
