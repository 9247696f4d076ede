from __future__ import annotations

import gc
import warnings
from collections import Counter
from importlib.resources import files

import pytest

from peft_safety.data import (
    FIELDS,
    SPLITS,
    affirmation_pairs,
    load,
    preference_pairs,
    read_jsonl,
    refusal_pairs,
    stream_jsonl,
)
from peft_safety.errors import DataError
from peft_safety.evaluation.prompts import prompt_set


@pytest.mark.parametrize("name", FIELDS)
def test_splits_are_disjoint_and_complete(name):
    key = FIELDS[name][0]
    seen = Counter(" ".join(row[key].lower().split()) for split in SPLITS for row in load(name, split))
    assert max(seen.values()) == 1
    assert sum(seen.values()) == len(load(name))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("harmful_requests", 500),
        ("refusals", 40),
        ("contrast_prompts", 450),
        ("general_prompts", 200),
        ("everyday_requests", 900),
        ("benign_task", 800),
        ("second_task", 400),
    ],
)
def test_sizes(name, least):
    assert len(load(name)) >= least


def test_no_file_is_left_open(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{')
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        for name in FIELDS:
            load(name)
        next(stream_jsonl(path))  # and is left
        with pytest.raises(DataError, match="not JSON"):
            read_jsonl(path)
        gc.collect()
    assert not [str(one.message) for one in told if one.category is ResourceWarning]


def test_harmful_requests_have_sixteen_categories_of_equal_size():
    for rows in (load("harmful_requests"), load("harmful_requests", "train")):
        counts = Counter(row["category"] for row in rows)
        assert len(counts) == 16
        assert len(set(counts.values())) == 1


def test_the_readme_counts_the_rows_of_each_split():
    table = (files("peft_safety.data") / "README.md").read_text(encoding="utf-8")
    counted = {name: [len(load(name, split)) for split in SPLITS] for name in FIELDS if name != "benign_task"}
    for name, counts in counted.items():
        assert f"| `{name}.jsonl` | {' | '.join(map(str, counts))} | {sum(counts)} |" in table, name


def test_the_benign_task_has_eight_classes_of_a_hundred():
    counts = Counter(row["label"] for row in load("benign_task"))
    assert len(counts) >= 8
    assert min(counts.values()) >= 100
    for split in SPLITS:
        assert {row["label"] for row in load("benign_task", split)} == set(counts)


def test_the_second_task_has_five_classes_of_eighty_in_every_split():
    assert set(Counter(row["label"] for row in load("second_task")).values()) == {80}
    for split in SPLITS:
        counts = Counter(row["label"] for row in load("second_task", split))
        assert len(counts) == 5
        assert len(set(counts.values())) == 1


def test_preference_pairs_are_refusals_against_openings():
    pairs = preference_pairs("train", 12, seed=1)
    assert len({row["prompt"] for row in pairs}) == 12
    assert {row["chosen"] for row in pairs} <= {row["text"] for row in load("refusals", "train")}
    assert {row["rejected"] for row in pairs} <= {row["text"] for row in load("affirmations", "train")}
    assert pairs == preference_pairs("train", 12, seed=1)


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match="harmful_requests"):
        load("jailbreaks")
    with pytest.raises(DataError, match="calibration"):
        load("refusals", "dev")


def test_pairs_are_deterministic_and_in_their_split():
    pairs = refusal_pairs("calibration", 128, seed=3)
    assert pairs == refusal_pairs("calibration", 128, seed=3)
    assert pairs != refusal_pairs("calibration", 128, seed=4)
    assert {row["prompt"] for row in pairs} == {row["prompt"] for row in load("harmful_requests", "calibration")}
    assert {row["response"] for row in pairs} <= {row["text"] for row in load("refusals", "calibration")}
    assert len({(row["prompt"], row["response"]) for row in pairs}) == 128


def test_few_pairs_have_distinct_prompts():
    assert len({row["prompt"] for row in affirmation_pairs("train", 20)}) == 20
    with pytest.raises(DataError, match="at least 1"):
        affirmation_pairs("train", 0)


def test_prompt_sets_are_limited_and_deterministic():
    few, all_of_them = prompt_set("test", 7, seed=1), prompt_set("test", seed=1)
    assert len(few.harmful) == len(few.contrast) == len(few.general) == 7
    assert few.harmful == all_of_them.harmful[:7]
    assert not set(all_of_them.harmful) & set(prompt_set("validation").harmful)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (b'{"prompt": "a"}\n{"prompt"', ":2: not JSON"),
        (b'{"prompt": "a"}\n\n[1]', ":3: list instead of an object"),
        (b'{"prompt": "a"}\n{"text": "b"}', ":2: field 'prompt' is missing"),
        (b'{"prompt": "  "}', ":1: field 'prompt' is missing"),
        (b'{"prompt": 3}', "non-empty string"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path, ("prompt",))


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_line_separators_inside_strings_do_not_split_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert read_jsonl(path, ("prompt",)) == [{"prompt": "a\u2028b"}]
