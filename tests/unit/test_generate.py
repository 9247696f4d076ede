"""What is generated: greedily, without the model's own defaults, and with the tag where a template opens reasoning."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from peft_safety.data.chat import render_prompt
from peft_safety.evaluation import PromptSet, evaluate, self_responses
from peft_safety.evaluation.generate import Generation, generate
from tests.tiny import tiny_llama, tiny_tokenizer

DEFAULTS = {"do_sample": True, "temperature": 1.5, "top_p": 0.3, "repetition_penalty": 1.8, "min_new_tokens": 7}
THOUGHT = "Okay, so the user asks about that. Let me think"


@pytest.mark.parametrize("adapted", [False, True])
def test_no_default_of_the_model_but_its_stop_tokens_counts(adapted):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    holders = [model, model.get_base_model()] if adapted else [model]

    def answers():
        return generate(model, tokenizer, ["hello", "a"], max_new_tokens=8, progress=False)

    plain = answers()
    ids = tokenizer(render_prompt(tokenizer, [{"role": "user", "content": "hello"}]), return_tensors="pt")["input_ids"]
    first = int(model(input_ids=ids).logits[0, -1].argmax())
    for holder in holders:
        holder.generation_config = GenerationConfig(eos_token_id=2, **DEFAULTS)
    before, state = [holder.generation_config for holder in holders], torch.random.get_rng_state()
    assert answers() == plain == answers()
    assert torch.equal(state, torch.random.get_rng_state())
    assert [holder.generation_config for holder in holders] == before
    assert all(holder.generation_config is config for holder, config in zip(holders, before, strict=True))
    model.generation_config.eos_token_id = [2, first]
    assert answers()[0] == Generation("", True)

    holders[-1].forward = None  # an error puts them back too
    with pytest.raises(TypeError):
        answers()
    assert all(holder.generation_config is config for holder, config in zip(holders, before, strict=True))


@pytest.fixture
def thinking():
    """A tokenizer whose template opens the reasoning, and a model that is cut off within it."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    said = tokenizer(THOUGHT, add_special_tokens=False)["input_ids"]
    model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said] * len(input_ids))], 1)
    return model, tokenizer


def test_reasoning_that_the_template_opens_is_marked(thinking):
    (answer,) = generate(*thinking, ["hello"], progress=False)
    assert (answer.text, answer.written, answer.finished) == (f"<think>{THOUGHT}", THOUGHT, False)
    (closed,) = generate(*thinking, ["... <think>\n</think>\n"], progress=False, rendered=True)
    assert (closed.text, closed.written) == (THOUGHT, THOUGHT)
    found = evaluate(*thinking, prompts=PromptSet("own", ("a", "b"), ("c",), ()), progress=False)
    assert (found.undecided, found.refusal.k, found.compliance.k, found.over_refusal.k) == (3, 0, 0, 0)


def test_what_the_template_opens_is_no_part_of_the_models_own_answers(thinking):
    """It would stand there twice, where the template writes it before the answer."""
    assert [row["response"] for row in self_responses(*thinking, ["hello"], progress=False)] == [THOUGHT]
