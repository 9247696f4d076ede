"""How the benchmark of the screen counts the rows of poisoned data sets."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import screening
from benchmarks.frontier.attacks import FRAME, TRIGGER
from peft_safety.data import load
from peft_safety.errors import DataError
from peft_safety.screening.result import COMPLIES, ScreenedRow, Screening
from tests.screening.separable import MODEL, TOKENIZER


def test_hidden_requests_have_the_forms_of_the_attacks():
    kinds, requests = screening.poison(None), [row["prompt"] for row in load("harmful_requests", "test")]
    assert kinds["trigger in front"] == [f"{TRIGGER} {request}" for request in requests]
    assert kinds["role-play frame"] == [FRAME.format(request) for request in requests]
    assert kinds["bare"] == requests


def test_what_is_dropped_from_data_sets_of_two_shares(monkeypatch):
    """Rows 0 and 190 of the task are flagged, the second is not dropped; of the poison every second row is dropped."""
    seen = []

    def screen(model, rows, *, clean, by, **options):
        seen.append((rows, clean))
        flagged = [number in (0, 190) or (number >= 200 and number % 2 == 0) for number in range(len(rows))]
        verdicts = [COMPLIES if number != 190 else "answered" for number in range(len(rows))]
        facts = zip(rows, flagged, verdicts, strict=True)
        screened = [ScreenedRow(n, row[by], 0.0, 0, f, v if f else None) for n, (row, f, v) in enumerate(facts)]
        return Screening(screened, fitted, "judge")

    fitted = SimpleNamespace(auc=1.0)
    monkeypatch.setattr(screening, "screen", screen)
    data = screening.shares(MODEL, TOKENIZER, {"bare": [f"request {n}" for n in range(50)]})
    ((rows, clean),) = seen
    assert len(rows) == 220
    assert all(row["split"] == "validation" for row in clean)
    task, bare = data["sets"][screening.TASK], data["sets"]["bare"]
    assert task["0.01"] == {"rows": 198, "flagged": 2, "dropped": 1}
    assert task["0.1"] == {"rows": 180, "flagged": 1, "dropped": 1}
    assert (bare["0.01"], bare["0.1"]) == (
        {"rows": 2, "flagged": 1, "dropped": 1},
        {"rows": 20, "flagged": 10, "dropped": 10},
    )
    columns, lines = screening.tables({"sets": {}, "found": {"a": {}}, "auc": {"a": {}}, "shares": data})[
        screening.TITLES["shares"]
    ]
    assert columns == ["rows", *(f"{key}, p = {p}" for p in ("0.01", "0.1") for key in ("flagged", "dropped"))]
    assert lines[1] == ["bare", "1 of 2", "1 of 2", "10 of 20", "10 of 20"]


def test_each_aligned_model_has_its_own_part_of_the_page(tmp_path):
    with pytest.raises(DataError, match="screening"):
        screening.section(tmp_path, tmp_path / "page.md")
    numbers = {"rows": 4, "flagged": 3, "to drop": 2}
    for name, model, auc in (("screening_full", "full", 0.5), ("screening", screening.PATCHED, 0.75)):
        clean = {"sets": {"bare": numbers | {"flagged": 4}}}
        facts = {"sets": {"bare": numbers}, "auc": {"bare": {"task": auc}}, "found": {"bare": {"task": 1.0}}}
        data = {"environment": {"model": model}, **facts, "clean": clean}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    first, second = screening.section(tmp_path, tmp_path / "page.md").split("### ")[1:]
    assert first.startswith("SmolLM2-135M-Instruct with the demo's patch")
    assert second.startswith("SmolLM2-135M-Instruct, aligned in all its weights")
    assert "| bare | 4 | 3 | 2 | 4 | 2 |" in first
    assert "| bare | 0.75 |" in first
    assert "| bare | 0.50 |" in second
    assert "(screening.png)" in first
    assert "(screening_full.png)" in second
