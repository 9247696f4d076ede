"""The data of a calibration as batches of tensors, and which of their positions count.

A batch holds keywords of the model's forward, whatever they are. Tokens (`input_ids` or `inputs_embeds`) are counted
by masks; of pixels and sounds the model makes patches and frames of its own, which count as a whole.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_safety.data.chat import IGNORE_INDEX, Collator, encode_prompts, encode_rows, is_prompt_only
from peft_safety.data.rows import Rows, as_rows
from peft_safety.errors import CalibrationError

Batch = Mapping[str, Any]
Positions = Literal["response", "prompt", "all"]
TEXT = ("input_ids", "inputs_embeds")
"""What holds a sequence of tokens, `(batch, tokens)` or `(batch, tokens, features)`."""
UNITS = {"pixel_values": "patches", "input_features": "frames", "input_values": "frames"}
"""What the model makes of data that are no tokens; of any other, "vectors"."""
NOT_DATA = ("labels", "attention_mask", "pixel_mask", "padding_mask")


@dataclass(frozen=True)
class Counted:
    """Which rows of a layer's input count: `masks (batch, tokens)`, bool, the decoder's before the encoder's; and
    whether those count that are no tokens at all, patches or frames. None: where they belong to a sequence of tokens
    that count, or to none.
    """

    masks: tuple[Tensor, ...]
    others: bool | None = None


def to_batches(
    data: Rows, tokenizer: Any, *, batch_size: int, max_length: int, model: nn.Module | None = None
) -> tuple[list[Batch], str]:
    """Batches of rows or of tensors, and their hash. Labels of an encoder-decoder `model` may be longer."""
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


def is_tokenized(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows are batches of tensors, which need no tokenizer."""
    return bool(rows) and ("input_ids" in rows[0] or any(map(_is_numbers, rows[0].values())))


def _is_numbers(value: Any) -> bool:
    """Whether this is a tensor, or an array of numbers."""
    array = getattr(value, "ndim", 0) > 0 and getattr(getattr(value, "dtype", None), "kind", "O") in "biuf"
    return isinstance(value, Tensor) or array


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the labels are a separate sequence (encoder-decoder models)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _check(index: int, batch: Mapping[str, Any], two_sequences: bool) -> Batch:
    """A batch of tensors. Lists of numbers and arrays become tensors, a single sequence of tokens becomes a batch."""
    result = {key: _as_tensor(value) for key, value in batch.items()}
    ids = result.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 1:
        result |= {key: value[None] for key, value in result.items() if isinstance(value, Tensor)}
        ids = result["input_ids"]
    if "input_ids" not in result and not any(_is_data(key, value) for key, value in result.items()):
        raise CalibrationError(
            f"batch {index} has {', '.join(sorted(batch)) or 'nothing'}, but no tensor of data. Give what the model's "
            "forward takes (input_ids, pixel_values, input_features, ...), rows first."
        )
    main = data_of(result)
    if not isinstance(main, Tensor) or not main.numel() or ("input_ids" in result and not _are_tokens(main)):
        raise _unfit(index, result)
    result = _all_labels(result)
    labels = result.get("labels")
    mask = result.get("attention_mask")
    if is_text(result) and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape != main.shape[:2]:
        raise CalibrationError(
            f"batch {index}: attention_mask {tuple(mask.shape)} is no mask of {tuple(main.shape[:2])} tokens. Give "
            "one number for each token."
        )
    if not isinstance(labels, Tensor):
        if labels is not None:
            raise _unfit(index, result)
        if two_sequences and is_text(result) and "decoder_input_ids" not in result:
            raise CalibrationError(f"batch {index}: an encoder-decoder needs labels, or decoder_input_ids. Give them.")
        return result
    if is_text(result):
        fits = labels.ndim == 2 and labels.shape[1:] == main.shape[1:2]
        classes = labels.ndim == 1 or labels.is_floating_point()
        if not labels.numel() or len(labels) != len(main) or not (fits or classes or two_sequences):
            raise _unfit(index, result)
    return result


def _all_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that asks for all logits. Its labels may have been those of the last `logits_to_keep` positions only."""
    result = dict(batch)
    kept, labels = result.pop("logits_to_keep", None), result.get("labels")
    if isinstance(kept, int) and is_text(result) and isinstance(labels, Tensor) and labels.ndim == 2:
        left_out = data_of(result).shape[1] - kept
        if labels.shape[1] == kept and left_out > 0:
            result["labels"] = nn.functional.pad(labels, (left_out, 0), value=IGNORE_INDEX)
    return result


def _as_tensor(value: Any) -> Any:
    if isinstance(value, Tensor) or not (isinstance(value, (list, tuple)) or _is_numbers(value)):
        return value
    with suppress(TypeError, ValueError, RuntimeError):  # no table of numbers
        return torch.as_tensor(value)
    return value


def _are_tokens(ids: Tensor) -> bool:
    return ids.ndim == 2 and not ids.is_floating_point()


def _unfit(index: int, batch: Batch) -> CalibrationError:
    given = {key: batch[key] for key in ("input_ids", "inputs_embeds", "labels") if key in batch}
    shapes = ", ".join(f"{key} {tuple(getattr(x, 'shape', ())) or type(x).__name__}" for key, x in given.items())
    return CalibrationError(
        f"batch {index}: input_ids and labels must be tensors of one shape (batch, tokens), not empty; given are "
        f"{shapes}. Set labels to -100 where a token does not count; labels (batch,) are classes."
    )


def _is_data(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and key not in NOT_DATA


def data_of(batch: Batch) -> Tensor:
    """The tensor whose rows are the samples: tokens, else pixels or sounds, else the first one that is no mask."""
    known = (key for key in (*TEXT, *UNITS) if key in batch)
    key = next(known, None) or next(key for key, value in batch.items() if _is_data(key, value))
    return batch[key]  # type: ignore[no-any-return]


def is_text(batch: Batch) -> bool:
    """Whether a batch has tokens, which a mask can count."""
    return any(key in batch for key in TEXT)


def unit_of(batch: Batch) -> str:
    """What the positions of a batch without tokens are."""
    return next((unit for key, unit in UNITS.items() if key in batch), "vectors")


def size_of(batch: Batch) -> int:
    """Tokens of a batch, with padding; of one without tokens, its samples."""
    return int(data_of(batch).shape[:2].numel()) if is_text(batch) else len(data_of(batch))


def attention_of(batch: Batch) -> Tensor:
    """Which tokens of a batch are no padding, bool `(batch, tokens)`."""
    tokens = data_of(batch)
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:  # a mask of pairs says nothing of single tokens
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return mask != 0  # type: ignore[no-any-return]


def answer_labels(batch: Batch) -> Tensor | None:
    """The labels that say which tokens are a response, `(batch, tokens)`; None where there are none, or classes."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    return labels


def attended(batches: Sequence[Batch]) -> int | None:
    """Tokens of all batches, without padding; None where some have none, and the model makes its own positions."""
    return sum(int(attention_of(batch).sum()) for batch in batches) if all(map(is_text, batches)) else None


def are_padded(batches: Sequence[Batch]) -> bool:
    """Whether batches without tokens are padded, which their patches or frames do not tell."""
    masks = (batch[key] for batch in batches if not is_text(batch) for key in NOT_DATA[1:] if key in batch)
    return any(bool((mask == 0).any()) for mask in masks)


def lacks_responses(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether there is no response to count: no label of a token, and classes instead, or a model that writes none."""
    if not is_encoder_decoder(model) and not any(map(is_text, batches)):
        return True
    if any((labels := answer_labels(batch)) is not None and bool((labels != IGNORE_INDEX).any()) for batch in batches):
        return False
    classes = all("labels" in batch and answer_labels(batch) is None for batch in batches)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return classes or (hasattr(base, "can_generate") and not base.can_generate())


def content_digest(batches: Sequence[Batch]) -> str:
    """sha256 of all that the batches hold; of text independent of order, batches and padding, of other tensors of
    their order within a batch only where their rows are not the samples.
    """
    rows = []
    for batch in batches:
        count = len(data_of(batch))
        text = is_text(batch)
        kept = attention_of(batch) if text else None
        labels = batch.get("labels")
        named = {k: v for k, v in batch.items() if k not in ("input_ids", "labels", *("attention_mask",) * text)}
        whole = {k: v for k, v in named.items() if not isinstance(v, Tensor) or v.ndim == 0 or len(v) != count}
        for i in range(count):
            ids = batch["input_ids"][i][kept[i]].tolist() if "input_ids" in batch and kept is not None else None
            entry = [ids, _answer(labels, kept, i)]
            own = {k: _hash(_cut(v[i], kept, i)) for k, v in sorted(named.items()) if k not in whole}
            rows.append(json.dumps([*entry, own] if own else entry))
        if whole:
            rows.append(json.dumps({key: _hash(value) for key, value in sorted(whole.items())}))
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _answer(labels: Any, kept: Tensor | None, i: int) -> Any:
    """The labels of a sample as they count: those of its tokens, of its answer, or its class."""
    if not isinstance(labels, Tensor) or i >= len(labels):
        return [IGNORE_INDEX] * int(kept[i].sum()) if kept is not None else None
    own = labels[i]
    if kept is not None and own.shape == kept[i].shape:
        own = own[kept[i]]
    elif own.ndim == 1 and not own.is_floating_point():
        own = own[own != IGNORE_INDEX]
    return own.tolist()


def _cut(value: Tensor, kept: Tensor | None, i: int) -> Tensor:
    return value[kept[i]] if kept is not None and value.shape[:1] == kept[i].shape else value


def _hash(value: Any) -> Any:
    """Of a tensor its dtype, shape and sha256; of lists and tables that of each entry."""
    if isinstance(value, Mapping):
        return {str(key): _hash(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hash(entry) for entry in value]
    if not isinstance(value, Tensor):
        return str(value)
    stored = value.detach().cpu().contiguous()
    content = stored.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(stored.dtype), list(stored.shape), hashlib.sha256(content).hexdigest()]


def call(model: nn.Module, batch: Batch, positions: Positions, device: torch.device) -> tuple[Counted, dict[str, Any]]:
    """The positions that count, and the arguments of the model's forward: the whole batch but its labels."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    accepted = inspect.signature(base.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    batch = {key: _moved(value, device) for key, value in batch.items()}
    arguments = {
        key: value
        for key, value in batch.items()
        if key != "labels" and (key in accepted or (anything and isinstance(value, Tensor)))
    }
    text = is_text(batch)
    if text and "attention_mask" in accepted:
        arguments.setdefault("attention_mask", torch.ones(data_of(batch).shape[:2], dtype=torch.long, device=device))
    if "use_cache" in accepted or (anything and (text or is_encoder_decoder(model))):
        arguments["use_cache"] = False
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    watched = any(m._forward_pre_hooks or m._forward_hooks for m in head.modules()) if head is not None else True
    if "logits_to_keep" in accepted and not watched:
        arguments["logits_to_keep"] = 1  # nobody reads them, and all of them are larger than the model's activations
    if is_encoder_decoder(model):
        return _two_sequences(base, batch, arguments, positions), arguments
    if not text:
        return Counted((), others=True), arguments
    return Counted((counted(answer_labels(batch), attention_of(batch), positions),)), arguments


def _two_sequences(base: Any, batch: Batch, arguments: dict[str, Any], positions: Positions) -> Counted:
    """Of an encoder-decoder the encoder's positions are the prompt, the decoder's the response. Adds what the decoder
    reads to the arguments; sequences of one length get another one, which tells whose a layer's input is.
    """
    labels, text = answer_labels(batch), is_text(batch)
    if "decoder_input_ids" in batch:
        given = batch["decoder_input_ids"]
        mask = batch.get("decoder_attention_mask")
        answer = torch.ones_like(given, dtype=torch.bool) if mask is None else mask != 0
        if labels is not None and labels.shape == given.shape:
            answer = answer & (labels != IGNORE_INDEX)
    elif labels is not None:
        answer = labels != IGNORE_INDEX
        if hasattr(base, "prepare_decoder_input_ids_from_labels"):
            arguments["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        else:
            arguments["labels"] = batch["labels"]
    elif text:  # classes: the decoder reads the same tokens
        return Counted((attention_of(batch),))
    else:
        raise CalibrationError("an encoder-decoder needs labels, or decoder_input_ids, in each batch. Give them.")
    answer = answer & (positions != "prompt")
    if not text:
        return Counted((answer,), others=positions != "response")
    prompt = attention_of(batch) & (positions != "response")
    if answer.shape[1] == prompt.shape[1]:
        prompt = nn.functional.pad(prompt, (0, 1))
        arguments["attention_mask"] = nn.functional.pad(arguments["attention_mask"], (0, 1))
        for key in (key for key in TEXT if key in arguments):
            arguments[key] = torch.cat([arguments[key], arguments[key][:1, :1].expand_as(arguments[key][:, :1])], 1)
    return Counted((answer, prompt))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(entry, device) for entry in value)
    return {key: _moved(entry, device) for key, entry in value.items()} if isinstance(value, dict) else value


def counted(labels: Tensor | None, attention: Tensor, positions: Positions) -> Tensor:
    """Which tokens count, `(batch, tokens)` bool: with a label ("response"), without one ("prompt"), or "all"."""
    attended = attention != 0
    if positions == "all":
        return attended
    answered = torch.zeros_like(attended) if labels is None else labels != IGNORE_INDEX
    return attended & (answered == (positions == "response"))
