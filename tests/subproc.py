"""Runs a piece of Python in a fresh interpreter: for environment variables, fork, signals and peak memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

PRELUDE = """
import os, sys, time
import numpy as np
import fastattn
def qkv(dtype, *shape, Sk=None):
    rng = np.random.default_rng(0)
    B, S, H, D = shape
    return [rng.standard_normal((B, n, H, D)).astype(dtype) for n in (S, Sk or S, Sk or S)]
def dtype_of(name):
    info = next(k for k in fastattn.kernels() if k.name == name)
    names = [str(n) for n in info.dtypes]
    name = "float32" if "float32" in names else names[0]
    if name == "bfloat16":
        import ml_dtypes
        return ml_dtypes.bfloat16
    return name
"""


def run(
    code: str, *, timeout: float = 120, env: dict[str, str] | None = None, prelude: bool = True
) -> tuple[str, str]:
    """(stdout, stderr) of the code; fails with both when it does not exit with 0."""
    process = start(code, env=env, prelude=prelude)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs after {timeout} s:\n{out}\n{err}") from None
    assert process.returncode == 0, f"exit status {process.returncode}:\n{out}\n{err}"
    return out, err


def start(code: str, *, env: dict[str, str] | None = None, prelude: bool = True) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    script = (PRELUDE if prelude else "") + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | (env or {}),
        # A CI runner may start the tests with SIGINT ignored; a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
