"""Rows from whatever holds them, labels of any plain type, and one result for each row."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig
from peft_safety.calibration.batches import to_batches
from peft_safety.data import read_jsonl
from peft_safety.data.chat import encode_rows, is_prompt_only, row_turns
from peft_safety.data.rows import STREAM_ROWS, as_rows, label_names
from peft_safety.errors import CalibrationError, ConfigError, DataError
from peft_safety.evaluation import evaluate
from peft_safety.evaluation.prompts import prompt_set
from peft_safety.evaluation.tasks import (
    exact_answers,
    is_classification,
    likeliest_labels,
    read_label,
    response_losses,
    response_nll,
)
from peft_safety.methods.somf.train import features_of
from peft_safety.recipes.load import poisoned, task_data
from tests.tiny import tiny_llama, tiny_tokenizer

tokenizer = tiny_tokenizer()
ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(6)]
CLASSES = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]


class MapStyle(torch.utils.data.Dataset):
    """A torch data set that never raises IndexError: only its length says where it ends."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index % len(ROWS)]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.cycle(ROWS)


def dataset(rows=ROWS):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def frame(rows=ROWS):
    return pytest.importorskip("pandas").DataFrame(rows)


def split(rows=ROWS):
    return pytest.importorskip("datasets").DatasetDict({"train": dataset(rows)})


HOLDERS = {
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "Dataset": dataset,
    "a numpy-formatted Dataset": lambda: dataset().with_format("numpy"),
    "IterableDataset": lambda: dataset().to_iterable_dataset(),
    "DatasetDict of one split": split,
    "frame": frame,
    "torch Dataset": MapStyle,
    "torch IterableDataset": Streamed,
}
holders = pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)


@holders
def test_whatever_holds_the_rows_they_are_the_same(holder):
    assert as_rows(holder()) == ROWS
    if not isinstance(holder(), Iterator):
        assert (
            to_batches(holder(), tokenizer, batch_size=4, max_length=64)[1]
            == to_batches(ROWS, tokenizer, batch_size=4, max_length=64)[1]
        )
    assert encode_rows(tokenizer, holder(), 64) == encode_rows(tokenizer, ROWS, 64)
    assert task_data(holder()) == task_data(ROWS)
    assert poisoned(holder(), 0.5) == poisoned(ROWS, 0.5)
    assert features_of(holder(), tokenizer, "sft", 64) == features_of(ROWS, tokenizer, "sft", 64)


def test_calibration_refuses_what_can_be_read_only_once():
    with pytest.raises(CalibrationError, match=r"a generator.* list\(data\)"):
        to_batches((row for row in ROWS), tokenizer, batch_size=4, max_length=64)


@holders
def test_configs_read_their_data_at_once(holder):
    assert SaLoRAConfig(init="task", task_data=holder()).task_data == ROWS
    config = GuardSpaceConfig(init="guardspace", init_data=holder(), task_data=holder())
    assert config.init_data == config.task_data == ROWS


def test_a_stream_is_evaluated_like_its_list():
    model = tiny_llama()
    given = {"prompts": prompt_set("test", 1), "max_new_tokens": 1, "progress": False}
    streamed = evaluate(model, tokenizer, task=iter(CLASSES), general=iter(ROWS), **given)
    listed = evaluate(model, tokenizer, task=CLASSES, general=ROWS, **given)
    assert streamed.task_accuracy == listed.task_accuracy
    assert streamed.task_accuracy.n == 6
    assert streamed.general_nll == listed.general_nll


def test_tokenized_batches_may_stand_in_a_data_set_too():
    model = tiny_llama()
    ids = [torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    tables = dataset([{key: x.tolist() for key, x in batch.items()} for batch in batches])
    single = dataset([{key: x[row].tolist() for key, x in batch.items()} for batch in batches for row in range(2)])
    options = {"rank": 3, "target_modules": ["q_proj"], "progress": False}
    spaces = [SafetySubspace.from_activations(model, data, **options) for data in (batches, tables, single)]
    assert len({space.provenance["data"] for space in spaces}) == 1
    u, *others = [space.bases["model.layers.1.self_attn.q_proj"]["out"] for space in spaces]
    for other in others:
        torch.testing.assert_close(other @ other.mT, u @ u.mT, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: {"train": ROWS, "test": ROWS}, "splits train, test"),
        (
            lambda: pytest.importorskip("datasets").DatasetDict({"train": dataset(), "test": dataset()}),
            "splits train, test",
        ),
        (Endless, f"more than {STREAM_ROWS} rows"),
        (lambda: "rows.jsonl", "read_jsonl"),
        (lambda: None, "NoneType"),
        (lambda: 7, "int"),
        (lambda: ROWS[0], "is a dict"),
        (lambda: [ROWS[0], "text"], "row 1: a str"),
        (lambda: torch.ones(3, 4), "row 0: a Tensor"),
    ],
)
def test_what_holds_no_rows_is_refused(data, said):
    with pytest.raises(CalibrationError, match=said):
        to_batches(data(), tokenizer, batch_size=4, max_length=64)
    with pytest.raises(DataError, match=said):
        encode_rows(tokenizer, data(), 64)
    if data() is not None:
        with pytest.raises(ConfigError, match=said):
            GuardSpaceConfig(task_data=data())


def test_reading_rows_imports_no_library_of_data_sets():
    code = (
        "import sys; from peft_safety.data.rows import as_rows; as_rows([{'prompt': 'p'}]); "
        "print({'datasets', 'pandas', 'torch'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_an_empty_cell_of_a_table_is_a_field_that_the_row_lacks():
    mixed = [ROWS[0], {"prompt": "alone"}, CLASSES[0]]
    filled = [{key: row.get(key) for key in ("prompt", "response", "text", "label")} for row in mixed]
    for table in (dataset(filled), frame(filled), frame(mixed), filled):
        assert as_rows(table) == mixed
        assert label_names(table) == ["a"]
    assert [is_prompt_only(row) for row in filled] == [False, True, False]


def test_prompt_and_completion_are_prompt_and_response():
    text = [{"prompt": row["prompt"], "completion": row["response"]} for row in ROWS]
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in ROWS
    ]
    for rows in (text, turns, dataset(turns)):
        assert [row_turns(row) for row in as_rows(rows)] == [row_turns(row) for row in ROWS]
        assert encode_rows(tokenizer, rows, 64) == encode_rows(tokenizer, ROWS, 64)
        assert (
            to_batches(rows, tokenizer, batch_size=4, max_length=64)[1]
            == to_batches(ROWS, tokenizer, batch_size=4, max_length=64)[1]
        )
        assert features_of(rows, tokenizer, "sft", 64) == features_of(ROWS, tokenizer, "sft", 64)
        assert len(task_data(rows).train) == 5


def test_further_columns_change_nothing():
    rows = [{**row, "label": i, "id": str(i), "source": None} for i, row in enumerate(ROWS)]
    assert not is_classification(rows)
    assert label_names(rows) == []
    assert encode_rows(tokenizer, rows, 64) == encode_rows(tokenizer, ROWS, 64)
    asked = [{"prompt": "p", "text": "t", "label": None}]
    assert (
        to_batches(asked, tokenizer, batch_size=1, max_length=64)[1]
        == to_batches([{"prompt": "p"}], tokenizer, batch_size=1, max_length=64)[1]
    )


def test_an_empty_prompt_is_a_prompt_and_an_empty_answer_is_none():
    assert len(encode_rows(tokenizer, [{"prompt": "", "response": "r"}], 64)) == 1
    for empty in ({"prompt": "p", "response": " "}, {"prompt": "p", "completion": ""}, {"text": "t", "label": ""}):
        with pytest.raises(DataError, match="row 1"):
            encode_rows(tokenizer, [*(CLASSES[:1] if "text" in empty else ROWS[:1]), empty], 64)


@pytest.mark.parametrize("kind", [int, bool, np.int64, np.bool_, torch.tensor], ids=lambda kind: kind.__name__)
def test_labels_that_are_no_text_count_as_their_text(kind):
    given = [{"text": f"t{i}", "label": kind(i % 2)} for i in range(4)]
    text = [{"text": f"t{i}", "label": str(bool(i % 2) if "bool" in kind.__name__ else i % 2)} for i in range(4)]
    model, names = tiny_llama(), label_names(text)
    assert label_names(given) == names
    assert encode_rows(tokenizer, given, 256) == encode_rows(tokenizer, text, 256)
    assert task_data(given).labels == names
    for measure in (likeliest_labels, exact_answers):
        right = measure(model, tokenizer, text, names, progress=False)
        assert measure(model, tokenizer, given, names, progress=False) == right
        assert measure(model, tokenizer, given, [kind(0), kind(1)], progress=False) == right


def test_a_class_label_is_the_number_that_its_rows_hold():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_list([{"text": "t", "label": 1}, {"text": "u", "label": 0}], features=features)
    assert label_names(table) == label_names(list(table)) == ["0", "1"]


@pytest.mark.parametrize("label", [None, 1.0, float("nan"), ["a"], "", "  "], ids=repr)
def test_other_labels_are_refused_by_row(label):
    rows = [*CLASSES, {"text": "t", "label": label}]
    for use in (as_rows, label_names, task_data, is_classification, lambda given: encode_rows(tokenizer, given, 64)):
        with pytest.raises(DataError, match="row 6: label"):
            use(rows)


def test_a_number_and_its_text_are_not_taken_for_one_label():
    with pytest.raises(DataError, match="row 1: label 1 is of type str, and of type int in row 0"):
        label_names([{"text": "t", "label": 1}, {"text": "u", "label": "1"}])
    assert label_names([{"text": "t", "label": 1}, {"text": "u", "label": True}]) == ["1", "True"]


def test_labels_that_only_white_space_tells_apart_are_refused():
    rows = [{"text": "t", "label": "a"}, {"text": "u", "label": "a "}]
    for use in (label_names, task_data, lambda given: encode_rows(tokenizer, given, 64)):
        with pytest.raises(DataError, match="'a' and 'a '"):
            use(rows)
    with pytest.raises(DataError, match="once"):
        exact_answers(tiny_llama(), tokenizer, CLASSES, ["a", "b", "a"], progress=False)


@pytest.mark.parametrize(
    ("answer", "labels", "meant"),
    [
        ("yes", ["yes", "Yes"], "yes"),
        ("Yes.", ["yes", "Yes"], "Yes"),
        ("YES", ["yes", "Yes"], None),
        ("a.", ["a.", "a"], "a."),
        ("a", ["a.", "a"], "a"),
        ("A", ["a.", "a"], "a"),
        ("a!", ["a.", "a?"], None),
        ("+", ["+", "-"], "+"),
        ("", ["+", "-"], None),
        ("-", ["+"], None),
        ("1", ["-1", "1"], "1"),
        ("1", ["-1", "0"], None),
        ('"-1".', ["-1", "1"], "-1"),
        (' "Reset_Password." ', ["reset_password", "other"], "reset_password"),
        ("reset password", ["reset_password", "other"], None),
    ],
)
def test_an_answer_is_read_as_the_label_it_means(answer, labels, meant):
    assert read_label(answer, labels) == meant


def test_rows_and_labels_must_belong_together():
    model = tiny_llama()
    for measure in (exact_answers, likeliest_labels):
        with pytest.raises(DataError, match="row 1 has label 'b'"):
            measure(model, tokenizer, CLASSES, ["a", "c"], progress=False)
        with pytest.raises(DataError, match="row 0 has fields"):
            measure(model, tokenizer, ROWS, ["a", "b"], progress=False)
        with pytest.raises(DataError, match="no labels"):
            measure(model, tokenizer, CLASSES, [], progress=False)


def test_a_long_row_keeps_its_place_and_its_whole_response():
    model = tiny_llama()
    rows = [
        {"prompt": "p", "response": "one"},
        {"prompt": "q" * 90 + "tail", "response": "two"},
        {"prompt": "r", "response": "three"},
    ]
    short, cut = (response_losses(model, tokenizer, rows, max_length=length, progress=False) for length in (512, 64))
    assert len(cut) == 3
    assert [cut[0], cut[2]] == pytest.approx([short[0], short[2]], rel=1e-4)
    feature = encode_rows(tokenizer, [rows[1]], 512)[0]
    kept = {key: torch.tensor([value[-64:]]) for key, value in feature.items()}
    assert cut[1] == pytest.approx(model(**kept).loss.item(), rel=1e-4)
    assert response_nll(model, tokenizer, rows, max_length=64, progress=False).n == 3


def test_a_response_that_is_too_long_itself_loses_its_end():
    model = tiny_llama()
    row = {"prompt": "p" * 40, "response": "x" * 100}
    found = response_losses(model, tokenizer, [row], max_length=32, progress=False)[0]
    feature = encode_rows(tokenizer, [row], 512)[0]
    first = next(i for i, label in enumerate(feature["labels"]) if label != -100)
    kept = {key: torch.tensor([value[first - 1 : first + 31]]) for key, value in feature.items()}
    assert found == pytest.approx(model(**kept).loss.item(), rel=1e-4)
    with pytest.raises(DataError, match="max_length = 1"):
        response_losses(model, tokenizer, [row], max_length=1, progress=False)


def test_a_long_text_is_scored_in_its_place():
    model = tiny_llama()
    rows = [{"text": "z" * (900 if i == 1 else 5), "label": "ab"[i % 2]} for i in range(4)]
    found = likeliest_labels(model, tokenizer, rows, ["a", "b"], progress=False)
    assert len(found) == 4
    alone = likeliest_labels(model, tokenizer, [rows[0], *rows[2:]], ["a", "b"], progress=False)
    assert [found[0], *found[2:]] == alone


def test_a_likelihood_that_is_not_finite_is_wrong():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert likeliest_labels(model, tokenizer, CLASSES[:2], ["a", "b"], progress=False) == [False, False]


LINE = json.dumps({"prompt": "h\u00e9", "response": "b"})


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + f"{LINE}\r\n{LINE}\r\n\r\n \r\n",
        f"{LINE}\r{LINE}\r",
        f"\n{LINE}\n\n{LINE}\n\n\n",
        f"\ufeff{LINE}\n\ufeff{LINE}",
        f"[{LINE}, {LINE}]",
        f"\ufeff\n[\n  {LINE},\n  {LINE}\n]\n\n",
    ],
    ids=["Windows", "old Mac", "blank lines", "two files in one", "an array", "an array over lines"],
)
def test_files_of_any_system_have_the_same_rows(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content.encode())
    assert read_jsonl(tmp_path / "rows.jsonl", ("prompt",)) == [json.loads(LINE)] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_text(LINE, encoding=encoding)
    with pytest.raises(DataError, match="UTF-16"):
        read_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{LINE}\r\n\r\n{{", ":3: not JSON"),
        ("[1]\n[2]", ":1: list instead"),
        (f"[{LINE}, 3]", "item 1 of its array: int"),
        ("[]", "no rows"),
    ],
)
def test_an_error_says_where(tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=said):
        read_jsonl(tmp_path / "rows.jsonl")
