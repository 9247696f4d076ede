"""Write the two locks, `constraints.txt` and `requirements/demo.txt`, from what is installed.

Run it by `make lock`, in an environment that the tests have passed in. Each lock holds everything that one extra of
`setup.cfg` needs, pinned, so that pip has nothing to resolve (`--no-deps`). What only another Python or another system
needs is not in them. torch is in them without its local version, and without what a CUDA build of it brings: pip
installs torch first, alone and with its dependencies.
"""

from __future__ import annotations

import argparse
import configparser
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "peft-safety"
LOCKS = {"demo": ROOT / "requirements" / "demo.txt", "dev": ROOT / "constraints.txt"}
"""By extra."""
ACCELERATED = ("nvidia-", "cuda-", "triton")
"""Begins the names of what torch needs on some machines only, and brings itself."""
HEADERS = {
    "demo": "# What `make demo` installs: the part of constraints.txt that it needs. `make lock` writes this file.",
    "dev": (
        "# The tested releases (Python 3.11, Linux), and what `make test` installs; users need only setup.cfg's "
        "ranges.\n"
        "# torch carries no local version: the same pin is met by a CPU build and by a CUDA build. triton has no pin: "
        "a\n"
        "# CUDA build of torch brings the very one it needs. `make lock` writes this file."
    ),
}


def wanted(extra: str) -> list[Requirement]:
    """The project's own requirements with an extra, from setup.cfg (installed metadata may be older)."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [*config["options"]["install_requires"].split("\n"), *config["options.extras_require"][extra].split("\n")]
    found = []
    for requirement in (Requirement(line) for line in lines if line.strip()):
        if canonicalize_name(requirement.name) == PROJECT:
            found += [inner for part in requirement.extras for inner in wanted(part)]
        elif requirement.marker is None or requirement.marker.evaluate():
            found.append(requirement)
    return found


def closure(requirements: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """Installed distributions by canonical name: these and all that they need here.

    Raises:
        LookupError: one of them is missing, or is not a release that is asked for.
    """
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen or name.startswith(ACCELERATED):
            continue
        seen.add((name, extras))
        try:
            found[name] = there = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            raise LookupError(f"{requirement} is not installed") from error
        if not requirement.specifier.contains(there.version, prereleases=True):
            raise LookupError(f"{requirement} is needed, {there.version} is installed")
        for inner in map(Requirement, there.requires or ()):
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                queue.append(inner)
    return found


def pins(extra: str) -> dict[str, str]:
    """`{name: version}` of everything that an extra needs, by the names that the packages go by."""
    found = closure(wanted(extra)).values()
    versions = {there.metadata["Name"]: there.version.partition("+")[0] for there in found}
    return dict(sorted(versions.items(), key=lambda pin: pin[0].lower()))


def read(path: Path) -> dict[str, str]:
    """`{name: version}` of a lock."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for extra, path in LOCKS.items():
        lines = [HEADERS[extra], *(f"{name}=={version}" for name, version in pins(extra).items())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
