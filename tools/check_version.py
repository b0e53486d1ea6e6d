#!/usr/bin/env python3
"""Ends with status 1 and a sentence unless everything that states the pack's version says the same.

    python3 tools/check_version.py [v0.2.0]

Looks at pyproject.toml, tlora_core/version.py, the newest release in CHANGELOG.md and, where one is given, a tag.
"""

import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
STATED = {
    "pyproject.toml": r'^version = "(.+)"$',
    "tlora_core/version.py": r'^__version__ = "(.+)"$',
    "CHANGELOG.md": r"^## \[(\d.*)\]",  # the first match is the newest release
}


def stated_versions(root: Path) -> dict[str, str]:
    """The version by the file that states it; empty where a file states none."""
    versions = {}
    for name, pattern in STATED.items():
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        versions[name] = found[1] if found else ""
    return versions


def main(arguments: list[str]) -> int:
    versions = stated_versions(REPO)
    versions |= {f"the tag {tag}": tag.removeprefix("v") for tag in arguments}
    if len(set(versions.values())) == 1:
        return 0
    said = ", ".join(f"{name} says {version or 'nothing'}" for name, version in versions.items())
    print(f"The versions differ: {said}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
