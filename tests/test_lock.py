"""requirements.lock names all that is installed with this project, and fits pyproject.toml. `make lock` renews it."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from daemons import ROOT

ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(?: ; ([^\\\n]+?))?((?: \\\n {4}--hash=sha256:[0-9a-f]{64})+)$", re.M
)


def locked() -> dict[str, Version]:
    """The release of each package."""
    text = (ROOT / "requirements.lock").read_text()
    found = {canonicalize_name(each[1]): Version(each[2]) for each in ENTRY.finditer(text)}
    # Nothing but these, their hashes and comments: no index, no path, no package without a hash.
    assert re.sub(r"(?m)^ *#.*\n?", "", ENTRY.sub("", text)).strip() == ""
    return found


def fits(requirement: Requirement, releases: dict[str, Version]) -> bool:
    release = releases.get(canonicalize_name(requirement.name))
    return release is not None and requirement.specifier.contains(release, prereleases=True)


def test_every_dependency_is_locked_at_a_release_that_is_allowed() -> None:
    """One that was added or bound anew in pyproject.toml and not locked would be installed unseen."""
    releases = locked()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert wanted
    for each in map(Requirement, wanted):
        assert fits(each, releases), f"make lock: {each} is not in requirements.lock"


def test_what_these_need_is_locked_as_well() -> None:
    """pip with --require-hashes installs nothing that is not named; so far as this environment has the packages."""
    releases = locked()
    for name in releases:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        for each in map(Requirement, needed):
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                assert canonicalize_name(each.name) in releases, f"make lock: {name} needs {each}"


def test_a_release_that_is_not_allowed_is_noticed() -> None:
    """The checker itself."""
    releases = locked()
    assert not fits(Requirement("flask>=99"), releases)
    assert not fits(Requirement("no-such-package"), releases)
    assert ENTRY.search("flask==3.1.3\n") is None
