"""``python -m fastattn bench``: fastattn beside the installed peers, and beside the machine's limits.

Every round times all implementations of a case one after the other, so that a slow minute of the machine hits
all of them; the figure is the median over the rounds. Before its clock starts, each peer's result is compared
with the float64 reference on a sample of rows: a peer that computes something else is not timed.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import Any

import fastattn
from attnbench import case_list, host
from attnbench.cases import Case, select
from attnbench.estimate import minutes_text, seconds_of
from attnbench.limits import Limits
from attnbench.peers import base as peers
from attnbench.timing import Speeds, bench_case, check_rounds
from fastattn._check import machine
from fastattn._check.output import Progress

SCHEMA = 2
ROUNDS = 7


def run(
    *,
    cases: str | None = None,
    threads: int | None = None,
    rounds: int = ROUNDS,
    peer_names: str | None = None,
    kernel: str | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Times the cases and returns everything that is known of the run, ready for JSON.

    Parameters
    ----------
    cases, peer_names : str, optional
        Comma-separated; None takes all, of the peers all that are installed.
    threads : int, optional
        For fastattn and every peer; default `fastattn.get_num_threads()`.
    rounds : int
        At most; a case whose round is long takes three.
    kernel : str, optional
        Forces this kernel of fastattn.
    command : sequence of str
        What the user typed, for the record.

    Raises
    ------
    ValueError
        Cases or peers that do not exist, threads or rounds below 1, `UnsupportedError` for the kernel.
    """
    chosen = select(cases, case_list.CASES)
    names = peers.choose(peer_names)
    threads = fastattn.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    check_rounds(rounds)

    start = header(SCHEMA, command)  # the commit that is measured, whatever is edited meanwhile
    before = fastattn.get_num_threads()
    progress = Progress(len(chosen) * rounds)
    limits = Limits(threads)
    try:
        progress.step("importing the peers", 0)
        implementations, unavailable = implement(names, threads, kernel)
        progress.step("measuring the limits", 0)
        limits.measure_all()
        progress.clear()
        print_estimate(chosen, implementations, rounds, limits)
        speeds = Speeds()
        results: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        for case in chosen:
            reason = _cannot_run(case, len(implementations))
            if reason:
                skipped[case.name] = reason
                progress.step("", rounds)
            else:
                results.append(bench_case(case, implementations, rounds, limits, speeds, progress))
        limits.measure_all()
    finally:
        progress.clear()
        fastattn.set_num_threads(before)
    for result in results:
        _set_limits(result, limits)
    _set_slowdowns(results)
    return {
        **start,
        "runs": [
            {
                **describe_run(threads, rounds, implementations, unavailable, limits),
                "skipped_cases": skipped,
                "cases": results,
            }
        ],
    }


def describe_run(
    threads: int,
    rounds: int,
    implementations: Sequence[peers.Implementation],
    unavailable: dict[str, str],
    limits: Limits,
) -> dict[str, Any]:
    """What a document says of one run beside its results."""
    return {
        "threads": threads,
        "rounds": rounds,
        "peers": [x.name for x in implementations[1:]],
        "unavailable_peers": unavailable,
        "threads_limited_by": {x.name: x.limited_by for x in implementations},
        "limits": limits.describe(),
    }


def header(schema: int, command: Sequence[str]) -> dict[str, Any]:
    """What a document says of the machine and the software."""
    return {
        "schema": schema,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": host.commit(),
        "machine": host.describe(),
        "versions": {"fastattn": fastattn.__version__, **machine.versions()},
    }


def implement(
    names: Sequence[str], threads: int, kernel: str | None = None
) -> tuple[list[peers.Implementation], dict[str, str]]:
    """fastattn and the peers that can be had, and why the others cannot."""
    found: list[peers.Implementation] = [peers.FastAttn(threads, kernel)]
    unavailable = {}
    for name in names:
        try:
            found.append(peers.PEERS[name](threads))
        except (ImportError, peers.NotApplicable) as error:
            unavailable[name] = str(error)
    return found, unavailable


def print_estimate(
    cases: Sequence[Case], implementations: Sequence[peers.Implementation], rounds: int, limits: Limits
) -> None:
    """On stderr, as the progress bar."""
    expected = sum(seconds_of(case, implementations, rounds, limits) for case in cases)
    what = f"{len(cases)} cases, {len(implementations)} implementations, threads: {limits.threads}"
    print(f"{what}: about {minutes_text(expected)}", file=sys.stderr)


def _cannot_run(case: Case, implementations: int) -> str | None:
    if case.dtype == "bfloat16" and machine.installed_version("ml_dtypes") is None:
        return "needs ml_dtypes"
    available = host.available_bytes()
    copy = case.bytes + (case.score_bytes if case.feature == "alibi" else 0)  # peers take ALiBi as a mask
    needed = (implementations + 2) * copy  # one each, one to measure the bandwidth, one to spare
    if available is not None and needed > available:
        return f"needs {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available"
    return None


def _set_limits(result: dict[str, Any], limits: Limits) -> None:
    """Fills in the best limits of the run, and the fraction of them that each implementation reached."""
    decode = result["kind"] == "decode"
    flops = limits.flops.get((result["kernel"], result["dtype"])) if result["kind"] != "latency" else None
    bandwidth = limits.bandwidth.get(result["kv_bytes"]) if decode else None
    result["limit"] = {
        "kind": {"prefill": "flops", "backward": "flops", "decode": "bandwidth", "latency": None}[
            result["kind"]
        ],
        "gflops": flops / 1e9 if flops else None,
        "gbytes": bandwidth / 1e9 if bandwidth else None,
    }
    for entry in result["results"]:
        speed, limit = (entry["gbytes"], bandwidth) if decode else (entry["gflops"], flops)
        entry["fraction_of_best_limit"] = speed * 1e9 / limit if limit else None


def _set_slowdowns(results: Sequence[dict[str, Any]]) -> None:
    """Time per computed score of a case with a feature, over that of its plain case.

    fastattn's is known from the rounds of the case itself, a peer's from the plain case if that was run too.
    """
    by_name = {result["name"]: result for result in results}
    for result in results:
        plain = by_name.get(result["plain_case"])
        speeds = {entry["name"]: entry["gflops"] for entry in plain["results"]} if plain else {}
        for entry in result["results"]:
            speed = speeds.get(entry["name"])
            entry["slowdown"] = speed / entry["gflops"] if speed else None
        result["results"][0]["slowdown"] = result["slowdown"]
