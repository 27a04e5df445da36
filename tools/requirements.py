"""Prints the requirements of some extras of pyproject.toml, without the package itself.

python tools/requirements.py test examples > requirements.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def requirements(*extras: str) -> list[str]:
    """The sorted requirements of ``extras``; raises KeyError for a name that pyproject.toml lacks."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    found = set(project["dependencies"])
    for extra in extras:
        found.update(project["optional-dependencies"][extra])
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:])))
