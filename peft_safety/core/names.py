"""Names of modules in the base model, without wrappers; patterns that match exactly these; short lists for messages.

PEFT matches a list of names as suffixes, and the keys of `rank_pattern` and `alpha_pattern` as regular expressions
after any prefix: "layers.0.lin" also means "img.layers.0.lin". The first match counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a module name that torch's wrappers add (compiled, sharded and checkpointed modules)."""
SHOWN = 3
"""Number of names that a message lists."""


def base_model(model: Any) -> nn.Module:
    """The model that adapters were put into, without the modules of PEFT, torch.compile and parallelism around it."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    inner = {PeftModel: "base_model", BaseTuner: "model"}
    inner |= dict.fromkeys((nn.DataParallel, nn.parallel.DistributedDataParallel), "module")
    for module in model.modules():
        if isinstance(module, (PeftModel, BaseTuner)) or isinstance(vars(module).get("peft_config"), dict):
            model = module
            break
    while True:
        names = [name for kind, name in inner.items() if isinstance(model, kind)]
        names += [name for name in WRAPPERS if name in model._modules]
        if not names:
            return model
        model = getattr(model, names[0])


def original(module: nn.Module) -> nn.Module:
    """The base model's own module under what PEFT put in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        module = inner  # type: ignore[assignment]
    return module


def own_name(name: str) -> str:
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def walk(model: nn.Module, shared: bool = False) -> Iterator[tuple[str, str, nn.Module]]:
    """`(own name, name in `model`, module)` of every module of the base model. An adapter's layer is not entered: it
    stands for its base layer. With `shared`, a module in several places is listed once for each of them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_model(model)
    root = next(name for name, module in model.named_modules() if module is base)
    inside = None  # the layer whose modules come next, depth first
    for name, module in base.named_modules(remove_duplicate=not shared):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        yield own_name(name), ".".join(filter(None, (root, name))), module


def places(model: nn.Module) -> dict[str, str]:
    """`{name in the base model: name in the model}` of every module, as `walk` gives them."""
    return {own: name for own, name, _ in walk(model, shared=True)}


def relocated(key: str, prefixes: Mapping[str, str]) -> str:
    """The key of a tensor with the longest module name in it replaced."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (module := ".".join(parts[:end])) in prefixes:
            return ".".join(filter(None, (prefixes[module], *parts[end:])))
    return key


def exclude_look_alikes(config: Any, existing: Iterable[str]) -> None:
    """Set `exclude_modules` so that the full names in `target_modules` match no other module that ends like them."""
    ends = tuple(f".{name}" for name in config.target_modules)
    others = [name for name in existing if name not in config.target_modules and name.endswith(ends)]
    config.exclude_modules = "|".join(map(re.escape, others)) or None


def pin(config: Any, modules: Mapping[str, tuple[int, float]], existing: Mapping[str, str] | None = None) -> None:
    """Make a LoRA config mean exactly the modules `{own name: (rank, alpha)}`. `existing` are the model's `places`."""
    places = existing or {}
    wanted = {places.get(name, name): value for name, value in modules.items()}
    config.target_modules = set(wanted)
    exclude_look_alikes(config, places.values())
    config.layers_to_transform = config.layers_pattern = None
    exact = {f"^{re.escape(name)}": value for name, value in wanted.items()}
    config.rank_pattern = {name: rank for name, (rank, _) in exact.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, (_, alpha) in exact.items() if alpha != config.lora_alpha}


_NAME = re.compile(r"\^?(?:[\w.\-]|\\[^\w\s])*\$?")
_LETTER = re.compile(r"\\?.")


def pattern_value(patterns: Mapping[str, T] | None, module: str, default: T) -> T | None:
    """What PEFT takes from `rank_pattern` or `alpha_pattern` for a module: the value of the first match. No regular
    expression is run: keys that are names are compared, others are skipped if they certainly end differently, and else
    the result is None, unknown.
    """
    vague = False
    for key, value in (patterns or {}).items():
        if _NAME.fullmatch(key):
            if _is_end(key, module):
                return value
        elif module.endswith(_certain_end(key)):
            return None
        else:
            vague = True
    return None if vague else default


def _is_end(key: str, module: str) -> bool:
    """Whether `(.*\\.)?(key)$` matches, for a key that is a name."""
    anchored, body = key.startswith("^"), key.removeprefix("^")
    letters = _LETTER.findall(body if body.endswith("\\$") else body.removesuffix("$"))
    start = len(module) - len(letters)
    if start < 0 or (start > 0 and (anchored or module[start - 1] != ".")):
        return False
    return all(wanted == "." or wanted[-1] == letter for wanted, letter in zip(letters, module[start:], strict=True))


def _certain_end(key: str) -> str:
    """A literal with which every match of a regular expression ends; empty if it is not obvious."""
    match = None if "|" in key or "(?" in key else re.search(r"(\\\w?)?([\w!,;:=-]*)$", key)
    return "" if match is None or match[1] else match[2]


def by_number(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def kind_of(name: str) -> str:
    """Last part of a module's name: `q_proj`."""
    return name.rpartition(".")[2]


def lines(
    rows: Sequence[T], name: Callable[[T], str], every: bool, kind: Callable[[str], str] = kind_of
) -> list[tuple[str, list[T]]]:
    """Label and rows of each line of a table: one for each module; or one for each kind of module, in the order in
    which they appear, and one for all.
    """
    if every or not rows:
        return [(name(row), [row]) for row in rows]
    kinds: dict[str, list[T]] = {}
    for row in rows:
        kinds.setdefault(kind(name(row)), []).append(row)
    return [(f"{label} ({len(part)})", part) for label, part in [*kinds.items(), ("all", list(rows))]]


def listed(names: Collection[str]) -> str:
    """`a, b, c and 21 more`."""
    rest = len(names) - SHOWN
    return ", ".join(sorted(names)[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def exclusion_pattern(names: Iterable[str], others: Iterable[str]) -> str:
    """A pattern for `exclude_modules` that matches exactly these names, numbered layers by one term if possible."""
    names = set(names)
    others = set(others) - names
    broad = {exact: re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", exact) for exact in map(re.escape, names)}
    clashing = {term for term in set(broad.values()) if any(re.fullmatch(term, other) for other in others)}
    return "|".join(sorted({exact if term in clashing else term for exact, term in broad.items()}))


def public_name(label: str) -> str:
    """A Hub id or an adapter's name unchanged; only the last part of a local path."""
    return os.path.basename(os.path.normpath(label)) if os.path.isabs(label) or os.path.exists(label) else label
