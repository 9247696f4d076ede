"""Weights of a model by module name, without building it: from safetensors files, a Hub id, or a loaded model. Dense
ones are read in blocks of columns, so that memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_safety.core import base_weights as weights
from peft_safety.core import files, publish
from peft_safety.core.targets import base_layers
from peft_safety.errors import CheckpointError, extra

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
FLOATS = ("F64", "F32", "F16", "BF16")
NOISE = {"4bit": 0.09, "8bit": 0.01, "fp8": 0.03}
"""`||Q(W) - W|| / ||W||` of a Gaussian weight: NF4 at block size 64, int8 by row, FP8 (e4m3)."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True)
class Matrix:
    """One weight `W (out_features, in_features)`. `block(start, stop)` gives columns, in fp32 if it is quantized."""

    shape: tuple[int, int]
    quantization: str | None
    block: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, weight: Any, quantization: str | None) -> Matrix:
        return cls((weight.shape[0], weight.shape[1]), quantization, lambda start, stop: weight[:, start:stop])


class Weights(Protocol):
    """Where the weights of one model come from."""

    label: str

    def open(self, name: str, transposed: bool = False) -> AbstractContextManager[Matrix]:
        """A CheckpointError says that the weight cannot be read. `transposed`: of a Conv1D, stored `(in, out)`."""


def open_weights(source: str | os.PathLike[str] | nn.Module) -> Weights:
    """The weights of a directory with safetensors, of a Hub id, or of a model without its adapters."""
    return ModuleWeights(source) if isinstance(source, nn.Module) else FileWeights(os.fspath(source))


class ModuleWeights:
    def __init__(self, model: nn.Module) -> None:
        self.layers = base_layers(model)
        self.label = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)

    @contextmanager
    def open(self, name: str, transposed: bool = False) -> Iterator[Matrix]:
        layer = self.layers.get(name)
        if layer is None:
            raise CheckpointError(f"{self.label} has no linear layer {name}. Give the model that the adapter is for.")
        if hasattr(layer, "weight") and not weights.is_whole(layer.weight):
            problem = "is on the meta device or sharded"
            raise CheckpointError(f"{self.label}: the weight of {name} {problem}. Give a checkpoint directory.")
        yield Matrix.of(weights.stored_weight(layer, name), weights.quantization(layer))


class FileWeights:
    def __init__(self, source: str) -> None:
        self.label = source
        self.directory = Path(source) if Path(source).is_dir() else _download(source)
        publish.require_whole(self.directory, ours=False)
        self.place = _tensor_files(self.directory)
        path = self.directory / "config.json"
        self.tied = path.is_file() and bool(files.read_json(path, any_number=True).get("tie_word_embeddings", True))

    @contextmanager
    def open(self, name: str, transposed: bool = False) -> Iterator[Matrix]:
        key = self._key(name)
        shape, dtype = self.header(key)
        if dtype not in FLOATS:
            dense, kind = self._dequantized(key, dtype)
            yield Matrix.of(dense.T if transposed else dense, kind)
            return
        if len(shape) != 2:
            raise CheckpointError(f"{self.label}: {key} is {shape}. Only 2-D weights of linear layers can be read.")
        with self._file_of(key) as handle:
            tensor = handle.get_slice(key)
            if transposed:
                yield Matrix((shape[1], shape[0]), None, lambda start, stop: tensor[start:stop].T)
            else:
                yield Matrix((shape[0], shape[1]), None, lambda start, stop: tensor[:, start:stop])

    def header(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype of a tensor, which is not read."""
        with self._file_of(key) as handle:
            tensor = handle.get_slice(key)
            return tuple(tensor.get_shape()), str(tensor.get_dtype())

    def _file_of(self, key: str) -> AbstractContextManager[Any]:
        return files.open_tensors(files.child(self.directory, self.place[key]))

    def _key(self, name: str) -> str:
        """The key of a module's weight. Handles checkpoints with a missing or additional prefix, names that
        transformers changes, and heads tied to the embedding."""
        names = [f"{name}.weight"]
        if names[0] not in self.place:
            prefix, _, rest = name.partition(".")
            if not any(key.startswith(f"{prefix}.") for key in self.place):
                names.append(f"{rest}.weight")
            names += [key for key, model_key in self._renamed.items() if model_key == f"{name}.weight"]
            longer = [key for key in self.place if key.endswith(f".{name}.weight")]
            names += longer if len(longer) == 1 else []
        if self.tied and name.endswith(("lm_head", "embed_out")):
            names += [key for key in self.place if key.endswith(EMBEDDINGS)]
        result = next((key for key in names if key in self.place), None)
        if result is None:
            packed = any(f"{name}.{suffix}" in self.place for suffix in ("qweight", "weight_packed"))
            what = "is packed by GPTQ, AWQ or the like" if packed else "is not there"
            raise CheckpointError(f"{self.label}: the weight of {name} {what}. Give the 16-bit checkpoint.")
        return result

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """`{key in the file: key in the model}` as transformers renames weights while it loads them, except for those
        that it fuses or splits; empty for an unknown architecture. No code of the checkpoint is run.
        """
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:
            return {}  # transformers 4 keeps the names
        model = _skeleton(self.directory)
        if model is None:
            return {}
        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        others = [one for one in transforms if not isinstance(one, WeightRenaming)]
        state, prefix = model.state_dict(), model.base_model_prefix
        renamed = {key: rename_source_key(key, renamings, others, prefix, state) for key in self.place}
        return {key: name for key, (name, fused) in renamed.items() if fused is None}

    def _dequantized(self, key: str, dtype: str) -> tuple[Tensor, str]:
        """A bitsandbytes weight, from the tensors stored with it."""
        scale = f"{key.removesuffix('weight')}SCB"
        if dtype == "I8" and scale in self.place:
            return weights.from_int8(self._tensor(key), self._tensor(scale)), "8bit"
        state = {name.removeprefix(f"{key}."): self._tensor(name) for name in self.place if name.startswith(f"{key}.")}
        if any(name.startswith("quant_state.bitsandbytes__") for name in state):
            with extra("quant", f"{self.label}: {key} is a 4-bit weight, and reading it needs bitsandbytes"):
                from bitsandbytes.functional import QuantState, dequantize_4bit
            packed = self._tensor(key)
            return dequantize_4bit(packed, QuantState.from_dict(state, device=packed.device)).float(), "4bit"
        raise CheckpointError(f"{self.label}: {key} is {dtype}, which cannot be read. Give the 16-bit checkpoint.")

    def _tensor(self, key: str) -> Tensor:
        with self._file_of(key) as handle:
            return torch.clone(handle.get_tensor(key))


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index if there is one, and checked against the headers of the files."""
    index: Any = {}
    if (directory / INDEX).is_file():
        index = files.read_json(directory / INDEX, limit=MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{directory / INDEX} has no weight_map. Copy the checkpoint again.")
    elif not (directory / SINGLE).is_file():
        hint = f"It needs {SINGLE} or {INDEX}."
        if any(path.suffix in files.PICKLES for path in directory.iterdir()):
            hint = "Pickles are never opened: convert them to safetensors."
        raise CheckpointError(f"{directory} holds no safetensors checkpoint of a model. {hint}")
    held: dict[str, str] = {}
    for name in sorted(set(index.values())) or [SINGLE]:
        path = files.child(directory, name)
        if not path.is_file():
            raise CheckpointError(f"{directory}: the shard {name} is missing. Copy the whole checkpoint.")
        with files.open_tensors(path) as handle:
            held |= dict.fromkeys(handle.keys(), name)
    for key in index:
        if key not in held:
            raise CheckpointError(f"{directory}: {INDEX} names {key}, which no shard holds. Copy all of it.")
    return held


def _download(source: str) -> Path:
    """Download a checkpoint from the Hub; offline, take it from the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", INDEX, "config.json"]))
    except (OSError, ValueError) as error:  # the Hub's errors are among them
        reason = type(error).__name__
        raise CheckpointError(f"{source!r} is no directory, and no Hub checkpoint in reach ({reason}).") from error


def _skeleton(directory: Path) -> Any:
    import transformers

    if not (directory / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            return None
        with torch.device("meta"):
            return kind(config)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError):
        return None  # a config that transformers cannot build: the names stay as they are
