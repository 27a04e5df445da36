"""``python -m fastattn info|check|bench|tune``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fastattn", description="Exact attention for NumPy arrays.")
    commands = top.add_subparsers(dest="command", required=True, metavar="info | check | bench | tune")
    commands.add_parser("info", help="what is on this machine, and which kernels can run on it")

    check = commands.add_parser("check", help="run every usable kernel against the reference (under 30 s)")
    check.add_argument("--threads", type=int, metavar="N", help="CPU threads")

    # Listed here; its options are those of the benchmark, which need not be installed.
    commands.add_parser("bench", help="time fastattn beside the installed peers", add_help=False)

    tune = commands.add_parser("tune", help="measure by what NumPy calls choose CPU or GPU (10 s), and keep it")
    tune.add_argument("--seconds", type=float, default=10.0, metavar="S", help="about so long (default 10)")
    tune.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    return top


def find_bench() -> Any:
    """The benchmark's module of options.

    It is in the sources alone: the checkout in which one stands, or that which pip installed.

    Raises
    ------
    ValueError
        There is none; the text says how to get it.
    """
    if importlib.util.find_spec("attnbench") is None:
        folders = [Path.cwd(), *_installed_from()]
        found = [folder / "bench" for folder in folders if (folder / "bench/attnbench/options.py").is_file()]
        if not found:
            raise ValueError(
                "bench: the benchmark is in the sources of fastattn, not in the package: run it there, after "
                "pip install '.[bench]'"
            )
        sys.path.append(str(found[0]))
    return importlib.import_module("attnbench.options")


def _installed_from() -> list[Path]:
    """The folder of the sources, where pip says that the package was installed from one (PEP 610)."""
    try:
        text = metadata.distribution("fastattn").read_text("direct_url.json")
        url = urllib.parse.urlsplit(json.loads(text or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return []
    return [Path(urllib.request.url2pathname(url.path))] if url.scheme == "file" else []


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"]:
        return int(find_bench().main(argv[1:]))
    arguments = parser().parse_args(argv)
    # Imported here, so that --help is quick; by name, so that tools which freeze applications see it.
    from fastattn._check import info, tune
    from fastattn._check import run as check

    mains = {"info": info.main, "check": check.main, "tune": tune.main}
    return mains[arguments.command](arguments)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:  # a wrong option: the text says which
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head`: the rest is not wanted, nor is a complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
