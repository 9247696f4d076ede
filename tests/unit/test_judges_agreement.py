"""Two judges side by side, against values computed by hand."""

import warnings

import pytest

from peft_safety.errors import DataError
from peft_safety.evaluation.judges import KeywordJudge, Verdict, agreement, check_control

LETTERS = {"R": Verdict.REFUSAL, "C": Verdict.COMPLIANCE, "O": Verdict.OTHER, "U": Verdict.UNDECIDED}


def verdicts(letters: str) -> list[Verdict]:
    return [LETTERS[letter] for letter in letters]


@pytest.mark.parametrize(
    ("a", "b", "n", "share", "kappa"),
    [
        # 20 both yes, 5 and 10 apart, 15 both no: (0.7 - 0.5) / (1 - 0.5), the textbook's example
        ("R" * 25 + "C" * 25, "R" * 20 + "C" * 5 + "R" * 10 + "C" * 15, 50, 0.7, 0.4),
        # 2 of 4 equal; chance (2 * 1 + 1 * 1 + 1 * 2) / 16 = 5 / 16: (8 - 5) / (16 - 5)
        ("RRCO", "ROCO", 4, 0.75, (12 - 5) / (16 - 5)),
        ("RC", "CR", 2, 0.0, -1.0),
        ("RRCC", "RCRC", 4, 0.5, 0.0),
        ("RCO", "RCO", 3, 1.0, 1.0),
        ("RRR", "CCC", 3, 0.0, 0.0),
        ("RRR", "RRR", 3, 1.0, None),
        ("RUCR", "RRUC", 2, 0.5, 0.0),
        ("UU", "RU", 0, None, None),
        ("", "", 0, None, None),
    ],
)
def test_kappa(a, b, n, share, kappa):
    for first, second in ((a, b), (b, a)):
        result = agreement(verdicts(first), verdicts(second))
        assert (result["n"], result["undecided"]) == (n, len(a) - n)
        assert result["share"] == pytest.approx(share)
        assert result["kappa"] == pytest.approx(kappa)
        assert sum(result["table"].values()) == n


def test_the_table_says_where_they_differ():
    assert agreement(verdicts("RRC"), verdicts("ROC"))["table"] == {
        "compliance/compliance": 1,
        "refusal/other": 1,
        "refusal/refusal": 1,
    }
    with pytest.raises(DataError, match="1 and 2 verdicts"):
        agreement(verdicts("R"), verdicts("RR"))


def test_a_judge_that_says_one_thing_of_all_is_named():
    with pytest.warns(UserWarning, match='"other" of all 2 responses of the control set'):
        assert check_control(KeywordJudge(), ["?", "?"], ["The sky.", "A sea."]) == {"other": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_control(KeywordJudge(), ["?", "?"], ["I can't.", "Sure."]) == {"refusal": 1, "compliance": 1}
        assert check_control(KeywordJudge(), [], []) == {}
