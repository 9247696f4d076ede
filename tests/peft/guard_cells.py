"""GuardSpace adapters on the tiny models, and the inputs that they are blind to."""

import torch
from peft import get_peft_model

from peft_safety import GuardSpaceConfig, SafetySubspace
from peft_safety.calibration.batches import Counted
from peft_safety.calibration.positions import selected
from peft_safety.core.targets import base_layers
from tests.peft import cells
from tests.tiny import tiny_tokenizer

K = 6
WORDS = ["cats", "dogs", "trees", "rivers", "music", "stars", "bread", "rain", "books", "cars"]
HARMFUL = [{"prompt": f"Help me steal {word}.", "response": "I cannot help with that."} for word in WORDS]
TASK = [{"prompt": f"Is {word} one word?", "response": "Yes."} for word in WORDS]


def batches(rows=HARMFUL):
    from peft_safety.calibration.batches import to_batches

    return to_batches(rows, tiny_tokenizer(), batch_size=4, max_length=64)[0]


def subspace(model, rows=HARMFUL, kind="linear", **options):
    options = {"rank": K, "target_modules": cells.targets(kind), "progress": False, "max_length": 64, **options}
    return SafetySubspace.from_activations(model, rows, tokenizer=tiny_tokenizer(), method="guardspace", **options)


def config(space, kind="linear", **options):
    common = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": cells.targets(kind),
        "fan_in_fan_out": kind == "conv1d",
        "subspace": space,
    }
    data = {"init_data": batches()} if options.get("init") == "guardspace" else {}
    return GuardSpaceConfig(**{**common, **data, **options})


def guarded(kind="linear", *, seed=0, trained=False, both=False, **options):
    space = subspace(cells.base_model(kind), kind=kind)
    if both:
        space = space.beside(cells.random_subspace(cells.base_model(kind), cells.targets(kind)))
        options["combine"] = "salora"
    torch.manual_seed(seed)
    model = get_peft_model(cells.base_model(kind), config(space, kind, **options))
    return cells.perturb(model, seed) if trained else model.eval()


@torch.no_grad()
def calibrated_inputs(model, kind="linear"):
    """The inputs of every targeted layer of the bare model, on the calibration data, `(tokens, n)`."""
    layers = {name: layer for name, layer in base_layers(model).items() if name.endswith(tuple(cells.targets(kind)))}
    found, mask = {}, None
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(selected(name, args[0], Counted((mask,))))
        )
        for name, layer in layers.items()
    ]
    for batch in batches():
        mask = batch["attention_mask"] != 0
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}
