"""``python -m fastattn info|check|bench|tune``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fastattn", description="Exact attention for NumPy arrays.")
    commands = top.add_subparsers(dest="command", required=True, metavar="info | check | bench | tune")
    commands.add_parser("info", help="what is on this machine, and which kernels can run on it")

    check = commands.add_parser("check", help="run every usable kernel against the reference (under 30 s)")
    check.add_argument("--threads", type=int, metavar="N", help="CPU threads")

    bench = commands.add_parser("bench", help="time fastattn beside the installed peers")
    bench.add_argument(
        "--device", metavar="cpu|cuda", default="cpu", help="cuda: on the GPU, beside PyTorch there"
    )
    transfers_help = "with --device cuda: NumPy arrays in and out instead of arrays on the GPU"
    bench.add_argument("--transfers", action="store_true", help=transfers_help)
    bench.add_argument("--cases", metavar="NAMES", help="names or patterns, e.g. 'bert,decode-*'")
    bench.add_argument("--quick", action="store_true", help="the headline cases alone, 3 rounds")
    scaling_help = "instead of the cases: time and memory of one causal call as the sequence grows"
    bench.add_argument("--scaling", action="store_true", help=scaling_help)
    peers_help = "torch, onnxruntime, jax, numpy, or none; on the GPU torch-math, torch-flash, ..."
    bench.add_argument("--peers", metavar="NAMES", help=peers_help)
    threads_help = "CPU threads, for fastattn and every peer; several, as in 1,2, are a run each"
    bench.add_argument("--threads", metavar="N", help=threads_help)
    rounds_help = "interleaved rounds (default 7); 3 at most where a round takes over 10 s"
    bench.add_argument("--rounds", type=int, metavar="N", help=rounds_help)
    bench.add_argument("--kernel", metavar="NAME", help="force this kernel of fastattn")
    bench.add_argument("--json", metavar="FILE", help="write everything that was measured")
    plot_help = (
        "draw it (needs matplotlib): NAME.png and NAME-roofline.png, with --scaling NAME.png alone; "
        "default bench.png"
    )
    bench.add_argument("--plot", metavar="NAME.png", nargs="?", const="bench.png", help=plot_help)

    tune = commands.add_parser(
        "tune", help="measure by what NumPy calls choose CPU or GPU (10 s), and keep it"
    )
    tune.add_argument("--seconds", type=float, default=10.0, metavar="S", help="about so long (default 10)")
    tune.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Imported here, so that --help is quick and each command loads only what it needs.
    from fastattn._cli import bench_options, check, info, tune

    mains = {"info": info.main, "check": check.main, "bench": bench_options.main, "tune": tune.main}
    command = mains[arguments.command]
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
