"""``python -m fastattn info|check|bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fastattn", description="Exact attention for NumPy arrays.")
    commands = top.add_subparsers(dest="command", required=True, metavar="info | check | bench")
    commands.add_parser("info", help="what is on this machine, and which kernels can run on it")

    check = commands.add_parser("check", help="run every usable kernel against the reference (under 30 s)")
    check.add_argument("--threads", type=int, metavar="N", help="CPU threads")

    bench = commands.add_parser("bench", help="time fastattn beside the installed peers")
    bench.add_argument("--cases", metavar="NAMES", help="names or patterns, e.g. 'bert,decode-*'")
    bench.add_argument("--peers", metavar="NAMES", help="torch, onnxruntime, jax, numpy, or none")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads, for fastattn and every peer")
    bench.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default 7)")
    bench.add_argument("--kernel", metavar="NAME", help="force this kernel of fastattn")
    bench.add_argument("--json", metavar="FILE", help="write everything that was measured")
    plot_help = "draw it (needs matplotlib); default bench.png"
    bench.add_argument("--plot", metavar="FILE", nargs="?", const="bench.png", help=plot_help)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Imported here, so that --help is quick and each command loads only what it needs.
    from fastattn._cli import bench, check, info

    command = {"info": info.main, "check": check.main, "bench": bench.main}[arguments.command]
    try:
        return command(arguments)
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
