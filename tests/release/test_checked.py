"""CITATION.cff, the classifiers and the workflows, by the checkers that `make wheel-check` installs for them."""

from __future__ import annotations

import configparser
import subprocess

import pytest

from tests.release.fresh import ROOT

CHECKERS = ROOT / ".nightly-checkers" / "bin"
pytestmark = pytest.mark.skipif(not CHECKERS.is_dir(), reason="make wheel-check installs the checkers")


def said(program: str, *words: str) -> str:
    done = subprocess.run([CHECKERS / program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_citation_follows_its_schema() -> None:
    assert "valid according to schema version 1.2.0" in said("cffconvert", "--validate", "-i", "CITATION.cff")
    assert "@misc" in said("cffconvert", "-f", "bibtex", "-i", "CITATION.cff")


def test_the_classifiers_are_those_of_the_index() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    ours = {line for line in setup["metadata"]["classifiers"].splitlines() if line}
    known = said("python", "-c", "import trove_classifiers; print(*trove_classifiers.classifiers, sep='\\n')")
    assert ours
    assert ours <= set(known.splitlines())


def test_no_workflow_is_open_to_attack() -> None:
    assert "No findings to report" in said("zizmor", "--offline", ".github")
