"""What a training step keeps of the activations until its backward pass, by the form of the adapter: plain LoRA of
PEFT, LoRA-FA (PEFT's, whose A is frozen by its optimizer), GuardSpace's frozen A, and the same on the fused path.

Counted, not timed: every tensor that autograd saves, once for each storage, without parameters and buffers. So the
figures are those of any machine. The fused path needs a 4-bit base, and uses the reference backend on a CPU.

    python -m benchmarks.saved_bytes [--tokens 512]    (two minutes on one core)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

from benchmarks.common import add_model, load_causal, model_name, model_source, parser_of, record, show
from peft_safety import GuardSpaceConfig, SafetySubspace
from peft_safety.core.base_weights import shape
from peft_safety.core.projection import orthonormalize
from peft_safety.core.targets import target_layers
from peft_safety.ops.dispatch import VARIABLE
from peft_safety.reporting.report import environment

RANK = 16
ARMS = ("no adapter", "LoRA", "LoRA-FA", "frozen", "frozen, fused")


def bases(model: nn.Module) -> SafetySubspace:
    """Random null spaces of n / 16 directions: what is saved does not depend on them."""
    made: dict[int, dict[Any, Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in target_layers(model, "all-linear").values():
        n = shape(layer)[1]
        if n not in made:
            made[n] = {"in": orthonormalize(torch.randn(n, n // 16, generator=generator))}
    return SafetySubspace({name: made[shape(layer)[1]] for name, layer in target_layers(model, "all-linear").items()})


def adapted(model: nn.Module, arm: str) -> nn.Module:
    """The model under the adapter of an arm, ready to train."""
    common: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if arm == "no adapter":
        return model.requires_grad_(False)
    if arm.startswith("frozen"):
        fused = arm.endswith("fused")
        config = GuardSpaceConfig(**common, subspace=bases(model), train="B", a_init="random", fused=fused)
        return get_peft_model(model, config)  # type: ignore[arg-type]
    plain: PeftModel = get_peft_model(model, LoraConfig(**common))  # type: ignore[arg-type, assignment]
    if arm == "LoRA-FA":
        create_lorafa_optimizer(plain, r=RANK, lora_alpha=RANK, lr=1e-4)
    return plain


def saved(model: nn.Module, work: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd saves in the work, without those of the model itself."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {
        part.untyped_storage().data_ptr()
        for parameter in model.parameters()
        for part in _state(getattr(parameter, "quant_state", None))
    }
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            held[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work()  # while it lives no storage is used twice
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del kept
    return total


def _state(state: Any) -> list[Tensor]:
    """The tensors of bitsandbytes' state of a weight, also of its quantized scales."""
    if state is None:
        return []
    inner = _state(getattr(state, "state2", None))
    return [*inner, *(value for value in vars(state).values() if isinstance(value, Tensor))]


def measured(source: str, base: str, arm: str, tokens: int) -> dict[str, Any]:
    """MiB a decoder block, without what lies outside of them (embedding, head, loss)."""
    model = load_causal(source, nf4=base == "nf4")
    peft_model = adapted(model, arm).train()
    blocks = len(model.model.layers)
    hidden = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    names = {VARIABLE: "reference"}
    with mock.patch.dict(os.environ, names):
        total = saved(peft_model, lambda: model.model(inputs_embeds=hidden.requires_grad_()).last_hidden_state)
    return {"base": base, "tokens": tokens, "arm": arm, "MiB a block": total / blocks / 2**20}


def main() -> None:
    parser = parser_of(__doc__)
    add_model(parser)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    source = model_source(args.model)
    rows: list[dict[str, Any]] = []
    for base in ("fp32", "nf4"):
        for arm in ARMS if base == "nf4" else ARMS[:-1]:
            rows.append(measured(source, base, arm, args.tokens))
        own = [row for row in rows if row["base"] == base]
        nothing, plain = (next(row["MiB a block"] for row in own if row["arm"] == arm) for arm in ARMS[:2])
        for row in own:
            row["of the adapter"] = row["MiB a block"] - nothing
            row["of LoRA's"] = row["MiB a block"] / plain
    show("saved for the backward pass", rows)
    facts = environment(0, model=model_name(args.model), r=RANK, threads=torch.get_num_threads())
    print(f"written to {record('saved_bytes', rows, facts)}")


if __name__ == "__main__":
    main()
