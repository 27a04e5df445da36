#!/usr/bin/env python3
"""What a call costs when the CPUs are shared: two callers at once, and every CPU busy with other processes.

bench/sharing.py --json bench/results/<machine>-sharing.json

Each figure is the median time of a call in units of the time alone. If calls wait for nothing but the CPUs,
both are 2: two callers halve the machine, and so does one busy process for each CPU. More is time lost in
threads that spin or wait for each other. Of a peer with several operators the first that has the case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnbench import case_list, cases, timing
from attnbench import run as bench
from attnbench.peers import base as peers
from fastattn._check import machine

SCHEMA = 1


def timed(run: Callable[[], Any], seconds: float) -> list[float]:
    found, end = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def callers(run: Callable[[], Any], number: int, seconds: float) -> float:
    """Median time of a call while `number` threads make calls, all for the same time."""
    gate, found = threading.Barrier(number), []

    def call() -> None:
        gate.wait()
        found.extend(timed(run, seconds))

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(found)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(run: Callable[[], Any], rounds: int, seconds: float) -> dict[str, Any]:
    alone, two, loaded = [], [], []
    for _ in range(rounds):
        timing.settle()
        alone.append(callers(run, 1, seconds))
        two.append(callers(run, 2, seconds) / alone[-1])
        with busy(machine.usable_cpus()):
            loaded.append(callers(run, 1, 2 * seconds) / alone[-1])
    return {
        "seconds_alone": statistics.median(alone),
        "two_callers": statistics.median(two),
        "busy_machine": statistics.median(loaded),
        "per_round": {"seconds_alone": alone, "two_callers": two, "busy_machine": loaded},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default="bert,bert-s128,decode-4k-f32")
    parser.add_argument("--peers", default="torch,onnxruntime")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls for each figure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        timing.check_rounds(arguments.rounds)
        chosen = cases.select(arguments.cases, case_list.CASES)
        names = peers.choose(arguments.peers)
    except ValueError as error:
        parser.error(str(error))
    threads = machine.usable_cpus()
    document = bench.header(SCHEMA, sys.argv) | {"mode": "sharing", "threads": threads, "results": []}
    found, unavailable = bench.implement(names, threads)
    document["unavailable"] = unavailable
    print(f"{'case':20}{'':14}{'alone':>11}{'two callers':>14}{'busy machine':>15}")
    for case in chosen:
        inputs = peers.Inputs.of(case)
        for implementation in found:
            try:
                runner = implementation.candidates(case)[0](inputs)
            except peers.NotApplicable as reason:
                print(f"{case.name:20}{implementation.name:14}{reason}")
                continue
            runner.run()
            entry = measure(runner.run, arguments.rounds, arguments.seconds)
            document["results"].append({"case": case.name, "implementation": implementation.name, **entry})
            alone = f"{entry['seconds_alone'] * 1e3:.3f} ms"
            two, loaded = (f"{entry[name]:.2f} x" for name in ("two_callers", "busy_machine"))
            print(f"{case.name:20}{implementation.name:14}{alone:>11}{two:>14}{loaded:>15}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
