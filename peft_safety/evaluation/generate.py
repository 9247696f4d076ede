"""Batched generation through the model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from peft_safety.data.chat import pad_id, render_prompt
from peft_safety.data.templates import Message
from peft_safety.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = TypeVar("Item")
Result = TypeVar("Result")
BATCH_SIZE = 32
"""Rows generated at once: on 2 CPU cores 164 tokens/s against 73 at 8 rows (SmolLM2-135M, fp32)."""

SHORTEST_PROMPT = 16
"""Characters of a request that a model writes itself."""
SELF_PROMPT_TRIES = 4
_TURN = "\N{OBJECT REPLACEMENT CHARACTER}"
THOUGHT, HEADER = "<think>", 16
"""What opens the reasoning where a template writes that itself, and the last tokens of a prompt that may hold it."""


@dataclass(frozen=True)
class Generation:
    """A response, and whether it ended by itself rather than at the token limit. `opened` is what the prompt ends in
    and the text begins with: the tag of reasoning that the chat template opens.
    """

    text: str
    finished: bool
    opened: str = ""

    @property
    def written(self) -> str:
        """The text without `opened`: what the model wrote itself."""
        return self.text.removeprefix(self.opened)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[Message] | list[int]],
    *,
    max_new_tokens: int = 24,
    batch_size: int = BATCH_SIZE,
    description: str = "generating",
    progress: bool = True,
    rendered: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Generation]:
    """Responses, in the order of `prompts`. Padding is on the left; of the model's own generation defaults only the
    stop tokens count, and they and its training mode are left as they were. Where the prompt opens the reasoning
    ("<think>"), the response begins with that tag, so that a judge knows what is reasoning.

    Args:
        prompts: user turns, or message lists that end with a user turn.
        max_new_tokens: tokens generated at most.
        description: of the progress bar, which `progress` shows on stderr.
        rendered: the prompts are texts that need no chat template, or their tokens.
        temperature, seed: of sampling; 0 is greedy. The state of torch's random numbers is put back.

    Raises:
        DataError: no prompts, or a tokenizer without chat template or pad token.
    """
    import torch

    if not prompts:
        raise DataError("no prompts to generate from. Give at least one.")
    turns = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    texts: Any = prompts if rendered else [render_prompt(tokenizer, cast("Any", messages)) for messages in turns]
    ids = [
        cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text)
        for text in texts
    ]
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {}
    run = partial(_generate_batch, model, tokenizer, max_new_tokens, **sampling)
    with torch.random.fork_rng() if sampling else nullcontext():
        if sampling:
            torch.manual_seed(seed)
        given = in_batches(model, ids, len, run, batch_size, description, progress)
    opened = (_opens_thought(tokenizer, prompt) for prompt in ids)
    return [replace(one, text=tag + one.text, opened=tag) for one, tag in zip(given, opened, strict=True)]


def _opens_thought(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The tag that a prompt ends in, or ""."""
    return THOUGHT if str(tokenizer.decode(prompt[-HEADER:])).rstrip().endswith(THOUGHT) else ""


def in_batches(
    model: PreTrainedModel,
    items: Sequence[Item],
    length: Callable[[Item], int],
    run: Callable[[list[Item]], list[Result]],
    batch_size: int,
    description: str = "",
    progress: bool = False,
) -> list[Result]:
    """`run` on batches of items of similar length, in evaluation mode: one result an item, in their order."""
    import torch
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    from peft_safety.core import base_weights

    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, Result] = {}
    bar = tqdm(total=len(items), desc=description, unit="row", disable=not progress, leave=False)
    with bar, base_weights.evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            results.update(zip(chosen, run([items[index] for index in chosen]), strict=True))
            bar.update(len(chosen))
    return [results[index] for index in range(len(items))]


def self_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 48,
    progress: bool = True,
) -> list[str]:
    """Requests that the model writes itself: it goes on where its chat template opens the user's turn. Sampled; no
    text twice; those that are too short or not finished are left out. A model that writes few of them gives fewer.

    Reference: Magpie, arXiv 2406.08464, section 2.
    """
    import torch

    opening, _, closing = render_prompt(tokenizer, [{"role": "user", "content": _TURN}]).partition(_TURN)
    ids, end = (
        cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (opening, closing)
    )
    run = partial(
        _generate_batch, model, tokenizer, max_new_tokens, end=end[:1], do_sample=True, temperature=1.0, top_p=0.95
    )
    prompts: dict[str, None] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(SELF_PROMPT_TRIES):
            if missing := count - len(prompts):
                written = in_batches(model, [ids] * missing, len, run, BATCH_SIZE, "the model's own prompts", progress)
                prompts |= {one.text: None for one in written if one.finished and len(one.text) >= SHORTEST_PROMPT}
    return list(prompts)


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    rows: list[list[int]],
    end: Sequence[int] = (),
    **sampling: Any,
) -> list[Generation]:
    import torch
    from transformers import GenerationConfig

    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    stops = sorted({int(token) for token in [*ends, *end, tokenizer.eos_token_id] if token is not None})
    width, pad = max(map(len, rows)), pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    config = GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=stops or None,
    )
    with _without_defaults(model):
        output = cast("torch.Tensor", model.generate(input_ids=ids, attention_mask=mask, generation_config=config))  # type: ignore[operator]
    return [_read(tokenizer, row.tolist(), stops) for row in output[:, width:]]


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Without the generation defaults of a model and of those in it: transformers merges them into what it is given,
    some versions `do_sample` too. PEFT gives its base those of the PeftModel, and leaves them there.
    """
    from transformers import GenerationConfig

    own = [
        (vars(part), vars(part)["generation_config"]) for part in model.modules() if "generation_config" in vars(part)
    ]
    try:
        for holder, _ in own:
            holder["generation_config"] = GenerationConfig()
        yield
    finally:
        for holder, config in own:
            holder["generation_config"] = config


def _read(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: list[int]) -> Generation:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return Generation(cast("str", text).strip(), end is not None)
