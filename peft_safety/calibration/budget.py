"""How many layers are calibrated at once: as many as the memory budget allows. The bases do not depend on it.

A second moment takes `8 n^2` bytes: 1.6 GB for the widest layers of an 8B model, 65 GB for all layers together. Where
the data have fewer tokens than the layer has features, the tokens themselves take less.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from peft_safety.calibration import bases
from peft_safety.calibration.token_rows import CHUNK
from peft_safety.core import base_weights as weights
from peft_safety.core import kinds
from peft_safety.errors import CalibrationError, ConfigError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FREE_SHARE = 0.5
"""Of the free memory of the model's device, where no budget is given."""


@dataclass(frozen=True)
class Need:
    """Bytes of an input: `held` while the model runs (`as_rows`: the tokens, not the moment), `work` to decompose."""

    held: int
    work: int
    as_rows: bool = False


def need(layer: nn.Module, tokens: int | None = None, width: int = 0) -> Need:
    """Of one input of a layer. Where rows may be held, `tokens` are the data's and `width` is the iteration's."""
    n = int(weights.shape(layer)[1])
    if kinds.is_embedding(layer):
        return Need(8 * n, 8 * n)  # counts
    if kinds.is_convolution(layer):  # many patches for each token
        return Need(8 * n**2, 16 * n**2)
    if tokens is not None and n > bases.DENSE_LIMIT and tokens < n:
        return Need(4 * tokens * n, 8 * n * (3 * width + CHUNK), as_rows=True)
    return Need(8 * n**2, 16 * n**2)


def bytes_of(memory: str | int | None, device: torch.device) -> int:
    """A budget in bytes, from a number or a text such as "4GB"; None takes `FREE_SHARE` of the free memory."""
    if memory is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return int(FREE_SHARE * free)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(memory))
    if match is None or match[2].upper() not in UNITS or isinstance(memory, bool) or float(match[1]) <= 0:
        raise ConfigError(f'memory={memory!r}. Use a number of bytes, or a text such as "4GB".')
    return int(float(match[1]) * UNITS[match[2].upper()])


def groups(
    layers: Mapping[str, nn.Module], leaders: Mapping[str, str], needs: Mapping[str, Need], budget: int
) -> list[dict[str, nn.Module]]:
    """The layers in groups that fit the budget, those with one input together; a CalibrationError if one cannot."""
    members: dict[str, list[str]] = {}
    for name in layers:
        members.setdefault(leaders.get(name, name), []).append(name)
    result: list[dict[str, nn.Module]] = []
    held: list[Need] = []
    for leader, names in members.items():
        if (least := together([needs[leader]])) > budget:
            n = weights.shape(layers[leader])[1]
            raise CalibrationError(
                f"{leader}: the inputs, {n} features, and their decomposition take {least / 1e9:.2g} GB, the budget "
                f"is {budget / 1e9:.2g} GB. Free memory, use a smaller rank, or exclude the layer."
            )
        if not result or together([*held, needs[leader]]) > budget:
            result.append({})
            held = []
        result[-1] |= {name: layers[name] for name in names}
        held.append(needs[leader])
    return result


def together(needs: Iterable[Need]) -> int:
    """Bytes of a group: all inputs are held, and one is decomposed at a time."""
    listed = list(needs)
    return sum(one.held for one in listed) + max(one.work for one in listed)
