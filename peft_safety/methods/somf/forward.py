"""A model that computes with fused weights while their mask is trained: only logits have gradients, and no base weight
is copied.

`MaskedAdapters` adds `B A x` to the output of every targeted base layer by a hook, whatever kind of layer that is
(dense, Conv1D, 4-bit or 8-bit). The mask is computed again in the backward pass, from the noise's seed, so that what a
step keeps is the layer's input and nothing of the size of the factors. `MaskedWeights` replaces full weights by
`torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_safety.core import base_weights as weights
from peft_safety.core.targets import base_layers
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.masks import Shape, concrete, noise, rescaled, stream
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.updates import MaskOf, Update


class MaskedModel(nn.Module):
    """What the Trainer sees: logits, at first 0: every entry is kept with probability 1/2. The frozen model under them
    is no submodule, so that nobody moves or saves it.

    Attributes:
        fused: False for DPO's reference, the safe model without any task.
        step_seed: decides the noise of the next forward pass.
    """

    model: nn.Module

    def __init__(
        self, model: nn.Module, shapes: Mapping[str, Shape], options: FuseOptions, device: torch.device
    ) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        self.options, self.names = options, list(shapes)
        self.logit_list = nn.ParameterList(torch.zeros(shape, device=device) for shape in shapes.values())
        self.fused = True
        self.step_seed = options.seed

    @property
    def logits(self) -> dict[str, Tensor]:
        """By name."""
        return dict(zip(self.names, self.logit_list, strict=True))

    def samples(self) -> MaskOf:
        """The masks of this step: concrete samples, drawn when they are asked for, the same again for the same
        seed.
        """
        logits, temperature, seed = self.logits, self.options.temperature, self.step_seed

        def sample(name: str) -> Tensor:
            return concrete(logits[name], noise(logits[name], stream(seed, name)), temperature)

        return sample

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict=True)
        except RuntimeError as error:
            raise ConfigError(
                f"the stored logits are of other modules or another granularity ({error}). Use the options they were "
                "trained with."
            ) from error

    def train(self, mode: bool = True) -> MaskedModel:
        """The base model stays in eval mode, so that policy and reference see no dropout, unless gradient
        checkpointing needs it otherwise.
        """
        super().train(mode)
        self.model.train(mode and any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules()))
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    @torch.no_grad()
    def reference(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """`forward` of the safe model without any task."""
        training = self.training
        self.eval()
        self.fused = False
        try:
            return self(input_ids, attention_mask)
        finally:
            self.fused = True
            self.train(training)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Freeze the model, and hook into it; undone at the end, whatever happens."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        training = self.model.training
        with ExitStack() as stack:
            stack.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
            stack.callback(lambda: self.model.train(training))
            stack.enter_context(weights.unpacked(self.model))
            self._attach(stack)
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield

    def _attach(self, stack: ExitStack) -> None:
        """Hooks, for those that need some."""


class MaskedAdapters(MaskedModel):
    """Adapters: `y = W x + B A x` at every targeted layer.

    Args:
        model: the base model, or a PeftModel, whose own adapters are off meanwhile.
        updates: by module name.

    Raises:
        ConfigError: the model has no such layer, or one of another shape.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, Update], options: FuseOptions) -> None:
        layers: dict[str, Any] = base_layers(model)
        for name, update in updates.items():
            shape = weights.shape(layers[name]) if name in layers else None
            if shape != update.shape:
                raise ConfigError(
                    f"{name}: the adapters update a weight {update.shape}, the model has {shape}. Give the adapters' "
                    "base model."
                )
        shapes = {key: shape for update in updates.values() for key, shape in update.mask_shapes.items()}
        super().__init__(model, shapes, options, layers[next(iter(updates))].weight.device)
        self.updates = [(layers[name], update.to(layers[name].weight.device)) for name, update in updates.items()]

    def _attach(self, stack: ExitStack) -> None:
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            active = self.model.active_adapters
            stack.callback(lambda: self.model.base_model.set_adapter(active))  # type: ignore[operator, union-attr]
            stack.enter_context(self.model.disable_adapter())
        for layer, update in self.updates:
            stack.callback(layer.register_forward_hook(self._hook(update)).remove)

    def _hook(self, update: Update) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self.fused:
                return output + apply(inputs[0], *update.aligned()).to(output.dtype)
            samples = self.samples()

            def fused(x: Tensor) -> Tensor:
                return apply(x, *update.factors(samples))

            if not torch.is_grad_enabled():
                return output + fused(inputs[0]).to(output.dtype)
            change: Tensor = checkpoint(fused, inputs[0], use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
            return output + change.to(output.dtype)

        return hook


def apply(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A x`, in the dtype of the factors."""
    return F.linear(F.linear(x.to(a.dtype), a), b)


class MaskedWeights(MaskedModel):
    """Full weights: `theta_s + masked(V)` in place of every parameter that a task changed.

    Args:
        model: the safe model, loaded.
        vectors: the summed task vectors, by parameter name; they are kept on the model's device.
    """

    def __init__(
        self, model: nn.Module, vectors: Mapping[str, Tensor], shapes: Mapping[str, Shape], options: FuseOptions
    ) -> None:
        super().__init__(model, shapes, options, next(model.parameters()).device)
        parameters = dict(model.named_parameters())
        self.vectors = {name: vector.to(parameters[name].device) for name, vector in vectors.items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if not self.fused:
            return super().forward(input_ids, attention_mask)
        samples, parameters, fused = self.samples(), dict(self.model.named_parameters()), {}
        for name, vector in self.vectors.items():
            change = rescaled(vector, samples(name).to(vector.device), self.options.rescale)
            fused[name] = (parameters[name] + change).to(parameters[name].dtype)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        return torch.func.functional_call(self.model, fused, args=(), kwargs=inputs)
