"""Activated LoRA and VeLoRA with projected factors: which tokens get the update, and how `lora_A` gets its gradient,
change nothing of the projection.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_safety import assert_protected, export_lora, orthogonality_report, verify
from peft_safety.core.adapter_dir import VELORA, seal
from peft_safety.core.plain_lora import ADAPTER_FILE, MANIFEST
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.registry.velora import ProtectedVelora
from tests.peft import cells
from tests.peft.guard_cells import TASK, batches, config, subspace

INVOCATION = [201, 202]
START = 5
FORMS = ("salora", "salora-task", "A", "both", "window")
LEAK = 2e-6


def made(form, **options):
    torch.manual_seed(0)
    if form.startswith("salora"):
        own = cells.config(init="task" if form == "salora-task" else "lora", **options)
    else:
        space = subspace(cells.base_model())
        if form == "both":
            space = space.beside(cells.random_subspace(cells.base_model(), cells.targets("linear")))
            options["combine"] = "salora"
        options |= {"window": 8, "task_data": batches(TASK)} if form == "window" else {}
        own = config(space, train="window" if form == "window" else "A", **options)
    return get_peft_model(cells.base_model(), own)


def ids(seed=0):
    """Two rows; the first one invokes the adapter."""
    tokens = cells.tokens(seed=seed)  # all below 200
    tokens[0, START : START + 2] = torch.tensor(INVOCATION)
    return tokens


def steps(model, count=3):
    optimizer = cells.adamw([p for p in model.parameters() if p.requires_grad])
    for step in range(count):
        model.train()(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_activated_lora_starts_at_the_invocation_and_leaks_nothing(form, tmp_path):
    model, tokens = steps(made(form, alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")), ids(9)
    got, base = cells.logits(model, tokens), cells.logits(cells.base_model(), tokens)
    cells.assert_same_function(got[1], base[1])
    cells.assert_same_function(got[0, :START], base[0, :START])
    assert float((got - base)[0, START:].norm()) > 1e-3
    assert_protected(model)
    model.save_pretrained(tmp_path / "native")
    assert verify(tmp_path / "native", cells.base_model()).worst_leak <= LEAK
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "native").eval()
    assert_protected(loaded)
    cells.assert_same_function(cells.logits(loaded, tokens), got)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path / "plain").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    cells.assert_same_function(cells.logits(plain, tokens), got)
    cells.assert_activated_is_not_merged(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init_type", ["random", "batch_average_once"])
def test_velora_trains_saves_and_leaks_nothing(form, init_type, tmp_path):
    model = steps(made(form, velora_config=VeloraConfig(num_groups=5, init_type=init_type)))
    assert_protected(model)
    got = cells.logits(model)
    assert float((got - cells.logits(cells.base_model())).norm()) > 1e-3
    model.save_pretrained(tmp_path / "native")
    found = verify(tmp_path / "native", cells.base_model())
    assert (found.worst_leak <= LEAK, tuple(found.unconstrained)) == (True, ())
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path / "native", is_trainable=True).eval()
    cells.assert_same_function(cells.logits(loaded), got)
    one, other = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert one.keys() == other.keys() >= {key for key in one if key.endswith(VELORA)} != set()
    assert all(torch.equal(one[key], other[key]) for key in one if key.endswith(VELORA))
    assert_protected(steps(loaded))
    export_lora(model, tmp_path / "plain")
    assert not any(VELORA in key for key in load_file(tmp_path / "plain" / ADAPTER_FILE))
    plain = PeftModel.from_pretrained(cells.base_model(), tmp_path / "plain").eval()
    cells.assert_same_function(cells.logits(plain), got)
    assert len(orthogonality_report(model, progress=False).modules) == 6
    cells.assert_same_function(cells.logits(model.merge_and_unload()), got)


@pytest.mark.parametrize("form", ["A", "both", "window", "salora-task"])
def test_velora_s_gradient_is_the_usual_one_where_compression_loses_nothing(form):
    """All inputs lie along the direction. The gradient of a constrained factor is projected, too."""
    gradients = []
    for options in ({"velora_config": VeloraConfig(num_groups=4)}, {}):
        model = made(form, **options)
        layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
        assert isinstance(layer.lora_variant.get("default"), ProtectedVelora) == bool(options)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        with torch.no_grad():
            weight = getattr(b, "raw", lambda b=b: b.weight)()
            weight.copy_(torch.linspace(-1, 1, weight.numel()).reshape_as(weight))
        layer.train()(torch.arange(1.0, 4.0)[:, None] * torch.ones(layer.in_features)).sum().backward()
        gradients.append(a.raw().grad)
    assert float(gradients[1].norm()) > 1e-2
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def stored(tmp_path, **options):
    model = steps(made("salora", velora_config=VeloraConfig(num_groups=5, **options)))
    model.save_pretrained(tmp_path)
    return tmp_path / ADAPTER_FILE


@pytest.mark.parametrize("change", ["missing", "longer", "not finite"])
def test_a_stored_direction_that_does_not_fit_is_refused(change, tmp_path):
    file = stored(tmp_path)
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(VELORA))
    if change == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.ones(len(tensors[key]) + 1) if change == "longer" else tensors[key] * torch.nan
    save_file(tensors, file, {"format": "pt"})
    seal(tmp_path)
    with pytest.raises(ArtifactError, match=VELORA):
        PeftModel.from_pretrained(cells.base_model(), tmp_path)


def test_a_direction_without_its_config_is_refused(tmp_path):
    stored(tmp_path)
    fields = json.loads((tmp_path / MANIFEST).read_text())
    fields["velora_config"] = None
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    seal(tmp_path)
    with pytest.raises(ArtifactError, match=VELORA):
        PeftModel.from_pretrained(cells.base_model(), tmp_path)


def test_both_at_once_are_refused_as_peft_does():
    with pytest.raises(ConfigError, match=r"(?i)variant"):
        made("salora", velora_config=VeloraConfig(), alora_invocation_tokens=[5], task_type="CAUSAL_LM")
