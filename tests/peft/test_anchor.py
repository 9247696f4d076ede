"""The anchor's gradient is that of its KL, once an optimizer step, and it holds what the training does not name."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_safety import SafetyAnchorCallback
from peft_safety.callbacks import anchor as module
from peft_safety.data.chat import Collator, encode_rows
from peft_safety.errors import ConfigError, DataError, DivergedError
from peft_safety.evaluation.generate import Generation, generate
from tests.peft import anchored
from tests.peft.anchored import REFUSALS, REQUESTS, TOKENIZER, logged, trainer, tuned

COLUMNS = ("input_ids", "attention_mask", "labels")
OTHERS = [{"prompt": f"hello {i}", "response": "good day"} for i in range(6)]
"""Anchors whose answers are no refusals: none is asked for."""


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def begin(callback: SafetyAnchorCallback, model: nn.Module, optimizer: Any, step: int = 0, fp16: bool = False) -> None:
    state = SimpleNamespace(global_step=step, log_history=[])
    callback.on_train_begin(SimpleNamespace(fp16=fp16), state, None, model=model, optimizer=optimizer)


def moved(seed: int = 1, **options: Any) -> Any:
    """An adapter in fp64 that is no longer zero."""
    model = tuned(**options).double().train()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return model


def explicit(model: Any, rows: list[Any], kept: int | None) -> torch.Tensor:
    """KL(reference || current), written out: row after row, without dropout."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    model.eval()
    for feature in encode_rows(TOKENIZER, rows, 128):
        batch = Collator(TOKENIZER)([feature])
        labels = batch.pop("labels")
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch).logits[0, :-1].softmax(-1)
        current = model(**batch).logits[0, :-1].softmax(-1)
        for p, q in zip(reference[labels[0, 1:] != -100], current[labels[0, 1:] != -100], strict=True):
            if kept is not None:
                top = p.topk(kept).indices
                p, q = (torch.cat([x[top], 1 - x[top].sum(0, keepdim=True)]) for x in (p, q))
            total, count = total + (p * (p / q).log()).sum(), count + 1
    return total / count


@pytest.mark.parametrize("kept", [None, 5])
def test_the_gradient_is_that_of_the_explicit_kl(kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if kept is not None:
        monkeypatch.setattr(module, "KEPT_TOKENS", kept)
    model = moved(lora_dropout=0.3)
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    callback = SafetyAnchorCallback(TOKENIZER, OTHERS, rows=len(OTHERS), weight=3.0)
    begin(callback, model, optimizer)
    assert all(p.dtype is torch.float16 and p.device.type == "cpu" for _, p in callback.references)
    before = [torch.full_like(p, 0.5) for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient.clone()
    callback.before_step(optimizer, (), {})
    assert all(layer.training for layer in model.modules()), "the modes are restored"
    assert not frozen.requires_grad, "switching adapters off and on leaves what is frozen frozen"
    loss = explicit(model, OTHERS, kept)
    expected = torch.autograd.grad(3.0 * loss, parameters)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for parameter, old, gradient in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(parameter.grad - old, gradient, rtol=2e-2, atol=2e-3 * largest)
    logs: dict[str, float] = {}
    callback.on_log(None, SimpleNamespace(log_history=[]), logs=logs)  # type: ignore[arg-type]
    assert logs["safety_anchor"] == pytest.approx(float(loss.detach()), rel=1e-2)
    assert logs["safety_anchor_seconds"] > 0


def test_the_reference_is_the_model_without_its_adapter_also_where_the_adapter_is_trained_already() -> None:
    callback, optimizer = (
        SafetyAnchorCallback(TOKENIZER, OTHERS, rows=2),
        torch.optim.SGD([nn.Parameter(torch.ones(1))]),
    )
    fresh, trained = tuned().double(), moved()
    begin(callback, fresh, optimizer)
    references = callback.references
    begin(callback, trained, optimizer, step=7)
    for one, other in zip(references, callback.references, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logs, other.logs)
    with torch.no_grad():
        assert float(callback.loss([0, 1])) > 1e-3
    assert len(optimizer._optimizer_step_pre_hooks) == 1, "one hook, however often training begins"


def test_the_users_loss_is_untouched_and_the_hook_goes_with_the_run(tmp_path: Path) -> None:
    plain = trainer(tuned(lora_dropout=0.2), tmp_path, [], max_steps=1)
    plain.train()
    run = trainer(tuned(lora_dropout=0.2), tmp_path, [SafetyAnchorCallback(TOKENIZER, OTHERS)], max_steps=3)
    run.train()
    assert logged(run, "loss")[0] == logged(plain, "loss")[0]
    distances = logged(run, "safety_anchor")
    assert len(distances) == 3
    assert 0 <= distances[0] < 1e-5 < distances[-1]
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_callback_that_is_kept_keeps_no_model(tmp_path: Path) -> None:
    callback = SafetyAnchorCallback(TOKENIZER, OTHERS)
    run = trainer(tuned(), tmp_path, [callback], max_steps=1)
    run.train()
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None
    assert not callback.references
    again = trainer(tuned(), tmp_path, [callback], max_steps=1)
    again.train()
    assert len(logged(again, "safety_anchor")) == 1, "it can be used again"


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
def test_it_runs_once_an_optimizer_step_however_many_batches_that_accumulates(
    every: int, steps: list[int], tmp_path: Path
) -> None:
    seen = []

    class Seen(SafetyAnchorCallback):
        def loss(self, chosen: Any) -> Any:
            seen.append((self._state.global_step, tuple(chosen)))
            return super().loss(chosen)

    for _ in range(2):
        run = trainer(tuned(), tmp_path, [Seen(TOKENIZER, OTHERS, rows=2, every=every)], gradient_accumulation_steps=2)
        run.train()
    half = len(seen) // 2
    assert seen[:half] == seen[half:], "drawn by seed and step"
    assert [step for step, _ in seen[:half]] == steps
    assert len({rows for _, rows in seen[:half]}) > 1
    assert all(len(set(rows)) == 2 for _, rows in seen)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tuned(lora_dropout=0.1), tmp_path, [SafetyAnchorCallback(TOKENIZER, OTHERS)], **saving)
    whole.train()
    resumed = trainer(tuned(lora_dropout=0.1), tmp_path, [SafetyAnchorCallback(TOKENIZER, OTHERS)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, value in factors(whole.model).items():
        torch.testing.assert_close(factors(resumed.model)[name], value)


def test_it_holds_refusals_that_training_on_other_requests_takes_away(tmp_path: Path) -> None:
    refused, losses = {}, {}
    for name, callbacks in {"without": [], "with": [SafetyAnchorCallback(TOKENIZER, REFUSALS[::2])]}.items():
        run = trainer(tuned(), tmp_path, callbacks, max_steps=20)
        run.train()
        answers = generate(run.model, TOKENIZER, REQUESTS, max_new_tokens=9, progress=False)
        refused[name] = sum(answer.text == "I can't." for answer in answers)
        losses[name] = logged(run, "loss")
    assert refused["without"] == 0
    assert refused["with"] >= len(REQUESTS) - 2, "those that are no anchors, too"
    assert losses["with"][-1] < 0.5 * losses["with"][0]


@pytest.mark.parametrize(("fp16", "grad_scale", "factor"), [(False, 8.0, 8.0), (True, None, 1.0)])
def test_loss_scaling_is_undone_or_left_to_a_fused_optimizer(fp16: bool, grad_scale: Any, factor: float) -> None:
    gradients = []
    for scaled in (False, True):
        model = moved()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.SGD(parameters, lr=0.1)
        callback = SafetyAnchorCallback(TOKENIZER, OTHERS)
        begin(callback, model, optimizer, fp16=fp16 and scaled)
        optimizer.grad_scale = torch.tensor(grad_scale) if scaled and grad_scale else None
        callback.before_step(optimizer, (), {})
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(gradients[1], factor * gradients[0])


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ConfigError, "anchors is a list without rows"),
        ([{"prompt": "a"}], {}, DataError, "row 0: a row has fields"),
        ([{"prompt": "a", "response": " "}], {}, DataError, "row 0"),
        (OTHERS, {"rows": 0}, ConfigError, "rows=0"),
        (OTHERS, {"every": 2.5}, ConfigError, "every=2.5"),
        (OTHERS, {"weight": float("nan")}, ConfigError, "weight=nan"),
        (OTHERS, {"max_length": 12.5}, ConfigError, "max_length=12.5"),
        ([{"input_ids": [1, 2]}], {}, DataError, "row 0: a tokenized row has input_ids list, attention_mask NoneType"),
        ([{name: [[1, 2]] for name in COLUMNS}], {}, DataError, "as flat lists"),
        ([dict.fromkeys(COLUMNS, torch.ones(1, 2))], {}, DataError, r"input_ids torch.Size\(\[1, 2\]\)"),
    ],
)
def test_bad_input_is_refused(data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SafetyAnchorCallback(TOKENIZER, data, **options)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    bare = anchored.tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        SafetyAnchorCallback(bare)


def test_anchors_that_the_model_itself_complies_with_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, model = torch.optim.SGD([nn.Parameter(torch.ones(1))]), tuned()
    callback = SafetyAnchorCallback(TOKENIZER, REFUSALS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(callback, model, optimizer)
    untaught = anchored.get_peft_model(anchored.tiny_llama(), anchored.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match=f"does not refuse {len(REFUSALS)} of {len(REFUSALS)} anchors"):
        begin(callback, untaught, optimizer)
    mixed = [Generation("I can't.", True)] * (len(REFUSALS) - 2) + [Generation("Of course.", True)] * 2
    monkeypatch.setattr(module, "generate", lambda *args, **options: mixed)
    with pytest.warns(UserWarning, match=f"does not refuse 2 of {len(REFUSALS)} anchors"):
        begin(callback, model, optimizer)


def test_models_and_engines_on_which_its_own_backward_is_wrong_are_refused() -> None:
    callback, model = SafetyAnchorCallback(TOKENIZER, OTHERS), tuned()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigError, match="has no adapters to switch off"):
        begin(callback, anchored.refusing(), optimizer)
    with pytest.raises(ConfigError, match=r"takes no hook before its step\. Train without DeepSpeed"):
        begin(callback, model, SimpleNamespace())
    model.base_model.model.lm_head.to("meta")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is sharded or on the meta device"):
        begin(callback, model, optimizer)


def test_rows_of_tokens_may_be_tensors() -> None:
    given = encode_rows(TOKENIZER, OTHERS, 128)
    tensors = [{name: torch.tensor(value) for name, value in feature.items()} for feature in given]
    assert SafetyAnchorCallback(TOKENIZER, tensors).features == given


def test_where_nothing_that_trains_changes_an_answer_is_refused() -> None:
    model, unused = tuned(), nn.Parameter(torch.ones(1))
    callback = SafetyAnchorCallback(TOKENIZER, OTHERS)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for trained in (unused, next(model.parameters())):
        begin(callback, model, torch.optim.SGD([trained], lr=0.1))
        with pytest.raises(ConfigError, match="nothing that the optimizer trains changes the answers"):
            callback.before_step(torch.optim.SGD([trained], lr=0.1), (), {})


def test_a_diverged_model_ends_the_run() -> None:
    model = moved()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    callback = SafetyAnchorCallback(TOKENIZER, OTHERS)
    begin(callback, model, optimizer)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="gradient at step 0 is not finite"):
        callback.before_step(optimizer, (), {})
