"""``python -m fastattn bench --device cuda``: fastattn beside PyTorch's backends and the limits of the GPU.

As on the CPU every round times all implementations of a case, one after the other, and a result that is not
the reference's is no time. Times are those between two CUDA events around a call; what the host needs to
queue one stands beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnbench import child_environment
from attnbench import run as bench
from attnbench.cases import Case, select
from attnbench.gpu import cases as cuda_cases
from attnbench.gpu import device as cuda_device
from attnbench.gpu import limits as cuda_limits
from attnbench.gpu import peers as cuda_peers
from attnbench.gpu import report as cuda_report
from attnbench.gpu import transfers as cuda_transfers
from attnbench.gpu.timing import bench_case
from attnbench.timing import check_rounds
from fastattn._check.output import Progress

SCHEMA = 1
ROUNDS = 7
QUICK_ROUNDS = 3

Save = Callable[[dict[str, Any]], None]


def main(arguments: Any, command: Sequence[str]) -> int:
    """Checks the options, runs, prints, and writes the document after each case; 1 when one was wrong."""
    for option in ("plot", "threads"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option}: has no meaning with --device cuda")
    if arguments.scaling:
        raise ValueError("--scaling: has no meaning with --device cuda")
    rounds = arguments.rounds
    if rounds is None:
        rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    check_rounds(rounds)
    among, quick = cuda_cases.CASES, cuda_cases.QUICK
    if arguments.transfers:
        among, quick = cuda_cases.TRANSFER_CASES, cuda_cases.QUICK_TRANSFERS
        if arguments.peers is not None:
            raise ValueError("--peers: has no meaning with --transfers")
    chosen = select(quick if arguments.quick else arguments.cases, among)
    names = cuda_peers.choose(arguments.peers)
    gpu = cuda_device.Gpu()

    save = _saver(arguments.json)
    if arguments.transfers:
        document = cuda_transfers.run(chosen, rounds, gpu, header(gpu, command), save, arguments.kernel)
    else:
        document = run(chosen, rounds, names, arguments.kernel, gpu, command, save)
    print(cuda_report.report(document))
    if arguments.json is not None:
        print(f"\nwrote {arguments.json}")
    return 1 if document["failed"] or any(case["errors"] for case in document["cases"]) else 0


def run(
    cases: Sequence[Case],
    rounds: int,
    names: Sequence[str],
    kernel: str | None,
    gpu: cuda_device.Gpu,
    command: Sequence[str],
    save: Save,
) -> dict[str, Any]:
    """Times the cases, those that need another FASTATTN_TF32 in a process of their own."""
    mine, others = cuda_cases.split(cases, os.environ)
    implementations, unavailable = cuda_peers.implement(gpu, names, kernel)
    limits = cuda_limits.Limits(gpu)
    document: dict[str, Any] = {
        **header(gpu, command),
        "mode": "cuda",
        "rounds": rounds,
        "peers": [x.name for x in implementations[1:]],
        "unavailable_peers": unavailable,
        "complete": False,
        "limits": {},
        "cases": [],
        "failed": {},
    }
    progress = Progress(len(cases) * rounds)
    precision = gpu.torch.get_float32_matmul_precision()
    try:
        limits.measure_all()
        # torch's own float32 products are TF32 where ours are.
        high = any(cuda_cases.needs_tf32(case) for case in mine)
        gpu.torch.set_float32_matmul_precision("high" if high else "highest")
        for case in mine:
            try:
                document["cases"].append(bench_case(case, implementations, rounds, gpu, progress))
            except Exception as error:  # out of memory, say: the other cases go on
                document["failed"][case.name] = cuda_peers.refusal(error, [])
            _finish(document, limits)
            save(document)
        if others:
            _add_child(document, others, rounds, names, kernel)
        limits.measure_all()
    finally:
        progress.clear()
        gpu.torch.set_float32_matmul_precision(precision)
    document["complete"] = True
    _finish(document, limits)
    save(document)
    return document


def header(gpu: cuda_device.Gpu, command: Sequence[str]) -> dict[str, Any]:
    """As on the CPU, with the GPU."""
    start = bench.header(SCHEMA, command)
    start["versions"] |= cuda_device.versions()
    return {**start, "gpu": gpu.describe()}


def _finish(document: dict[str, Any], limits: cuda_limits.Limits) -> None:
    document["limits"] = limits.describe()
    set_fractions(document)


def set_fractions(document: dict[str, Any]) -> None:
    """Fills in what share of the run's best limit each result reached."""
    peaks = {x["name"]: x["tflops"] for x in document["limits"]["gemm"]}
    copy = document["limits"]["copy_gbytes"]
    for case in document["cases"]:
        figure, limit = {
            "prefill": ("tflops", peaks[case["limit_name"]]),
            "decode": ("gbytes", copy),
            "latency": ("tflops", None),
        }[case["kind"]]
        for entry in case["results"]:
            entry["fraction_of_limit"] = entry[figure] / limit if limit else None


def child_command(
    cases: Sequence[Case], rounds: int, names: Sequence[str], kernel: str | None, path: str
) -> list[str]:
    """The same benchmark for these cases."""
    command = [sys.executable, "-m", "attnbench", "--device", "cuda", "--rounds", str(rounds)]
    command += ["--cases", ",".join(case.name for case in cases), "--peers", ",".join(names) or "none"]
    return [*command, *(["--kernel", kernel] if kernel is not None else []), "--json", path]


def _add_child(
    document: dict[str, Any], cases: Sequence[Case], rounds: int, names: Sequence[str], kernel: str | None
) -> None:
    """The cases that need the other FASTATTN_TF32: it is read once per process."""
    value = "0" if os.environ.get(cuda_cases.TF32_VARIABLE) == "1" else "1"
    environment = child_environment() | {cuda_cases.TF32_VARIABLE: value}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = child_command(cases, rounds, names, kernel, str(path))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            lines = done.stderr.strip().splitlines()
            reason = f"its process ended with {done.returncode}: {lines[-1] if lines else 'no output'}"
            document["failed"] |= {case.name: reason for case in cases}
            return
    document["cases"] += found["cases"]
    document["failed"] |= found["failed"]
    missing = {case.name for case in cases} - {case["name"] for case in found["cases"]} - set(found["failed"])
    document["failed"] |= dict.fromkeys(sorted(missing), f"its process ended with {done.returncode}")


def _saver(path: str | None) -> Save:
    """Writes the document, so that a run that is stopped leaves what it had."""

    def save(document: dict[str, Any]) -> None:
        if path is not None:
            beside = Path(f"{path}.part")
            beside.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(beside, path)

    return save
