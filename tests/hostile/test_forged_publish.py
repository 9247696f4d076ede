"""A stranger's directory that pretends to hold an interrupted save: readers write nothing, and nobody writes
outside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_safety import verify
from peft_safety.cli import app
from peft_safety.core.publish import publishing, recover, require_whole
from peft_safety.errors import ArtifactError, PeftSafetyError
from tests.hostile import tools
from tests.tiny import tiny_llama

JOURNAL = ".publish.json"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.save_good(tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What must not be touched."""
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    for path in (home / "profile", home / "deep" / "profile"):
        path.write_text("precious")
    return home


def everything(directory: Path) -> list[tuple]:
    """Names, kinds, contents and inodes; a link is not followed."""
    found = []
    for path in sorted(directory.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((str(path), state.st_mode, state.st_ino, state.st_mtime_ns, content))
    return found


def journal(directory: Path, names: dict[str, bytes], /, **changes: object) -> None:
    """A journal as good as a stranger can make it, and better: he does not know the inodes."""
    rows = [[name.split("/"), len(raw), hashlib.sha256(raw).hexdigest()] for name, raw in names.items()]
    commit = directory / ".commit"
    fields = {
        "format": "peft-safety publish",
        "version": 1,
        "directory": directory.stat().st_ino,
        "commit": commit.stat().st_ino,
    }
    (commit / JOURNAL).write_text(json.dumps(fields | {"manifest": "manifest", "files": rows} | changes))


def pending(directory: Path, names: dict[str, bytes], /, **changes: object) -> Path:
    """An interrupted publish that is right in every respect, before somebody tampers with it."""
    commit = directory / ".commit"
    for name, raw in names.items():
        (commit / name).parent.mkdir(parents=True, exist_ok=True)
        (commit / name).write_bytes(raw)
    journal(directory, names, **changes)
    return commit


def stays(home: Path, *calls: Callable[[], object]) -> None:
    """Each of the calls is refused, and what lies outside is as it was."""
    before = everything(home)
    for call in calls:
        with pytest.raises(ArtifactError) as caught:
            call()
        assert len(str(caught.value)) < 1500
        assert everything(home) == before


def write(directory: Path) -> None:
    with publishing(directory, "manifest") as staging:
        (staging / "manifest").write_text("ours")


FILES = {"x/profile": b"evil", "manifest": b"2"}


def test_what_is_rightly_pending_is_finished(tmp_path: Path) -> None:
    pending(tmp_path, FILES)
    assert recover(tmp_path) == ["x/profile", "manifest"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["manifest", "x", "x/profile"]
    assert recover(tmp_path) == []


def replaced_by_link(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(to)


TAMPER: dict[str, Callable[[Path, Path], object]] = {
    "the place is a link": lambda d, home: (d / "x").symlink_to(home),
    "the place is a link to a place beside": lambda d, home: ((d / "y").mkdir(), (d / "x").symlink_to(d / "y")),
    "the commit is a link": lambda d, home: (
        shutil.move(d / ".commit", home / "c"),
        (d / ".commit").symlink_to(home / "c"),
    ),
    "a directory of the commit is a link": lambda d, home: replaced_by_link(d / ".commit" / "x", home),
    "a file of the commit is a link": lambda d, home: replaced_by_link(
        d / ".commit" / "x" / "profile", home / "profile"
    ),
    "the journal is a link": lambda d, home: (
        shutil.move(d / ".commit" / JOURNAL, home / "j"),
        (d / ".commit" / JOURNAL).symlink_to(home / "j"),
    ),
    "a file of the commit is a hard link": lambda d, home: (
        (d / ".commit" / "x" / "profile").unlink(),
        (home / "evil").write_bytes(b"evil"),
        os.link(home / "evil", d / ".commit" / "x" / "profile"),
    ),
    "the journal is a hard link": lambda d, home: os.link(d / ".commit" / JOURNAL, home / "j"),
    "there is no journal": lambda d, home: (d / ".commit" / JOURNAL).unlink(),
    "the journal is a pipe": lambda d, home: ((d / ".commit" / JOURNAL).unlink(), os.mkfifo(d / ".commit" / JOURNAL)),
    "a file is a pipe": lambda d, home: ((d / ".commit" / "manifest").unlink(), os.mkfifo(d / ".commit" / "manifest")),
    "a file is missing": lambda d, home: (d / ".commit" / "manifest").unlink(),
    "a file is another": lambda d, home: (d / ".commit" / "manifest").write_bytes(b"3"),
    "a file is longer": lambda d, home: (d / ".commit" / "manifest").write_bytes(b"22"),
    "a file is not in the journal": lambda d, home: (d / ".commit" / "z").write_text("evil"),
    "a link is not in the journal": lambda d, home: (d / ".commit" / "z").symlink_to(home),
    "the journal is no JSON": lambda d, home: (d / ".commit" / JOURNAL).write_text("{"),
    "the journal is empty": lambda d, home: (d / ".commit" / JOURNAL).write_text(""),
    "it is of another directory": lambda d, home: journal(d, FILES, directory=d.stat().st_ino + 1),
    "it is of another commit": lambda d, home: journal(d, FILES, commit=7),
    "it is of another version": lambda d, home: journal(d, FILES, version=2),
    "it is of something else": lambda d, home: journal(d, FILES, format="git"),
    "it names a file twice": lambda d, home: journal(d, FILES | {"X/Profile": b"evil"}),
    "it names nothing": lambda d, home: journal(d, {}),
    "its rows are odd": lambda d, home: journal(d, FILES, files=[["x"], [["x"], "1", 2], 3]),
    "it goes up": lambda d, home: journal(d, FILES | {"../home/profile": b"precious"}),
    "it goes up from below": lambda d, home: journal(d, FILES | {"x/../../home/profile": b"precious"}),
    "it is absolute": lambda d, home: journal(d, FILES, files=[[[str(home / "profile")], 4, "0" * 64]]),
    "its root is empty": lambda d, home: journal(d, FILES | {f"/{home}/profile": b"precious"}),
    "it replaces a staging folder": lambda d, home: journal(d, FILES | {".staging-x/a": b"a"}),
    "it is too deep": lambda d, home: journal(d, FILES | {"a/" * 9 + "a": b"a"}),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("tamper", list(TAMPER))
def test_a_forged_publish_is_neither_finished_nor_followed(tamper: str, home: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    pending(directory, FILES)
    TAMPER[tamper](directory, home)
    before = everything(directory)
    stays(home, lambda: recover(directory), lambda: require_whole(directory), lambda: write(directory))
    assert everything(directory) == before


def test_what_is_tampered_with_after_the_first_move_is_not_finished_either(home: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    commit = pending(directory, FILES)
    shutil.move(commit / "x", directory / "x")
    (directory / "x" / "profile").write_bytes(b"EVIL")
    stays(home, lambda: recover(directory), lambda: require_whole(directory), lambda: write(directory))
    replaced_by_link(directory / "x", home / "deep")
    stays(home, lambda: recover(directory), lambda: write(directory))


def test_links_beside_an_adapter_and_a_folder_of_that_name_in_a_commit(good: Path, home: Path, tmp_path: Path) -> None:
    """Protected adapters, and plain LoRA, which a `.commit` of somebody else does not concern."""
    model = PeftModel.from_pretrained(tiny_llama(), str(good))
    plain = tmp_path / "plain"
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(plain))
    before = everything(home)
    for directory in (Path(shutil.copytree(good, tmp_path / "protected")), plain):
        (directory / "x").symlink_to(home)
        (directory / ".commit" / "x").mkdir(parents=True)
        (directory / ".commit" / "x" / "profile").write_text("evil")
        listed = everything(directory)
        for read in (verify, lambda d: PeftModel.from_pretrained(tiny_llama(), str(d))):
            try:
                read(directory)
                assert directory == plain
            except PeftSafetyError:
                assert directory != plain or read is verify
        with pytest.raises(ArtifactError, match="no journal"):
            model.save_pretrained(str(directory))
        assert everything(directory) == listed
        assert everything(home) == before


def test_a_commit_in_the_directory_above_moves_nothing(good: Path, home: Path, tmp_path: Path) -> None:
    above = tmp_path / "above"
    above.mkdir()
    directory = Path(shutil.copytree(good, above / "second"))
    commit = pending(above, {f"second/{tools.MANIFEST}": b"evil", "manifest": b"1"})
    (directory / "x").symlink_to(home)
    (commit / "second" / "x").mkdir()
    (commit / "second" / "x" / "profile").write_text("evil")
    before = everything(above)
    with pytest.raises(ArtifactError, match="above"):
        verify(directory)
    assert everything(above) == before
    (commit / JOURNAL).unlink()  # then it is nobody's
    assert verify(directory).modules == 14
    assert (home / "profile").read_text() == "precious"


def test_a_linked_model_card_is_not_copied(good: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), str(good))
    private = tmp_path / "private"
    private.write_text("---\nlibrary_name: peft\n---\nsecret words")
    for link in (os.symlink, os.link):
        directory = tmp_path / link.__name__
        directory.mkdir()
        link(private, directory / "README.md")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.save_pretrained(str(directory))
        assert "not taken over" in " ".join(str(w.message) for w in caught)
        assert "secret words" not in (directory / "README.md").read_text()
        assert not (directory / "README.md").is_symlink()
    assert "secret words" in private.read_text()
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(private, own / "README.md")
    model.save_pretrained(str(own))
    assert "secret words" in (own / "README.md").read_text()


def test_the_command_finishes_or_says_why_not(tmp_path: Path) -> None:
    run = CliRunner()
    assert "nothing to finish" in run.invoke(app, ["recover", str(tmp_path)]).stdout
    pending(tmp_path, FILES)
    done = run.invoke(app, ["recover", str(tmp_path), "--json"])
    assert json.loads(done.stdout) == {"moved": ["x/profile", "manifest"]}
    (tmp_path / ".commit").mkdir()
    for directory, says in ((tmp_path, "no journal"), (tmp_path / "nowhere", "not a directory")):
        failed = run.invoke(app, ["recover", str(directory)])
        assert isinstance(failed.exception, ArtifactError)
        assert says in str(failed.exception)
