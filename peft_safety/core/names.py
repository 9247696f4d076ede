"""Names of modules: as the base model has them, whatever is wrapped around the model and its layers; patterns that
mean exactly them; and short lists of them for messages.

PEFT matches a list of names as suffixes, and the keys of `rank_pattern` and `alpha_pattern` as regular expressions
behind any prefix, the first match first. A full name can therefore mean more than one module: "layers.0.lin" is the
end of "img.layers.0.lin".
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a module name that torch's wrappers add (compiled, sharded and checkpointed modules)."""
SHOWN = 3
"""Number of names that a message lists."""


def base_model(model: nn.Module) -> nn.Module:
    """The model that adapters were put into: without PEFT's models, compiled, parallel and other modules around it."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    inside = (
        m
        for m in model.modules()
        if isinstance(m, (PeftModel, BaseTuner)) or isinstance(vars(m).get("peft_config"), dict)
    )
    model = next(inside, model)
    while True:
        if isinstance(model, PeftModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif (
            wrapped := next((model._modules[part] for part in WRAPPERS if part in model._modules), None)
        ) is not None:
            model = wrapped
        else:
            return model


def original(module: nn.Module) -> nn.Module:
    """The base model's own module under what PEFT put in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        module = inner  # type: ignore[assignment]
    return module


def own_name(name: str) -> str:
    """A module's name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def walk(model: nn.Module, shared: bool = False) -> Iterator[tuple[str, str, nn.Module]]:
    """`(own name, name in `model`, module)` of every module of the base model. An adapter's layer stands for the layer
    under it and is not entered.

    Args:
        shared: name a module that is in several places by each of them, not by the first only.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = base_model(model)
    root = next(name for name, module in model.named_modules() if module is base)
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules(remove_duplicate=not shared):
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield own_name(name), ".".join(filter(None, (root, name))), module


def places(model: nn.Module) -> dict[str, str]:
    """`{name in the base model: name in the model}` of every module, as `walk` gives them."""
    return {own: name for own, name, _ in walk(model, shared=True)}


def relocated(key: str, prefixes: Mapping[str, str]) -> str:
    """The key of a tensor with the longest module name in it replaced."""
    module, dot, rest = key.rpartition(".")
    while dot:
        if module in prefixes:
            return ".".join(filter(None, (prefixes[module], rest)))
        module, dot, last = module.rpartition(".")
        rest = f"{last}.{rest}"
    return key


def exact(table: Mapping[str, T]) -> dict[str, T]:
    """The same table with keys that PEFT matches with exactly one full name."""
    return {f"^{re.escape(name)}": value for name, value in table.items()}


def look_alikes(wanted: Collection[str], existing: Iterable[str]) -> list[str]:
    """Existing names that are not wanted but end with a wanted name, so that PEFT would match them."""
    result = []
    for name in existing:
        rest = name
        while name not in wanted and "." in rest:
            rest = rest.partition(".")[2]
            if rest in wanted:
                result.append(name)
                break
    return result


def exclude_look_alikes(config: Any, existing: Iterable[str]) -> None:
    """Make a LoRA config with full module names match no other existing module."""
    config.exclude_modules = "|".join(map(re.escape, look_alikes(config.target_modules, existing))) or None


def pin(config: Any, modules: Mapping[str, tuple[int, float]], existing: Mapping[str, str] | None = None) -> None:
    """Make a LoRA config mean exactly these modules, with these ranks and alphas.

    Args:
        modules: `{own name: (rank, alpha)}`.
        existing: `places` of the model that it is for. Without one, modules whose names end with a wanted name cannot
            be told apart.
    """
    existing = {name: name for name in modules} if existing is None else existing
    wanted = {existing.get(name, name): value for name, value in modules.items()}
    config.target_modules = set(wanted)
    exclude_look_alikes(config, existing.values())
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = exact({name: rank for name, (rank, _) in wanted.items() if rank != config.r})
    config.alpha_pattern = exact({name: alpha for name, (_, alpha) in wanted.items() if alpha != config.lora_alpha})


def pattern_value(patterns: Mapping[str, T] | None, module: str, default: T) -> T | None:
    """What PEFT takes from `rank_pattern` or `alpha_pattern` for a module: the first match. None where a regular
    expression may decide: none is ever run.

    A key that is a name is compared: letters, digits, `_`, `-`, `.` (which stands for any character) and `\\` before
    punctuation, with or without `^` before and `$` behind. Another key before it is passed over only if it ends
    otherwise than the module.
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


_NAME = re.compile(r"\^?(?:[\w.\-]|\\[^\w\s])*\$?")
_LETTER = re.compile(r"\\?.")


def _is_end(key: str, module: str) -> bool:
    """Whether `(.*\\.)?(key)$` matches, for a key that is a name."""
    anchored, body = key.startswith("^"), key.removeprefix("^")
    letters = _LETTER.findall(body if body.endswith("\\$") else body.removesuffix("$"))
    start = len(module) - len(letters)
    if start < 0 or (start > 0 and (anchored or module[start - 1] != ".")):
        return False
    return all(wanted == "." or wanted[-1] == letter for wanted, letter in zip(letters, module[start:], strict=True))


def _certain_end(key: str) -> str:
    """The literal end that every match of a regular expression has, as far as it is obvious."""
    if "|" in key or "(?" in key:
        return ""
    match = re.search(r"(\\\w?)?([\w!,;:=-]*)$", key)
    return "" if match is None or match[1] else match[2]


def listed(names: Collection[str]) -> str:
    """`a, b, c and 21 more`."""
    first = sorted(names)[:SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def exclusion_pattern(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """A regular expression that matches the full names of some modules and none of the others: what `exclude_modules`
    takes.

    Where a whole subtree is meant it says so, and numbered layers are one term:
    `model\\.vision_tower\\..*|model\\.layers\\.\\d+\\.mlp\\.gate`.
    """
    names, others = set(names), set(others) - set(names)
    inner = {parent for other in others for parent in _parents(other)}  # modules that hold one of the others
    terms: list[str] = []
    for name in sorted(names):
        if any(re.fullmatch(term, name) for term in terms):
            continue
        top = next(
            (
                parent
                for parent in _parents(name)
                if parent not in inner and sum(n.startswith(f"{parent}.") for n in names) > 1
            ),
            None,
        )
        exact = re.escape(name) if top is None else re.escape(top) + r"\..*"
        broad = re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", exact)
        terms.append(exact if any(re.fullmatch(broad, other) for other in others) else broad)
    return "|".join(terms)


def _parents(name: str) -> list[str]:
    """The parent modules, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def public_name(label: str) -> str:
    """A Hub id or an adapter's name as it is; of a local path only the last part."""
    return os.path.basename(os.path.normpath(label)) if os.path.isabs(label) or os.path.exists(label) else label
