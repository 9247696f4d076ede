"""Batches by length, turns that share a forward, and the states that come out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.screening.states import batches, last_states, nested, shared_out
from tests.tiny import tiny_llama

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 120))
def test_batches_hold_everything_once_within_the_budget(lengths, budget):
    result = batches(lengths, budget)
    assert sorted(place for batch in result for place in batch) == list(range(len(lengths)))
    for batch in result:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget
    longest = [max(lengths[place] for place in batch) for batch in result]
    assert longest == sorted(longest, reverse=True), "what needs most memory comes first"


@settings(deadline=None)
@given(LENGTHS, st.integers(50, 200))
def test_batches_are_few(lengths, budget):
    """No batch could take another sequence of the next batch."""
    result = batches(lengths, budget)
    for longer, shorter in pairwise(result):
        least = min(lengths[place] for place in longer)
        assert (len(shorter) + 1) * least > budget


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=12))
def test_a_sequence_stands_for_those_that_it_begins_with(sequences):
    parts = nested(sequences)
    assert [number for _, numbers in parts for number in numbers] == list(range(len(sequences)))
    for ids, numbers in parts:
        assert ids == sequences[numbers[-1]]
        assert all(ids[: len(sequences[number])] == sequences[number] for number in numbers)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_states_are_those_of_each_sequence_alone(budget):
    model = tiny_llama(layers=3)
    turns = [5, 9, 8, 40, 41, 7]
    sequences = [turns[:3], turns, [9], turns[:2], [6] * 12]
    result = last_states(model, sequences, [1, 3], budget)
    for ids, state in zip(sequences, result, strict=True):
        with torch.inference_mode():
            alone = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = torch.stack([alone[layer][0, -1] for layer in (1, 3)])
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_turns_of_one_conversation_take_one_forward():
    model, shapes = tiny_llama(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    last_states(model, [[5, 6], [5, 6, 7, 8], [5, 6, 7, 8, 9]], [1], 1000)
    assert shapes == [(1, 5)]


def test_the_model_is_left_as_it_was_and_progress_is_counted():
    model, done = tiny_llama().train(), []
    model.model.layers[0].eval()
    last_states(model, [[5], [6, 7], [6, 7, 8]], [1], 4, done.append)
    assert model.training
    assert not model.model.layers[0].training
    assert sum(done) == 3


def test_nothing_gives_nothing():
    assert last_states(tiny_llama(), [], [1, 2], 100).shape[:2] == (0, 2)
    assert shared_out([], list) == []
