"""Streaming second moments: `S = sum_t x_t x_t^T` of each layer's inputs, in one pass, with no activation kept.

Layers that are fed the same tensor (q/k/v, gate/up) share one moment. Memory is one `n x n` fp64 matrix per distinct input, whatever the number of samples:
in fp32, one massive activation, as many models have, would drown all but a few dozen directions in rounding noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_safety import weights
from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_prompts, encode_rows, is_prompt_only
from peft_safety.errors import CalibrationError

Batch = Mapping[str, Tensor]
Positions = Literal["response", "prompt", "all"]


class InputMoments:
    """Accumulates the second moments of the inputs of some layers while a model runs.

    Args:
        layers: base layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.tokens = 0
        self._moments: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._mask: Tensor | None = None
        self._last: tuple[str, Tensor] | None = None

    def moment(self, name: str) -> Tensor:
        """`S (n, n)` of one layer, fp64 (fp32 where the device has no fp64). Layers with the same input return the same tensor.

        Raises:
            CalibrationError: the layer was never called, or `S` is not finite.
        """
        if name not in self._leader:
            raise CalibrationError(f"{name}: the layer was never called on the calibration data. Leave it out of target_modules.")
        found = self._moments[self._leader[name]]
        if not bool(torch.isfinite(found).all()):
            raise CalibrationError(f"{name}: its inputs hold NaN or Inf. Load the model in float32 or bfloat16, and check the data.")
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers for the duration of a block."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(self._hook(name)).remove)
            stack.callback(self._forget)
            yield

    def expect(self, mask: Tensor) -> None:
        """Announce the next batch: which of its positions count, `(batch, tokens)` bool."""
        self._forget()
        self._mask = mask
        self.tokens += int(mask.sum())

    def _forget(self) -> None:
        self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if self._last is not None and self._last[1] is x:  # the very same tensor: its leader has counted it
                self._leader.setdefault(name, self._last[0])
                return
            if self._leader.setdefault(name, name) != name:
                raise CalibrationError(f"{name}: shares its input with {self._leader[name]} in some batches only. Calibrate it on its own.")
            self._last = (name, x)
            self._add(name, self._select(name, x))

        return hook

    def _select(self, name: str, x: Tensor) -> Tensor:
        if self._mask is None:
            raise CalibrationError("InputMoments.expect was not called before the batch.")
        return selected(name, x, self._mask)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        total = self._moments.get(name)
        if total is None:
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            total = self._moments[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device, dtype=wide)
        x = x.to(total.dtype)
        with torch.autocast(device_type=x.device.type, enabled=False), exact_matmul():
            total.addmm_(x.mT, x)


def selected(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The rows of a layer's input or output that count, `(tokens, features)`, fp32.

    Args:
        x: `(batch, tokens, features)`, or flattened to `(batch * tokens, features)`.
        mask: `(batch, tokens)` bool.

    Raises:
        CalibrationError: they do not line up.
    """
    if x.shape[:-1] != mask.shape and x.shape[0] != mask.numel():
        raise CalibrationError(
            f"{name}: its input {tuple(x.shape)} does not line up with {tuple(mask.shape)} tokens (routed experts?). Leave it out of target_modules."
        )
    return x.detach().reshape(-1, x.shape[-1])[mask.reshape(-1).to(x.device)].float()


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    positions: Positions = "response",
    progress: bool = True,
    what: str = "calibrating",
) -> InputMoments:
    """Run every batch once, without gradients and in eval mode, and return the moments at the positions that count.

    Args:
        batches: `input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`; positions without attention never count.
        positions: those with a label ("response"), those without ("prompt"), or both ("all").
    """
    moments = InputMoments(layers)
    with moments.watching():
        run(model, batches, moments.expect, positions=positions, progress=progress, what=what)
    return moments


@torch.no_grad()
def run(
    model: nn.Module, batches: Sequence[Batch], expect: Callable[[Tensor], None], *, positions: Positions = "response", progress: bool = True, what: str
) -> None:
    """One pass over the batches in eval mode; whoever has hooked the layers is told before each batch which of its positions count.

    Args:
        expect: called with a `(batch, tokens)` bool mask.
    """
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with weights.unpacked(model):
            for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
                ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
                attention = batch.get("attention_mask", torch.ones_like(ids)).to(device)
                expect(counted(labels, attention, positions))
                model(input_ids=ids, attention_mask=attention, use_cache=False)
    finally:
        for module, flag in training:
            module.training = flag


def counted(labels: Tensor, attention: Tensor, positions: Positions) -> Tensor:
    """Which positions count, `(batch, tokens)` bool."""
    there = attention != 0
    if positions == "all":
        return there
    return there & ((labels != IGNORE_INDEX) == (positions == "response"))


def to_batches(data: Sequence[Mapping[str, Any]], tokenizer: Any, *, batch_size: int, max_length: int) -> tuple[list[Batch], str]:
    """Rows or tokenised batches as batches, and a hash of what they hold. Rows of a prompt alone may stand among complete ones.

    Raises:
        CalibrationError: no data, rows without a tokenizer, or batches without labels.
    """
    if isinstance(data, (str, bytes, Mapping)) or not hasattr(data, "__getitem__"):
        raise CalibrationError(f"calibration data is a {type(data).__name__}. Give a list or data set of rows {{prompt, response}} or of tokenised batches.")
    if not len(data) or not isinstance(data[0], Mapping):
        raise CalibrationError("no calibration data, or not rows. Give rows {prompt, response} or tokenised batches.")
    if "input_ids" in data[0]:
        batches = [_check(i, batch) for i, batch in enumerate(data)]
    else:
        if tokenizer is None:
            raise CalibrationError("rows of text need tokenizer=. Pass the model's tokenizer, or tokenised batches with labels.")
        bare = [row for row in data if is_prompt_only(row)]
        full = [row for row in data if not is_prompt_only(row)]
        encoded = encode_prompts(tokenizer, bare, max_length) + (encode_rows(tokenizer, full, max_length) if full else [])
        features = sorted(encoded, key=lambda f: len(f["input_ids"]))
        collate = Collator(tokenizer)
        batches = [collate(features[i : i + batch_size]) for i in range(0, len(features), batch_size)]
    return batches, content_digest(batches)


def content_digest(batches: Sequence[Batch]) -> str:
    """sha256 of the sequences, whatever their order, batches and padding."""
    rows = []
    for batch in batches:
        attention = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        sequences = zip(batch["input_ids"], batch["labels"], attention, strict=True)
        rows += [json.dumps([ids[there].tolist(), labels[there].tolist()]) for ids, labels, there in sequences]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _check(index: int, batch: Mapping[str, Any]) -> Batch:
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.ndim != 2 or ids.shape != labels.shape or ids.numel() == 0:
        raise CalibrationError(
            f"batch {index}: input_ids and labels must be tensors of one shape (batch, tokens), not empty. Set labels to -100 where a token does not count."
        )
    return batch


@contextmanager
def exact_matmul() -> Iterator[None]:
    """TF32 off: its ten bits of mantissa would show in the small singular directions."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
