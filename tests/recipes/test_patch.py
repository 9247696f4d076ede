"""The patch recipe: what is kept as it is, when it stops, what it writes, stacking, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_safety import assert_protected, verify
from peft_safety.cli import app
from peft_safety.data import load
from peft_safety.errors import ConfigError, DataError
from peft_safety.evaluation.generate import SELF_PROMPT_TRIES, Generation, self_prompts
from peft_safety.evaluation.prompts import prompt_set
from peft_safety.recipes.distil import _token_losses
from peft_safety.recipes.patch import PatchOptions, general_rows, make_patch, patch
from peft_safety.recipes.train import TrainOptions, finetune
from peft_safety.recipes.watch import Look, Stopping, Watch
from tests.tiny import tiny_llama, tiny_tokenizer

QUICK = TrainOptions(max_steps=2, batch_size=4, max_length=256, lr=1e-2, progress=False)
SMALL = {
    "harmful": 4,
    "general": 3,
    "everyday": 2,
    "contrast": 3,
    "self_written": 0,
    "validation": 2,
    "answer_tokens": 4,
    "safety_rank": 4,
    "r": 2,
    "training": QUICK,
    "stopping": Stopping(every=1),
}
GENERAL = [{"prompt": f"say {word}", "response": f"{word}, then"} for word in ("cats", "dogs", "trees", "bread")]
REFUSALS = [{"prompt": f"steal {word}", "response": "No, I will not."} for word in ("cats", "dogs", "trees", "bread")]


def test_rows_to_keep_pull_the_tuned_model_back_to_the_base():
    """With nothing to learn the loss is zero at the start; with a moved adapter, only distillation brings the base's
    answers back.
    """
    kept = [{**row, "distil": True} for row in GENERAL]
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    before = finetune(tiny_llama(), tiny_tokenizer(), kept, LoraConfig(target_modules=["q_proj"]), QUICK)[1]
    assert abs(before.loss) < 1e-6, "B = 0: nothing to keep yet"
    losses = {}
    for steps in (1, 60):
        options = TrainOptions(max_steps=steps, batch_size=4, max_length=256, lr=2e-2, progress=False)
        losses[steps] = finetune(tiny_llama(), tiny_tokenizer(), kept, config, options)[1].last_loss
    assert losses[1] > 1e-4
    assert losses[60] < 0.6 * losses[1]


def test_an_earlier_patch_stays_frozen_while_rows_are_kept():
    kept = [{**row, "distil": True} for row in GENERAL]
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    stacked = get_peft_model(tiny_llama(), config, adapter_name="prior")
    tuned, _ = finetune(stacked, tiny_tokenizer(), kept, config, QUICK)
    trains = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trains
    assert all(".default." in name for name in trains)


def test_the_loss_of_each_kind_of_row_is_what_it_says():
    g = torch.Generator().manual_seed(0)
    logits, base = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    labels = torch.randint(0, 7, (3, 5), generator=g)
    labels[:, :2] = -100
    distil = torch.tensor([False, True, False])
    found = _token_losses(logits, labels, distil, lambda rows: base[rows])
    expected = []
    for row in (0, 2):
        expected += [-logits[row, t - 1].log_softmax(-1)[labels[row, t]] for t in range(2, 5)]
    for t in range(2, 5):
        p, q = base[1, t - 1].softmax(-1), logits[1, t - 1].softmax(-1)
        expected.append((p * (p / q).log()).sum())
    torch.testing.assert_close(found, torch.stack(expected))
    assert _token_losses(logits, labels, distil | True, lambda rows: logits[rows]).abs().max() < 1e-6


def test_a_patch_end_to_end_and_another_one_stacked_on_it(tmp_path, capsys):
    model = tiny_llama()
    first = make_patch(model, tmp_path / "one", PatchOptions(**SMALL), tokenizer=tiny_tokenizer(), eval_limit=2)
    saved = json.loads((tmp_path / "one" / "report.json").read_text())
    assert saved["details"]["options"]["mode"] == "hard"
    assert saved["details"]["looks"][0]["step"] == 0
    assert (tmp_path / "one" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "before" in capsys.readouterr().out
    assert verify(tmp_path / "one" / "adapter", tiny_llama()).worst_leak <= 1e-6
    assert first.run.best in first.run.looks

    options = PatchOptions(**{**SMALL, "prior_patches": (str(tmp_path / "one" / "adapter"),)})
    second = make_patch(tiny_llama(), tmp_path / "two", options, tokenizer=tiny_tokenizer(), eval_limit=2)
    assert_protected(second.model)
    for layer in (m for m in second.model.modules() if hasattr(m, "get_delta_weight") and "default" in m.lora_A):
        d, e = (layer.get_delta_weight(name).double() for name in ("prior0", "default"))
        assert abs(float((d * e).sum())) <= 1e-6 * float(d.norm() * e.norm())
    one = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one" / "adapter")
    for (name, p), q in zip(one.named_parameters(), second.model.parameters(), strict=False):
        if "lora" in name:
            break
        assert torch.equal(p, q)
    prior = {n.replace("prior0", "default"): p for n, p in second.model.named_parameters() if "prior0" in n}
    assert all(torch.equal(prior[n], p) for n, p in one.named_parameters() if "lora_" in n), (
        "the earlier patch stays as it was"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "none", "basis": "weight"},
        {"mode": "soft"},
        {"basis": "contrastive"},
        {"side": "both", "safety_rank": None, "safety_energy": 0.5, "safety_rank_pattern": {"down_proj": 0.3}},
    ],
)
def test_every_kind_of_patch_trains(options):
    tuned, run = patch(
        tiny_llama(), tiny_tokenizer(), PatchOptions(**{**SMALL, **options}), refusals=REFUSALS, general=GENERAL
    )
    assert run.training.steps == 2
    assert run.training.rows == len(REFUSALS) + len(GENERAL)
    assert tuned.peft_config["default"].mode == options.get("mode", "hard")
    assert tuned.peft_config["default"].unfinished is None
    assert any(p.abs().max() > 0 for n, p in tuned.named_parameters() if "lora_B" in n)


def test_the_packages_own_rows_repeat_past_their_split_and_answers_are_the_models_own(monkeypatch):
    seen = {}

    def finetune(model, tokenizer, rows, config, *rest, **options):
        seen["rows"] = rows
        raise InterruptedError

    monkeypatch.setattr("peft_safety.recipes.patch.finetune", finetune)
    options = PatchOptions(**{**SMALL, "harmful": 360, "general": 2, "contrast": 350})
    with pytest.raises(InterruptedError):
        patch(tiny_llama(), tiny_tokenizer(), options)
    texts = {row["text"] for row in load("refusals", "train")}
    harmful = [row for row in seen["rows"] if row["response"] in texts]
    own = [row for row in seen["rows"] if row["response"] not in texts]
    assert len(harmful) == 360
    assert len({row["prompt"] for row in harmful}) == len(load("harmful_requests", "train"))
    assert {row["prompt"] for row in own} <= {
        row["prompt"]
        for name in ("general_prompts", "everyday_requests", "contrast_prompts")
        for split in ("train", "calibration")
        for row in load(name, split)
    }
    assert len(own) > len({row["prompt"] for row in own}) > 0
    assert all(row["truncated"] and row["distil"] for row in own)
    assert not any("distil" in row for row in harmful)


def test_prompts_that_the_bare_model_wrote_are_rows_to_keep_too(monkeypatch):
    def self_prompts(model, tokenizer, count, **options):
        asked.append(
            (count, options["seed"], getattr(model.model.layers[0].self_attn.q_proj, "disable_adapters", None))
        )
        return ["say bread", "say trees"]

    asked = []
    monkeypatch.setattr("peft_safety.recipes.patch.self_prompts", self_prompts)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    options = PatchOptions(**{**SMALL, "self_written": 5})
    rows = general_rows(model.base_model.model, tiny_tokenizer(), options)
    assert asked == [(5, options.training.seed, True)]
    written = [row for row in rows if row["prompt"] in ("say bread", "say trees")]
    assert len(written) == 2
    assert all(row["distil"] and row["response"] for row in written)


def scripted(monkeypatch, figures, **stopping):
    """A watch whose looks see these (refusal, over-refusal) pairs."""
    watch = Watch(tiny_tokenizer(), prompt_set("validation", 2), Stopping(**{"every": 1, **stopping}))
    pairs = iter(figures)

    class Figure:
        def __init__(self, pair):
            self.refusal, self.over_refusal, self.everyday_refusal = (
                type("Rate", (), {"value": value})() for value in (*pair, 0.0)[:3]
            )

    monkeypatch.setattr("peft_safety.recipes.watch.evaluate", lambda *args, **kwargs: Figure(next(pairs)))
    return watch


def run_watched(monkeypatch, figures, **stopping):
    watch = scripted(monkeypatch, figures, **stopping)
    model = tiny_llama()
    watch.look(model, 0)
    options = TrainOptions(max_steps=len(figures) - 1, batch_size=2, max_length=256, lr=1e-2, progress=False)
    tuned, run = finetune(
        model,
        tiny_tokenizer(),
        REFUSALS,
        LoraConfig(r=2, target_modules=["q_proj"]),
        options,
        callbacks=[watch],
    )
    return watch, tuned, run


def test_training_stops_when_the_targets_are_met(monkeypatch):
    watch, _, run = run_watched(monkeypatch, [(0.3, 0.1), (0.9, 0.1), (1.0, 0.3), (0.98, 0.15), (1.0, 0.0)])
    assert run.steps == 3
    assert watch.best == Look(3, 0.98, 0.15)


def test_everyday_refusals_keep_training_from_stopping_and_weigh_twice_in_its_choice(monkeypatch):
    watch, _, run = run_watched(
        monkeypatch, [(0.1, 0.0, 0.0), (1.0, 0.0, 0.2), (0.98, 0.0, 0.1), (0.99, 0.0, 0.04), (1.0, 0.0, 0.0)]
    )
    assert run.steps == 3
    assert watch.best == Look(3, 0.99, 0.0, 0.04)


def test_training_stops_when_nothing_gets_better_and_the_best_weights_come_back(monkeypatch):
    watch, tuned, run = run_watched(
        monkeypatch, [(0.3, 0.0), (0.8, 0.1), (0.7, 0.2), (0.6, 0.2), (0.5, 0.5), (1.0, 0.0)], patience=2
    )
    assert run.steps == 3
    assert watch.best == Look(1, 0.8, 0.1)
    last = {n: p.clone() for n, p in tuned.named_parameters() if p.requires_grad}
    watch.restore(tuned)
    changed = [n for n, p in tuned.named_parameters() if n in last and not torch.equal(p, last[n])]
    assert changed
    assert all(torch.equal(p, watch.weights[n]) for n, p in tuned.named_parameters() if n in watch.weights)


def test_mistakes_cost_nothing(tmp_path):
    for options in ({"harmful": 0}, {"stopping": Stopping(every=0)}):
        with pytest.raises(ConfigError):
            PatchOptions(**{**SMALL, **options})
    with pytest.raises(DataError, match="no general rows"):
        patch(tiny_llama(), tiny_tokenizer(), PatchOptions(**SMALL), general=[])
    with pytest.raises(ConfigError, match="mode='firm'"):
        make_patch(
            tiny_llama(),
            tmp_path / "out",
            PatchOptions(**{**SMALL, "mode": "firm"}),
            tokenizer=tiny_tokenizer(),
            eval_limit=2,
        )
    assert not (tmp_path / "out").exists()


def test_the_command_reads_chat_data_and_writes_a_patch(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("refusals", REFUSALS), ("general", GENERAL)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "patch",
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
        "--max-steps",
        "2",
        "--eval-limit",
        "2",
        "--safety-rank",
        "4",
        "--rank",
        "2",
    ]
    command += ["--data", str(tmp_path / "refusals.jsonl"), "--general", str(tmp_path / "general.jsonl")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert verify(tmp_path / "out" / "adapter").method == "ORTHOSAFETYPATCH"
    facts = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert facts["safety_rank"] == 4


@pytest.mark.parametrize("method", ["ortho_patch", "weight", "salora"])
def test_the_calibrate_command_knows_every_method(method, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [
        "calibrate",
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path),
        "--method",
        method,
        "--safety-energy",
        "0.5",
        "--safety-rank-pattern",
        "down_proj=0.1",
        "--json",
    ]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["energy"] == 0.5
    assert facts["per_kind"] == {"down_proj": 0.1}
    assert facts["sides"] == ("out" if method == "salora" else "in")


def test_the_models_own_prompts_are_finished_whole_and_different(monkeypatch):
    written = [
        "How do I bake a cake?",
        "How do I bake a cake?",
        "Hm",
        "A sentence that never",
        "Name three big rivers.",
    ]
    seen = []

    def generate_batch(model, tokenizer, tokens, rows, end, **sampling):
        seen.append((rows, end, sampling))
        return [Generation(text, text != "A sentence that never") for text in written][: len(rows)]

    monkeypatch.setattr("peft_safety.evaluation.generate._generate_batch", generate_batch)
    tokenizer = tiny_tokenizer()
    prompts = self_prompts(tiny_llama(), tokenizer, 5, progress=False)
    assert prompts == ["How do I bake a cake?", "Name three big rivers."]
    assert len(seen) == SELF_PROMPT_TRIES, "too few came: it asked again, and gave what there was"
    rows, end, sampling = seen[0]
    opening = tokenizer.decode(rows[0])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert asked.startswith(opening)
    assert asked.removeprefix(opening).startswith("hello"), "it goes on exactly where the user's text begins"
    assert len(end) == 1
    assert sampling["do_sample"]


def test_the_models_own_prompts_depend_on_the_seed_and_leave_the_generator_alone():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    state = torch.random.get_rng_state()
    first, again, other = (
        self_prompts(model, tokenizer, 6, seed=seed, max_new_tokens=64, progress=False) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == len(first) <= 6
    assert torch.equal(torch.random.get_rng_state(), state)
