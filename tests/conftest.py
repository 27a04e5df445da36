"""Every test that asks for `kernel` runs on each kernel usable here, forced by name.

`kernel` together with `dtype` (a dtype object) loops over all pairs that the kernel supports, or with
``--pairs diagonal`` over some in which each kernel and each dtype is;
`kernel` alone, or with the mark one_dtype, takes float32, or the kernel's first dtype.
Unusable kernels show up once, skipped with their reason, in test_entry_points.py.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inputs import DTYPES, PARTIAL

import fastattn

# Scripts and the benchmark are imported by their names, and find what they import as if one of them were run.
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("tools", "bench")]

USABLE = [kernel for kernel in fastattn.kernels() if kernel.usable]


_WORKERS = 4  # each with its own PyTorch and JAX in memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairs",
        choices=("all", "diagonal"),
        default="all",
        help="(kernel, dtype) pairs of a test: all, or some in which each kernel and each dtype is",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs the whole suite in several processes, a file in one of them, where pytest-xdist is installed."""
    if (
        not hasattr(config, "workerinput")  # one of those processes
        and config.args_source == config.ArgsSource.TESTPATHS
        and getattr(config.option, "numprocesses", 0) is None
        and not config.option.usepdb
        and not config.option.collectonly
    ):
        config.option.numprocesses = "auto"
        config.option.dist = "loadfile"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, _WORKERS)


def _usable(devices: tuple[str, ...]) -> list[fastattn.KernelInfo]:
    return [kernel for kernel in USABLE if kernel.device in devices]


def _pairs(one_dtype: bool, devices: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = []
    for kernel in _usable(devices):
        names = [str(name) for name in kernel.dtypes]
        if one_dtype:
            names = ["float32"] if "float32" in names else names[:1]
        pairs += [(kernel.name, name) for name in DTYPES if name in names]
    return pairs


def _diagonal(pairs: list[tuple[str, str]], turn: int) -> list[tuple[str, str]]:
    """Each kernel once, and pairs for the dtypes that are left; another `turn`, other pairs."""
    chosen = []
    for number, kernel in enumerate(dict.fromkeys(kernel for kernel, _ in pairs)):
        own = [pair for pair in pairs if pair[0] == kernel]
        chosen.append(own[(number + turn) % len(own)])
    for name in dict.fromkeys(name for _, name in pairs):
        if name not in {dtype for _, dtype in chosen}:
            own = [pair for pair in pairs if pair[1] == name]
            chosen.append(own[turn % len(own)])
    return [pair for pair in pairs if pair in chosen]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_dtype: loop over kernels, with one dtype each")
    config.addinivalue_line("markers", "cpu_only: a promise for the CPU's kernels, not for a GPU's")


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What a kernel for some problems, or some devices, refuses is not tested on it, visibly."""
    outcome: Any = yield
    error = outcome.excinfo[1] if outcome.excinfo else None
    if isinstance(error, fastattn.UnsupportedError):
        for name in PARTIAL:
            if f'kernel: "{name}" cannot compute' in str(error):
                outcome.force_exception(pytest.skip.Exception(str(error)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.fixturenames
    cpu_only = metafunc.definition.get_closest_marker("cpu_only") is not None
    devices = ("cpu",) if cpu_only else ("cpu", "cuda")
    if "kernel" in asked and "dtype" in asked:
        one = metafunc.definition.get_closest_marker("one_dtype") is not None
        if metafunc.config.getoption("pairs") == "diagonal" and not one:
            turn = zlib.crc32(metafunc.definition.nodeid.encode())
            pairs = [pair for device in devices for pair in _diagonal(_pairs(one, (device,)), turn)]
        else:
            pairs = _pairs(one, devices)
        ids = [f"{kernel}-{name}" for kernel, name in pairs]
        metafunc.parametrize("kernel,dtype", [(kernel, DTYPES[name]) for kernel, name in pairs], ids=ids)
    elif "kernel" in asked:
        metafunc.parametrize("kernel", [kernel.name for kernel in _usable(devices)])
    elif "dtype" in asked:
        metafunc.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after the test."""
    before = fastattn.get_num_threads()
    yield
    fastattn.set_num_threads(before)
