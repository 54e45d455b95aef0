"""What newer releases there are than those installed, and which bound keeps each of them away.

python -m tests.newest
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution, distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: What no bound says.
CPU = "its wheels on the index are CUDA builds of several gigabytes; the pinned one is the newest CPU build"


@dataclass(frozen=True)
class Blocked:
    """A newer release, and the requirements of installed packages that it does not meet."""

    name: str
    installed: str
    newest: str
    bounds: tuple[str, ...]

    def __str__(self) -> str:
        why = "; ".join(self.bounds) or (CPU if self.name == "torch" else "no bound: constraints-newest.txt is older")
        return f"{self.name} {self.installed}, newest {self.newest}: {why}"


def outdated() -> list[tuple[str, str, str]]:
    """Name, installed and newest version of what has a newer release, as pip's index says."""
    command = [sys.executable, "-m", "pip", "list", "--outdated", "--format", "json", "--disable-pip-version-check"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(one["name"], one["version"], one["latest_version"]) for one in json.loads(said)]


def bounds(name: str, version: str) -> tuple[str, ...]:
    """The installed packages that do not go with a version of another, and what they ask for."""
    wanted, found = canonicalize_name(name), []
    for one in distributions():
        for text in one.requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if canonicalize_name(requirement.name) != wanted or (marker and not _applies(one.metadata["Name"], marker)):
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                found.append(f"{one.metadata['Name']} {one.version} asks for {requirement.specifier}")
    return tuple(sorted(set(found)))


def _applies(owner: str, marker: object) -> bool:
    """Whether a marker holds here; of our own extras all are installed, of others' none is counted."""
    extras = (
        ["", *(distribution("tdhook_rl").metadata.get_all("Provides-Extra") or [])] if owner == "tdhook_rl" else [""]
    )
    return any(marker.evaluate({"extra": extra}) for extra in extras)  # type: ignore[attr-defined]


def main() -> None:
    found = [Blocked(*one, bounds(one[0], one[2])) for one in outdated() if one[0] not in ("pip", "setuptools")]
    print("\n".join(map(str, found)) if found else "everything that is installed is the newest there is")


if __name__ == "__main__":
    main()
