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
    if not isinstance(found, RepairVerification) and found.rounded_to is not None:
        result["worst_leak"] = f"{found.worst_leak:.3g}, the rounding to {found.rounded_to}"
    return result


def applying(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a certificate's settings that mean something beside the others."""
    needs = GuardSpaceConfig.ONLY_WITH
    return {
        name: x for name, x in settings.items() if name not in needs or settings.get(needs[name][0]) in needs[name][1]
    }
