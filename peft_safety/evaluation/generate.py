"""Batched greedy generation through the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from peft_safety.data.chat import pad_id, render_prompt
from peft_safety.data.templates import Message
from peft_safety.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 32
"""Rows generated at once: on 2 CPU cores 164 tokens/s against 73 at 8 rows (SmolLM2-135M, fp32)."""


@dataclass(frozen=True)
class Generation:
    """A response, and whether it ended by itself rather than at the token limit."""

    text: str
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[Message]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = BATCH_SIZE,
    description: str = "generating",
    progress: bool = True,
) -> list[Generation]:
    """Greedy responses, in the order of `prompts`.

    Prompts are sorted by length, so that a batch holds little padding, and padded on the left. The model's own
    sampling defaults and its training mode are left as they were.

    Args:
        prompts: user turns, or message lists that end with a user turn.
        max_new_tokens: tokens generated at most.
        progress: show a bar on stderr.

    Raises:
        DataError: no prompts, or a tokenizer without chat template or pad token.
    """
    rendered = [
        render_prompt(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        for prompt in prompts
    ]
    return generate_text(
        model,
        tokenizer,
        rendered,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
        progress=progress,
    )


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = BATCH_SIZE,
    description: str = "generating",
    progress: bool = True,
) -> list[Generation]:
    """`generate` for prompts that are rendered already, with their special tokens."""
    import torch
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    if not texts:
        raise DataError("no prompts to generate from. Give at least one.")
    ids = [cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    results: dict[int, Generation] = {}
    with (
        tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress, leave=False) as bar,
        inference(model),
        torch.inference_mode(),
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _generate_batch(model, tokenizer, [ids[index] for index in chosen], max_new_tokens)
            results.update(zip(chosen, batch, strict=True))
            bar.update(len(chosen))
    return [results[index] for index in range(len(ids))]


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside the block, without repacking of 4-bit weights (see `base_weights.unpacked`)."""
    from peft_safety.core import base_weights as weights

    training = model.training
    model.eval()
    try:
        with weights.unpacked(model):
            yield
    finally:
        model.train(training)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the end tokens of the generation config and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None})


def _generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_new_tokens: int
) -> list[Generation]:
    import torch
    from transformers import GenerationConfig

    width, pad, stops = max(map(len, rows)), pad_id(tokenizer), stop_ids(model, tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=stops or None
    )
    output = cast("torch.Tensor", model.generate(input_ids=ids, attention_mask=mask, generation_config=config))  # type: ignore[operator]
    return [_read(tokenizer, row.tolist(), stops) for row in output[:, width:]]


def _read(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: list[int]) -> Generation:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Generation(cast("str", text).strip(), end is not None)
