"""Where sharding keeps a leaf from folding in place: FSDP and ZeRO hand whole weights to its forward, which projects
them, and what they gather to be saved is folded on its way to the file. No collectives of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_safety.core import projection
from peft_safety.core.names import own_name
from peft_safety.errors import ProtectionError
from peft_safety.layers.protected_linear import is_plain, protected_leaves


@torch.no_grad()
def folded_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the factors of all leaves folded. Changes neither the model nor `state`.

    Raises:
        ProtectionError: a factor that is not whole.
    """
    result = dict(state)
    for name, leaf in protected_leaves(model):
        stored = own_name(name)  # torch's state dicts leave out what its wrappers add to names
        for key in (f"{stored}.weight", f"{stored}.initial"):
            if leaf.basis is None or key not in result:
                continue
            factor = result[key]
            if not is_plain(factor, leaf.basis, leaf.side):
                raise ProtectionError(
                    f"{key} {tuple(factor.shape)} is a shard or on the meta device, and cannot be saved as it is. "
                    "Pass save_pretrained the gathered weights: "
                    "state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
                    "cpu_offload=True))."
                )
            result[key] = factor.detach().clone()
            projection.fold_(leaf.basis.to(factor.device), result[key], leaf.side)
    return result
