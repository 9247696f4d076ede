"""The rows of a job: each format of TRL and of this package, from each kind of file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pytest
import trl

from peft_safety.data import load
from peft_safety.data.chat import classification_prompt
from peft_safety.errors import ArtifactError, ConfigError, DataError
from peft_safety.recipes.job.data import feature, read_data
from tests.recipes.jobs import PAIRS, TASK, write_rows
from tests.tiny import tiny_llama, tiny_tokenizer

USER, ASSISTANT = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FORMATS = {
    "pair": {"prompt": "hi", "response": "ho"},
    "label": {"text": "hi", "label": "ho"},
    "messages": {"messages": USER + ASSISTANT},
    "sharegpt": {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]},
    "tools": {"messages": USER + ASSISTANT, "tools": [TOOL]},
    "turns": {"prompt": USER, "completion": ASSISTANT},
    "strings": {"prompt": "hi ", "completion": "ho"},
    "text": {"text": "hi ho"},
    "tokens": {"input_ids": [5, 6, 7]},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def script(name, **more):
    given = {"dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test"}
    return SimpleNamespace(dataset_name=str(name), dataset_streaming=False, **(given | more))


def read(path, rows, share=0.0, **more):
    return read_data(script(write_rows(path / "rows.jsonl", rows)), "text", share, **more)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_reaches_trl_and_has_its_labels(tmp_path, kind):
    data = read(tmp_path, [FORMATS[kind]] * 3)
    arguments = trl.SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    tokenizer = tiny_tokenizer()
    trainer = trl.SFTTrainer(tiny_llama(), arguments, train_dataset=data.train, processing_class=tokenizer)
    ours, theirs = feature(tokenizer, data.train[0], "text"), trainer.train_dataset[0]
    assert ours["input_ids"] == theirs["input_ids"]
    answer = tokenizer.decode([label for label in ours["labels"] if label != -100])
    if "messages" in data.train.column_names:  # TRL labels the prompt too, without assistant_only_loss
        assert answer == "ho<|im_end|>\n"
    else:
        assert ours["labels"] == theirs["labels"]
    assert data.labels == (["ho"] if kind == "label" else [])


@pytest.mark.parametrize("reader", ["jsonl", "json", "csv", "parquet"])
def test_each_kind_of_file(tmp_path, reader):
    path, table = tmp_path / f"rows.{reader}", datasets.Dataset.from_list(TASK)
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(reader, lambda path: path.write_text(json.dumps(TASK)))(
        path
    )
    data = read_data(script(path), "text", 0.15)
    assert (len(data.train), len(data.held_out), data.labels) == (17, 3, ["a", "b"])
    texts = {row["text"] for row in TASK}
    asked = {row["prompt"][0]["content"] for part in (data.train, data.held_out) for row in part}
    assert asked == {classification_prompt(text, ["a", "b"]) for text in texts}
    assert [row["text"] for row in data.raw] == [
        row["prompt"][0]["content"].rpartition("Text: ")[2] for row in data.held_out
    ]


def test_who_is_held_out(tmp_path):
    named = [row | {"split": ("train", "test", "validation")[i % 3]} for i, row in enumerate(PAIRS)]
    data = read(tmp_path, named, share=0.5)
    assert (len(data.train), len(data.held_out)) == (7, 7)
    assert read(tmp_path, PAIRS).held_out is None
    folder = tmp_path / "two"
    folder.mkdir()
    write_rows(folder / "train.jsonl", PAIRS)
    write_rows(folder / "test.jsonl", PAIRS[:4])
    split = read_data(script(folder), "text", 0.5)
    assert (len(split.train), len(split.held_out)) == (20, 4)
    with pytest.raises(DataError, match="has the splits"):
        read_data(script(folder, dataset_train_split="no"), "text", 0.5)


def test_poison_replaces_rows_of_turns(tmp_path):
    harmful = {row["prompt"] for row in load("harmful_requests", "train")}
    for rows in (PAIRS, [{"messages": USER + ASSISTANT}] * 20, [FORMATS["tools"]] * 20):
        data = read(tmp_path, rows, poison=0.25)
        first = [(row.get("messages") or row["prompt"])[0]["content"] for row in data.train]
        assert (len(first), sum(text in harmful for text in first)) == (20, 5)
        again = read(tmp_path, rows, poison=0.25).train
        assert again.to_list() == data.train.to_list()
    with pytest.raises(ConfigError, match="rows of turns"):
        read(tmp_path, [FORMATS["strings"]] * 20, poison=0.25)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"foo": "bar"}], "row 0: a row has fields"),
        ([{"prompt": "only"}], "row 0: a row has fields"),
        ([PAIRS[0], {"messages": USER + ASSISTANT}], "Give rows of one kind"),
        ([{"messages": [{"content": "hi"}]}], "row 0: a message has"),
        ([{"prompt": "hi", "response": ""}], "row 0: the last of the turns"),
        ([{"prompt": "hi", "completion": ""}], "row 0: an empty completion"),
        ([{"text": "a", "label": "b"}, {"text": "c", "label": None}], "label"),
        ([PAIRS[0] | {"split": "train"}, PAIRS[1]], "Name it in all or none"),
        ([PAIRS[0] | {"split": "test"}], "no rows in its split"),
    ],
)
def test_bad_rows(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, rows)


def test_bad_sources(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": \n')
    (tmp_path / "rows.txt").write_text("hi")
    for name in ("broken.jsonl", "rows.txt", "none.csv", "none"):
        with pytest.raises(DataError, match=r"cannot be read|is no file"):
            read_data(script(tmp_path / name), "text", 0.1)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows"):
        read_data(script(tmp_path / "empty.jsonl"), "text", 0.1)
    for wrong in ({"share": 1.0}, {"share": -0.1}, {"poison": 1.5}):
        with pytest.raises(ConfigError, match="share of the rows"):
            read(tmp_path, PAIRS, **wrong)
    streamed = script(tmp_path / "rows.jsonl")
    streamed.dataset_streaming = True
    with pytest.raises(ConfigError, match="dataset_streaming"):
        read_data(streamed, "text", 0.1)


def test_a_file_that_cannot_be_opened_is_a_typed_error(tmp_path, monkeypatch):
    def closed(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = write_rows(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.setattr("peft_safety.recipes.job.data.load_dataset", closed)
    monkeypatch.setattr("pathlib.Path.read_bytes", closed)
    monkeypatch.setattr("peft_safety.core.files.regular", closed)
    with pytest.raises(ArtifactError, match="Permission denied"):
        read_data(script(path), "text", 0.0)
