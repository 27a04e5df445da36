"""A short run of every CUDA kernel that is usable here, for tools that make programs slow.

python tools/gpu_short_run.py [--arrays numpy|torch] [--problems NAME ...] [--dtypes NAME ...]

The problems are those of ``python -m fastattn check``, each compared with the reference. Exit status: 0 all
right, 1 a wrong result or an error, 3 no CUDA kernel is usable (or torch is missing where it was asked for).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastattn
from fastattn._check import gate, machine, problems

DTYPES = ("float32", "float16", "bfloat16", "float64")
TORCH_ARGUMENTS = ("mask", "bias")  # the other ones are small, and may stay on the host


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrays", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--problems", nargs="+", choices=problems.PROBLEMS, default=list(problems.PROBLEMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    arguments = parser.parse_args(argv)
    kernels = [kernel for kernel in fastattn.kernels() if kernel.device == "cuda" and kernel.usable]
    if not kernels:
        print("no CUDA kernel is usable here")
        return 3
    try:
        to_device = numpy_arrays if arguments.arrays == "numpy" else torch_arrays()
    except ImportError as error:
        print(error)
        return 3
    wanted = arguments.dtypes
    if machine.installed_version("ml_dtypes") is None:
        wanted = [dtype for dtype in wanted if dtype != "bfloat16"]
    count, wrong = 0, 0
    for dtype in wanted:
        for name in arguments.problems:
            q, k, v, options = problems.make(name, dtype)
            want = gate.expected(q, k, v, **options)
            for kernel in (kernel for kernel in kernels if dtype in kernel.dtypes):
                text = check(kernel.name, to_device((q, k, v), options), want)
                count += text is not None
                if text:
                    wrong += 1
                    print(f"WRONG {kernel.name} {dtype} {name}: {text}", flush=True)
    print(f"{count} problems, {wrong} wrong")
    return 1 if wrong else 0


def check(kernel: str, call: tuple[Any, dict[str, Any]], want: gate.Expected) -> str | None:
    """What is wrong, or nothing; None where the kernel does not take the problem."""
    arrays, options = call
    try:
        out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **options)
        out, lse = to_numpy(out), to_numpy(lse)
    except fastattn.UnsupportedError:
        return None
    except Exception as error:  # the other problems go on
        return f"{type(error).__name__}: {error}"
    of_gate = max(gate.worst(out, want.out, want.out_limit)[1], gate.worst(lse, want.lse, want.lse_limit)[1])
    return "" if of_gate <= 1.0 else f"{of_gate:.3g} times the error that is allowed"


def numpy_arrays(arrays: Sequence[Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Staged: fastattn copies them."""
    return arrays, options


def torch_arrays() -> Callable[[Sequence[Any], dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """What puts q, k, v, masks and biases into the GPU's memory."""
    torch = importlib.import_module("torch")

    def tensor(x: Any) -> Any:
        x = np.ascontiguousarray(x)
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(x).cuda()

    def convert(arrays: Sequence[Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        there = {name: tensor(x) for name, x in options.items() if name in TORCH_ARGUMENTS}
        return [tensor(x) for x in arrays], {**options, **there}

    return convert


def to_numpy(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.double().cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
