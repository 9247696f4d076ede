"""Bases of an embedding, from how often each token counts.

On the input side the basis is a set of tokens, see `core.projection`: all that the data hold, whatever the requested
size. Each is a direction of its own, so leaving one out would let just that input through, and keeping it costs only
its own embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_safety.calibration.bases import contrastive_basis, output_basis
from peft_safety.calibration.sizes import Size
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.errors import CalibrationError


def seen_tokens(counts: TokenCounts, against: TokenCounts | None, name: str) -> tuple[Tensor, Tensor]:
    """The tokens `(k,)` that the data hold, and those to compare with do not, the most frequent first; and the square
    roots of their counts.
    """
    tokens = counts.tokens()
    if against is not None:
        tokens = tokens[against.counts[tokens] == 0]
    if not 0 < len(tokens) < len(counts.counts):
        problem = "all, so that nothing is left to train" if len(tokens) else "none that the other data lack"
        raise CalibrationError(
            f"{name}: of its {len(counts.counts)} tokens the data hold {problem}. Leave it out of target_modules."
        )
    return tokens, counts.counts[tokens].sqrt().float()


@torch.no_grad()
def embedding_outputs(
    weight: Tensor, counts: TokenCounts, against: TokenCounts | None, size: Size, name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """`output_basis` of the embeddings `W (m, n)` of the tokens that count; the contrastive one `against` others."""
    x = _outputs(weight, counts)
    if against is None:
        return output_basis(x, None, size, name, seed=seed)
    y = _outputs(weight, against)
    return contrastive_basis((x @ x.mT).to(counts.dtype), (y @ y.mT).to(counts.dtype), size, name)


def _outputs(weight: Tensor, counts: TokenCounts) -> Tensor:
    tokens = counts.tokens()
    return weight[:, tokens] * counts.counts[tokens].sqrt().to(weight)
