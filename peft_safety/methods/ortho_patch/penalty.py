"""The soft constraint: a penalty on the energy that the update has on general data, added as its exact gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.errors import ConfigError
from peft_safety.layers.adapters import adapter_layers, config_table
from peft_safety.methods.ortho_patch.config import OrthoSafetyPatchConfig


class _Term(NamedTuple):
    """One module: factors, `Q sqrt(L) (n, k)` of its inputs' moment, and `s^2 / tr(W S W^T)`."""

    a: nn.Parameter
    b: nn.Parameter
    root: Tensor
    weight: float


class SoftPenalty:
    """`lam * sum_modules tr(dW S dW^T) / tr(W S W^T)`, with `S = Q L Q^T` from the adapter's subspace: `E||dW x||^2 /
    E||W x||^2` on its data. Neither dW nor S is ever formed: `A S = (A Q) L Q^T`. The published method has no penalty.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        config = config_table(model).get(adapter_name)
        if not isinstance(config, OrthoSafetyPatchConfig) or config.mode != "soft":
            kind = f"mode={config.mode!r}" if isinstance(config, OrthoSafetyPatchConfig) else type(config).__name__
            remedy = "Make it with OrthoSafetyPatchConfig(mode='soft')."
            raise ConfigError(f"adapter {adapter_name!r} has no soft constraint ({kind}). {remedy}")
        self.config, self.terms = config, []
        roots: dict[int, Tensor] = {}  # layers with the same input share one
        for name, layer in adapter_layers(model, adapter_name, linear=True).items():
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            if not weights.is_whole(a) or not weights.is_whole(b):
                raise ConfigError(f"{name}: its factors are sharded or on the meta device. Use mode='hard', or DDP.")
            basis, spectrum = config.subspace.bases[name]["in"], config.subspace.spectra[name]["in"]
            if id(basis) not in roots:
                precision = torch.promote_types(a.dtype, torch.float32)
                roots[id(basis)] = (basis.to(precision) * spectrum.to(precision)).to(a.device)
            root = roots[id(basis)]
            output = weights.dense_weight(layer.get_base_layer(), name).to(root) @ root
            energy = float(output.square().sum(dtype=torch.float64))
            if not energy > 0:
                raise ConfigError(f"{name}: the weight gives zero on the data of the subspace. Leave the module out.")
            self.terms.append(_Term(a, b, root, float(layer.scaling[adapter_name]) ** 2 / energy))

    @torch.no_grad()
    def value(self) -> float:
        """The penalty, without its weight `reg_lambda`, summed over the modules."""
        total = torch.zeros((), dtype=torch.float64)
        for a, b, root, weight in self.terms:
            total += weight * (b.to(root) @ (a.to(root) @ root)).square().sum().double().cpu()
        return float(total)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's exact gradient: `2 w B^T B A S` to A's and `2 w B A S A^T` to B's."""
        for term in self.terms:
            a, b = term.a.to(term.root), term.b.to(term.root)
            z = a @ term.root
            scale = 2 * self.config.reg_lambda * term.weight
            _add(term.a, scale * ((b.mT @ b) @ z) @ term.root.mT)
            _add(term.b, scale * (b @ (z @ z.mT)))

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """For `torch.optim.Optimizer.register_step_pre_hook`: after accumulation, clipping and unscaling."""
        self.add_gradient()
        self.config._penalized = True


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.requires_grad:
        parameter.grad = gradient.to(parameter.dtype) if parameter.grad is None else parameter.grad.add_(gradient)
