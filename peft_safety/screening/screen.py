"""A screen: a direction in the aligned model's hidden states that tells harmful requests from others."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peft_safety.core.projection import all_finite
from peft_safety.data import load
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.screening.direction import auc, discriminant, threshold_at
from peft_safety.screening.requests import Request, requests_of
from peft_safety.screening.states import Tokens, last_states, shared_out

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARMFUL, HARMLESS = ("harmful_requests",), ("everyday_requests", "contrast_prompts")
"""The packaged prompts behind a screen: "train" for the direction, "validation" for all that is chosen."""
SHRINKAGES = (0.1, 0.5, 1.0)
"""Forms of the direction that are tried, see `discriminant`; 1 is the difference of the means."""
KNOWN = 256
"""Prompts of each packaged training set that are read: more made no difference on validation prompts (135M model)."""
LAYERS = 8
"""Layers that are tried are so many parts of the depth apart; the first part is left out."""
LEAST_AUC = 0.9
"""Of a screen on validation prompts. Below it, one harmless prompt in ten and more looks more harmful than another."""


@dataclass(frozen=True)
class Screen:
    """What `Screen.fit` found.

    Attributes:
        layer, shrinkage: the block whose output is read, and the form of the direction: those with most harmful
            validation prompts above the threshold.
        direction, threshold: `(d,)` fp64; a request is flagged where its score, `h . direction`, is above.
        fpr: the rate of false positives that was asked for.
        auc, false_positives, true_positives: on the packaged validation prompts; k of n each. With `own_rows` the
            harmless ones are requests of the user's own clean rows.
        max_length, budget: tokens kept of a request, from the right, and tokens of a batch.
    """

    layer: int
    shrinkage: float
    direction: Tensor
    threshold: float
    fpr: float
    auc: float
    false_positives: tuple[int, int]
    true_positives: tuple[int, int]
    max_length: int
    budget: int
    own_rows: bool = False

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fpr: float = 0.01,
        clean: Sequence[Tokens] = (),
        without: Collection[str] = (),
        known: int = KNOWN,
        max_length: int = 1024,
        budget: int = 4096,
        progress: bool = True,
    ) -> Screen:
        """Read the packaged prompts, choose layer and form, and set the threshold.

        Args:
            clean: requests known to be harmless, in place of the package's harmless validation prompts.
            without: texts of packaged prompts that are left out: those that a benchmark of the screen is run on.
            known: prompts of each packaged file and split that are read at most.

        Raises:
            ConfigError: an option out of range, or a model that is no causal language model.
            CalibrationError: the model does not tell harmful requests from others, or computes NaN.
            DataError: no chat template.
        """
        if not 0 <= fpr < 1 or min(max_length, budget, known) < 1:
            given = f"fpr={fpr}, max_length={max_length}, budget={budget}, known={known}"
            raise ConfigError(f"{given}. Give a rate from 0 to below 1, at least one token, and at least one prompt.")
        config = model.config.get_text_config()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError("a screen reads a causal language model, and this is an encoder-decoder. Give another.")
        left_out = [] if isinstance(without, str) else list(without)
        if isinstance(without, str) or not all(isinstance(prompt, str) for prompt in left_out):
            raise ConfigError("without= names prompts by their texts. Give a list of texts.")
        depth = int(config.num_hidden_layers)
        layers = sorted({max(1, round(depth * part / LAYERS)) for part in range(2, LAYERS + 1)})
        kinds = [(names, split) for split in ("train", "validation") for names in (HARMFUL, HARMLESS)]
        prompts = [[row for name in names for row in _drawn(name, split, left_out, known)] for names, split in kinds]
        parts = [[requests_of(tokenizer, row, 0, max_length)[0].ids for row in part] for part in prompts]
        parts[-1] = [list(ids) for ids in clean] or parts[-1]
        if not all(parts):
            names, split = kinds[parts.index([])]
            raise ConfigError(f"without= leaves no {split} prompt of {', '.join(names)}. Leave fewer out.")
        every = [ids for part in parts for ids in part]
        with tqdm(total=len(every), desc="known prompts", unit="row", disable=not progress, leave=False) as bar:

            def run(part: Sequence[Tokens]) -> list[Tensor]:  # copies: a view is sent with all that it is a view of
                return [state.clone() for state in last_states(model, part, layers, budget, bar.update)]

            states = torch.stack(shared_out(every, run))
        if not all_finite(states):
            raise CalibrationError("the model's hidden states hold NaN or Inf. Load it in bfloat16 or float32.")
        train_p, train_n, valid_p, valid_n = states.split([len(part) for part in parts])
        tried = []
        for place, layer in enumerate(layers):
            for shrinkage in SHRINKAGES:
                direction = discriminant(train_p[:, place], train_n[:, place], shrinkage)
                high, low = (x[:, place].double() @ direction for x in (valid_p, valid_n))
                threshold = threshold_at(low, fpr)
                wrong, right = ((int((x > threshold).sum()), len(x)) for x in (low, high))
                found = auc(high, low), wrong, right, max_length, budget, bool(clean)
                tried.append(cls(layer, shrinkage, direction, threshold, fpr, *found))
        best = max(tried, key=lambda screen: (screen.true_positives, screen.auc))
        if not best.auc >= LEAST_AUC:
            raise CalibrationError(
                f"this model does not tell harmful requests from others: AUC {best.auc:.2f} on validation prompts, at "
                f"layer {best.layer} of {depth}; {LEAST_AUC} is needed. Give the aligned model."
            )
        return best

    def scores(self, model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[Request]]) -> list[list[float]]:
        """A score for each request of each row. Processes share the rows out, and each gets all scores."""

        self._check_fits(model)

        def run(part: Sequence[Sequence[Request]]) -> list[list[float]]:
            ids = [request.ids for row in part for request in row]
            states = last_states(model, ids, [self.layer], self.budget)[:, 0].double()
            values = iter((states @ self.direction).tolist() if ids else [])
            return [[next(values) for _ in row] for row in part]

        result = shared_out(rows, run)
        for row, values in zip(rows, result, strict=True):
            if not all(map(math.isfinite, values)):
                where = f"row {row[0].row}: its hidden states hold NaN or Inf"
                raise CalibrationError(f"{where}. Load the model in bfloat16 or float32.")
        return result

    def _check_fits(self, model: PreTrainedModel | PeftModel) -> None:
        config = model.config.get_text_config()
        depth, width = int(config.num_hidden_layers), getattr(config, "hidden_size", len(self.direction))
        if self.layer > depth or len(self.direction) != width:
            own = f"layer {self.layer} of a model with {len(self.direction)} features"
            raise ConfigError(
                f"this screen reads {own}, and the model has {depth} layers with {width} features. Fit a new screen."
            )


def _drawn(name: str, split: str, without: Collection[str], most: int) -> list[dict[str, str]]:
    rows = [row for row in load(name, split) if row["prompt"] not in without]
    return random.Random(0).sample(rows, most) if len(rows) > most else rows
