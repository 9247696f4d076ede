"""What a fusion will do and what it did, and the two files that say so beside a result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_safety.core.names import public_name
from peft_safety.core.plain_lora import CARD
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.masks import Masks, Shape, save_masks
from peft_safety.methods.somf.train import MaskRun

RECORD = "peft_safety_fusion.json"
"""File with the report, in the directory of a result."""
COPIES = 3
"""fp32 copies of the logits that training cannot do without: themselves and AdamW's two moments."""


@dataclass(frozen=True)
class FuseReport:
    """What decided a fusion, and its result. From `plan_fusion` without a result.

    Attributes:
        facts: layout ("continued", "independent" or "checkpoints"), granularity of the mask, options that decide the
            result, names and fingerprints of the inputs, number of modules, rank of the result (0: full weights).
        mask_shapes: by the masks' full names; empty without a mask.
        masks: what was applied; None without.
        run: what training the mask cost; None where none was trained.
        logits: of a mask that was trained or given as logits: any density can be exported from them again.
        factors: `{module: (A, B)}` of a LoRA result, the scaling folded into B; empty for full weights.
    """

    facts: dict[str, Any]
    mask_shapes: dict[str, Shape]
    masks: Masks | None = None
    run: MaskRun | None = None
    logits: dict[str, Tensor] | None = None
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def mask_entries(self) -> int:
        """Of all masks."""
        return sum(map(math.prod, self.mask_shapes.values()))

    @property
    def training_bytes(self) -> int:
        """The mask's logits and optimizer state: the least that training adds to the model and the frozen factors."""
        return 4 * COPIES * self.mask_entries

    @property
    def record(self) -> dict[str, Any]:
        """Facts and figures, as plain values."""
        figures: dict[str, Any] = {"mask_entries": self.mask_entries, "training_bytes": self.training_bytes}
        if self.masks is not None:
            figures |= {"density": self.masks.density(), "mask": self.masks.record}
        return {**self.facts, **figures}

    def to_json(self) -> dict[str, Any]:
        """The record, and shape and density (the share of kept entries) of every mask."""
        rows = {name: {"shape": list(shape)} for name, shape in self.mask_shapes.items()}
        densities = {} if self.masks is None else self.masks.densities()
        return {**self.record, "masks": {n: {**row, "density": densities.get(n)} for n, row in rows.items()}}

    @property
    def card(self) -> str:
        """A model card."""
        rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in self.record.items())
        tags = ("library_name: peft\n" if self.factors else "") + "tags: [safety, peft-safety]"
        return CARD_TEXT.format(tags=tags, rows=rows)

    def write(self, directory: Path) -> None:
        """The masks, the report as JSON, and the model card."""
        if self.masks is not None:
            save_masks(self.masks, directory)
        (directory / RECORD).write_text(json.dumps(self.to_json(), indent=2, sort_keys=True), encoding="utf-8")
        (directory / CARD).write_text(self.card, encoding="utf-8")


CARD_TEXT = f"""---
{{tags}}
---
# Fused by peft-safety

A safe model and fine-tuned ones in one (SOMF, arXiv 2405.09055). Nothing here promises how it behaves: measure
refusal, over-refusal and the tasks. `{RECORD}` has a row for every mask.

| | |
|---|---|
{{rows}}
"""


def distinct(fingerprints: Mapping[str, str]) -> list[dict[str, str]]:
    """Names and fingerprints of inputs, given by label.

    Raises:
        ConfigError: two of them are the same weights.
    """
    for label, digest in fingerprints.items():
        twin = next(other for other, same in fingerprints.items() if same == digest)
        if twin != label:
            raise ConfigError(
                f"{label} holds the same weights as {twin}. Give every input once, and tasks after their fine-tuning; "
                "use weights to count one more."
            )
    return [{"name": public_name(label), "fingerprint": digest} for label, digest in fingerprints.items()]
