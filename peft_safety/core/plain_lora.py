"""Plain LoRA on disk: reading and checking an adapter directory, and writing one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from peft_safety.core import files, publish
from peft_safety.core.certificate import FILE_NAME as CERTIFICATE
from peft_safety.core.factor_forms import KEYS, LINEAR, Form
from peft_safety.core.features import check_plain, check_sizes
from peft_safety.core.names import by_number, pattern_value, pin
from peft_safety.core.projection import all_finite
from peft_safety.errors import ArtifactError, ConfigError, PeftSafetyError

if TYPE_CHECKING:  # importing PEFT registers the methods, which import this module
    from peft import LoraConfig

MANIFEST = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
CARD = "README.md"
PREFIX = "base_model.model."
"""Of every key that PEFT stores."""
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")
"""Of a whole model in its directory."""
REPAIRED_TYPE = "SAFELORA"
"""`peft_type` of a stored `SafeLoRAConfig`. Its factors are plain LoRA."""
PLAIN_TYPES = ("LORA", REPAIRED_TYPE)
RECORD = "peft_safety.safe_lora"
"""Key of a Safe LoRA record in the header of the adapter's safetensors file."""

MAX_PRODUCT = 1e30
"""Of `s B A`, by its largest entries."""
UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What PEFT raises when a config holds a value of a wrong kind."""
DTYPES = ("F32", "BF16", "F16")
EXTRA_DTYPES = (*DTYPES, "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Dtypes of tensors that are no factors, such as buffers of a module in `modules_to_save`."""


@dataclass(frozen=True)
class Factors:
    """The update `s B A` of one module: `a (r, n)`, `b (m, r)`, and `s`, NaN where only a regular expression in the
    config says what alpha is. `transposed`: the checkpoint stores the base weight as `(n, m)`. `form`: how PEFT stores
    the factors.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool = False
    form: Form = LINEAR

    def scaled(self) -> tuple[Tensor, Tensor]:
        """`(A, s B)`, copied to the CPU."""
        return self.a.detach().cpu().clone(), (self.b.detach().float() * self.scaling).to(self.b.dtype).cpu()


@dataclass(frozen=True)
class PlainLoRA:
    """A checked directory. `extra` are trained tensors that are no factors, `record` is of a Safe LoRA repair."""

    fields: dict[str, Any]
    config: LoraConfig
    factors: dict[str, Factors]
    extra: dict[str, Tensor]
    record: dict[str, Any] | None

    @property
    def rows(self) -> dict[str, Tensor]:
        """`lora_A` by module."""
        return {name: factor.a for name, factor in self.factors.items()}

    def modules(self, where: Path) -> dict[str, tuple[int, float]]:
        """Rank and alpha by full name, instead of any pattern. A ConfigError refuses an alpha that only a regular
        expression says.
        """
        result = {}
        for name, factor in self.factors.items():
            if math.isnan(factor.scaling):
                raise ConfigError(
                    f"{where}: a regular expression says the alpha of {name}, and none is run. Write full names."
                )
            rank = int(factor.a.shape[0])
            result[name] = (rank, factor.scaling * (math.sqrt(rank) if self.config.use_rslora else rank))
        return result


def broken(where: Path | str, problem: str) -> ArtifactError:
    return ArtifactError(f"{where}: {problem}. Copy or save the adapter again.")


def read_manifest(directory: Path, warn: bool = True) -> dict[str, Any]:
    """The bounded JSON of a directory's `adapter_config.json`; an ArtifactError refuses a mixture of two saves."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory. Give the directory that save_pretrained wrote.")
    publish.require_whole(directory, warn=warn)
    return files.read_json(files.child(directory, MANIFEST), files.MAX_LISTING_BYTES)


def config_of(fields: Mapping[str, Any], path: Path) -> Any:
    """The config that PEFT makes of a stored one. A PeftSafetyError says which field does not fit."""
    from peft import LoraConfig

    try:
        return LoraConfig.from_peft_type(**{name: value for name, value in fields.items() if name != "runtime_config"})
    except PeftSafetyError:
        raise
    except UNFIT as error:
        raise broken(path, f"not a config of this PEFT ({error})") from error


def read_plain(directory: Path, allowed: Collection[str] = (), warn: bool = True, *, linear: bool = True) -> PlainLoRA:
    """Read and check a plain LoRA directory, repaired by Safe LoRA or not. Runs no pickle and no regular expression of
    it. `allowed`: features that the caller knows, see `NOT_PLAIN`; with them, the scalings are not those of a layer.
    `linear`: factors of convolutions and embeddings are refused.

    Raises:
        ArtifactError: files or factors are missing, not finite, or of a wrong shape or dtype; a tensor that no plain
            LoRA has; a protected adapter under another name.
        ConfigError: an adapter of another kind, an unsupported feature (see `check_plain`), or a number out of range.
    """
    fields, path = read_manifest(directory, warn), directory / MANIFEST
    kind, protected = fields.get("peft_type"), fields.get("safety_artifact") is not None
    if kind not in PLAIN_TYPES:
        hint = " It is a protected adapter; peft-safety export makes a plain LoRA of it." if protected else ""
        raise ConfigError(f"{directory} holds a {kind!r} adapter. Give a plain LoRA adapter.{hint}")
    if protected:
        raise broken(path, f"peft_type {kind!r} would read a protected adapter without its protection")
    check_sizes(fields, str(path))
    config = config_of(fields, path)
    check_plain(config, str(directory), allowed)
    file = files.child(directory, ADAPTER_FILE)
    with files.open_tensors(file) as handle:
        record = _record(handle, file) or fields.get("safe_lora")
        if not isinstance(record, (dict, type(None))):
            raise broken(path, "safe_lora must be a JSON object")
        pairs = _factor_keys(handle, file, linear)
        others = set(handle.keys()).difference(*(pair for pair, _ in pairs.values()))
        extra = {key: read_tensor(handle, file, key, ("F64", *EXTRA_DTYPES)) for key in sorted(others)}
        factors = {}
        for module, (pair, form) in pairs.items():
            a, b = form.matrices(*(read_tensor(handle, file, key, ("F64", *DTYPES)) for key in pair))
            alpha = pattern_value(fields.get("alpha_pattern"), module, fields["lora_alpha"])
            scaling = scaling_of(math.nan if alpha is None else alpha, a.shape[0], fields)
            check_product(file, module, a, b, scaling)
            factors[module] = Factors(a, b, scaling, bool(fields.get("fan_in_fan_out")), form)
    if record is not None:
        config.safe_lora = record
    return PlainLoRA(fields, config, factors, extra, record)


def extra_keys(path: Path) -> list[str]:
    """The keys of an adapter's file that are no factors, from its header."""
    with files.open_tensors(path) as handle:
        return sorted(set(handle.keys()).difference(*(pair for pair, _ in _factor_keys(handle, path).values())))


def read_tensor(handle: Any, path: Path, key: str, dtypes: tuple[str, ...]) -> Tensor:
    """A tensor of an open safetensors file. Another dtype, or a value that is not finite, is an ArtifactError."""
    dtype = handle.get_slice(key).get_dtype()
    if dtype not in dtypes:
        raise broken(path, f"{key} is {dtype}; an adapter holds {', '.join(dtypes)}")
    tensor: Tensor = handle.get_tensor(key)
    if not all_finite(tensor):
        raise broken(path, f"{key} {tuple(tensor.shape)} holds NaN or Inf")
    return tensor


def check_product(path: Path, module: str, a: Tensor, b: Tensor, scaling: float) -> None:
    """An ArtifactError refuses finite factors whose product overflows. A NaN scaling, of a pattern, is passed."""
    largest = float(a.abs().max()) * float(b.abs().max()) * a.shape[0] * scaling
    if largest > MAX_PRODUCT:
        shapes = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
        raise broken(path, f"{module}: the product of {shapes} may reach {largest:.2g}")


def _factor_keys(handle: Any, path: Path, linear: bool = False) -> dict[str, tuple[tuple[str, str], Form]]:
    """The keys of lora_A and lora_B by module, layer 2 before layer 10, and their form. Their shapes are checked in
    the header. `linear` refuses every other form.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in handle.keys():  # noqa: SIM118
        module, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        if kind and (kind not in KEYS or not key.startswith(PREFIX)):
            raise ArtifactError(
                f"{path}: {key} is no factor of a plain LoRA (DoRA and biases are not supported). Train without it."
            )
        if kind and pairs.setdefault(module, {}).setdefault(KEYS[kind], key) != key:
            raise broken(path, f"{module} has two factors {KEYS[kind]}")
    if not pairs:
        raise ArtifactError(f"{path} holds no LoRA factors. Give an adapter directory.")
    result = {}
    for module in sorted(pairs, key=by_number):
        keys = pairs[module]
        a, b = (tuple(handle.get_slice(keys[kind]).get_shape()) if kind in keys else () for kind in "AB")
        form = stored_form(module, keys, a, b)
        if form is None:
            raise broken(path, f"{module} has lora_A {a or 'missing'} and lora_B {b or 'missing'}")
        if linear and not form.is_linear:
            kind = "an embedding" if form.embedding else "a convolution"
            raise ArtifactError(f"{path}: {module} is {kind} ({a}), which is not supported here. Train without it.")
        result[module] = (keys["A"], keys["B"]), form
    return result


def stored_form(module: str, keys: Mapping[str, str], a: tuple[int, ...], b: tuple[int, ...]) -> Form | None:
    """The form of two factors "A" and "B" by their keys and shapes; None if these are no factors of one layer."""
    form = Form.stored_as(a, b, any("lora_embedding_" in key for key in keys.values()))
    fits = form is not None and all(keys[kind] == f"{PREFIX}{form.key(module, kind)}" for kind in "AB")
    return form if fits else None


def scaling_of(alpha: float, rank: int, fields: Mapping[str, Any]) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rank-stabilized LoRA."""
    return float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def stored_record(directory: Path) -> dict[str, Any] | None:
    path = directory / ADAPTER_FILE
    if not path.is_file():
        return None
    with files.open_tensors(path) as handle:
        return _record(handle, path)


def _record(handle: Any, path: Path) -> dict[str, Any] | None:
    text = (handle.metadata() or {}).get(RECORD)
    return None if text is None else files.parse_json(text, str(path))


def rewrite(path: Path, renamed: Callable[[str], str] = str, record: Mapping[str, Any] | None = None) -> None:
    """Write an adapter's file again where keys change, or with the record of a repair in its header."""
    with files.open_tensors(path) as handle:
        if record is None and all(renamed(key) == key for key in handle.keys()):  # noqa: SIM118
            return
        metadata = handle.metadata() or {}
        tensors = {renamed(key): handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    _save_tensors(tensors, path, metadata if record is None else {**metadata, RECORD: json.dumps(dict(record))})


def plain_config(
    pairs: Mapping[str, tuple[Tensor, Tensor]], like: Mapping[str, Any], places: Mapping[str, str] | None = None
) -> LoraConfig:
    """The config of `(A, s B)` by module, with full names and alpha = rank; other fields are as in `like`."""
    from peft import LoraConfig

    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(pairs),
        inference_mode=True,
        task_type=like.get("task_type"),
        fan_in_fan_out=bool(like.get("fan_in_fan_out")),
        alora_invocation_tokens=like.get("alora_invocation_tokens"),
        base_model_name_or_path=like.get("base_model_name_or_path"),
    )
    pin(config, {name: (r, r) for name, r in ranks.items()}, places)
    return config


def factor_tensors(
    pairs: Mapping[str, tuple[Tensor, Tensor]], forms: Mapping[str, Factors] | None = None
) -> dict[str, Tensor]:
    """`(A, B)` by module under PEFT's keys, in the forms of these factors; else in that of linear layers."""
    result = {}
    for name, pair in pairs.items():
        form = LINEAR if forms is None else forms[name].form
        for kind, x in zip("AB", form.stored(*pair), strict=True):
            result[f"{PREFIX}{form.key(name, kind)}"] = x
    return result


def check_elsewhere(source: Path, target: str | os.PathLike[str] | None) -> None:
    """A ConfigError refuses to write a repaired adapter over its original, or among the files of a model."""
    if target is not None and os.path.realpath(target) == os.path.realpath(source):
        raise ConfigError(f"{source} is also the output directory. Write somewhere else; the original adapter stays.")
    if target is not None:
        check_no_model(Path(target))


def check_no_model(target: Path) -> None:
    """A ConfigError refuses to write an adapter among the files of a model: who loads them would get both."""
    found = [path.name for pattern in MODEL_FILES for path in sorted(target.glob(pattern))]
    if found:
        problem = f"{target} holds a model ({found[0]}), and an adapter beside it would be loaded with it"
        raise ConfigError(f"{problem}. Give another directory.")


def check_no_adapter(target: Path) -> None:
    """A ConfigError refuses to write a whole model beside an adapter, which would be loaded on top of it."""
    if os.path.lexists(target / MANIFEST):
        problem = f"{target} holds an adapter, which would be loaded on top of the new model"
        raise ConfigError(f"{problem}. Give another directory.")


def card_with(source: Path, section: str) -> str:
    """The model card of an adapter directory, or a new one, with a further section."""
    card = files.child(source, CARD)
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\nlibrary_name: peft\n---\n"
    return text.rstrip() + "\n\n" + section


def write_plain(
    target: Path,
    tensors: Mapping[str, Tensor],
    config: LoraConfig | Mapping[str, Any],
    card: str,
    records: Mapping[str, Any] | None = None,
    more: Callable[[Path], object] | None = None,
) -> None:
    """Publish a plain LoRA directory atomically. `records` go into its header; `more` writes further files into it."""
    fields = config if isinstance(config, Mapping) else config.to_dict()
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    header = {key: json.dumps(value) for key, value in (records or {}).items()}
    with publish.publishing(target, MANIFEST) as folder:
        _save_tensors(tensors, folder / ADAPTER_FILE, header)
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
        if more is not None:
            more(folder)
        kept = (folder / CERTIFICATE).is_file()
    if not kept:
        files.drop(target / CERTIFICATE)  # of the factors that were there before


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt", **metadata})
