"""Hidden states at the last tokens of prompts: one forward for prompts that begin alike, in batches of one length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from peft_safety.core import base_weights
from peft_safety.data.chat import can_trim
from peft_safety.errors import PeftSafetyError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Tokens = Sequence[int]
Item = TypeVar("Item")
Result = TypeVar("Result")


def nested(sequences: Sequence[Tokens]) -> list[tuple[Tokens, list[int]]]:
    """Sequences, each with the numbers of those that it begins with: turns of one conversation follow one another."""
    result: list[tuple[Tokens, list[int]]] = []
    for number, ids in enumerate(sequences):
        if result and ids[: len(result[-1][0])] == result[-1][0]:
            result[-1] = ids, [*result[-1][1], number]
        else:
            result.append((ids, [number]))
    return result


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of all sequences, the longest batch first. No batch has more than `budget` tokens with its padding, but
    one of a single sequence.
    """
    result: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if result and (len(result[-1]) + 1) * lengths[place] <= budget:
            result[-1].append(place)
        else:
            result.append([place])
    return result[::-1]


@torch.inference_mode()
def last_states(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Tokens],
    layers: Sequence[int],
    budget: int,
    advance: Callable[[int], Any] = lambda done: None,
) -> Tensor:
    """The hidden states `(sequences, layers, d)`, fp32 on the CPU, after the blocks of these numbers at the last token
    of each sequence. Padding is on the right, where a causal model does not see it.
    """
    result: list[Tensor] = [torch.empty(0)] * len(sequences)
    parts = nested(sequences)
    options = {"output_hidden_states": True, "use_cache": False} | ({"logits_to_keep": 1} if can_trim(model) else {})
    with base_weights.evaluating(model):
        for batch in batches([len(ids) for ids, _ in parts], budget):
            rows = [parts[place][0] for place in batch]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
            states = model(input_ids=ids, attention_mask=mask, **options).hidden_states
            wanted = [(line, number) for line, place in enumerate(batch) for number in parts[place][1]]
            where = [line for line, _ in wanted], [len(sequences[number]) - 1 for _, number in wanted]
            picked = torch.stack([states[layer][where].float().cpu() for layer in layers], dim=1)
            for (_, number), vector in zip(wanted, picked, strict=True):
                result[number] = vector
            advance(len(wanted))
    return torch.stack(result) if result else torch.empty(0, len(layers), 0)


def join_processes() -> None:
    """Let the processes of `accelerate launch` or `torchrun` find one another, unless they have."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState()


def process() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def by_first(run: Callable[[], Result]) -> Result:
    """What `run` gives in the first process, in all of them; or its error."""
    rank, world = process()
    if world == 1:
        return run()
    told: list[Any] = [None, None]
    try:
        told[0] = run() if rank == 0 else None
    except Exception as error:
        told[1] = f"{type(error).__name__}: {error}"
        raise
    finally:  # the others wait for it
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise PeftSafetyError(f"the first process has stopped: {told[1]}")
    return cast("Result", told[0])


def shared_out(items: Sequence[Item], run: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """`run` on this process's share of the items; the results of all processes, in the order of the items."""
    rank, world = process()
    own = list(run(items[rank::world]))
    if world == 1:
        return own
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own)
    return [gathered[place % world][place // world] for place in range(len(items))]
