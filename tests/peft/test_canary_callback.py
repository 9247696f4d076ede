"""The canary sees refusals go in every context, says so, and puts the last good adapter back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peft_safety import CanaryCallback
from peft_safety.callbacks.canary import CONTEXTS
from peft_safety.errors import ConfigError, DataError
from tests.peft import anchored
from tests.peft.anchored import REQUESTS, TOKENIZER, logged, refusing, trainer, tuned

FORMS: dict[str, Any] = {
    "bare": "{}",
    "behind": lambda request: f"zz {request}",
    "turns": lambda request: [{"role": "system", "content": "x"}, {"role": "user", "content": request}],
}
FALLS = {"max_steps": 20}
"""Steps after which the tiny model refuses nothing any more."""


class Copies(TrainerCallback):
    """The adapter at every step, before other callbacks see that step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[state.global_step] = adapter(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_it_warns_logs_each_context_and_changes_nothing(tmp_path: Path) -> None:
    plain = trainer(tuned(lora_dropout=0.1), tmp_path, [], **FALLS)
    plain.train()
    canary = CanaryCallback(TOKENIZER, REQUESTS, FORMS, every=5)
    run = trainer(tuned(lora_dropout=0.1), tmp_path, [canary], **FALLS)
    with pytest.warns(UserWarning, match=r"refusal fell by step \d+ \(.*bare: 100% -> \d+%"):
        run.train()
    assert list(canary.looks) == [0, 5, 10, 15, 20]
    for name in FORMS:
        assert logged(run, f"canary_refusal_{name}") == [look[name] for look in canary.looks.values()]
        assert canary.looks[0][name] == 1
        assert canary.looks[20][name] == 0
    assert run.state.global_step == 20
    for name, value in adapter(plain.model).items():
        assert torch.equal(adapter(run.model)[name], value), name


def test_it_stops_and_puts_the_last_good_adapter_back(tmp_path: Path) -> None:
    copies, canary = Copies(), CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, every=2, action="stop")
    run = trainer(tuned(), tmp_path, [copies, canary], **FALLS)
    base = {name: p.detach().clone() for name, p in run.model.named_parameters() if "lora_" not in name}
    with pytest.warns(UserWarning, match="Training stops, and the adapter goes back to step"):
        run.train()
    last = max(canary.looks)
    assert run.state.global_step == last < 20
    good = max(step for step, look in canary.looks.items() if look["bare"] >= 0.8)
    assert 0 < good < last
    for name, value in adapter(run.model).items():
        assert torch.equal(value, copies.steps[good][name]), name
    assert any(not torch.equal(value, copies.steps[last][name]) for name, value in copies.steps[good].items())
    assert all(torch.equal(p, base[name]) for name, p in run.model.named_parameters() if name in base)


def test_a_resumed_run_is_compared_with_step_0(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 12}
    with pytest.warns(UserWarning, match="refusal fell"):
        trainer(tuned(), tmp_path, [CanaryCallback(TOKENIZER, REQUESTS, every=12)], **saving).train()
    checkpoint, options = str(tmp_path / "checkpoint-12"), {"max_steps": 14}
    canary = CanaryCallback(TOKENIZER, REQUESTS, every=2)
    with pytest.warns(UserWarning, match="refusal") as caught:
        trainer(tuned(), tmp_path, [canary], **options).train(resume_from_checkpoint=checkpoint)
    said = [str(warning.message) for warning in caught if "refusal" in str(warning.message)]
    assert "fallen by step 12 already (bare: 100% ->" in said[0]
    assert "fell by step 14" in said[1]
    assert canary.looks[12]["bare"] < 0.8
    more = {**CONTEXTS, "more": "yy {}"}
    stopping = CanaryCallback(TOKENIZER, REQUESTS, more, every=2, action="stop")
    with pytest.raises(ConfigError, match="Resume from an earlier checkpoint"):
        trainer(tuned(), tmp_path, [stopping], **options).train(resume_from_checkpoint=checkpoint)


def test_a_run_of_fewer_steps_is_looked_at_when_it_ends(tmp_path: Path) -> None:
    canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, action="stop")
    run = trainer(tuned(), tmp_path, [canary], **FALLS)
    before = adapter(run.model)
    with pytest.warns(UserWarning, match=r"by step 20 \(bare: 100% -> 0%\).*goes back to step 0"):
        run.train()
    assert logged(run, "canary_refusal_bare") == [1, 0]
    assert all(torch.equal(value, before[name]) for name, value in adapter(run.model).items())


class Ends(TrainerCallback):
    """Ends the training at step 18, or after its evaluation, as `EarlyStoppingCallback` does. Step 16 is the best."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.event == "on_step_end" and state.global_step == 18

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        control.should_training_stop |= self.event == "on_evaluate" and state.global_step == 18
        metrics["eval_loss"] = abs(state.global_step - 16)


@pytest.mark.parametrize("event", ["on_evaluate", "on_step_end"])
def test_a_run_that_another_callback_ends_is_looked_at(tmp_path: Path, event: str) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1}
    for action, message in (("warn", r"by step 18 \(bare: 100% -> \d+%\)\."), ("stop", "adapter goes back to step 0")):
        canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, action=action)  # type: ignore[arg-type]
        run = trainer(tuned(), tmp_path, [Ends(event), canary], **FALLS, **options)
        before = adapter(run.model)
        with pytest.warns(UserWarning, match=message):
            run.train()
        assert (run.state.global_step, list(canary.looks)) == (18, [0, 18])
        assert logged(run, "canary_refusal_bare") == [look["bare"] for look in canary.looks.values()]
        same = [torch.equal(value, before[name]) for name, value in adapter(run.model).items()]
        assert all(same) == (action == "stop")


def test_the_best_checkpoint_is_looked_at_if_it_is_loaded(tmp_path: Path) -> None:
    canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"})
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tuned(), tmp_path, [Ends("on_evaluate"), canary], **FALLS, **options, load_best_model_at_end=True)
    with pytest.warns(UserWarning, match="refusal fell by step 16"):
        run.train()
    assert list(canary.looks) == [0, 16]


def test_every_look_is_logged_where_logs_are_rarer(tmp_path: Path) -> None:
    canary = CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, every=5)
    run = trainer(tuned(), tmp_path, [canary], **FALLS, logging_steps=10)
    with pytest.warns(UserWarning, match="refusal fell"):
        run.train()
    entries = [entry for entry in run.state.log_history if "canary_refusal_bare" in entry]
    assert [entry["step"] for entry in entries] == list(canary.looks) == [0, 5, 10, 15, 20]
    assert [entry["canary_refusal_bare"] for entry in entries] == [look["bare"] for look in canary.looks.values()]


def test_the_best_checkpoint_does_not_replace_what_it_puts_back(tmp_path: Path) -> None:
    copies, canary = Copies(), CanaryCallback(TOKENIZER, REQUESTS, {"bare": "{}"}, every=4, action="stop")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tuned(), tmp_path, [copies, canary], **FALLS, **options, load_best_model_at_end=True)
    with pytest.warns(UserWarning, match="Training stops"):
        run.train()
    good = max(step for step, look in canary.looks.items() if look["bare"] >= 0.8)
    assert run.state.best_model_checkpoint not in (None, str(tmp_path / f"checkpoint-{good}"))
    for name, value in adapter(run.model).items():
        assert torch.equal(value, copies.steps[good][name]), name
    assert not canary._kept, "the copies go with the run"


def test_the_defaults_are_three_contexts_of_held_out_requests() -> None:
    canary = CanaryCallback(TOKENIZER)
    assert list(CONTEXTS) == ["bare", "prefix", "role"]
    assert all(len(texts) == len(set(texts)) == 16 for texts in canary._texts.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(set(canary.prompts)) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompts or no contexts"),
        ({"prompts": "one"}, "no prompts or no contexts"),
        ({"prompts": iter([])}, "no prompts or no contexts"),
        ({"prompts": anchored.REFUSALS}, "prompt 0 is a dict, contexts a dict"),
        ({"contexts": ["{}"]}, "prompt 0 is a str, contexts a list"),
        ({"contexts": {"a": 5}}, "context 'a' is 5"),
        ({"contexts": {}}, "no prompts or no contexts"),
        ({"contexts": {"a": "no place"}}, "context 'a' is 'no place'"),
        ({"every": 0}, "every=0"),
        ({"margin": 2}, "margin=2"),
        ({"action": "pause"}, "action='pause'"),
    ],
)
def test_bad_input_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CanaryCallback(TOKENIZER, **{"prompts": REQUESTS, **options})


def test_a_model_that_refuses_nothing_has_nothing_to_lose(tmp_path: Path) -> None:
    model = anchored.get_peft_model(anchored.tiny_llama(), anchored.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="refuses too little at step 0"):
        trainer(model, tmp_path, [CanaryCallback(TOKENIZER, REQUESTS)]).train()


def test_shards_and_a_missing_template_are_refused(tmp_path: Path) -> None:
    bare = anchored.tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        CanaryCallback(bare, REQUESTS)
    model = refusing()
    model.lm_head.to("meta")
    with pytest.raises(ConfigError, match=r"CanaryCallback: lm_head\.weight is sharded"):
        CanaryCallback(TOKENIZER, REQUESTS).on_train_begin(None, None, model=model)  # type: ignore[arg-type]
