"""Directions outside the null space: the rows of a frozen `A`, or the window in which `A` trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peft_safety.calibration.grouped import GroupedMoments
from peft_safety.calibration.token_counts import TokenCounts
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core.names import listed
from peft_safety.core.projection import (
    OVERSAMPLING,
    Side,
    fold_,
    is_tokens,
    orthonormalize,
    principal_cosines,
    project_out,
    top_eigenvectors,
)
from peft_safety.core.subspace import SafetySubspace
from peft_safety.errors import CalibrationError

ROW_NORM = 3**-0.5
"""Norm of a row of `lora_A` as PEFT initializes it: n entries uniform in +-1/sqrt(n)."""


@torch.no_grad()
def blind_signs(tokens: Tensor, vocabulary: int, rank: int, counts: TokenCounts | None, seed: int = 0) -> Tensor:
    """`A (rank, vocabulary)` of an embedding: random signs, as large as entries of PEFT's normal `lora_B`, and
    zeros at `tokens (k,)`. The moment of tokens is diagonal, so that its top directions would be single tokens:
    with the task's `counts` all of the task's other tokens get signs instead, and no token beside them, unless the
    task has none.
    """
    free = torch.ones(vocabulary, dtype=torch.bool)
    free[tokens] = False
    if counts is not None and bool((own := free & (counts.counts > 0).cpu()).any()):
        free = own
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rank, vocabulary), generator=generator, dtype=torch.int8)
    return (2.0 * signs - 1.0) * free


@torch.no_grad()
def blind_rows(basis: Tensor, rank: int, *, moment: Tensor | TokenRows | None = None, seed: int = 0) -> Tensor:
    """`A (rank, n)` with `A Q = 0`, fp32: orthogonal rows of the norm that PEFT's initialization gives them, at random
    in the complement (by `seed`). Where it has fewer dimensions, the surplus rows are zero.

    Args:
        basis: `Q (n, k)`, orthonormal columns.
        moment: `S (n, n)` of the task's inputs: the rows are then the top eigenvectors of `P S P`, `P = I - Q Q^T`.

    Reference: the frozen A is LoRA-FA's, arXiv 2308.03303; the null space LoRA-Null's, arXiv 2503.02659, there of
        pre-training inputs; directions of the task's inputs are EVA's, arXiv 2410.07170.
    """
    n, k = basis.shape
    free = min(rank, n - k)
    q = basis.to(device=basis.device if moment is None else moment.device, dtype=torch.float64)
    if moment is None:
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randn(n, free, generator=generator, dtype=torch.float64).to(q.device)
    else:
        s = moment if isinstance(moment, TokenRows) else moment.to(q)
        width = min(free + OVERSAMPLING, n - k)
        # what was projected once stays in the complement, where P S P and P S are the same
        columns, _ = top_eigenvectors(lambda v: project_out(q, s @ v), n, width, like=q, seed=seed)
    for _ in range(3):  # a direction that the task hardly uses comes out of the iteration with much of Q in it
        columns = orthonormalize(project_out(q, columns[:, :free]))
    rows = torch.zeros(rank, n, device=q.device)
    rows[:free] = columns.mT.float() * ROW_NORM
    fold_(basis.to(rows.device), rows, "in")
    return rows


def frozen_factors(
    subspace: SafetySubspace,
    ranks: Mapping[str, int],
    moments: GroupedMoments | None,
    features: Mapping[str, int],
    *,
    share_random: bool = False,
) -> dict[str, Tensor]:
    """`blind_rows` of every module, `ranks` of them. Modules with one input and one basis share their directions,
    random ones only with `share_random`. A module that the task does not reach gets random rows, as all do without
    moments. `features`: inputs by module.
    """
    if moments is not None and moments.positions < max(ranks.values()):
        few = f"task_data: {moments.positions} tokens, patches or frames cannot give {max(ranks.values())} directions"
        raise CalibrationError(f"{few}. Give more rows, or use a_init='random'.")
    free = {name: features[name] - subspace.rank(name, "in") for name in ranks}
    narrow = [name for name, rank in ranks.items() if rank > free[name]]
    if narrow:
        warnings.warn(
            f"{len(narrow)} of {len(ranks)} layers have fewer directions outside the null space than r, and rows of "
            f"zeros for the rest: {listed(narrow)}.",
            stacklevel=3,
        )
    made: dict[tuple[int, int, int | str | None], Tensor] = {}
    rows = {}
    for index, (name, rank) in enumerate(ranks.items()):
        basis = subspace.bases[name]["in"]
        reached = moments is not None and moments.reaches(name)
        source = moments.leader(name) if moments is not None and reached else None if share_random else index
        key = (id(basis), rank, source)
        if is_tokens(basis):
            counts = moments.operator(name) if moments is not None and reached else None
            of_task = counts if isinstance(counts, TokenCounts) else None
            rows[name] = blind_signs(basis, features[name], rank, of_task, seed=index)
            continue
        if key not in made:
            moment = moments.operator(name) if moments is not None and reached else None
            if isinstance(moment, TokenCounts):
                moment = None  # a basis of the weight: directions of tokens are none of it
            made[key] = blind_rows(basis, rank, moment=moment, seed=0 if reached else index)
        rows[name] = made[key]
    return rows


@torch.no_grad()
def windows(
    subspace: SafetySubspace, names: Iterable[str], width: int, moments: GroupedMoments | None
) -> SafetySubspace:
    """The windows in which a trainable `A` is blind: `{"window": N (n, m)}` with orthonormal columns in the complement
    of the null space, of which `A` is a combination. Modules with one input and one basis share a window. Where the
    complement has fewer than `width` dimensions, the window is all of it.

    The provenance has the digest of the null space, and the largest `||N^T Q||_2`, which bounds `||A Q|| / ||A||`.
    """
    bases = {name: subspace.bases[name]["in"] for name in names}
    features = {name: int(basis.shape[0]) for name, basis in bases.items()}
    widths = {name: min(width, basis.shape[0] - basis.shape[1]) for name, basis in bases.items()}
    rows = frozen_factors(subspace, widths, moments, features, share_random=True)
    made: dict[int, Tensor] = {}
    worst = 0.0
    for name, a in rows.items():
        if id(a) not in made:
            made[id(a)] = a.cpu().mT / ROW_NORM
            worst = max(worst, float(principal_cosines(made[id(a)], bases[name])[0]))
    facts = {"sides": "window", "window": width, "window_leak": worst, "null_space": subspace.restricted(bases).digest}
    prints = {name: values for name, values in subspace.fingerprints.items() if name in bases}
    new: dict[str, dict[Side, Tensor]] = {name: {"window": made[id(a)]} for name, a in rows.items()}
    return SafetySubspace(new, None, prints, {**subspace.provenance, **facts})
