"""What a call adds to a process's peak memory: ``python -m attnbench.extra_memory NAME S DTYPE THREADS``.

A process of its own, because a peak that another call has set would hide this one's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from attnbench import run as bench
from attnbench.peers import base as peers
from attnbench.scaling import scaling_case

WARM_SIZE = 64  # brings the libraries' threads and code into memory


def measure(name: str, size: int, dtype: str, threads: int) -> int | None:
    """Growth of the peak during one call, without the result; None where the system does not tell."""
    implementations, _ = bench.implement([] if name == "fastattn" else [name], threads)
    implementation = implementations[-1]

    def prepare(tokens: int) -> tuple[peers.Inputs, peers.Runner]:
        inputs = peers.Inputs.of(scaling_case(tokens, dtype))
        (make,) = implementation.candidates(inputs.case)
        return inputs, make(inputs)

    prepare(WARM_SIZE)[1].run()
    inputs, runner = prepare(size)
    gc.collect()
    return_free_memory()
    if not reset_peak():
        return None
    before = status_bytes("VmRSS")
    result = runner.run()
    after = status_bytes("VmHWM")
    if before is None or after is None:
        return None
    del result
    return max(0, after - before - inputs.q.nbytes)  # the result is as large as q


def return_free_memory() -> None:
    """To the system, where the C library can: what the call took from it would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> bool:
    """Sets VmHWM to VmRSS (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(name: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
