"""The options of ``bench``: checked before minutes of work, and a process for each number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastattn
from fastattn._cli import bench, case_list, machine, peers, scaling
from fastattn._cli.cases import select
from fastattn._cli.report import report
from fastattn._cli.timing import check_rounds

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
QUICK_ROUNDS = 3
# What libraries size their threads by when they are imported.
THREAD_VARIABLES = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(arguments: Any) -> int:
    """Runs, prints, and writes what was asked for; `arguments` is what argparse made of the command line."""
    _check_files(arguments)
    if arguments.quick and arguments.cases is not None:
        raise ValueError("--quick: chooses the cases itself, leave out --cases")
    given = sys.argv[1:]  # bench/compare.py leaves out the word bench
    command = ["python", "-m", "fastattn", "bench", *(given[1:] if given[:1] == ["bench"] else given)]
    if arguments.device == "cuda":
        from fastattn._cli import cuda_bench  # none of it is needed on the CPU

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
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "fastattn", "bench", *options, "--json", str(path)]
        try:
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        except subprocess.CalledProcessError as error:
            raise ValueError(f"--threads: the run with {threads} ended with {error.returncode}") from None
        return dict(json.loads(path.read_text()))


def _draw(arguments: Any, document: dict[str, Any]) -> list[str]:
    """Writes the figures and returns their names; matplotlib is only imported here."""
    if arguments.scaling:
        from fastattn._cli import scaling_plot

        scaling_plot.draw(document, arguments.plot)
        return [arguments.plot]
    from fastattn._cli import plot, roofline

    path = Path(arguments.plot)
    beside = str(path.with_name(f"{path.stem}-roofline{path.suffix}"))
    plot.draw(document, arguments.plot)
    roofline.draw(document, beside)
    return [arguments.plot, beside]
