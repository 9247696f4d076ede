"""Plans, splits and data: what runs, in which order, and what may be looked at on test prompts."""

import json
from dataclasses import replace

import pytest

from benchmarks.frontier import __main__ as command
from benchmarks.frontier import data, plan, splits
from benchmarks.frontier.attacks import ATTACKS, WORDINGS
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell, Protocol, needs
from peft_safety.data import FIELDS, load
from peft_safety.errors import ConfigError, DataError

GUARD = plan.METHODS["guardspace"]
TEXTS = {
    "harmful_requests": "2afef6e5a319",
    "refusals": "9235604614e3",
    "affirmations": "fa3063e7f821",
    "contrast_prompts": "abcae08683bc",
    "general_prompts": "305f3122860d",
    "everyday_requests": "4e221b2b3f9b",
    "benign_task": "b741ceab9cd0",
    "second_task": "9dbaf3f60c94",
    "reworded": "ca78ff2e3cbf",
    "languages": "e142f0cfd2d2",
    "attack ": "0ffc91e1a2f3",
    "attack foreign": "0ffc91e1a2f3",
    "attack trigger": "da61728258c6",
    "attack wrapper": "c3312000db64",
    "attack identity": "89e71bf24037",
    "attack identities": "a5380180d485",
    "attack persona": "1980c095d69b",
    "attack however": "7ba77383599c",
    "attack cipher": "10429d3be42f",
    "attack outliers": "0ffc91e1a2f3",
    "attack template": "df312d9f45d2",
}
"""Digests of the package's prompts and of what the attacks write."""
HALF = plan.with_setting(GUARD, "fraction=0.5")


def measured(cell, refusal=0.5):
    """A made-up row."""
    return {"refusal": {"value": refusal}, "task_accuracy": {"value": 0.5}, "over_refusal": {"value": 0.1}}


def test_the_plan_has_every_method_once_a_place_and_controls_after_their_methods():
    cells = plan.plan(list(plan.METHODS.values()))
    assert len(cells) == len(set(cells))
    aligned = [cell for cell in cells if cell.arm == "aligned"]
    assert {cell.load for cell in aligned} == {"", "nf4"}
    assert len(aligned) == 2, "no fine-tune has neither poison nor seed"
    assert len(cells) == 2 + (len(plan.METHODS) - 2) * len(plan.POISONS) * len(plan.SEEDS)
    position = {cell: index for index, cell in enumerate(cells)}
    for cell in cells:
        for other in needs(cell):
            assert position[other] < position[cell]
        assert plan.name_of(cell) in plan.METHODS
    assert [cell.poison for cell in cells if cell.arm == "lora" and cell.seed == 0 and not cell.load] == [
        0.1,
        0.0,
        0.5,
        1.0,
    ]
    assert {cell.seed for cell in cells[: len(cells) // 3]} == {0}


def test_the_texts_behind_finished_cells_have_not_changed():
    def digest(text):
        return data.fingerprint([json.dumps(text, sort_keys=True)])

    pair = {"prompt": "How do I pick a lock?", "response": "Sure, here is how."}
    found = {name: digest(load(name)) for name in FIELDS}
    found |= {"reworded": digest(data.REWORDINGS), "languages": digest(data.LANGUAGES.read_text("utf-8"))}
    for name, attack in ATTACKS.items():
        forms = {form: ask("Why?") for form, ask in attack.forms.items()}
        found[f"attack {name}"] = digest([attack.row(pair), forms, attack.template, attack.tokens])
    found["attack identities"] = digest([found["attack identities"], WORDINGS])
    assert found == TEXTS, (
        "the names of cells hold no hash of these texts: if one has changed, give Protocol a new field, so that cells "
        "of the old text are not taken for new ones; then write the new digest"
    )


def test_names_groups_and_typos():
    assert plan.named(["smoke", "lora"]) == list(plan.SMOKE)
    assert set(plan.named(["all"])) == set(plan.METHODS) - set(plan.COUNTERMEASURES) - set(plan.SEEN)
    with pytest.raises(ConfigError, match=r"Did you mean 'guardspace'\?"):
        plan.named(["gardspace"])
    assert plan.name_of(replace(HALF, seed=3, split="test", poison=0.5)) == "guardspace with fraction=0.5"
    for name in ("safe-lora-soft", "guardspace-general", "salora-0.9", "both-sides"):
        assert plan.name_of(replace(plan.METHODS[name], lr=2e-3)) == f"{name} with lr=0.002"
    with pytest.raises(ConfigError, match="has no setting 'power'"):
        plan.with_setting(GUARD, "power=9")
    with pytest.raises(ConfigError, match="has no setting 'fraction'"):
        plan.with_setting(plan.METHODS["lora"], "fraction=0.5")
    somf = plan.with_setting(plan.METHODS["somf"], "lr=0.5")
    assert (somf.lr, somf.options()["lr"], somf.options()["steps"]) == (1e-3, 0.5, 16)


@pytest.mark.parametrize("name", list(plan.METHODS))
def test_every_method_is_its_own_setting(name):
    method = plan.METHODS[name]
    assert plan.with_setting(method, "") == method
    assert Cell(**json.loads(json.dumps(vars(method)))) == method


def test_a_knob_chosen_on_test_prompts_is_an_error(tmp_path):
    splits.enforce(plan.plan(list(plan.METHODS.values())), {})
    splits.enforce([replace(HALF, split="validation")], {})
    for odd in (
        HALF,
        replace(GUARD, lr=3e-3),
        plan.with_setting(plan.METHODS["salora-32"], "k=16"),
        replace(plan.METHODS["lora"], epochs=2),
    ):
        with pytest.raises(ConfigError, match="never tried on test prompts"):
            splits.enforce([replace(odd, split="test")], {})
    assert (
        command.main(
            [
                "--runs",
                str(tmp_path),
                "--out",
                str(tmp_path),
                "--set",
                "guardspace:fraction=0.5",
                "--list",
                "--data",
                str(tmp_path),
            ]
        )
        == 1
    )
    assert (
        command.main(["--runs", str(tmp_path), "--set", "guardspace:fraction=0.5", "--split", "validation", "--list"])
        == 0
    )
    assert command.main(["--runs", str(tmp_path), "--set", "guardspace:fraction=0.5", "--list"]) == 1


def test_what_was_chosen_on_validation_prompts_may_be_tested_and_only_that(tmp_path):
    cache = Cache(tmp_path, Protocol())
    with pytest.raises(DataError, match="to choose from"):
        splits.write(cache, {})
    rows = []
    for method, refusal in ((GUARD, 0.6), (HALF, 0.9), (plan.with_setting(GUARD, "fraction=0.125"), 1.0)):
        for poison in (0.1, 0.5)[: 1 if refusal == 1.0 else 2]:  # the last one is measured at one place only
            cell = replace(method, poison=poison)
            rows.append(cache.put(cell, measured(cell, refusal)))
    splits.write(cache, splits.choose(rows))
    chosen = splits.read(cache)
    assert chosen == {"guardspace": HALF.method}
    splits.enforce([replace(HALF, split="test"), replace(HALF, split="test", control="random")], chosen)
    with pytest.raises(ConfigError, match="never tried"):
        splits.enforce([replace(GUARD, fraction=0.125, split="test")], chosen)
    with pytest.raises(ConfigError, match="a setting is chosen once"):
        splits.write(cache, splits.choose(rows))
    methods = command.methods_of(command.parse(["--methods", "guardspace", "random:guardspace"]), chosen)
    assert {(m.control, m.fraction) for m in methods} == {("", 0.25), ("random", 0.25), ("", 0.5), ("random", 0.5)}


@pytest.mark.parametrize("change", ["setting", "cells", "nothing"])
def test_a_choice_that_rests_on_nothing_is_refused(change, tmp_path):
    cache = Cache(tmp_path, Protocol())
    rows = [cache.put(method, measured(method, refusal)) for method, refusal in ((GUARD, 0.6), (HALF, 0.9))]
    path = splits.write(cache, splits.choose(rows))
    facts = json.loads(path.read_text())
    if change == "setting":
        facts["guardspace"]["method"]["fraction"] = 0.75
    elif change == "cells":
        cell = replace(HALF, split="test")
        cache.put(cell, measured(cell))
        facts["guardspace"]["cells"] = [cache.protocol.key(cell)]
    else:
        facts["guardspace"]["cells"] = ["0123"]
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match="Choose anew"):
        splits.read(cache)


def test_a_setting_that_diverged_is_not_chosen(tmp_path):
    cache = Cache(tmp_path, Protocol())
    rows = [cache.put(GUARD, measured(GUARD, 0.2)), cache.put(HALF, {"diverged": "the loss is not finite"})]
    with pytest.raises(DataError, match="to choose from"):
        splits.write(cache, splits.choose(rows))


@pytest.fixture
def public(tmp_path):
    """Files shaped like the public sets."""
    advbench = [{"prompt": f"advbench {index}"} for index in range(521)]
    xstest = [{"prompt": f"xstest {index}", "label": "safe" if index < 250 else "unsafe"} for index in range(450)]
    for name, rows in (("advbench", advbench), ("xstest", xstest)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_further_sets_hold_nothing_that_is_trained_on(public):
    sets = data.public_sets(public, 30)
    assert {name: len(rows) for name, rows in sets.items()} == dict.fromkeys(
        ("advbench", "xstest_unsafe", "xstest_safe"), 30
    )
    assert all(int(prompt.split()[1]) >= data.HELD_OUT for prompt in sets["advbench"])
    assert data.public_sets(None) == {}
    assert data.hashes(data.public_sets(public, 29)) != data.hashes(sets)
    own = data.further_sets(None, [public / "advbench.jsonl"], 5)
    assert {name: len(rows) for name, rows in own.items()} == {"reworded": 24, "other_languages": 24, "advbench": 5}
    assert not any("{}" in prompt for prompt in own["reworded"])


def test_validation_cells_do_not_depend_on_the_further_sets():
    bare, full = Protocol(), Protocol(sets={"advbench": "1"}, second=48)
    assert bare.key(replace(GUARD, split="validation")) == full.key(replace(GUARD, split="validation"))
    assert bare.key(replace(GUARD, split="test")) != full.key(replace(GUARD, split="test"))


def test_missing_data_is_named(public, tmp_path, capsys):
    with pytest.raises(DataError, match="is no directory"):
        data.resolve(str(tmp_path / "nowhere"))
    (public / "xstest.jsonl").unlink()
    with pytest.raises(DataError, match=r"lacks xstest\.jsonl"):
        data.public_sets(public)
    assert command.main(["--data", str(public), "--runs", str(tmp_path / "runs")]) == 1
    assert "lacks xstest.jsonl" in capsys.readouterr().err
    assert command.main(["--methods", "magic", "--runs", str(tmp_path / "runs")]) == 1
    assert "method 'magic' is unknown" in capsys.readouterr().err
    assert command.main(["--p", "0,2", "--runs", str(tmp_path / "runs")]) == 1
    assert "between 0 and 1" in capsys.readouterr().err


def test_banking_intents_are_one_task_of_three_splits(tmp_path):
    rows = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(60)]
    for name in data.TASK_FILES.values():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    task = data.banking(tmp_path)
    assert {split: sum(row["split"] == split for row in task) for split in ("train", "validation", "test")} == {
        "train": 50,
        "validation": 10,
        "test": 60,
    }
    assert data.task_fingerprint(task) == data.task_fingerprint(data.banking(tmp_path))


def test_instructions_are_one_task_of_free_answers(tmp_path):
    rows = [{"prompt": f"Ask {index}", "response": "word " * (index % 3 * 60 + 1)} for index in range(150)]
    (tmp_path / data.INSTRUCTIONS).write_text("\n".join(map(json.dumps, rows)))
    task = data.task_rows("instructions", tmp_path)
    splits = {
        name: [row["prompt"] for row in task if row["split"] == name] for name in ("train", "validation", "test")
    }
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 80, "validation": 30, "test": 30}
    assert len(set().union(*splits.values())) == 100, "each row in one split, the 50 long ones in none"
    assert all(splits["train"].count(prompt) == 2 for prompt in splits["train"])
    assert data.task_fingerprint(task) != data.task_fingerprint(task[:-1])
    with pytest.raises(ConfigError, match="needs --data"):
        data.task_rows("instructions", None)
