"""The ways to compute one protected NF4 linear layer. All arms share the packed weight and the factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_step import DenseProjected
from peft_safety import ops
from peft_safety.core.projection import orthonormalize, project_wide
from peft_safety.ops import reference

R, SAFETY_RANK, SCALE = 16, 32, 1.0
BLOCK = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
"""Linear layers of one block of Llama-2-7B: (out_features, in_features)."""
BLOCKS = 32

UNPROJECTED = ("peft LoRA", "LoRA, this path", "this, frozen A")
"""Arms whose B is not projected."""

Arm = Callable[[Tensor], Tensor]


@dataclass
class Layer:
    """A weight in the form of bitsandbytes and in ours, with an adapter and the basis that its B must avoid."""

    base: Any
    q: ops.QuantBundle
    a: Tensor
    b: Tensor
    u: Tensor

    @property
    def state(self) -> Any:
        return self.base.weight.quant_state


class Holder(nn.Module):
    """The smallest model that PEFT puts an adapter on."""

    is_loaded_in_4bit = True

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def layer(n: int, k: int, device: str, dtype: torch.dtype, seed: int = 0) -> Layer:
    """A random layer: double-quantized, with factors of usual size in `dtype` and a basis in fp32."""
    import bitsandbytes as bnb

    torch.manual_seed(seed)
    base = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
    base.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=base
    )
    base = base.to(device)
    a = (torch.randn(R, k, device=device) / k**0.5).to(dtype)
    b = (torch.randn(n, R, device=device) / 30).to(dtype)
    u = orthonormalize(torch.randn(n, min(SAFETY_RANK, n // 2), device=device))
    return Layer(base, ops.require(ops.from_linear4bit(base)), a.requires_grad_(), b.requires_grad_(), u)


def peft_arm(one: Layer, *, dense: bool) -> Arm:
    """PEFT's LoRA layer on bitsandbytes: unprotected, or with `dense` protected by C on its activations."""
    from peft import LoraConfig, get_peft_model

    holder = Holder(one.base)
    config = LoraConfig(r=R, lora_alpha=int(SCALE * R), target_modules=["linear"], lora_dropout=0.0)
    model = get_peft_model(holder, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    module: Any = model.base_model.model.linear  # type: ignore[union-attr]
    a, b = nn.Parameter(one.a.detach()), nn.Parameter(one.b.detach())
    module.lora_A["default"].weight = a
    module.lora_B["default"].weight = b
    if dense:
        module.lora_B["default"] = DenseProjected(module.lora_B["default"], one.u.cpu())
        module.lora_B["default"].complement = module.lora_B["default"].complement.to(b)
    model.train()
    return module  # type: ignore[no-any-return]


class _TwoPath(torch.autograd.Function):
    """Base and adapter computed apart: dequantize and multiply, forward and backward, with few passes over the
    activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, packed: Tensor, state: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        z = x @ a.mT
        ctx.save_for_backward(x, z, a, b, packed)
        ctx.state = state
        return (x @ dequantize_4bit(packed, state).mT).addmm_(z, b.mT, alpha=SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from bitsandbytes.functional import dequantize_4bit

        (dy,) = grads
        x, z, a, b, packed = ctx.saved_tensors
        dz = (dy @ b).mul_(SCALE)
        dx = (dy @ dequantize_4bit(packed, ctx.state)).addmm_(dz, a)
        return dx, dz.mT @ x, (dy.mT @ z).mul_(SCALE), None, None


def arms(one: Layer) -> dict[str, Arm]:
    """Ways to compute the output from x (t, k). All but "peft LoRA" and "LoRA, this path" are protected;
    that A is blind where it is frozen makes no difference to the cost."""
    packed, state = one.base.weight.data, one.state

    def two_path(x: Tensor) -> Tensor:
        output: Tensor = _TwoPath.apply(x, one.a, project_wide(one.u, one.b, "out"), packed, state)
        return output

    return {
        "naive SaLoRA": peft_arm(one, dense=True),
        "peft LoRA": peft_arm(one, dense=False),
        "two-path": two_path,
        "LoRA, this path": lambda x: ops.nf4_lora(x, one.q, ops.lora_z(x, one.a), one.b, SCALE),
        "this": lambda x: ops.nf4_lora(x, one.q, ops.lora_z(x, one.a), project_wide(one.u, one.b, "out"), SCALE),
        "this, frozen A": lambda x: ops.nf4_lora(x, one.q, ops.lora_z(x, one.a.detach()), one.b, SCALE),
    }


def errors(one: Layer, x: Tensor) -> dict[str, float]:
    """Of each arm's output for `x (t, k)`: its distance from the formula in fp64, relative to the output's length."""
    weight, a, b = reference.unrounded(one.q).double(), one.a.detach().double(), one.b.detach().double()
    wide = x.double()
    base, z = wide @ weight.mT, wide @ a.mT
    found = {}
    for name, arm in arms(one).items():
        factor = b if name in UNPROJECTED else project_wide(one.u.double(), b, "out")
        wanted = base + SCALE * z @ factor.mT
        with torch.no_grad():
            found[name] = float((arm(x).double() - wanted).norm() / wanted.norm())
    return found


def bare(one: Layer, dtype: torch.dtype) -> Arm:
    """The matrix product alone, with a dense weight and no adapter."""
    weight = ops.nf4_dequant(one.q, dtype)
    return lambda x: x @ weight.mT


def trained(arm: Arm, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """One forward and backward of an arm, with gradients for x and for the factors of the arm."""
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.backward(arm(leaf), dy)
