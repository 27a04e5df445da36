"""``python -m fastattn info``: what is on this machine, and what of it fastattn can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn import _core
from fastattn._check import machine
from fastattn._check.output import table


def main(arguments: Any) -> int:
    print(text())
    return 0


def text(short: bool = False) -> str:
    """Version, CPU, kernels, threads and what was built for GPUs; unless short also packages and CUDA."""
    here = machine.describe()
    versions = machine.versions()
    lines = [
        f"fastattn  {fastattn.__version__}, Python {versions['python']}, NumPy {np.__version__}",
        f"machine   {machine.summary(here)}",
        f"system    {here['system']}, {here['architecture']}",
        f"features  {' '.join(here['features']) or 'unknown'}",
        f"threads   {fastattn.get_num_threads()}",
    ]
    if not short:
        file = Path(str(_core.__file__))
        lines.append(f"build     {_core.build_info()}, {file.name} in {file.parent}")
        packages = [f"{name} {versions[name]}" for name in machine.PACKAGES if name in versions]
        lines.append(f"packages  {', '.join(packages) or 'none of ' + ', '.join(machine.PACKAGES)}")
        lines.append(f"cuda      {_usable_cuda()}")
    lines.append(f"gpu build {_core.cuda_build()}")
    rows = [
        [kernel.name, kernel.device, "yes" if kernel.usable else f"no: {kernel.reason}", " ".join(kernel.dtypes)]
        for kernel in fastattn.kernels()
    ]
    return "\n".join(lines) + "\n\n" + table(["kernel", "device", "usable", "dtypes"], rows, left=4)


def _usable_cuda() -> str:
    """Usable, or why not, as a call would say it."""
    q = np.zeros((1, 1), np.float32)
    try:
        plan = fastattn.explain(q, q, q, device="cuda")
    except fastattn.UnsupportedError as reason:
        return str(reason)
    return f"usable ({plan.kernel})"
