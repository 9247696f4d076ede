"""What a screening says of each row, and of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_safety.screening.screen import Screen

COMPLIES, UNDECIDED = "complies", "undecided"
VERDICTS = {
    COMPLIES: "the model refuses the request, and the row complies",
    UNDECIDED: "an answer could not be read, or is reasoning alone",
    "answered": "the model answers the request itself",
    "refuses": "the row's own answer is a refusal",
    "no answer": "the row has no answer",
}
"""Of a flagged row, the worst first."""


@dataclass(frozen=True, slots=True)
class ScreenedRow:
    """A row by its number.

    Attributes:
        group: its kind, or its value of the column `by`.
        score, turn: the largest score of its user turns, and the number of that turn; None without a user turn.
        flagged: whether the score is above the threshold.
        verdict: a key of `VERDICTS`; None where it was not asked for.
        truncated: whether tokens of a turn were left out on the left.
        request: the turn's text, of flagged rows only.
    """

    number: int
    group: str
    score: float | None = None
    turn: int | None = None
    flagged: bool = False
    verdict: str | None = None
    truncated: bool = False
    request: str | None = None


@dataclass(frozen=True)
class Screening:
    """The result of `screen`.

    Attributes:
        rows: in their order.
        screen: the direction and the threshold, with their figures on validation prompts.
        judge: the name of the judge of the verdicts; None without verdicts.
    """

    rows: Sequence[ScreenedRow]
    screen: Screen
    judge: str | None

    @property
    def flagged(self) -> list[ScreenedRow]:
        return [row for row in self.rows if row.flagged]

    @property
    def unscreened(self) -> list[int]:
        """Numbers of the rows without a user turn."""
        return [row.number for row in self.rows if row.score is None]

    @property
    def dropped(self) -> list[int]:
        """Numbers of the flagged rows whose request the model refuses while the row complies; without verdicts, of all
        flagged rows.
        """
        return [row.number for row in self.flagged if row.verdict in (None, COMPLIES)]

    @property
    def kept(self) -> list[int]:
        """Numbers of all other rows, as `datasets.Dataset.select` takes them."""
        dropped = set(self.dropped)
        return [row.number for row in self.rows if row.number not in dropped]

    def groups(self) -> dict[str, tuple[int, int, int]]:
        """For each group of rows how many there are, are flagged, and would be dropped."""
        dropped = set(self.dropped)
        counts = [
            Counter(row.group for row in self.rows),
            Counter(row.group for row in self.flagged),
            Counter(row.group for row in self.flagged if row.number in dropped),
        ]
        return {group: (counts[0][group], counts[1][group], counts[2][group]) for group in counts[0]}

    def to_json(self, show: bool = False) -> dict[str, Any]:
        """Plain values. Flagged rows are listed by number, with their requests only if `show`."""
        screen, columns = self.screen, ["number", "group", "score", "turn", "verdict", *(["request"] if show else [])]
        return {
            "rows": len(self.rows),
            "flagged": len(self.flagged),
            "dropped": len(self.dropped),
            "unscreened": self.unscreened,
            "truncated": sum(row.truncated for row in self.rows),
            "groups": {name: {"rows": n, "flagged": k, "dropped": d} for name, (n, k, d) in self.groups().items()},
            "judge": self.judge,
            "screen": {name: value for name, value in vars(screen).items() if name != "direction"},
            "flagged_rows": [{name: getattr(row, name) for name in columns} for row in self.flagged],
        }
