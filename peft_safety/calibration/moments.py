"""Streaming second moments: `S = sum_t x_t x_t^T` of each layer's inputs, in one pass, with no activation kept.

Layers with the same input tensor (q/k/v, gate/up) share one moment. Each distinct input takes one `n x n` fp64 matrix,
whatever the number of samples; a wide input of few tokens is kept itself instead (see `TokenRows`). In fp32, one
massive activation, as many models have, would hide all but a few dozen directions in rounding noise.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_safety.calibration.token_rows import TokenRows, wide
from peft_safety.core import base_weights as weights
from peft_safety.core.names import listed
from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_prompts, encode_rows, is_prompt_only
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import CalibrationError

Batch = Mapping[str, Tensor]
Positions = Literal["response", "prompt", "all"]


class InputMoments:
    """Accumulates the second moments of the inputs of base layers. `leaders` gives for each layer the first one that
    is fed the same tensor; `loose` layers have input rows that are not positions of the batch, so that all of them
    count.
    """

    def __init__(self, layers: Mapping[str, nn.Module], as_rows: Container[str] = ()) -> None:
        self.layers = dict(layers)
        self.as_rows = as_rows
        self.tokens = 0
        self.loose: set[str] = set()
        self._moments: dict[str, Tensor | TokenRows] = {}
        self.leaders: dict[str, str] = {}
        self._masks: tuple[Tensor, ...] = ()
        self._last: tuple[str, Tensor] | None = None

    def reaches(self, name: str) -> bool:
        return self.leaders.get(name) in self._moments

    def moment(self, name: str) -> Tensor:
        """`S (n, n)` of one layer, fp64 where the device has it; one tensor for layers with the same input."""
        result = self.operator(name)
        return result.dense() if isinstance(result, TokenRows) else result

    def operator(self, name: str) -> Tensor | TokenRows:
        """The same, or the rows behind it where they are kept."""
        if not self.reaches(name):
            raise CalibrationError(f"{name}: no token that counts reaches this layer. Give other data, or exclude it.")
        result = self._moments[self.leaders[name]]
        if not bool(result.isfinite().all()):
            raise CalibrationError(f"{name}: its inputs hold NaN or Inf. Load the model in float32.")
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                hook = partial(self._see, name)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield
        self._last = None

    def expect(self, *masks: Tensor) -> None:
        """Set the positions that count next, bool masks `(batch, tokens)`: the decoder's before the encoder's."""
        self._last, self._masks = None, masks
        self.tokens += sum(int(mask.sum()) for mask in masks)

    def _see(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, last = args[0] if args else next(iter(kwargs.values())), self._last
        if last is not None and last[1] is x and self.leaders.setdefault(name, last[0]) == last[0]:
            return  # the very same tensor: its leader has counted it
        if self.leaders.setdefault(name, name) != name:
            problem = f"{name}: shares its input with {self.leaders[name]} in some batches only"
            raise CalibrationError(f"{problem}. Calibrate it alone.")
        self._last = (name, x)
        if self._masks:
            self._add(name, selected(name, x, *self._masks))
            counts_all = all(bool(mask.all()) for mask in self._masks)
            if not counts_all and positions_of(x.shape[:-1], *self._masks) is None:
                self.loose.add(name)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor) -> None:
        if not x.shape[0]:
            return
        n, total = x.shape[1], self._moments.get(name)
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


def positions_of(lead: Sequence[int], *masks: Tensor) -> Tensor | None:
    """Which rows of a layer's input count, bool of the shape `lead`; None where the rows are not positions of the
    batch.

    Args:
        lead: `(batch, tokens)`, also flattened, or with further dimensions (heads) after or between them; or
            `(batch,)` of a pooled input, which counts if any position of its sequence does.
        masks: `(batch, tokens)` bool each.
    """
    for mask in masks:
        batch, tokens = mask.shape
        if tuple(lead) == (mask.numel(),):
            return mask.reshape(-1)
        if len(lead) > 1 and lead[0] == batch and tokens in lead[1:]:
            axis = 1 + list(lead[1:]).index(tokens)
            return mask.view(batch, *(tokens if i == axis else 1 for i in range(1, len(lead)))).expand(*lead)
    if len(lead) >= 1 and lead[0] == masks[0].shape[0]:  # pooled, or the patches of an image: by sequence
        chosen = torch.stack([mask.any(dim=1) for mask in masks]).any(dim=0)
        return chosen.view(-1, *(1 for _ in lead[1:])).expand(*lead)
    return None


def selected(name: str, x: Tensor, *masks: Tensor) -> Tensor:
    """The rows of `x (..., features)` that count, `(rows, features)`, fp32; all where they are not positions of the
    batch (routed experts, patches of images). A CalibrationError refuses what is no tensor.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        raise CalibrationError(f"{name}: a {type(x).__name__} is no rows of features. Leave it out of target_modules.")
    rows, chosen = x.detach().reshape(-1, x.shape[-1]), positions_of(x.shape[:-1], *masks)
    if chosen is None:
        return rows.float() if any(bool(mask.any()) for mask in masks) else rows[:0].float()
    return rows[chosen.reshape(-1).to(x.device)].float()


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
    return moments


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Batch], positions: Positions
) -> dict[str, str]:
    """For each layer that gets an input, the first layer that gets the same tensor. Runs the shortest batch."""
    moments = InputMoments(layers)
    with moments.watching():
        shortest = min(batches, key=lambda batch: batch["input_ids"].numel())
        run(model, [shortest], lambda *_: None, positions=positions, progress=False, what="inputs")
    return moments.leaders


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Sequence[Batch],
    expect: Callable[..., None],
    *,
    positions: Positions = "response",
    progress: bool = True,
    what: str,
) -> None:
    """One pass over the batches in eval mode. `expect` is called before each batch with the positions that count, a
    `(batch, tokens)` bool mask; for an encoder-decoder with the decoder's and the encoder's.
    """
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    with weights.evaluating(model):
        for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
            on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            masks, arguments = _call(model, on_device, positions)
            expect(*masks)
            model(**arguments)


def _call(model: nn.Module, batch: dict[str, Tensor], positions: Positions) -> tuple[list[Tensor], dict[str, Any]]:
    """The positions that count, and the arguments of the model's forward."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    accepted = inspect.signature(base.forward).parameters
    ids, labels = batch["input_ids"], batch["labels"]
    attention = batch.get("attention_mask", torch.ones_like(ids))
    usual = ("input_ids", "attention_mask", "labels")
    extra: dict[str, Any] = {key: value for key, value in batch.items() if key in accepted and key not in usual}
    if "use_cache" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        extra["use_cache"] = False
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    watched = any(m._forward_pre_hooks or m._forward_hooks for m in head.modules()) if head is not None else True
    if "logits_to_keep" in accepted and not watched:
        extra["logits_to_keep"] = 1  # nobody reads them, and all of them are larger than the model's activations
    if not is_encoder_decoder(model):
        return [counted(labels, attention, positions)], {"input_ids": ids, "attention_mask": attention, **extra}
    if labels.shape[1] == ids.shape[1]:  # other lengths: they tell which of the two sequences a layer's input is
        ids, attention = nn.functional.pad(ids, (0, 1), value=int(ids[0, 0])), nn.functional.pad(attention, (0, 1))
    if "decoder_input_ids" not in extra:
        extra["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    prompt = (attention != 0) & (positions != "response")
    answer = (labels != IGNORE_INDEX) & (positions != "prompt")
    return [answer, prompt], {"input_ids": ids, "attention_mask": attention, **extra}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the labels are a separate sequence (encoder-decoder models)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def counted(labels: Tensor, attention: Tensor, positions: Positions) -> Tensor:
    """Which positions count, `(batch, tokens)` bool: with a label ("response"), without one ("prompt"), or "all"."""
    attended = attention != 0
    if positions == "all":
        return attended
    return attended & ((labels != IGNORE_INDEX) == (positions == "response"))


def to_batches(
    data: Rows, tokenizer: Any, *, batch_size: int, max_length: int, model: nn.Module | None = None
) -> tuple[list[Batch], str]:
    """Batches of rows or of tokenized batches, and their hash. Labels of an encoder-decoder `model` may be longer."""
    if isinstance(data, Iterator):
        raise CalibrationError(f"calibration data is a {type(data).__name__}, readable only once. Give list(data).")
    rows = as_rows(data, "calibration data", CalibrationError)
    if not rows:
        raise CalibrationError("no calibration data. Give rows {prompt, response} or tokenized batches.")
    if is_tokenized(rows):
        batches = [_check(i, batch, model is not None and is_encoder_decoder(model)) for i, batch in enumerate(rows)]
    else:
        if tokenizer is None:
            raise CalibrationError("rows of text need tokenizer=. Pass the model's, or tokenized batches with labels.")
        prompts = [row for row in rows if is_prompt_only(row)]
        complete = [row for row in rows if not is_prompt_only(row)]
        encoded = encode_prompts(tokenizer, prompts, max_length)
        encoded += encode_rows(tokenizer, complete, max_length) if complete else []
        features = sorted(encoded, key=lambda f: len(f["input_ids"]))
        collate = Collator(tokenizer)
        batches = [collate(features[i : i + batch_size]) for i in range(0, len(features), batch_size)]
    return batches, content_digest(batches)


def attended(batches: Sequence[Batch]) -> int:
    """Tokens of all batches, without padding."""
    return sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)


def is_tokenized(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows are tokenized batches, which need no tokenizer."""
    return bool(rows) and ("input_ids" in rows[0] or any(isinstance(value, Tensor) for value in rows[0].values()))


def content_digest(batches: Sequence[Batch]) -> str:
    """sha256 of the sequences; independent of their order, batches and padding."""
    rows = []
    for batch in batches:
        attention = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        for ids, labels, attended in zip(batch["input_ids"], batch["labels"], attention, strict=True):
            answer = labels[attended] if labels.shape == attended.shape else labels[labels != IGNORE_INDEX]
            rows.append(json.dumps([ids[attended].tolist(), answer.tolist()]))
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _check(index: int, batch: Mapping[str, Any], two_sequences: bool) -> Batch:
    """A tokenized batch of tensors. Lists of numbers become tensors, a single sequence becomes a batch; without labels
    no position is a response.
    """
    if "input_ids" not in batch:
        raise CalibrationError(
            f"batch {index} has {', '.join(sorted(batch))}, but no input_ids: tokens say which positions count. "
            "Give token batches, or a subspace of the weights (SafetySubspace.from_weights)."
        )
    result = dict(batch)
    for key in {"input_ids", "attention_mask", "labels"} & set(batch):
        if not isinstance(batch[key], Tensor):
            with suppress(TypeError, ValueError, RuntimeError):  # not a table of numbers: refused below
                result[key] = torch.as_tensor(batch[key])
    ids = result.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 1:
        result |= {key: value[None] for key, value in result.items() if isinstance(value, Tensor)}
    ids, labels = result.get("input_ids"), result.get("labels")
    if labels is None and isinstance(ids, Tensor) and not two_sequences:
        labels = result["labels"] = torch.full_like(ids, IGNORE_INDEX)
    if isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.ndim == 2 and ids.numel() and labels.numel():
        if labels.ndim == 1 and len(labels) == len(ids):  # classes of sequences: no position is a response
            return {**result, "labels": torch.full_like(ids, IGNORE_INDEX)}
        if ids.shape == labels.shape or (two_sequences and labels.ndim == 2 and len(labels) == len(ids)):
            return result
    raise CalibrationError(
        f"batch {index}: input_ids and labels must be tensors of one shape (batch, tokens), not empty. Set labels to "
        "-100 where a token does not count."
    )


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Switch TF32 off: its 10-bit mantissa would distort the small singular directions."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
