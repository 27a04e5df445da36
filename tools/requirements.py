"""Prints the requirements of some extras of pyproject.toml, without the package itself.

python tools/requirements.py test examples > requirements.txt
python tools/requirements.py --only cuda-build    # those of the extra alone, not what fastattn depends on
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def requirements(*extras: str, dependencies: bool = True) -> list[str]:
    """The sorted requirements of ``extras``, and of the package itself unless ``dependencies`` is false.

    Raises KeyError for a name that pyproject.toml lacks.
    """
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    found = set(project["dependencies"] if dependencies else ())
    for extra in extras:
        found.update(project["optional-dependencies"][extra])
    return sorted(found)


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--only"]
    print("\n".join(requirements(*names, dependencies="--only" not in sys.argv[1:])))
