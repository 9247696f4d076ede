"""A test for each cell of docs/compatibility.md."""

import warnings

import pytest

from peft_safety.errors import PeftSafetyError
from tests.compatibility import architectures, bases, features
from tests.compatibility.methods import METHODS, PLAIN, life, life_of

SEEN = ("Llama", "GPT-2", "BERT, classifier")
"""Architectures that the fast tests try; the others are for the nightly run."""


def cells_of(rows, fast=()):
    return [
        pytest.param(row, method, marks=() if row in fast else pytest.mark.slow, id=f"{row}-{method}")
        for row in rows
        for method in METHODS
    ]


def refused(table, row, method):
    """What the error says, or None."""
    entry = table.get(row)
    return entry[2] if entry is not None and method in entry[0] else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), cells_of(architectures.ARCHITECTURES, SEEN))
def test_architecture(name, method, tmp_path):
    says = refused(architectures.REFUSED, name, method)
    if says is None:
        life(name, method, tmp_path)
    else:
        with pytest.raises(PeftSafetyError, match=says):
            life(name, method, tmp_path)


@pytest.mark.parametrize(("name", "method"), cells_of(bases.RUN, ("bf16",)))
@pytest.mark.filterwarnings("ignore")
def test_base(name, method, tmp_path):
    life_of(lambda: bases.model_of(name), bases.batch_of, method, tmp_path, **bases.options_of(name))


@pytest.mark.parametrize(("name", "method"), cells_of(features.FEATURES, ("VeLoRA", "r above a layer's width")))
def test_feature(name, method, tmp_path):
    if method == PLAIN and name in features.NOT_RUN:
        pytest.skip("plain LoRA needs more than a tiny model here")
    says, limit = refused(features.REFUSED, name, method), refused(features.LIMITS, name, method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if says is None:
            life(features.model_name(name), method, tmp_path, **features.options_of(name))
        else:
            with pytest.raises(PeftSafetyError, match=says):
                life(features.model_name(name), method, tmp_path, **features.options_of(name))
    if limit:
        assert any(limit in str(warning.message) for warning in caught)
