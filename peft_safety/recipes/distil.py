"""Keeping a model as it is on some rows while it learns others: the rows' loss is the distance from the model without
its adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from peft_safety.data.chat import IGNORE_INDEX
from peft_safety.layers.adapters import without_adapters


class DistillingTrainer(Trainer):
    """Its batches say which rows to `distil`: there the loss is `weight KL(base || tuned)` at the response tokens,
    elsewhere cross entropy.

    The mean is over the batch's tokens of either kind together. The base is the same model with its adapters switched
    off: no second copy.
    """

    def __init__(self, *args: Any, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = weight
        # the mean over this batch; the Trainer then averages over accumulated batches and processes
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, distil = inputs["labels"], inputs["distil"]
        tokens = {name: value for name, value in inputs.items() if name not in ("labels", "distil")}
        outputs = model(**tokens)

        def base(rows: Tensor) -> Tensor:
            bare = self.accelerator.unwrap_model(model)
            selected = {name: v[rows] if isinstance(v, Tensor) else v for name, v in tokens.items()}
            with torch.no_grad(), without_adapters(bare):
                logits: Tensor = bare(**selected).logits
            return logits

        loss = _token_losses(outputs.logits, labels, distil, base, self.weight).mean()
        return (loss, outputs) if return_outputs else loss


def _token_losses(
    logits: Tensor, labels: Tensor, distil: Tensor, base: Callable[[Tensor], Tensor], weight: float = 1.0
) -> Tensor:
    """Loss of every labeled token, `(tokens,)`.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        labels: `(batch, tokens)`, -100 where a token does not count.
        distil: `(batch,)` bool.
        base: rows -> the base's logits of these rows.
    """
    counts, losses = labels[:, 1:] != IGNORE_INDEX, []
    if bool((~distil).any()):
        learned = counts & ~distil[:, None]
        losses.append(F.cross_entropy(logits[:, :-1][learned].float(), labels[:, 1:][learned], reduction="none"))
    if bool(distil.any()):
        kept = counts[distil]
        tuned, target = (x[:, :-1][kept].float().log_softmax(-1) for x in (logits[distil], base(distil)))
        losses.append(weight * F.kl_div(tuned, target, reduction="none", log_target=True).sum(-1))
    return torch.cat(losses)
