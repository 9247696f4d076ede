"""What is in the wheel and in the source distribution (`make wheel`): the package, whole, and nothing else."""

from __future__ import annotations

import configparser
import subprocess
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message

import pytest

from tests.release.fresh import ROOT, built

WHEEL, SOURCE = built("whl"), built("tar.gz")
CONTENT = [*(ROOT / "peft_safety").rglob("*.*"), *(ROOT / name for name in ("README.md", "setup.cfg"))]
CHANGED = max(path.stat().st_mtime for path in CONTENT if path.suffix != ".pyc" and path.is_file())
BUILT = [path.stat().st_mtime for path in (WHEEL, SOURCE) if path]
pytestmark = pytest.mark.skipif(
    len(BUILT) < 2 or min(BUILT) < CHANGED, reason="make wheel builds them, after a change"
)


@pytest.fixture(scope="module")
def wheel() -> dict[str, bytes]:
    """The wheel's files by name."""
    assert WHEEL is not None
    with zipfile.ZipFile(WHEEL) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def own(wheel: dict[str, bytes], name: str) -> bytes:
    """A file of the wheel's metadata."""
    (found,) = [content for path, content in wheel.items() if path.endswith(f".dist-info/{name}")]
    return found


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    return message_from_bytes(own(wheel, "METADATA"))


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_each_file_of_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    outside = {name for name in wheel if ".dist-info/" not in name}
    assert outside == tracked("peft_safety")
    assert {"peft_safety/py.typed", "peft_safety/data/harmful_requests.jsonl"} <= outside
    for name in outside:
        assert wheel[name] == (ROOT / name).read_bytes(), f"make wheel: {name} has changed since"


def test_the_source_distribution_holds_what_the_wheel_is_built_from() -> None:
    assert SOURCE is not None
    with tarfile.open(SOURCE) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in names if name.startswith("peft_safety.egg-info/")} | {"PKG-INFO"}
    assert names - made == tracked("peft_safety") | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}


def test_they_are_small() -> None:
    for path in (WHEEL, SOURCE):
        assert path is not None
        assert path.stat().st_size < 1e6, path.name


def test_the_licenses_travel_with_the_wheel(wheel: dict[str, bytes], metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    files = metadata.get_all("License-File") or []
    assert set(files) == {"LICENSE", "peft_safety/data/NOTICE"}
    for name in files:
        assert own(wheel, f"licenses/{name}") == (ROOT / name).read_bytes()
    data = {path.name for path in (ROOT / "peft_safety").rglob("*.jsonl")}
    assert data == {path.name for path in (ROOT / "peft_safety" / "data").glob("*.jsonl")}, "the NOTICE is for these"


def test_the_entry_points_lead_into_the_wheel(wheel: dict[str, bytes]) -> None:
    points = configparser.ConfigParser()
    points.read_string(own(wheel, "entry_points.txt").decode())
    assert set(points.sections()) == {"console_scripts", "inspect_ai", "axolotl.plugins"}
    for group in points.sections():
        for target in points[group].values():
            path, _, name = target.replace(".", "/").partition(":")
            (file,) = {f"{path}.py", f"{path}/__init__.py"} & wheel.keys()
            assert not name or f" {name}(" in wheel[file].decode()


def test_its_description_is_the_readme(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert text.strip() == (ROOT / "README.md").read_bytes().strip()
