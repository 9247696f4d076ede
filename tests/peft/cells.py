"""What the tests of PEFT's life cycle share: a table of tiny base models, protected adapters on them, a few steps of
training, and the leak of dW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_safety import SafetySubspace, SaLoRAConfig, merge_quantized
from peft_safety.core.base_weights import shape
from peft_safety.core.names import own_name
from peft_safety.core.plain_lora import PREFIX
from peft_safety.core.projection import orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.errors import ConfigError
from peft_safety.layers import protected_leaves
from peft_safety.registry.protection import protected_configs
from tests.tiny import tiny_llama

BASES = ("linear", "conv1d", "nf4", "int8")
"""Kinds of base layers: fp32 Linear, transformers' Conv1D, bitsandbytes 4-bit and 8-bit."""
WIDE = "nf4-wide"
"""4-bit too, and as wide as a block of the quantization: what the fused path asks for."""
INITS = ("lora", "task")
LINEAR_TARGETS = ("q_proj", "v_proj", "down_proj")
K = 4
"""Protected directions per layer."""


def covering(combinations: Iterable[tuple[Any, ...]], fast: Collection[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test: a few combinations in which every value occurs, and the others for the nightly run."""
    return [c if c in fast else pytest.param(*c, marks=pytest.mark.slow) for c in combinations]


def base_model(kind: str = "linear", seed: int = 0) -> nn.Module:
    """A fresh tiny causal language model whose linear layers are of this kind."""
    return copy.deepcopy(_base(kind, seed))


@cache
def _base(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the first call, which builds, leaves the generator as later ones do
        torch.manual_seed(seed)
        if kind == "conv1d":
            return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
        model = tiny_llama(seed, hidden=64 if kind == WIDE else 32)
        return model if kind == "linear" else quantized(model, kind)


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Replace every linear layer but the output embedding by bitsandbytes'."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        m, n = shape(layer)
        if kind in ("nf4", WIDE):
            new = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            new.support_avx512bf16_for_cpu = (
                False  # its packed format computes in bf16, cuts gradients, and needs wider layers
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    setattr(
        model, "is_loaded_in_4bit" if kind in ("nf4", WIDE) else "is_loaded_in_8bit", True
    )  # as transformers does; PEFT chooses its layer class by it
    return model.to("cpu").eval()  # bitsandbytes quantizes on a move


def targets(kind: str) -> list[str]:
    """Layers of several shapes, square and not."""
    return ["c_attn", "c_proj"] if kind == "conv1d" else list(LINEAR_TARGETS)


def random_subspace(model: nn.Module, target_modules: Any, seed: int = 0, k: int = K) -> SafetySubspace:
    """Random bases: whatever the mechanism does with a calibrated subspace, it must do with this one."""
    generator = torch.Generator().manual_seed(seed)
    layers = target_layers(model, target_modules)
    return SafetySubspace(
        {
            name: {"out": orthonormalize(torch.randn(shape(layer)[0], k, generator=generator))}
            for name, layer in layers.items()
        }
    )


def config(kind: str = "linear", init: str = "lora", *, seed: int = 0, **options: Any) -> SaLoRAConfig:
    """A protected config for this base, with a random subspace (and a random task subspace) of this seed."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets(kind), "fan_in_fan_out": kind == "conv1d", **options}
    subspace = random_subspace(_base(kind, 0), options["target_modules"], seed)
    task = (
        {"init": "task", "task_data": random_subspace(_base(kind, 0), options["target_modules"], seed + 100, k=8)}
        if init == "task"
        else {}
    )
    return SaLoRAConfig(**{"subspace": subspace, **task, **options})


def protected(
    kind: str = "linear", init: str = "lora", *, seed: int = 0, trained: bool = False, **options: Any
) -> PeftModel:
    """A fresh protected model; `trained` gives its factors random values, as some training would."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(kind), config(kind, init, seed=seed, **options))
    return perturb(model, seed) if trained else model.eval()


def plain(kind: str = "linear", seed: int = 3, **options: Any) -> PeftModel:
    """A plain LoRA with random factors."""
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets(kind),
        "fan_in_fan_out": kind == "conv1d",
        "task_type": "CAUSAL_LM",
        **options,
    }
    return perturb(get_peft_model(base_model(kind), LoraConfig(**options)), seed)


def perturb(model: nn.Module, seed: int = 0, adapter: str | None = None) -> Any:
    """Move all factors of an adapter (of all adapters) at random, and fold."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and (adapter is None or f".{adapter}." in name):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for _, leaf in protected_leaves(model):
        leaf.fold()  # what must hold without it is tested with raw writes
    return model.eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids, **kwargs).logits


def assert_same_function(found: Tensor, expected: Tensor) -> None:
    """Equal logits to rounding: of factors that lie elsewhere in memory, where a CPU's products may have other last
    bits, or of another process.
    """
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def factors(model: nn.Module) -> dict[str, Tensor]:
    """All factors of all adapters as they are stored, the frozen ones too, by name."""
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def assert_same_factors(found: nn.Module, expected: nn.Module) -> None:
    """The very bits, whatever the adapters are called and wherever the factors lie."""
    for one, other in zip(factors(found).values(), factors(expected).values(), strict=True):
        assert torch.equal(one, other)


def train(model: Any, optimizer: Callable[[Any], torch.optim.Optimizer], steps: int) -> torch.optim.Optimizer:
    """A few steps on random tokens; what is trained is what requires a gradient."""
    chosen = optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        ids = tokens(seed=step % 8)
        model(input_ids=ids, labels=ids).loss.backward()
        chosen.step()
        chosen.zero_grad()
    return chosen


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


@cache
def trains_in_8_bits_here() -> bool:
    import bitsandbytes as bnb

    weight = nn.Parameter(torch.zeros(64))
    weight.grad = torch.ones(64)
    try:
        bnb.optim.AdamW8bit([weight], min_8bit_size=0).step()
    except RuntimeError:  # of bitsandbytes before its optimizers had a form for CPUs
        return False
    return True


def adamw8bit(parameters: Any) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    if not trains_in_8_bits_here():
        pytest.skip("this bitsandbytes has no 8-bit optimizer for CPUs")
    return bnb.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=0)


def canonical(name: str) -> str:
    """A module's name in the base model, from its name in a PeftModel."""
    return own_name(name).removeprefix(PREFIX).removesuffix(".base_layer")


def layers_of(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield canonical(name), module


@torch.no_grad()
def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """dW `(out, in)` of each layer, as PEFT's own merge computes it."""
    return {
        name: layer.get_delta_weight(adapter).T
        if getattr(layer, "fan_in_fan_out", False)
        else layer.get_delta_weight(adapter)
        for name, layer in layers_of(model, adapter)
    }


def leak(model: nn.Module, adapter: str = "default", subspace: SafetySubspace | None = None) -> float:
    """Largest `||U^T dW|| / ||dW||` of any layer. Fails where an update is zero: that would leak nothing and prove
    nothing.
    """
    subspace = subspace or protected_configs(model)[adapter].subspace
    return leak_of(deltas(model, adapter), subspace)


def leak_of(updates: dict[str, Tensor], subspace: SafetySubspace) -> float:
    worst = 0.0
    assert updates
    for name, delta in updates.items():
        delta = delta.double()
        assert float(delta.norm()) > 1e-6, f"{name} was not trained"
        worst = max(worst, float((subspace.bases[name]["out"].double().T @ delta).norm() / delta.norm()))
    return worst


def assert_activated_is_not_merged(model):
    """An activated LoRA updates some tokens only, and a merged weight would update all."""
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(NotImplementedError, match="aLoRA does not support"):
            merge()
    with pytest.raises(ConfigError, match="alora_invocation_tokens cannot be merged here"):
        merge_quantized(model, verbose=False)
