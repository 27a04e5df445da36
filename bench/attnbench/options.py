"""The options of ``bench``: checked before minutes of work, and a process for each number of threads."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastattn
from attnbench import case_list, child_environment, scaling
from attnbench import run as bench
from attnbench.cases import select
from attnbench.peers import base as peers
from attnbench.report import report
from attnbench.timing import check_rounds
from fastattn._check import machine

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
QUICK_ROUNDS = 3
# What libraries size their threads by when they are imported.
THREAD_VARIABLES = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fastattn bench", description="Time fastattn beside the installed peers."
    )
    top.add_argument(
        "--device", metavar="cpu|cuda", default="cpu", help="cuda: on the GPU, beside PyTorch there"
    )
    transfers_help = "with --device cuda: NumPy arrays in and out instead of arrays on the GPU"
    top.add_argument("--transfers", action="store_true", help=transfers_help)
    top.add_argument("--cases", metavar="NAMES", help="names or patterns, e.g. 'bert,decode-*'")
    top.add_argument("--quick", action="store_true", help="the headline cases alone, 3 rounds")
    scaling_help = "instead of the cases: time and memory of one causal call as the sequence grows"
    top.add_argument("--scaling", action="store_true", help=scaling_help)
    peers_help = "torch, onnxruntime, jax, numpy, or none; on the GPU torch-math, torch-flash, ..."
    top.add_argument("--peers", metavar="NAMES", help=peers_help)
    threads_help = "CPU threads, for fastattn and every peer; several, as in 1,2, are a run each"
    top.add_argument("--threads", metavar="N", help=threads_help)
    rounds_help = "interleaved rounds (default 7); 3 at most where a round takes over 10 s"
    top.add_argument("--rounds", type=int, metavar="N", help=rounds_help)
    top.add_argument("--kernel", metavar="NAME", help="force this kernel of fastattn")
    top.add_argument("--json", metavar="FILE", help="write everything that was measured")
    plot_help = (
        "draw it (needs matplotlib): NAME.png and NAME-roofline.png, with --scaling NAME.png alone; "
        "default bench.png"
    )
    top.add_argument("--plot", metavar="NAME.png", nargs="?", const="bench.png", help=plot_help)
    return top


def main(argv: Sequence[str]) -> int:
    """Runs, prints, and writes what the options ask for.

    Raises
    ------
    ValueError
        An option is wrong; the text says which.
    """
    arguments = parser().parse_args(argv)
    _check_files(arguments)
    if arguments.quick and arguments.cases is not None:
        raise ValueError("--quick: chooses the cases itself, leave out --cases")
    command = ["python", "-m", "fastattn", "bench", *argv]
    if arguments.device == "cuda":
        from attnbench.gpu import run as cuda_bench  # none of it is needed on the CPU

        return cuda_bench.main(arguments, command)
    if arguments.device != "cpu":
        raise ValueError(f"--device: expected cpu or cuda, got {arguments.device!r}")
    if arguments.transfers:
        raise ValueError("--transfers: needs --device cuda")
    if arguments.quick:
        arguments.cases = case_list.QUICK
    if arguments.scaling:
        for option in ("cases", "kernel"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--scaling: has its own cases, leave out --{option} and --quick")
    if arguments.rounds is None:
        arguments.rounds = QUICK_ROUNDS if arguments.quick else bench.ROUNDS
    numbers = thread_counts(arguments.threads)
    # Before the first process of several starts.
    check_rounds(arguments.rounds)
    select(arguments.cases, case_list.CASES)
    peers.choose(arguments.peers)

    if len(numbers) == 1:
        document = _run(arguments, numbers[0], command)
    else:
        documents = [_run_in_process(arguments, number) for number in numbers]
        document = documents[0] | {
            "command": command,
            "runs": [run for each in documents for run in each["runs"]],
        }
    print(scaling.report(document) if arguments.scaling else report(document))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwrote {arguments.json}")
    if arguments.plot is not None:
        for path in _draw(arguments, document):
            print(f"wrote {path}")
    return 0


def thread_counts(text: str | None) -> list[int]:
    """The numbers of a comma-separated list; None: `fastattn.get_num_threads()`.

    Raises
    ------
    ValueError
        No number, one below 1, or the same one twice.
    """
    if text is None:
        return [fastattn.get_num_threads()]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--threads: expected numbers with commas between them, got {text!r}") from None
    for number in numbers:
        if number < 1:
            raise ValueError(f"--threads: expected at least 1, got {number}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"--threads: expected different numbers, got {text!r}")
    return numbers


def _check_files(arguments: Any) -> None:
    for path in (arguments.json, arguments.plot):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: the folder does not exist")
    if arguments.plot is not None and Path(arguments.plot).suffix not in PLOT_SUFFIXES:
        raise ValueError(
            f"--plot: expected a name that ends in {', '.join(PLOT_SUFFIXES)}, got {arguments.plot!r}"
        )
    if arguments.plot is not None and machine.installed_version("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib: pip install 'fastattn[bench]'")


def _run(arguments: Any, threads: int, command: Sequence[str]) -> dict[str, Any]:
    if arguments.scaling:
        return scaling.run(
            threads=threads, rounds=arguments.rounds, peer_names=arguments.peers, command=command
        )
    return bench.run(
        cases=arguments.cases,
        threads=threads,
        rounds=arguments.rounds,
        peer_names=arguments.peers,
        kernel=arguments.kernel,
        command=command,
    )


def _run_in_process(arguments: Any, threads: int) -> dict[str, Any]:
    """The document of one number of threads: some libraries cannot change it once they are imported."""
    options = ["--threads", str(threads), "--rounds", str(arguments.rounds)]
    for name in ("cases", "peers", "kernel"):
        value = getattr(arguments, name)
        if value is not None:
            options += [f"--{name}", value]
    if arguments.scaling:
        options.append("--scaling")
    environment = child_environment() | dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "attnbench", *options, "--json", str(path)]
        try:
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError as error:
            raise ValueError(f"--threads: the run with {threads} ended with {error.returncode}") from None
        return dict(json.loads(path.read_text()))


def _draw(arguments: Any, document: dict[str, Any]) -> list[str]:
    """Writes the figures and returns their names; matplotlib is only imported here."""
    if arguments.scaling:
        from attnbench.plots import scaling as scaling_plot

        scaling_plot.draw(document, arguments.plot)
        return [arguments.plot]
    from attnbench.plots import bars as plot
    from attnbench.plots import roofline

    path = Path(arguments.plot)
    beside = str(path.with_name(f"{path.stem}-roofline{path.suffix}"))
    plot.draw(document, arguments.plot)
    roofline.draw(document, beside)
    return [arguments.plot, beside]
