"""The columns of docs/compatibility.md, and the life of an adapter: calibrate, train a step, save and load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_safety import (
    GuardSpaceConfig,
    OrthoSafetyPatchConfig,
    SaLoRAConfig,
    assert_protected,
    calibrate,
)
from tests.compatibility.architectures import SAVING, TARGETS, batch_of, model_of

SIZE = {"r": 2, "lora_alpha": 4}
PLAIN = "LoRA"
METHODS: dict[str, Callable[..., Any]] = {
    PLAIN: LoraConfig,
    "GuardSpace B": lambda **o: GuardSpaceConfig(**o, safety_rank=4, train="B", a_init="random"),
    "GuardSpace window": lambda **o: GuardSpaceConfig(**o, safety_rank=4, train="window", window=8, a_init="random"),
    "GuardSpace A": lambda **o: GuardSpaceConfig(**o, safety_rank=4, train="A"),
    "SaLoRA": lambda **o: SaLoRAConfig(**o, safety_rank=4),
    "patch": lambda **o: OrthoSafetyPatchConfig(**o, safety_rank=4),
}
"""The config of each column. Sizes are those of tiny models."""


def first(output: Any) -> torch.Tensor:
    return next(output[name] for name in ("logits", "logits_per_image", "text_embeds") if name in output)


def outputs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the model computes."""
    with torch.no_grad():
        return first(model(**batch)).float()


def life(name: str, method: str, folder: Any, **options: Any) -> None:
    """`life_of` one of the architectures."""
    given = {"target_modules": TARGETS.get(name, "all-linear"), **options}
    saving = SAVING.get(name, {})
    life_of(lambda: model_of(name), lambda seed: batch_of(name, seed), method, folder, saving=saving, **given)


def life_of(
    make: Callable[[], Any],
    rows: Callable[[int], Any],
    method: str,
    folder: Any,
    *,
    saving: Any = None,
    **options: Any,
) -> None:
    """Calibrate on a batch, train one step, save, load onto a new base: the same function, and not the base's."""
    config = METHODS[method](**{**SIZE, **options})
    base, batch, other = make(), rows(0), rows(1)
    if method != PLAIN:
        config.subspace = calibrate(base, config, [batch], progress=False)
    before = outputs(base, other)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output = model.train()(**batch)
    loss = output.get("loss")
    (first(output).float().square().mean() if loss is None else loss).backward()
    optimizer.step()
    got = outputs(model.eval(), other)
    assert not torch.equal(got, before), "it has learned something"
    model.save_pretrained(str(folder), **(saving or {}))
    loaded = PeftModel.from_pretrained(make(), str(folder)).eval()
    if method != PLAIN:
        assert_protected(loaded)
    torch.testing.assert_close(outputs(loaded, other), got, rtol=1e-4, atol=1e-4)
