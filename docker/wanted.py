"""Prints what Longshift needs at run time, one requirement a line: its dependencies and those of some extras.

python docker/wanted.py EXTRA,EXTRA
"""

import sys
import tomllib
from pathlib import Path


def wanted(project: Path, extras: list[str]) -> list[str]:
    """Requirements as ``pyproject.toml`` has them.

    Raises:
        SystemExit: there is no such extra.
    """
    table = tomllib.loads(project.read_text())["project"]
    offered = table["optional-dependencies"]
    unknown = sorted(set(extras) - set(offered))
    if unknown:
        raise SystemExit(f"no such extra: {', '.join(unknown)}; there are {', '.join(sorted(offered))}")
    return [*table["dependencies"], *(requirement for extra in extras for requirement in offered[extra])]


if __name__ == "__main__":
    chosen = [extra for extra in sys.argv[1].split(",") if extra]
    sys.stdout.write("\n".join(wanted(Path("pyproject.toml"), chosen)) + "\n")
