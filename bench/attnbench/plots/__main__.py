"""Draws a record again: in bench, ``python -m attnbench.plots RECORD.json NAME.png [--cases NAMES]``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from attnbench import case_list
from attnbench.plots import bars


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnbench.plots", description=__doc__)
    parser.add_argument("record", metavar="RECORD.json", help="what bench --json wrote")
    parser.add_argument("plot", metavar="NAME.png")
    parser.add_argument("--cases", metavar="NAMES", default=case_list.QUICK, help="default: those of --quick")
    arguments = parser.parse_args(argv)
    document = json.loads(Path(arguments.record).read_text())
    wanted = arguments.cases.split(",")
    for run in document["runs"]:
        run["cases"] = [
            case for case in run["cases"] if any(fnmatch.fnmatch(case["name"], name) for name in wanted)
        ]
    bars.draw(document, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
