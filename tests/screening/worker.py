"""One process of a screening: prints what it found as one line of JSON.

python -m tests.screening.worker
"""

from __future__ import annotations

import json

import pytest

from peft_safety import screen
from peft_safety.evaluation.judges import Verdict
from peft_safety.screening import screen as fitting
from peft_safety.screening import states
from tests.screening.separable import COMMON, MODEL, MarkedJudge, harmful, harmless, known

ROWS = [{"prompt": (harmful if number % 3 == 1 else harmless)(40 + number), "response": "yes"} for number in range(11)]


class FirstJudge(MarkedJudge):
    def __call__(self, prompt: str, response: str) -> Verdict:
        assert states.process()[0] == 0, "another process's judge may say something else"
        return super().__call__(prompt, response)


def main() -> None:
    read, judge = [], FirstJudge()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "load", known)
        run = states.last_states
        patch.setattr(fitting, "last_states", lambda m, ids, *rest: read.append(len(ids)) or run(m, ids, *rest))
        result = screen(MODEL, iter(ROWS), judge=judge, **COMMON)
    rows = [[row.number, row.score, row.verdict] for row in result.rows]
    print(json.dumps({"process": states.process(), "rows": rows, "dropped": result.dropped, "read": read}), flush=True)


if __name__ == "__main__":
    main()
