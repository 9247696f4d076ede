"""Making a good adapter, damaging a copy of it, and telling whether a model was touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_safety import SafetySubspace, SaLoRAConfig
from peft_safety.core import adapter_dir as artifact
from peft_safety.core import files
from tests.tiny import VOCAB_SIZE, tiny_llama

ADAPTER, SUBSPACE, MANIFEST = artifact.ADAPTER_FILE, artifact.SUBSPACE_FILE, artifact.MANIFEST
PREFIX = "base_model.model."
Q0, Q1, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
U = f"basis.out.{Q0}"
REMEDIES = (
    "Copy",
    "Save",
    "save",
    "Use",
    "Load",
    "Convert",
    "convert",
    "Calibrate",
    "Remove",
    "Give",
    "Keep",
    "Replace",
    "Point",
    "Lower",
    "Make",
    "Leave",
)
Damage = Callable[[Path], None]
Tensors = dict[str, Tensor]


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(4, VOCAB_SIZE, (batch, 12), generator=torch.Generator().manual_seed(seed))


def subspace(model: nn.Module, rank: int = 8, seed: int = 0) -> SafetySubspace:
    """Estimated on random tokens: as good as any for what is tested here."""
    ids = tokens(seed, batch=8)
    return SafetySubspace.from_activations(
        model, [{"input_ids": ids, "labels": ids}], rank=rank, target_modules="all-linear", progress=False
    )


def trained(base: nn.Module, space: SafetySubspace, seed: int = 0, **options: Any) -> nn.Module:
    """A protected adapter after three optimizer steps."""
    torch.manual_seed(seed)
    model = get_peft_model(
        base, SaLoRAConfig(r=4, lora_alpha=16, subspace=space, target_modules="all-linear", **options)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(seed + 1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save_good(directory: Path, *, seed: int = 0, base_seed: int = 0, **options: Any) -> Path:
    """A good adapter directory over all linears of a tiny Llama: rank 4, k = 8, fp32."""
    hidden = options.pop("hidden", 32)
    if options.get("init") == "task":
        options["task_data"] = subspace(tiny_llama(base_seed), seed=7)
    trained(
        tiny_llama(base_seed, hidden=hidden), subspace(tiny_llama(base_seed, hidden=hidden)), seed, **options
    ).save_pretrained(str(directory))
    return directory


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())


def forge(directory: Path, config: dict[str, Any] | None = None) -> None:
    """Recompute every hash, as an attacker would."""
    config = manifest(directory) if config is None else config
    record = config.get("safety_artifact")
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        for name in (ADAPTER, SUBSPACE):
            if name in record["files"] and (directory / name).is_file():
                record["files"][name] = files.sha256(directory / name)
        artifact.sign(config)
    (directory / MANIFEST).write_text(json.dumps(config))


def fields(**values: Any) -> Damage:
    """Set fields of the config, with a forged signature."""
    return lambda directory: forge(directory, manifest(directory) | values)


def record(**values: Any) -> Damage:
    """Set fields of its `safety_artifact` entry."""

    def damage(directory: Path) -> None:
        config = manifest(directory)
        forge(directory, config | {"safety_artifact": config["safety_artifact"] | values})

    return damage


def text(change: Callable[[str], str]) -> Damage:
    """Change the config's text, nothing recomputed."""

    def damage(directory: Path) -> None:
        path = directory / MANIFEST
        path.write_text(change(path.read_text()))

    return damage


def tensors(
    change: Callable[[Tensors], Any],
    name: str = ADAPTER,
    *,
    listed: tuple[str, ...] = (),
    metadata: dict[str, str] | None = None,
) -> Damage:
    """Change the tensors of a file, every hash forged; `listed` names go into `extra_tensors`."""

    def damage(directory: Path) -> None:
        path = directory / name
        with safe_open(str(path), "pt") as handle:
            header = handle.metadata() if metadata is None else metadata
        content = load_file(path)
        change(content)
        save_file({key: value.contiguous() for key, value in content.items()}, path, metadata=header)
        config = manifest(directory)
        config["safety_artifact"]["extra_tensors"] = sorted(listed)
        forge(directory, config)

    return damage


def bases(change: Callable[[Tensors], Any], **metadata: str) -> Damage:
    """Change the side file, and replace its header's metadata if any is given."""
    return tensors(change, SUBSPACE, metadata=metadata or None)


def put(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """Replace one tensor by a function of it."""

    def change(content: Tensors) -> None:
        content[key] = value(content[key].clone())

    return change


def poke(value: float) -> Callable[[Tensor], Tensor]:
    """One bad entry."""

    def change(x: Tensor) -> Tensor:
        x.view(-1)[3] = value
        return x

    return change


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(content: Tensors) -> None:
        content[first], content[second] = content[second].clone(), content[first].clone()

    return change


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a failed load must leave alone."""
    return {
        "modules": [
            (name, type(module), module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "grad": [(name, parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()],
        "marks": sorted(key for key in vars(model) if "peft" in key),
    }


def subspace_header(directory: Path, shared: dict[str, str], large: Tensor) -> None:
    """Give the subspace file a further basis, `basis.out.large`, and say who shares it; every hash forged."""
    path = directory / SUBSPACE
    with safe_open(str(path), "pt") as handle:
        ((name, facts),) = handle.metadata().items()
    content = json.loads(facts)
    content["shared"] = {**content.get("shared", {}), **shared}
    save_file(load_file(path) | {"basis.out.large": large}, path, metadata={name: json.dumps(content)})
    forge(directory)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that a block leaves a model as it was: classes, bits, gradient flags, hooks, PEFT's marks."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["grad"] == before["grad"]
    assert after["marks"] == before["marks"]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(value, before["state"][key]) for key, value in after["state"].items())
