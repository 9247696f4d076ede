"""The anchor: a second loss that holds a model's answers to a few requests where they were before training."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments

from peft_safety.callbacks.steps import add_gradient, averaged, before_steps, log_value, refuse_shards
from peft_safety.core import base_weights as weights
from peft_safety.core.checks import check_counts, check_positive
from peft_safety.data import refusal_pairs
from peft_safety.data.chat import IGNORE_INDEX, Collator, can_trim, chat_of, encode_rows, row_turns
from peft_safety.data.rows import Row, Rows, data_rows, label_names
from peft_safety.errors import ConfigError, DivergedError
from peft_safety.evaluation.generate import BATCH_SIZE, generate
from peft_safety.evaluation.judges import KeywordJudge, Verdict
from peft_safety.layers.adapters import without_adapters

KEPT_TOKENS = 512
"""Tokens of each reference distribution that are kept; all others count together as one more."""
REFERENCE_ROWS = 8
"""Rows of a forward that makes references."""
JUDGED_TOKENS = 16
"""Tokens generated of an answer that is judged."""
HALF_SCALE = 2.0**10
"""Of the anchor's loss under fp16, whose small gradients are rounded to zero. The gradient is divided by it."""


class Reference(NamedTuple):
    """What the model without its adapters says at a row's response tokens: the likeliest `tokens (positions, k)`, and
    the log-probabilities, in half precision, of these and of all others together: `logs (positions, k + 1)`.
    """

    tokens: Tensor
    logs: Tensor


class SafetyAnchorCallback(TrainerCallback):  # type: ignore[misc]
    """Holds the model's answers to anchor requests where the model without its adapters has them.

    Before an optimizer step, after accumulation, clipping and loss scaling, it adds the gradient of
    `weight * KL(reference || current)`, the mean over the response tokens of some anchor rows. The loss that the user
    sees stays the task's. Logged are `safety_anchor`, the KL without its weight in nats a token, and
    `safety_anchor_seconds`, the time that it took; both since the last log.

    The references are computed once, when training begins or is resumed, with all adapters switched off. Each keeps
    the 512 likeliest tokens in half precision and all others as one: about 3 kB a token on the CPU. Dropout is off in
    the anchor's forward. Under DDP every process computes the same rows on the module itself and by
    `torch.autograd.grad`, which fires no hook of DDP; the gradients are averaged.

    Args:
        tokenizer: with a chat template.
        data: anchor rows with answers: {prompt, response} or {messages}. Default: the package's calibration requests
            with refusals.
        rows: anchor rows of a step, drawn by seed and step.
        every: optimizer steps from one use of the anchor to the next.
        weight: of the anchor's loss.
        max_length: tokens kept of each anchor row.
        seed: of the draws.

    Raises:
        ConfigError: no anchors, or an option out of range; when training begins: a model without adapters, DeepSpeed
            or sharded parameters, or anchors with a refusal of which the model itself refuses none; at a step: nothing
            that trains changes an answer.
        DataError: a row without a response, or a tokenizer without a chat template.
        DivergedError: the anchor's gradient is not finite.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: Rows | None = None,
        *,
        rows: int = 4,
        every: int = 1,
        weight: float = 1.0,
        seed: int = 0,
        max_length: int = 512,
    ) -> None:
        self.tokenizer, self.rows, self.every, self.weight, self.seed = tokenizer, rows, every, weight, seed
        self.max_length = max_length
        check_counts(self, "rows", "every", "max_length")
        check_positive(self, "weight")
        anchors = refusal_pairs("calibration") if data is None else data_rows(data, "anchors")
        self.features = encode_rows(tokenizer, anchors, max_length)
        self.references: list[Reference] = []
        self.seconds = 0.0
        self._requests = list(_refused(tokenizer, anchors))
        self._pending: list[tuple[float, float]] = []  # KL and seconds of each use since the last log
        self._hook: Any = None
        self._model: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        model, name = kwargs["model"], type(self).__name__
        if not hasattr(model, "disable_adapter"):
            kind = type(model).__name__
            raise ConfigError(f"{name}: a {kind} has no adapters to switch off. Train an adapter of a PeftModel.")
        refuse_shards(name, model)
        self.on_train_end()
        self._model, self._state, self._scale = model, state, HALF_SCALE if args.fp16 else 1.0
        self._collate = Collator(self.tokenizer, trim=can_trim(model))
        with without_adapters(model), weights.evaluating(model), torch.no_grad():
            self._check_refusals(model)
            self.references = [
                reference
                for start in range(0, len(self.features), REFERENCE_ROWS)
                for reference in self._refer(range(start, min(start + REFERENCE_ROWS, len(self.features))))
            ]
        self._hook = before_steps(name, kwargs["optimizer"], self.before_step, "Train without DeepSpeed.")

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """For `torch.optim.Optimizer.register_step_pre_hook`."""
        if self._state.global_step % self.every:
            return
        self._wait()
        started = time.perf_counter()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        draw = random.Random(f"{self.seed} {self._state.global_step}")
        with torch.enable_grad():
            loss = self.loss(draw.sample(range(len(self.features)), min(self.rows, len(self.features))))
            if not parameters or not loss.requires_grad:
                said = "nothing that the optimizer trains changes the answers to anchors"
                raise ConfigError(f"{type(self).__name__}: {said}. Activate the adapter that trains.")
            gradients = torch.autograd.grad(self._scale * self.weight * loss, parameters, allow_unused=True)
        added = {p: averaged(g / self._scale) for p, g in zip(parameters, gradients, strict=True) if g is not None}
        if not torch.nn.utils.get_total_norm(added.values()).isfinite():
            said = f"the anchor's gradient at step {self._state.global_step} is not finite (KL {float(loss.detach())})"
            raise DivergedError(f"{type(self).__name__}: {said}. Lower the learning rate, or train in bf16.")
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer undoes the loss scaling in its step
        for parameter, gradient in added.items():
            add_gradient(parameter, gradient if scale is None else gradient * scale.to(gradient))
        self._wait()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._pending.append((float(loss.detach()), seconds))

    def loss(self, chosen: Sequence[int]) -> Tensor:
        """`KL(reference || current)` of some anchor rows, in nats a response token."""
        references = [self.references[index] for index in chosen]
        with weights.evaluating(self._model):
            logits = self._logits(chosen)
        tokens = torch.cat([reference.tokens for reference in references]).to(logits.device)
        target = torch.cat([reference.logs for reference in references]).to(logits).log_softmax(-1)
        return F.kl_div(_log_shares(logits, tokens), target, reduction="sum", log_target=True) / len(tokens)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and self._pending:
            distances, seconds = zip(*self._pending, strict=True)
            log_value(logs, state, "safety_anchor", sum(distances) / len(distances))
            log_value(logs, state, "safety_anchor_seconds", sum(seconds))
            self._pending = []

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._model, self.references = None, None, []  # whoever keeps the callback keeps no model

    def _logits(self, chosen: Sequence[int]) -> Tensor:
        """What predicts the response tokens of some rows, one row after another: `(positions, vocabulary)`."""
        batch = self._collate([self.features[index] for index in chosen])
        labels = batch.pop("labels")
        inputs = {key: v.to(self._model.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
        logits = self._model(**inputs, use_cache=False).logits[:, :-1]
        logits = logits[(labels[:, 1:] != IGNORE_INDEX).to(logits.device)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _refer(self, chosen: Sequence[int]) -> Iterator[Reference]:
        logits = self._logits(chosen)
        tokens = logits.topk(min(KEPT_TOKENS, logits.shape[-1])).indices
        logs = _log_shares(logits, tokens).half().cpu()
        sizes = [sum(label != IGNORE_INDEX for label in self.features[index]["labels"][1:]) for index in chosen]
        return map(Reference, tokens.int().cpu().split(sizes), logs.split(sizes))

    def _check_refusals(self, model: nn.Module) -> None:
        """Whether the model gives the refusals that it is to be held at; one batch of requests is asked."""
        asked = random.Random(self.seed).sample(self._requests, min(BATCH_SIZE, len(self._requests)))
        if not asked:
            return
        texts, judge = [text for _, text in asked], KeywordJudge()
        answers = generate(model, self.tokenizer, texts, max_new_tokens=JUDGED_TOKENS, progress=False, rendered=True)
        verdicts = [judge(request, answer.text) for (request, _), answer in zip(asked, answers, strict=True)]
        complied = sum(verdict is not Verdict.REFUSAL for verdict in verdicts)
        said = f"{type(self).__name__}: the model without adapters does not refuse {complied} of {len(asked)} anchors"
        if complied == len(asked):
            raise ConfigError(f"{said}. There is nothing to hold: align the model first, or give other anchors.")
        if complied:
            warnings.warn(f"{said}. These are held where they are.", stacklevel=2)

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _log_shares(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of `tokens (positions, k)`, and of all other tokens together: `(positions, k + 1)`."""
    tokens = tokens.long()
    kept = logits.gather(-1, tokens)
    if tokens.shape[-1] < logits.shape[-1]:
        kept = torch.cat([kept, logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)], dim=-1)
    return kept.log_softmax(-1)


def _refused(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Request and prompt, as the chat template writes it, of each row that ends with a refusal."""
    judge, labels = KeywordJudge(), label_names(rows)
    for row in rows:
        if "input_ids" not in row:
            *asked, answer = [turn for part in row_turns(row, labels) for turn in part]
            request = str(asked[-1].get("content")) if asked else ""
            if judge(request, str(answer.get("content"))) is Verdict.REFUSAL:
                yield request, chat_of(tokenizer, row).text(asked, header=True)
