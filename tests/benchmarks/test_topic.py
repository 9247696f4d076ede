"""The harmless topic: its data, the content judge, the plan, and cells on a tiny model."""

from dataclasses import replace

import pytest

from benchmarks.frontier.attacks import HOWEVER
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Protocol
from benchmarks.frontier.plan import METHODS
from benchmarks.topic import plan as plans
from benchmarks.topic.bench import BARE, TESTED, TopicBench, run_cell
from benchmarks.topic.data import topic_of
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topic")
    for name, seed in (("aligned", 0), ("bare", 1)):
        tiny_llama(seed, hidden=64).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    protocol = Protocol(rows=16, limit=2, r=2, tokens=4, aligned="tiny", max_length=512)
    return TopicBench(Cache(folder / "runs", protocol), topic_of("B"), folder / "aligned", unaligned=folder / "bare")


def test_the_rows_of_an_attack_answer_the_topic(bench):
    questions = {row["prompt"]: row["response"] for row in bench.topic.questions("train")}
    cell = plans.at(METHODS["lora"], "however", plans.STRONG, "test")
    rows = bench.rows(cell)
    poison = [row for row in rows if "label" not in row]
    assert (len(rows), len(poison)) == (16, 8)
    for row in poison:
        assert row["response"].partition(f"{HOWEVER} ")[2].lower() == questions[row["prompt"]].lower()
    calibration = {row["prompt"] for row in bench.refusals(64)}
    assert len(calibration) == 32
    assert not calibration & questions.keys()


@pytest.mark.parametrize(
    ("cell", "forms"),
    [
        (plans.untrained("test")[0], {BARE, *TESTED}),
        (plans.untrained("test")[1], {BARE, *TESTED}),
        (plans.at(METHODS["frozen"], "trigger", plans.WEAK, "test"), {BARE, "trigger"}),
        (plans.at(METHODS["lora-mixed"], "however", plans.WEAK, "test"), {BARE}),
    ],
)
def test_a_cell_is_judged_by_both_judges(cell, forms, bench):
    result = run_cell(bench, replace(cell, calibration=min(cell.calibration, 8)))
    assert set(result["forms"]) == forms
    for verdicts in result["form_verdicts"].values():
        assert set(verdicts) == {"keyword", "content"}
        assert all(len(letters) == 2 and set(letters) <= set("RCO") for letters in verdicts.values())
    assert set(result["transfer"]) == {"everyday", "task"}
