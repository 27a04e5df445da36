"""``python -m fastattn check``: every kernel that is usable here, against the float64 reference."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fastattn
from fastattn._check import gate, info, machine, problems
from fastattn._check.output import Progress, table, three_digits
from fastattn._check.shapes import Shape

DTYPES = ("float32", "bfloat16", "float16", "float64")
PREFILL = Shape(8, 8, 512, 512, 64, 64)
DECODE = Shape(32, 8, 1, 4096, 128, 128)
SPEED_SECONDS = 0.15  # per figure; slow kernels take one call


@dataclass
class Result:
    """One kernel with one dtype."""

    kernel: str
    dtype: str
    passed: int = 0
    gradients_passed: int = 0
    max_error: float = 0.0  # of out
    of_gate: float = 0.0  # the worst error in units of its limit: out, lse or a gradient
    failures: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # problems that the kernel does not take, with the reason
    gradients_refused: list[str] = field(default_factory=list)
    gflops: float = 0.0
    gbytes: float = 0.0

    @property
    def has_backward(self) -> bool:
        """False where no gradient was computed: it refused each, or none of its results was right."""
        return len(self.gradients_refused) < self.passed

    def remarks(self) -> list[str]:
        return self.refused + (self.gradients_refused if self.has_backward else [])


def main(arguments: Any) -> int:
    """Prints what is here and how every kernel does; 1 when one fails or none is usable."""
    print(info.text(short=True))
    pairs, notes = _pairs(fastattn.kernels())
    before = fastattn.get_num_threads()
    if arguments.threads is not None:
        fastattn.set_num_threads(arguments.threads)
    try:
        results = run(pairs)
    finally:
        fastattn.set_num_threads(before)
    print(f"\nAgainst fastattn.reference, {len(problems.PROBLEMS)} problems for each kernel and dtype:\n")
    rows = []
    for r in results:
        state = _state(r.passed, len(problems.PROBLEMS) - len(r.refused))
        gradients = _state(r.gradients_passed, r.passed - len(r.gradients_refused)) if r.has_backward else "-"
        speed = [three_digits(r.gflops), three_digits(r.gbytes)] if r.gflops else ["-", "-"]
        rows.append([r.kernel, r.dtype, state, gradients, f"{r.max_error:.1e}", f"{r.of_gate:.2f}", *speed])
    header = ["kernel", "dtype", "problems", "gradients", "max error", "error / gate"]
    print(table([*header, "prefill GFLOP/s", "decode GB/s"], rows, left=2))
    print(f"\nprefill: {PREFILL}; decode: {DECODE}, GB/s of K and V")
    for note in notes + [f"{r.kernel} {r.dtype} refuses {text}" for r in results for text in r.remarks()]:
        print(note)
    failures = [f"FAILED {r.kernel} {r.dtype}: {text}" for r in results for text in r.failures]
    for line in failures:
        print(line)
    if not results:
        print("FAILED: no kernel is usable on this machine")
        return 1
    failed = len({(r.kernel, r.dtype) for r in results if r.failures})
    print(f"\n{failed} of {len(results)} failed" if failed else "\nall passed")
    return 1 if failed else 0


def run(pairs: Sequence[tuple[str, str]], speed: bool = True) -> list[Result]:
    """Checks (and times) each pair of kernel and dtype."""
    results = {pair: Result(*pair) for pair in pairs}
    progress = Progress(len(pairs) * (len(problems.PROBLEMS) + 2 * speed))
    try:
        for dtype in dict.fromkeys(dtype for _, dtype in pairs):
            for name in problems.PROBLEMS:
                q, k, v, kwargs = problems.make(name, dtype)
                want = gate.expected(q, k, v, **kwargs)
                dout = problems.dout(q, v)
                want_gradients = gate.expected_gradients(dout, q, k, v, **kwargs)
                for kernel in (kernel for kernel, other in pairs if other == dtype):
                    progress.step(f"{kernel} {dtype}: {name}", 0)
                    result = results[kernel, dtype]
                    saved = _check(result, name, (q, k, v), kwargs, want)
                    if saved is not None:
                        _check_gradients(result, name, (dout, q, k, v, *saved), kwargs, want_gradients)
                    progress.step(f"{kernel} {dtype}: {name}")
        for pair, result in results.items() if speed else ():
            progress.step(f"{pair[0]} {pair[1]}: speed", 0)
            if not result.failures:
                result.gflops = PREFILL.flops / _seconds(PREFILL, *pair) / 1e9
                result.gbytes = DECODE.kv_bytes / _seconds(DECODE, *pair) / 1e9
            progress.step(f"{pair[0]} {pair[1]}: speed", 2)
    finally:
        progress.clear()
    return list(results.values())


def _state(passed: int, taken: int) -> str:
    return f"{passed}/{taken} {'ok' if 0 < passed == taken else 'FAILED'}"


def _check(result: Result, name: str, arrays: Any, kwargs: dict[str, Any], want: gate.Expected) -> Any:
    """out and lse where they are right, for the gradients; else None."""
    try:
        out, lse = fastattn.mha(*arrays, kernel=result.kernel, return_lse=True, **kwargs)
    except fastattn.UnsupportedError as reason:  # some kernels take some problems only
        result.refused.append(f"{name}: {reason}")
        if len(result.refused) == len(problems.PROBLEMS):
            result.failures.append("it refuses every problem")
        return None
    except Exception as raised:  # a kernel that raises has failed; the others go on
        result.failures.append(f"{name}: {type(raised).__name__}: {raised}")
        return None
    error, of_gate = gate.worst(out, want.out, want.out_limit)
    lse_error, lse_of_gate = gate.worst(lse, want.lse, want.lse_limit)
    result.max_error = max(result.max_error, error)
    result.of_gate = max(result.of_gate, of_gate, lse_of_gate)
    if of_gate <= 1.0 and lse_of_gate <= 1.0:
        result.passed += 1
        return out, lse
    if of_gate > 1.0:
        result.failures.append(f"{name}: error {error:.2g}, allowed {want.out_limit:.2g}")
    if lse_of_gate > 1.0:
        times = f"{lse_of_gate:.2g} times what is allowed"
        result.failures.append(f"{name}: error of lse {lse_error:.2g}, {times}")
    return None


def _check_gradients(
    result: Result, name: str, arrays: Any, kwargs: dict[str, Any], want: gate.ExpectedGradients
) -> None:
    try:
        gradients = fastattn.mha_backward(*arrays, kernel=result.kernel, **kwargs)
    except fastattn.UnsupportedError as reason:
        result.gradients_refused.append(f"gradients of {name}: {reason}")
        return
    except Exception as raised:
        result.failures.append(f"gradients of {name}: {type(raised).__name__}: {raised}")
        return
    of_gate, error, worst = gate.worst_gradient(gradients, want)
    result.of_gate = max(result.of_gate, of_gate)
    if of_gate <= 1.0:
        result.gradients_passed += 1
    else:
        times = f"{of_gate:.2g} times what is allowed"
        result.failures.append(f"{name}: error of {worst} {error:.2g}, {times}")


def _seconds(shape: Shape, kernel: str, dtype: str) -> float:
    """The fastest of a few calls."""
    q, k, v = replace(shape, dtype=dtype).arrays()
    best, spent = math.inf, 0.0
    while spent < SPEED_SECONDS:
        start = time.perf_counter()
        fastattn.mha(q, k, v, kernel=kernel)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return best


def _pairs(kernels: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Kernels and dtypes to check, best kernel first, and remarks on those that are not."""
    skipped = "bfloat16" if machine.installed_version("ml_dtypes") is None else None
    notes = [f"{skipped} was not checked: pip install ml_dtypes"] if skipped else []
    pairs = [
        (kernel.name, dtype)
        for kernel in kernels
        for dtype in DTYPES
        if kernel.usable and dtype in kernel.dtypes and dtype != skipped
    ]
    return pairs, notes
