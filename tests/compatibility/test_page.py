"""docs/compatibility.md is what its tables say, and what it promises in other files is there."""

import re
from pathlib import Path

from tests.compatibility import architectures, bases, features
from tests.compatibility.methods import METHODS
from tests.compatibility.page import PAGE, page
from tests.peft import test_libraries, test_packed


def test_the_page_is_made_of_the_tables():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.compatibility.page"


def test_it_is_as_large_as_promised():
    assert len(architectures.ARCHITECTURES) >= 35
    assert len(bases.RUN) + len(bases.PACKED) >= 10
    assert len(features.FEATURES) >= 20


def test_every_row_of_a_note_exists_and_every_refusal_has_a_sentence():
    for rows, tables in (
        (architectures.ARCHITECTURES, (architectures.REFUSED, architectures.LIMITS)),
        (features.FEATURES, (features.REFUSED, features.LIMITS)),
    ):
        for entries in tables:
            assert entries.keys() <= rows.keys()
            for methods, sentence, *_ in entries.values():
                assert set(methods) <= METHODS.keys()
                assert sentence.endswith(".")
    assert set(features.MODELS) | set(features.NOT_RUN) <= features.FEATURES.keys()


def test_packed_bases_have_the_tests_that_are_named():
    assert set(bases.PACKED.values()) == set(test_packed.CLASSES)
    assert bases.PACKED_CELLS.keys() < METHODS.keys()
    source = Path(test_packed.__file__).read_text(encoding="utf-8")
    assert {name for _, name in bases.PACKED_CELLS.values()} <= set(re.findall(r"def (test_\w+)", source))


def test_bases_of_libraries_are_tested_on_them():
    assert set(bases.LIBRARY.values()) == set(test_libraries.KINDS)
    assert len(test_libraries.FORMS) >= len(METHODS) - 1
