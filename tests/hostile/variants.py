"""Good small adapters of every method, and a generator of damages: what `test_variants.py` runs."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_safety import GuardSpaceConfig, OrthoSafetyPatchConfig, SafetySubspace, SaLoRAConfig, repair_adapter
from peft_safety.core.subspace_file import FORMAT
from tests.hostile import tools
from tests.hostile.damages import link, remove, truncate, write
from tests.hostile.saver import WIDTH, Small
from tests.hostile.tools import ADAPTER, MANIFEST, PREFIX, SUBSPACE, Damage, Tensors

CERTIFICATE = "safety_certificate.json"
NAMES = ("first", "second")
EVIL = r"([a-z_.0-9]+)+!"
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**400, 1e308, "x", EVIL, "\ud800", [], [1], [EVIL], ["first"], [None], {}, {"first": 1},
    {"first": [1]}, {EVIL: 2}, [[[]]],
)  # fmt: skip
"""What is put into every field of a config."""


def bases(*sides: str, seed: int = 0) -> SafetySubspace:
    generator = torch.Generator().manual_seed(seed)
    table: Any = {
        name: {side: torch.linalg.qr(torch.randn(WIDTH, 4, generator=generator)).Q for side in sides} for name in NAMES
    }
    return SafetySubspace(table)


METHODS: dict[str, Callable[[], LoraConfig]] = {
    "salora": lambda: SaLoRAConfig(subspace=bases("out"), **COMMON),
    "task": lambda: SaLoRAConfig(subspace=bases("out"), init="task", task_data=bases("out", seed=1), **COMMON),
    "guardspace": lambda: GuardSpaceConfig(subspace=bases("in"), train="A", **COMMON),
    "combined": lambda: GuardSpaceConfig(subspace=bases("in", "out"), combine="salora", **COMMON),
    "window": lambda: GuardSpaceConfig(subspace=bases("in"), train="window", window=8, a_init="random", **COMMON),
    "frozen": lambda: GuardSpaceConfig(subspace=bases("in"), train="B", a_init="random", **COMMON),
    "patch": lambda: OrthoSafetyPatchConfig(subspace=bases("in"), **COMMON),
    "both": lambda: OrthoSafetyPatchConfig(subspace=bases("in", "out"), side="both", **COMMON),
    "repaired": lambda: LoraConfig(**COMMON),
}
COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(NAMES)}


def save(method: str, root: Path) -> Path:
    """A trained adapter of a method."""
    torch.manual_seed(0)
    directory = root / method
    model = get_peft_model(Small(), METHODS[method]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if method != "repaired":
        model.eval().save_pretrained(str(directory))
        return directory
    model.save_pretrained(str(root / "plain"))
    repair_adapter(root / "plain", bases("in"), directory)
    return directory


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2)))
    return result


def forged(change: Callable[[Tensors], Any], name: str = ADAPTER) -> Damage:
    """Change the tensors of a file; the hashes and the list of extra tensors are forged, where there are any."""

    def damage(directory: Path) -> None:
        path = directory / name
        with safe_open(str(path), "pt") as handle:
            header = handle.metadata()
        content = load_file(path)
        change(content)
        save_file({key: value.contiguous() for key, value in content.items()}, path, metadata=header)
        config = tools.manifest(directory)
        if config.get("safety_artifact"):
            kept = load_file(directory / ADAPTER)
            config["safety_artifact"]["extra_tensors"] = sorted(key for key in kept if ".lora_" not in key)
            tools.forge(directory, config)

    return damage


def flip(name: str, seed: int) -> Damage:
    def damage(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        position = int(torch.randint(len(content), (), generator=torch.Generator().manual_seed(seed)))
        content[position] ^= 1 << seed % 8
        (directory / name).write_bytes(content)

    return damage


def grown(name: str) -> Damage:
    """64 GB of zeros, of which none is on the disk."""
    return lambda directory: os.truncate(directory / name, 64 << 30)


def field(name: str, value: Any) -> Damage:
    def damage(directory: Path) -> None:
        config = tools.manifest(directory) | {name: value}
        record = config.get("safety_artifact")
        if name != "safety_artifact" and isinstance(record, dict):
            tools.forge(directory, config)
        else:
            (directory / MANIFEST).write_text(json.dumps(config))

    return damage


def of_files(names: list[str]) -> Iterator[tuple[str, Damage]]:
    """What can happen to any file."""
    for name in names:
        for share in (0.0, 0.3, 0.99):
            yield f"{name} cut to {share}", truncate(name, share)
        for seed in range(6):
            yield f"{name} bit {seed}", flip(name, seed)
        yield f"{name} missing", remove(name)
        yield f"{name} is a directory", lambda d, n=name: (d / n).unlink() or (d / n).mkdir()
        yield f"{name} is a pipe", lambda d, n=name: (d / n).unlink() or os.mkfifo(d / n)
        yield f"{name} leads outside", link(name)
        yield f"{name} is a device", lambda d, n=name: (d / n).unlink() or (d / n).symlink_to("/dev/zero")
        yield f"{name} is sparse", grown(name)
        yield f"{name} is noise", write(name, bytes(range(256)) * 40)


def of_factors() -> Iterator[tuple[str, Damage]]:
    """Of one module; then tensors that do not belong there."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "NaN": tools.poke(float("nan")),
        "Inf": tools.poke(float("inf")),
        "huge": lambda x: x * 1e37,
        "transposed": lambda x: x.T,
        "wide": lambda x: torch.cat([x, x], 1),
        "long": lambda x: torch.cat([x, x]),
        "double": lambda x: x.double(),
        "integers": lambda x: x.to(torch.int8),
        "empty": lambda x: x[:0],
        "flat": lambda x: x.flatten(),
        "leaking": lambda x: x + 0.1,
    }
    for factor in "AB":
        key = f"{PREFIX}first.lora_{factor}.weight"
        for name, change in changes.items():
            yield f"lora_{factor} {name}", forged(tools.put(key, change))
        yield f"lora_{factor} missing", forged(lambda t, k=key: t.pop(k))
    keys = [f"{PREFIX}first.lora_{factor}.weight" for factor in "AB"]
    yield "both huge", forged(lambda t: [t.__setitem__(key, t[key] * 1e25) for key in keys])
    for name in ("first.base_layer.weight", "first.weight", "lm_head.weight", "first.lora_A.x.weight", "x.lora_B"):
        yield f"also {name}", forged(lambda t, n=name: t.update({PREFIX + n: torch.ones(WIDTH, WIDTH)}))


def of_texts() -> Iterator[tuple[str, Damage]]:
    yield "a duplicate key", tools.text(lambda t: t.replace('"r":', '"r": 8, "r":', 1))
    yield "NaN for alpha", tools.text(lambda t: t.replace('"lora_alpha": 8', '"lora_alpha": NaN'))
    yield "a long number", tools.text(lambda t: t.replace('"lora_alpha": 8', f'"lora_alpha": {"9" * 5000}'))
    yield "deep lists", tools.text(lambda t: t.replace('"lora_alpha": 8', f'"lora_alpha": {"[" * 9000}'))
    yield "a lone surrogate", tools.text(lambda t: t.replace('"lora_alpha": 8', '"lora_alpha": "\\ud800"'))
    yield "UTF-16", lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_text().encode("utf-16"))
    yield "two megabytes", tools.text(lambda t: t + " " * (2 << 20))


def of_bases() -> Iterator[tuple[str, Damage]]:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "NaN": tools.poke(float("nan")),
        "not orthonormal": lambda u: u * 1.01,
        "without a column": lambda u: u[:, :0],
        "one column": lambda u: u[:, :1],
        "of another layer": lambda u: u.flip(0),
        "everything": lambda u: torch.eye(len(u)),
        "of fewer rows": lambda u: u[:16],
        "bytes": lambda u: u.to(torch.int8),
    }

    def every(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
        return lambda t: t.update({key: change(u.clone()) for key, u in t.items() if key.startswith("basis.")})

    for name, change in changes.items():
        yield f"bases {name}", forged(every(change), SUBSPACE)
    yield "no bases", forged(lambda t: [t.pop(key) for key in list(t) if key.startswith("basis.")], SUBSPACE)
    yield "no fingerprints", forged(lambda t: [t.pop(k) for k in list(t) if k.startswith("finger")], SUBSPACE)
    large = torch.linalg.qr(torch.randn(512, 64)).Q.contiguous()
    shared = {f"basis.out.x{i}": "basis.out.large" for i in range(8_000)}
    yield "one basis for 8,000", lambda d: tools.subspace_header(d, shared, large)
    yield "another type", tools.text(lambda t: t.replace('"peft_type": "', '"peft_type": "X'))
    yield "another header", lambda d: save_file(load_file(d / SUBSPACE), d / SUBSPACE, metadata={FORMAT: "[]"})


def files_of(directory: Path) -> list[str]:
    return [name for name in (ADAPTER, SUBSPACE, CERTIFICATE, MANIFEST) if (directory / name).is_file()]


def variants(directory: Path) -> list[tuple[str, Damage]]:
    """Every damage that a directory can have."""
    names = files_of(directory)
    result = [*of_files(names), *of_factors(), *of_texts()]
    return [*result, *of_bases()] if SUBSPACE in names else result


def fields(directory: Path) -> list[tuple[str, Damage]]:
    """Every value of `VALUES` in every field of the config."""
    names = sorted(tools.manifest(directory))
    return [(f"{name}={str(value)[:20]!r}", field(name, value)) for name in names for value in VALUES]


def mutate(directory: Path, seed: int) -> tuple[str, bool]:
    """Change one file at random: the bytes of any, or a field of a JSON file, at any depth. Every other time, whatever
    hash there is fits the change. Returns what was done, and whether hashes were forged.
    """
    chooser = random.Random(seed)
    path = directory / chooser.choice(
        [n for n in (ADAPTER, SUBSPACE, CERTIFICATE, MANIFEST) if (directory / n).exists()]
    )
    if path.suffix == ".json" and chooser.random() < 0.7:
        table = content = json.loads(path.read_text())
        while isinstance(table[key := chooser.choice(sorted(table))], dict) and table[key] and chooser.random() < 0.8:
            table = table[key]
        table[key] = deepcopy(chooser.choice((*VALUES, content[chooser.choice(sorted(content))])))
        path.write_text(json.dumps(content))
        what = f"{key} = {str(table[key])[:40]!r}"
    else:
        raw, kinds = bytearray(path.read_bytes()), []
        for _ in range(chooser.choice((1, 1, 2, 8))):
            start = chooser.randrange(len(raw))
            end = min(len(raw), start + chooser.choice((1, 8, 400, len(raw))))
            kinds.append(kind := chooser.choice(("flip", "flip", "cut", "zeros", "twice", "noise")))
            block = bytes(raw[start:end])
            raw[start:end] = {
                "flip": bytes([block[0] ^ 1 << chooser.randrange(8)]) + block[1:],
                "cut": b"" if len(raw) > len(block) else b"x",
                "zeros": bytes(len(block)),
                "twice": block * 2,
                "noise": chooser.randbytes(len(block)),
            }[kind]
        path.write_bytes(raw)
        what = ", ".join(kinds)
    signed = chooser.random() < 0.5
    if signed:
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # there is nothing left to sign
            tools.forge(directory)
    return f"{path.name}: {what}", signed
