"""Streaming second moments: `S = sum_t x_t x_t^T` of each layer's inputs, in one pass, with no activation kept.

Layers with the same input tensor (q/k/v, gate/up) share one moment. Each distinct input takes one `n x n` fp64 matrix,
whatever the number of samples; a wide input of few tokens is kept itself instead (see `TokenRows`). In fp32, one
massive activation, as many models have, would hide all but a few dozen directions in rounding noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_safety.calibration.batches import Batch, Counted, Positions, are_padded, call, size_of
from peft_safety.calibration.inside import watching, without_fast_path
from peft_safety.calibration.patches import Patches
from peft_safety.calibration.positions import placed_rows, positions_of
from peft_safety.calibration.token_counts import TokenCounts, counted_ids
from peft_safety.calibration.token_rows import TokenRows, wide
from peft_safety.core import base_weights as weights
from peft_safety.core.kinds import is_embedding
from peft_safety.core.names import listed
from peft_safety.core.parameters import ParameterOf, owner_of
from peft_safety.errors import CalibrationError, UnsupportedLayerError

Moment = Tensor | TokenRows | TokenCounts
TOKENS = "tokens"


class InputMoments:
    """Accumulates the second moments of the inputs of base layers. `leaders` gives for each layer the first one that
    is fed the same tensor; `loose` layers have input rows that are not positions of the batch, so that all of them
    count. `tokens` were counted by masks, `others` (patches, frames) where a batch has no tokens.
    """

    def __init__(self, layers: Mapping[str, nn.Module], as_rows: Container[str] = ()) -> None:
        self.layers = dict(layers)
        self.as_rows = as_rows
        self.tokens = 0
        self.loose: set[str] = set()
        self._moments: dict[str, Moment] = {}
        self.leaders: dict[str, str] = {}
        self._others: list[int] = []  # by batch, those of the layer that sees most of them
        self._counted: Counted | None = None
        self._last: tuple[str, Tensor, Patches | str | None] | None = None

    @property
    def others(self) -> int:
        return sum(self._others)

    def reaches(self, name: str) -> bool:
        return self.leaders.get(name) in self._moments

    def moment(self, name: str) -> Tensor:
        """`S (n, n)` of one layer, fp64 where the device has it; one tensor for layers with the same input. An
        UnsupportedLayerError refuses an embedding, whose vocabulary is too large for it.
        """
        result = self.operator(name)
        if isinstance(result, TokenCounts):
            what = f"{name}: an embedding of {len(result.counts)} tokens has no second moment that can be held"
            raise UnsupportedLayerError(f"{what}. Leave it out of target_modules.")
        return result.dense() if isinstance(result, TokenRows) else result

    def operator(self, name: str) -> Moment:
        """The same, or the rows behind it where they are kept; of an embedding how often each token counts."""
        if not self.reaches(name):
            raise CalibrationError(f"{name}: no token that counts reaches this layer. Give other data, or exclude it.")
        result = self._moments[self.leaders[name]]
        if not bool(result.isfinite().all()):
            raise CalibrationError(f"{name}: its inputs hold NaN or Inf. Load the model in float32.")
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        inside = {n: x for n, x in self.layers.items() if isinstance(x, ParameterOf) and not x.is_input}
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                if name not in inside:
                    hook = partial(self._see, name)
                    stack.callback(owner_of(layer).register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(watching(inside, self))
            yield
        self._last = None

    def expect(self, which: Counted) -> None:
        """Set the positions that count next."""
        self._last, self._counted = None, which
        self.tokens += sum(int(mask.sum()) for mask in which.masks)
        self._others.append(0)

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, last = args[0] if args else next(iter(kwargs.values())), self._last
        reading = TOKENS if is_embedding(layer) else Patches.of(layer)
        same = last is not None and last[1] is x and last[2] == reading
        if same and last is not None and self.leaders.setdefault(name, last[0]) == last[0]:
            return  # the very same tensor: its leader has counted it
        if self.leaders.setdefault(name, name) != name:
            problem = f"{name}: shares its input with {self.leaders[name]} in some batches only"
            raise CalibrationError(f"{problem}. Calibrate it alone.")
        self._last = (name, x, reading)
        if not self.counting:
            return
        if isinstance(reading, Patches):
            self._note(name, self._patches(name, reading, x), self.positions(x.shape[:1]) is not None)
        elif reading == TOKENS:
            self._note(name, self._count(name, x, weights.shape(layer)[1]), self.positions(x.shape) is not None)
        else:
            self.take(name, x)

    @property
    def counting(self) -> bool:
        """Whether positions were set, by `expect`."""
        return self._counted is not None

    def positions(self, lead: Sequence[int]) -> Tensor | None:
        """`positions_of` those that count now."""
        assert self._counted is not None
        return positions_of(lead, self._counted)

    def take(self, name: str, x: Tensor) -> None:
        """Count the rows of an input `(..., features)` that are at these positions."""
        assert self._counted is not None
        self.add(name, *placed_rows(name, x, self._counted))

    def add(self, name: str, rows: Tensor, placed: bool) -> None:
        """Count rows `(rows, features)`; `placed`: whether they were chosen by position."""
        self._add(name, rows.float())
        self._note(name, len(rows), placed)

    def _note(self, name: str, rows: int, placed: bool) -> None:
        assert self._counted is not None
        if placed:
            return
        if self._counted.others is not None:
            self._others[-1] = max(self._others[-1], rows)
        elif not all(bool(mask.all()) for mask in self._counted.masks):
            self.loose.add(name)

    def _patches(self, name: str, reading: Patches, x: Tensor) -> int:
        assert self._counted is not None
        rows = 0
        for block in reading.rows(x, self._counted):
            rows += len(block)
            self._add(name, block)
        return rows

    def _count(self, name: str, x: Tensor, vocabulary: int) -> int:
        assert self._counted is not None
        ids = counted_ids(x, self._counted)
        if ids.numel():
            counts = self._moments.setdefault(name, TokenCounts(vocabulary, ids.device))
            assert isinstance(counts, TokenCounts)
            counts.add(ids)
        return len(ids)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        if not x.shape[0]:
            return
        n, total = x.shape[1], self._moments.get(name)
        assert not isinstance(total, TokenCounts)
        if total is None:
            rows = TokenRows(n, x.device) if name in self.as_rows else None
            total = self._moments[name] = rows or torch.zeros(n, n, device=x.device, dtype=wide(x.device))
        with torch.autocast(device_type=x.device.type, enabled=False), exact_matmul():
            if isinstance(total, TokenRows):
                total.add(x)
                if total.tokens > n:  # more than the batches have tokens: patches of images, routed experts
                    self._moments[name] = total.dense()
            else:
                x = x.to(total.dtype)
                total.addmm_(x.mT, x)


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    positions: Positions = "response",
    as_rows: Container[str] = (),
    progress: bool = True,
    what: str = "calibrating",
) -> InputMoments:
    """Run every batch once, in eval mode, and return the moments at the positions that count (see `counted`)."""
    moments = InputMoments(layers, as_rows)
    with moments.watching():
        run(model, batches, moments.expect, positions=positions, progress=progress, what=what)
    if moments.loose:
        warnings.warn(
            f"{what}: {len(moments.loose)} layers have inputs that do not line up with the tokens of a batch (routed "
            f"experts, images), so all of them count, padding included: {listed(moments.loose)}. With positions='all' "
            "and batches of one length without padding, the result is exact.",
            stacklevel=3,
        )
    if moments.others and are_padded(batches):
        warnings.warn(
            f"{what}: images or recordings of unequal size are padded, and their masks do not say which patches or "
            "frames are padding, so all of them count. Batches of one size each are exact.",
            stacklevel=3,
        )
    return moments


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], positions: Positions
) -> dict[str, str]:
    """For each layer that gets an input, the first layer that gets the same tensor. Runs the shortest batch."""
    moments = InputMoments(layers)
    with moments.watching():
        run(model, [min(batches, key=size_of)], lambda _: None, positions=positions, progress=False, what="inputs")
    return moments.leaders


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Sequence[Batch],
    expect: Callable[[Counted], None],
    *,
    positions: Positions = "response",
    progress: bool = True,
    what: str,
) -> None:
    """One pass over the batches in eval mode. `expect` is called before each batch with the positions that count."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    with weights.evaluating(model), without_fast_path():
        for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
            which, arguments = call(model, batch, positions, device)
            expect(which)
            model(**arguments)


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Switch TF32 off: its 10-bit mantissa would distort the small singular directions."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
