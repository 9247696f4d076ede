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
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_safety import weights
from peft_safety.errors import ConfigError
from peft_safety.estimate.targets import base_layers
from peft_safety.methods.somf.compose import Shape, Update, dense_tensor, mask_shape
from peft_safety.methods.somf.fusions import stream
from peft_safety.methods.somf.masks import Granularity, concrete, expected_density, initial_logit, noise
from peft_safety.methods.somf.options import FuseOptions

Mode = Literal["fused", "aligned", "base"]


class Samples:
    """Masks of one training step: concrete samples of logits, drawn when they are asked for, the same again for the
    same seed.
    """

    def __init__(self, logits: Mapping[str, Tensor], temperature: float, seed: int) -> None:
        self.logits, self.temperature, self.seed = logits, temperature, seed

    def __getitem__(self, name: str) -> Tensor:
        logit = self.logits[name]
        return concrete(logit, noise(logit, stream(self.seed, name)), self.temperature)


class MaskedModel(nn.Module):
    """What the Trainer sees: logits, and a frozen model under them.

    Attributes:
        mode: "fused", or for DPO's reference "aligned" (no task) or "base" (no adapter at all).
        step_seed: decides the noise of the next forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, Shape],
        covers: Mapping[str, int],
        options: FuseOptions,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.options, self.covers = model, options, dict(covers)
        self.names = list(shapes)
        start = initial_logit(options.initial_density)
        self.logit_list = nn.ParameterList(
            nn.Parameter(torch.full(shape, start, device=device)) for shape in shapes.values()
        )
        if len(devices := getattr(model, "hf_device_map", None) or {}) > 1:
            self.hf_device_map = (
                devices  # the Trainer then leaves a model alone that accelerate has spread over devices
            )
        self.mode: Mode = "fused"
        self.step_seed = options.seed

    @property
    def logits(self) -> dict[str, Tensor]:
        """By name."""
        return dict(zip(self.names, self.logit_list, strict=True))

    def density(self) -> Tensor:
        """Expected density; see `expected_density`."""
        return expected_density(self.logits, self.covers)

    def samples(self) -> Samples:
        """The masks of this step."""
        return Samples(self.logits, self.options.temperature, self.step_seed)

    def load_logits(self, found: Mapping[str, Tensor]) -> None:
        """Go on from stored logits.

        Raises:
            ConfigError: of other modules or shapes.
        """
        own = self.logits
        odd = sorted(
            name
            for name in set(found) | set(own)
            if name not in found or name not in own or found[name].shape != own[name].shape
        )
        if odd:
            raise ConfigError(
                f"{odd[0]}: the stored logits are of other modules or another granularity. Use the options they were "
                "trained with."
            )
        with torch.no_grad():
            for name, logit in own.items():
                logit.copy_(found[name])

    def train(self, mode: bool = True) -> MaskedModel:
        """The base model stays in eval mode, so that no dropout tells policy and reference apart, unless gradient
        checkpointing needs it otherwise.
        """
        super().train(mode)
        self.model.train(
            mode and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        )
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        raise NotImplementedError

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Freeze the model, and hook into it; undone at the end, whatever happens."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        training = self.model.training
        with ExitStack() as stack:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            stack.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
            stack.callback(lambda: self.model.train(training))
            stack.enter_context(weights.unpacked(self.model))
            self._attach(stack)
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
        self_layers = base_layers(model)
        for name, update in updates.items():
            a, b = update.aligned()
            found = weights.shape(self_layers[name]) if name in self_layers else None
            if found != (b.shape[0], a.shape[1]):
                raise ConfigError(
                    f"{name}: the adapters update a weight {(b.shape[0], a.shape[1])}, the model has {found}. Give "
                    "the adapters' base model."
                )
        shapes = {key: shape for update in updates.values() for key, shape in update.shapes.items()}
        covers = {key: count for update in updates.values() for key, count in update.covers.items()}
        device = next(self_layers[name].weight.device for name in updates)
        super().__init__(model, shapes, covers, options, device)  # type: ignore[arg-type]
        self.layers = {name: self_layers[name] for name in updates}
        self.updates = nn.ModuleList(update.to(self.layers[name].weight.device) for name, update in updates.items())  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def _attach(self, stack: ExitStack) -> None:
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            active = self.model.active_adapters
            stack.callback(lambda: self.model.base_model.set_adapter(active))  # type: ignore[operator, union-attr]
            stack.enter_context(self.model.disable_adapter())
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
        for update in self.updates:
            handle = self.layers[update.name].register_forward_hook(self._hook(update))  # type: ignore[arg-type, index]
            stack.callback(handle.remove)

    def _hook(self, update: Any) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.mode == "base":
                return None
            if self.mode == "aligned":
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
    """Full weights: `theta_s + F(masked V_i)` in place of every parameter that a task changed.

    Args:
        model: the safe model, loaded.
        vectors: by parameter name, one task vector a task; they are kept on the model's device.
    """

    def __init__(
        self, model: nn.Module, vectors: Mapping[str, list[Tensor]], granularity: Granularity, options: FuseOptions
    ) -> None:
        parameters = dict(model.named_parameters())
        shapes = {name: mask_shape(tuple(found[0].shape), granularity, name) for name, found in vectors.items()}
        covers = {
            name: found[0].numel() // max(1, torch.Size(shapes[name]).numel()) for name, found in vectors.items()
        }
        super().__init__(model, shapes, covers, options, next(iter(parameters.values())).device)
        self.vectors = {name: [v.to(parameters[name].device) for v in found] for name, found in vectors.items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.mode != "fused":
            return self.model(**inputs)
        samples, parameters = self.samples(), dict(self.model.named_parameters())
        fused = {
            n: dense_tensor(parameters[n], v, samples[n], self.options, n).to(parameters[n].dtype)
            for n, v in self.vectors.items()
        }
        return torch.func.functional_call(self.model, fused, args=(), kwargs=inputs)
