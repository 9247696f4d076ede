"""Weights of a model by module name, without building it: a directory of safetensors (one file or shards), a Hub id,
or a model that is already loaded.

A weight is read in blocks of input columns and never as a whole, and a file is mapped only while one of its tensors is
being read, so that memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files, publish
from peft_safety.core.conversion import model_keys
from peft_safety.core.targets import base_layers
from peft_safety.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
FLOATS = ("F64", "F32", "F16", "BF16")
NOISE = {"4bit": 0.09, "8bit": 0.01, "fp8": 0.03}
"""`||Q(W) - W|| / ||W||` of a Gaussian weight: NF4 at block size 64, int8 by row, FP8 (e4m3)."""


@dataclass(frozen=True)
class Matrix:
    """One weight `W (out_features, in_features)`, whatever its storage.

    Attributes:
        quantization: "4bit", "8bit", "fp8" or None.
        block: `(start, stop)` -> columns `start:stop`, `(out_features, stop - start)`, in the stored precision (fp32
            if quantized).
    """

    shape: tuple[int, int]
    quantization: str | None
    block: Callable[[int, int], Tensor]


class Weights(Protocol):
    """Where the weights of one model come from."""

    label: str

    def open(self, name: str, transposed: bool = False) -> AbstractContextManager[Matrix]:
        """The weight of a module, by the module's full name in the base model; `transposed` for transformers' Conv1D,
        stored `(in, out)`.

        Raises:
            CheckpointError: no such weight, or one of a kind that cannot be read.
        """


def open_weights(source: str | os.PathLike[str] | nn.Module) -> Weights:
    """The weights of a model.

    Args:
        source: a directory with safetensors, a Hub id, or a model (its adapters, if any, do not count).

    Raises:
        CheckpointError: nothing can be read there; pickles are never opened.
    """
    return ModuleWeights(source) if isinstance(source, nn.Module) else FileWeights(os.fspath(source))


class ModuleWeights:
    """The weights of a loaded model."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: Mapping[str, nn.Module] = base_layers(model)
        self.label = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)

    @contextmanager
    def open(self, name: str, transposed: bool = False) -> Iterator[Matrix]:
        if name not in self.layers:
            raise CheckpointError(
                f"{self.label}: the model has no linear layer {name}. Give the model that the adapter belongs to."
            )
        layer = self.layers[name]
        if hasattr(layer, "weight") and not weights.is_whole(layer.weight):
            raise CheckpointError(
                f"{self.label}: the weight of {name} is on the meta device or sharded. Give a checkpoint directory."
            )
        dense = weights.stored_weight(layer, name)
        yield Matrix(
            (dense.shape[0], dense.shape[1]), weights.quantization(layer), lambda start, stop: dense[:, start:stop]
        )


class FileWeights:
    """The weights in safetensors files."""

    def __init__(self, source: str) -> None:
        self.label = source
        self.directory = Path(source) if Path(source).is_dir() else _download(source)
        publish.require_whole(self.directory, ours=False)
        self.place = _tensor_files(self.directory)
        config = self.directory / "config.json"
        self._renamed: dict[str, str] | None = None
        self.tied = config.is_file() and bool(files.read_json(config).get("tie_word_embeddings", True))

    @contextmanager
    def open(self, name: str, transposed: bool = False) -> Iterator[Matrix]:
        key = self._key(name)
        with files.open_tensors(files.child(self.directory, self.place[key])) as handle:
            dtype, shape = handle.get_slice(key).get_dtype(), tuple(handle.get_slice(key).get_shape())
            if dtype in FLOATS:
                if len(shape) != 2:
                    raise CheckpointError(
                        f"{self.label}: {key} is {shape}; only 2-D weights of linear layers can be read (no fused "
                        "experts)."
                    )
                tensor = handle.get_slice(key)
                out, width = reversed(shape) if transposed else shape
                yield Matrix(
                    (out, width),
                    None,
                    lambda start, stop: tensor[start:stop].T if transposed else tensor[:, start:stop],
                )
                return
        dense, kind = self._dequantized(key, dtype)
        dense = dense.T if transposed else dense
        yield Matrix((dense.shape[0], dense.shape[1]), kind, lambda start, stop: dense[:, start:stop])

    def header(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype of a tensor, which is not read."""
        with files.open_tensors(files.child(self.directory, self.place[key])) as handle:
            tensor = handle.get_slice(key)
            return tuple(tensor.get_shape()), str(tensor.get_dtype())

    def _key(self, name: str) -> str:
        """The key of a module's weight. Handles checkpoints with a missing or additional prefix, names that
        transformers changes, and heads tied to the embedding."""
        names = [f"{name}.weight"]
        if names[0] not in self.place:
            prefix, _, rest = name.partition(".")
            if not any(key.startswith(f"{prefix}.") for key in self.place):
                names.append(f"{rest}.weight")
            names += [key for key, model_key in self.renamed.items() if model_key == f"{name}.weight"]
            longer = [key for key in self.place if key.endswith(f".{name}.weight")]
            names += longer if len(longer) == 1 else []
        if self.tied and name.endswith(("lm_head", "embed_out")):
            names += [
                key for key in self.place if key.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
            ]
        result = next((key for key in names if key in self.place), None)
        if result is None:
            packed = any(f"{name}.{suffix}" in self.place for suffix in ("qweight", "weight_packed"))
            what = "is packed by GPTQ, AWQ or the like" if packed else "is not there"
            raise CheckpointError(f"{self.label}: the weight of {name} {what}. Give the 16-bit checkpoint.")
        return result

    @property
    def renamed(self) -> dict[str, str]:
        """`{key: key in the model}` as transformers loads this checkpoint; see `model_keys`."""
        if self._renamed is None:
            self._renamed = model_keys(self.directory, self.place)
        return self._renamed

    def _dequantized(self, key: str, dtype: str) -> tuple[Tensor, str]:
        """A bitsandbytes weight, from the tensors stored beside it."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        related = [name for name in self.place if name.startswith((f"{key}.", f"{key.removesuffix('weight')}SCB"))]
        values = {name: self.tensor(name) for name in [key, *related]}
        scale = values.get(f"{key.removesuffix('weight')}SCB")
        if dtype == "I8" and scale is not None:
            return weights.from_int8(values[key], scale), "8bit"
        if any(".quant_state.bitsandbytes__" in name for name in related):
            packed = values.pop(key)
            state = QuantState.from_dict(
                {name.removeprefix(f"{key}."): value for name, value in values.items()}, device=packed.device
            )
            return dequantize_4bit(packed, state).float(), "4bit"
        raise CheckpointError(
            f"{self.label}: {key} is stored as {dtype}, which cannot be read. Give the 16-bit checkpoint."
        )

    def tensor(self, key: str) -> Tensor:
        """One tensor as it is stored, by its key."""
        with files.open_tensors(files.child(self.directory, self.place[key])) as handle:
            return torch.clone(handle.get_tensor(key))


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index if there is one, and checked against the headers of the files."""
    if (directory / INDEX).is_file():
        place = files.read_json(directory / INDEX, limit=MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(place, dict) or not place or not all(isinstance(name, str) for name in place.values()):
            raise CheckpointError(f"{directory / INDEX} has no weight_map. Copy the checkpoint again.")
    elif (directory / SINGLE).is_file():
        place = None
    else:
        pickles = any(path.suffix in files.PICKLES for path in directory.iterdir())
        hint = (
            "Pickles are never opened: convert them to safetensors." if pickles else f"It needs {SINGLE} or {INDEX}."
        )
        raise CheckpointError(f"{directory} holds no safetensors checkpoint of a model. {hint}")
    held: dict[str, str] = {}
    for name in sorted(set(place.values())) if place else [SINGLE]:
        if not files.child(directory, name).is_file():
            raise CheckpointError(f"{directory}: the shard {name} is missing. Copy the whole checkpoint.")
        with files.open_tensors(files.child(directory, name)) as handle:
            held |= dict.fromkeys(handle.keys(), name)
    missing = [key for key in place or {} if key not in held]
    if missing:
        raise CheckpointError(
            f"{directory}: {INDEX} names {missing[0]}, which no shard holds. Copy the whole checkpoint."
        )
    return held


def _download(source: str) -> Path:
    """Download a checkpoint from the Hub; offline, take it from the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", INDEX, "config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source!r} is neither a directory nor a checkpoint that can be fetched ({type(error).__name__})."
        ) from error
