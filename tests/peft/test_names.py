"""An adapter is the modules that it was trained on: whatever else their names could mean, and whatever is wrapped
around them.
"""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    Trainer,
    TrainingArguments,
)

import peft_safety
from peft_safety import SaLoRAConfig
from peft_safety.convert.export import export_directory, export_lora
from peft_safety.core.names import pattern_value
from peft_safety.core.parameters import own_place, place_of
from peft_safety.core.plain_lora import read_plain
from peft_safety.core.targets import base_layers
from peft_safety.errors import PeftSafetyError
from tests.peft.named_cells import Net, output, protected, random_subspace, train
from tests.tiny import tiny_llama

TWINS = ("layers.0.lin", "img.layers.0.lin", "layers.1.lin", "img.layers.1.lin", "layersX0.lin")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r"layers\.\d\.lin"},
        {"target_modules": ["lin"], "exclude_modules": r"img\..*"},
        {"target_modules": ["lin"], "rank_pattern": {r"^layers\.0\.lin": 2}},
        {"target_modules": ["lin"], "alpha_pattern": {r"^layers\.0\.lin": 64, "layers.1.lin": 3}},
        {
            "target_modules": ["lin"],
            "rank_pattern": {r"img\..*": 3, "layers.0.lin": 2},
            "alpha_pattern": {r".*\.1\.lin": 5, "lin": 7},
            "use_rslora": True,
        },
    ],
)
def test_names_that_end_other_names(options, tmp_path):
    model = protected(Net(*TWINS), TWINS, **options)
    there = {
        n: (m.r["default"], m.scaling["default"])
        for n, m in model.get_base_model().named_modules()
        if hasattr(m, "lora_B")
    }
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(Net(*TWINS), tmp_path / "first")
    assert {
        n: (m.r["default"], m.scaling["default"])
        for n, m in loaded.get_base_model().named_modules()
        if hasattr(m, "lora_B")
    } == there
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "second")
    stored = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert sorted(stored["target_modules"]) == sorted(there)
    assert set(stored["rank_pattern"]) | set(stored["alpha_pattern"]) <= set(there)
    again = PeftModel.from_pretrained(Net(*TWINS), tmp_path / "second")
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-6)


def test_exported_adapters_have_no_further_modules(tmp_path):
    model = protected(Net(*TWINS), TWINS, target_modules=r"layers\.\d\.lin", alpha_pattern={"layers.0.lin": 9})
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "live")
    export_directory(tmp_path / "native", tmp_path / "stored")
    live = PeftModel.from_pretrained(Net(*TWINS), tmp_path / "live")
    assert not any(hasattr(m, "lora_B") for n, m in live.get_base_model().named_modules() if n.startswith("img"))
    for found in (live, PeftModel.from_pretrained(Net(*TWINS), tmp_path / "stored")):
        torch.testing.assert_close(output(found), output(model), rtol=0, atol=1e-5)


def test_patterns_mean_what_they_mean_to_peft():
    modules = ["layers.0.lin", "img.layers.0.lin", "layers.0_lin", "q_proj", "self_attn.q_proj"]
    keys = [
        "lin",
        "layers.0.lin",
        r"^layers\.0\.lin",
        r"layers\.\d\.lin",
        "q_proj$",
        ".*q_proj",
        "(q|v)_proj",
        "x+_proj",
        r"li\w",
        r"\x6cin",
        "attn.q_proj",
    ]
    decided = 0
    for first in keys:
        for second in keys:
            table = {first: 1, second: 2}
            for module in modules:
                found = pattern_value(table, module, 9)
                assert found in (None, table.get(get_pattern_key(table, module), 9)), (table, module)
                decided += found is not None
    assert decided > 150
    assert (
        pattern_value({".*proj": 3, "q_proj": 2}, "q_proj", 1) is None
    )  # the first match wins, and is not known here
    assert pattern_value({"([a-z_.0-9]+)+!": 3, "q_proj": 2}, "q_proj", 1) == 2


def test_a_plain_adapter_whose_alpha_only_a_regular_expression_knows(tmp_path):
    model = train(
        get_peft_model(
            Net("a.lin", "b.lin"), LoraConfig(r=2, target_modules=["lin"], alpha_pattern={"a.*": 3, "lin": 5})
        )
    )
    model.save_pretrained(tmp_path)
    for name, factor in read_plain(tmp_path).factors.items():
        assert (
            math.isnan(factor.scaling)
            or factor.scaling == model.get_base_model().get_submodule(name).scaling["default"]
        )


ODD = (
    "lora_head",
    "x.lora_A",
    "x.lora_B",
    "base_layer",
    "y.base_layer.lin",
    "modules_to_save",
    "z.weight",
    "base_model.model.lin",
    "lora_A.lin",
    "_hidden",
)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("role", ["saved", "targeted", "neither"])
def test_modules_with_names_of_peft(name, role, tmp_path):
    names = ("body", name)
    options = {
        "target_modules": list(names) if role == "targeted" else ["body"],
        "modules_to_save": [name] if role == "saved" else None,
    }

    def plain():
        model = train(get_peft_model(Net(*names), LoraConfig(r=4, **options)))
        model.save_pretrained(tmp_path / "plain")
        return (output(PeftModel.from_pretrained(Net(*names), tmp_path / "plain")) - output(model)).abs().max() < 1e-6

    try:
        served = bool(plain())
    except (ValueError, KeyError, RuntimeError, AttributeError):
        served = False
    if not served:
        pytest.skip("plain LoRA cannot either")
    if (name, role) == (
        "base_layer",
        "saved",
    ):  # PEFT matches the end of any name, and would train the weight under the adapter
        with pytest.raises(PeftSafetyError, match="body"):
            protected(Net(*names), names, **options)
        return
    model = protected(Net(*names), names, **options)
    model.save_pretrained(tmp_path / "ours")
    peft_safety.verify(tmp_path / "ours")
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(Net(*names), tmp_path / "ours")), output(model), rtol=0, atol=1e-6
    )
    fresh = protected(Net(*names), names, **options)
    fresh.load_adapter(str(tmp_path / "ours"), "default", is_trainable=True)
    torch.testing.assert_close(output(fresh), output(model), rtol=0, atol=1e-6)


def whole(model):
    return torch.compile(model, backend="eager")


def parts(model):
    model.enc = torch.compile(model.enc, backend="eager")
    return model


def parallel(model):
    return nn.DataParallel(model)


class Nested(Net):
    """With a forward that enters its parts, so that they can be compiled one by one."""

    def __init__(self):
        super().__init__("head")
        self.enc = Net("up", "down", seed=1)

    def forward(self, x):
        return self.head(self.enc(x))


@pytest.mark.parametrize("there", [whole, parts, parallel, None])
@pytest.mark.parametrize("wrap", [whole, parts, parallel])
def test_wrapped_bases(wrap, there, tmp_path):
    names = ("enc.up", "enc.down")
    base = wrap(Nested())
    model = get_peft_model(
        base,
        SaLoRAConfig(
            r=4, subspace=random_subspace(Nested(), names), target_modules=["up", "down"], modules_to_save=["head"]
        ),
    )
    train(model)
    peft_safety.assert_protected(model)
    model.save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == sorted(names)
    other = (there or (lambda m: m))(Nested())
    loaded = PeftModel.from_pretrained(other, tmp_path, is_trainable=True)
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=1e-6)
    train(loaded)
    loaded.load_adapter(str(tmp_path), "default", is_trainable=True)
    peft_safety.assert_protected(loaded)
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=1e-6)


def test_a_compiled_adapter_is_saved_like_any(tmp_path):
    model = protected(Nested(), ("enc.up",), target_modules=["up"])
    compiled = torch.compile(model, backend="eager")
    peft_safety.assert_protected(compiled)
    compiled.save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(Nested(), tmp_path)), output(model), rtol=0, atol=1e-6)


HEADS = {
    "targeted": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "targeted and tied": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "kept tied": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "both ends saved": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_run_with_a_head_resumes_and_ends_with_its_best_model(case, tmp_path):
    tied, options = HEADS[case]

    def base():
        model = tiny_llama()
        model.config.tie_word_embeddings = tied
        if tied:
            model.tie_weights()
        return model

    targets = [n for n in base_layers(base()) if n.endswith(tuple(options["target_modules"]))]
    rows = [
        {"input_ids": torch.randint(4, 200, (12,), generator=torch.Generator().manual_seed(i)).tolist()}
        for i in range(8)
    ]
    rows = [row | {"labels": row["input_ids"]} for row in rows]

    def trainer(**arguments):
        config = SaLoRAConfig(r=4, subspace=random_subspace(base(), targets), task_type="CAUSAL_LM", **options)
        settings = {
            "max_steps": 4,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
        }
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0}
        return Trainer(
            get_peft_model(base(), config),
            TrainingArguments(str(tmp_path), **settings, **quiet, **arguments),
            train_dataset=rows,
            eval_dataset=rows,
        )

    first = trainer(load_best_model_at_end=True)
    first.train()
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    peft_safety.assert_protected(second.model)
    row = torch.tensor([rows[0]["input_ids"]])
    last = PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4")
    with torch.no_grad():
        torch.testing.assert_close(second.model.eval()(row).logits, last.eval()(row).logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(first.model.eval()(row).logits, last(row).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "place", "own"),
    [
        ("a.q_proj", "a.q_proj", "a.q_proj"),
        ("a.experts.base_layer.base_layer", "a.experts", "a.experts"),
        ("a.attn.base_layer.out_proj", "a.attn", "a.attn.out_proj"),
        ("y.base_layer.lin", "y.base_layer.lin", "y.base_layer.lin"),
    ],
)
def test_the_layer_behind_one_of_pefts_names(name, place, own):
    assert place_of(name) == place
    assert own_place(name) == own
