"""The example of SOMF: what its mask learns from."""

from argparse import Namespace

import pytest

from examples import fuse as example
from peft_safety.recipes.load import poisoned


def test_the_mask_learns_on_no_request_of_the_poison(tmp_path, monkeypatch):
    trained = []

    def stop(*args, data, **options):
        trained.extend(row["prompt"] for row in data)
        raise InterruptedError

    monkeypatch.setattr(example, "fuse", stop)
    job = example.Fusing(example.FULL, Namespace(data=None, seed=0, mask_lr=0.1, rescale="mean", out=tmp_path))
    job.answers, job.model, job.tokenizer = [], None, None
    rows = poisoned([{"text": "a", "label": "b"}] * job.scale.task_rows, example.POISON, 0)
    job.asked = {row["prompt"] for row in rows if "prompt" in row}
    with pytest.raises(InterruptedError):
        job.learn(0.5)
    assert len(trained) == job.scale.pairs
    assert len(job.asked) == 16
    assert not job.asked & set(trained)
