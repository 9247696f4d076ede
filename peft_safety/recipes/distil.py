"""Keeping a model as it is on some rows while it learns others: the rows' loss is the distance from the model without
its adapters.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from peft_safety.data.chat import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


@cache
def distilling_trainer(weight: float) -> type[Trainer]:
    """A Trainer whose batches say which rows to `distil`: there the loss is `weight KL(base || tuned)` at the response
    tokens, elsewhere cross entropy.

    The mean is over the batch's tokens of either kind together. The base is the same model with its adapters switched
    off: no second copy.
    """
    from transformers import Trainer

    class DistillingTrainer(Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = (
                False  # the mean over this batch; the Trainer then averages over accumulated batches and processes
            )

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels, distil = inputs["labels"], inputs["distil"]
            outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", "distil")})
            losses = _token_losses(
                outputs.logits, labels, distil, lambda rows: _base_logits(self, model, inputs, rows), weight
            )
            loss = losses.mean()
            return (loss, outputs) if return_outputs else loss

    return DistillingTrainer


def _base_logits(trainer: Any, model: Any, inputs: dict[str, Any], rows: torch.Tensor) -> torch.Tensor:
    import torch

    bare = trainer.accelerator.unwrap_model(model)
    with torch.no_grad(), bare.disable_adapter():
        kept = {"logits_to_keep": inputs["logits_to_keep"]} if "logits_to_keep" in inputs else {}
        logits: torch.Tensor = bare(
            input_ids=inputs["input_ids"][rows], attention_mask=inputs["attention_mask"][rows], **kept
        ).logits
    return logits


def _token_losses(
    logits: torch.Tensor, labels: torch.Tensor, distil: torch.Tensor, base: Any, weight: float = 1.0
) -> torch.Tensor:
    """Loss of every labeled token, `(tokens,)`.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        labels: `(batch, tokens)`, -100 where a token does not count.
        distil: `(batch,)` bool.
        base: rows -> the base's logits of these rows.
    """
    import torch
    from torch.nn import functional

    counts = labels[:, 1:] != IGNORE_INDEX
    parts = []
    if bool((~distil).any()):
        learned = counts & ~distil[:, None]
        parts.append(
            functional.cross_entropy(logits[:, :-1][learned].float(), labels[:, 1:][learned], reduction="none")
        )
    if bool(distil.any()):
        kept = counts[distil]
        found, wanted = (x[:, :-1][kept].float().log_softmax(-1) for x in (logits[distil], base(distil)))
        parts.append(weight * functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts)
