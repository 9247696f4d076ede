"""What `verify` has checked, as a table (its JSON is the whole dataclass)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from peft_safety.convert.verify import FrozenVerification, RepairVerification, Verification
from peft_safety.methods.guardspace import GuardSpaceConfig


def facts(found: Verification | FrozenVerification | RepairVerification) -> dict[str, Any]:
    """The lines of the table: settings that mean nothing beside the others are left out."""
    result = {name: value for name, value in asdict(found).items() if name != "rounded_to"}
    if isinstance(found, FrozenVerification):
        result["settings"] = applying(found.settings)
    if isinstance(found, RepairVerification):
        return result
    leak, rounded = f"{found.worst_leak:.3g}", found.rounded_to
    if found.blindness_checked:
        result["worst_leak"] = leak if rounded is None else f"{leak}, the rounding to {rounded}"
        return result
    result["blindness_checked"] = "False: give --subspace to measure it"
    if isinstance(found, Verification):
        source = "of lora_A outside its window, not into the null space"
    else:
        source = "stored in the certificate" if rounded is None else f"what the rounding to {rounded} may add"
        source += ", not measured"
    result["worst_leak"] = f"{leak}, {source}"
    return result


def applying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a certificate's settings that mean something beside the others."""
    needs = GuardSpaceConfig.ONLY_WITH
    return {
        name: x for name, x in settings.items() if name not in needs or settings.get(needs[name][0]) in needs[name][1]
    }
