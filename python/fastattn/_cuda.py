"""What the CUDA backend asks of Python: where cuBLAS is, and the speeds that `tune` measured on this machine.

Imported when CUDA is first used, by the compiled module; nothing here needs a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

CUBLAS = "libcublasLt.so.13"
TUNE_SCHEMA = 1
# struct DeviceSpeeds of csrc/core/device_choice.h: FLOP/s, bytes/s, and the seconds of an empty call.
SPEEDS = (
    *("cpu_per_thread_f64", "cpu_per_thread_f32", "cpu_per_thread_bf16"),
    *("gpu_f64", "gpu_f32", "gpu_half"),
    *("to_device", "to_host", "cpu_seconds", "gpu_seconds"),
)


def find_cublas() -> str | None:
    """Find the library of cuBLAS that the CUDA kernels call.

    Returns
    -------
    str or None
        Path of libcublasLt.so.13, as `cuda.pathfinder` finds it where that is installed, else among the
        packages of ``sys.path``; None where there is none. Torch is never imported.
    """
    return _cublas_of_pathfinder() or _cublas_of_packages(sys.path)


def _cublas_of_pathfinder() -> str | None:
    try:
        import cuda.pathfinder as pathfinder
    except ImportError:
        return None
    try:
        path: str | None = pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception:  # not found, or found and broken: the kernels will say what is missing
        return None
    # It also takes cuBLAS 12, which has another ABI.
    return path if path is not None and Path(path).name.startswith(CUBLAS) else None


def _cublas_of_packages(folders: list[str]) -> str | None:
    """NVIDIA's wheels put it there; so does torch, which depends on them."""
    for folder in folders:
        path = Path(folder or ".") / "nvidia" / "cu13" / "lib" / CUBLAS
        if os.path.isfile(path):  # Path.is_file raises where one may not look
            return str(path.resolve())
    return None


def tune_file() -> Path | None:
    """Where `tune` writes: ``fastattn/tune.json`` in $XDG_CACHE_HOME, else ~/.cache; None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    # The specification says that a relative path is to be ignored.
    folder = Path(cache) if cache and os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    # Without $HOME, a user who is in no list of users keeps the "~".
    return folder / "fastattn" / "tune.json" if folder.is_absolute() else None


def gpu_name() -> str | None:
    """Name of the first GPU that this process sees, from the driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")


def this_machine() -> dict[str, str | None]:
    """What a tune file must have been measured on to count here."""
    from fastattn._check import machine  # parses /proc/cpuinfo; needed by this and nothing else

    return {"cpu": machine.cpu_model(), "gpu": gpu_name()}


def stored_speeds() -> dict[str, float] | None:
    """Read what ``python -m fastattn tune`` measured on this machine.

    Returns
    -------
    dict of str to float or None
        Some or all of `SPEEDS`; those that are missing keep their defaults. None where there is no file
        that can be read, where it is of another machine, and, with a warning, where it is not what `tune`
        writes.
    """
    path = tune_file()
    # Nobody has to have a cache, or a home: what cannot be read is as good as absent. A pipe might never end.
    try:
        if path is None or not os.path.isfile(path):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    try:
        document = json.loads(content.decode())
        speeds = checked_speeds(document)
    except (ValueError, RecursionError) as error:
        again = "write it again with `python -m fastattn tune`"
        warnings.warn(f"{path} is ignored: {error}; {again}", RuntimeWarning, stacklevel=2)
        return None
    return speeds if document["machine"] == this_machine() else None


def checked_speeds(document: Any) -> dict[str, float]:
    """The speeds of a tune file's content.

    Raises
    ------
    ValueError
        It is not what `tune` writes; the text says where.
    """
    if not isinstance(document, dict) or document.get("schema") != TUNE_SCHEMA:
        raise ValueError(f'expected {{"schema": {TUNE_SCHEMA}, ...}}')
    if not isinstance(document.get("machine"), dict):
        raise ValueError("machine: expected a cpu and a gpu")
    speeds = document.get("speeds")
    if not isinstance(speeds, dict):
        raise ValueError("speeds: expected names with numbers")
    for name, value in speeds.items():
        if name not in SPEEDS:
            raise ValueError(f"speeds: {name!r} is none of {', '.join(SPEEDS)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"speeds: {name}: expected a number, got {value!r}")
        if not 0 < value <= sys.float_info.max:  # NaN fails it too, as does an int that is no float
            raise ValueError(f"speeds: {name}: expected a finite number above 0, got {value!r}")
    return {name: float(value) for name, value in speeds.items()}
