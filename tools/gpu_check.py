"""Builds, tests, sanitizes and times fastattn on a machine with an NVIDIA GPU, from a bare checkout.

python tools/gpu_check.py                                         everything, into gpu_check.json
python tools/gpu_check.py --steps build,test --time-budget 500    a part, for each step so many seconds
python tools/gpu_check.py --steps bench --merge gpu_check.json    another part, into the same file

Needs what builds and tests fastattn (pip, scikit-build-core, pybind11, CMake, nvcc; pytest, NumPy, torch) in
the Python that runs it, and no network. Nothing is installed outside --scratch. A step that failed or was cut
short is recorded, and the next ones run. Exit status: 0 when no step failed or was cut short.

The file:
  schema      1
  commit      of the checkout, "-dirty" at its end for local changes; null where git does not say
  when        UTC, of the last command
  machine     cpu, cpus, memory_bytes, system
  gpu         name, driver, compute_capability, memory, cuda (nvcc's release); what is not known is left out
  versions    Python and the installed packages
  conflicts   what differs between the parts that were merged; nothing, in a record to rely on
  steps       build, test, sanitize, bench; each:
    status    passed, failed, partial (cut short by the time budget) or skipped
    summary   one line
    when, commit, gpu, seconds
    commands  argv, seconds, rc (null: killed), timed_out, tail of the output
    failures  where, text
    results   build: kernels, build_info, path, version, architecture
              test: passed, failed, errors, skipped, skip_reasons, seconds_of_slowest
              sanitize: for each run its tool, arrays, verdict, reason, errors, reports, seconds, and ours:
              how many reports name a function of fastattn
              bench: the documents of `tune`, `bench --device cuda`, of each fused kernel, and `--transfers`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_steps import bench, build, sanitize, tests
from gpu_steps.commands import ROOT, Context, Step, find_tool, output_of, smi

SCHEMA = 1
PACKAGES = (
    *("numpy", "torch", "jax", "cupy", "cupy-cuda13x", "ml_dtypes", "pytest", "pytest-timeout", "hypothesis"),
    *("scikit-build-core", "pybind11", "cmake", "ninja", "nvidia-cublas", "cuda-pathfinder"),
)
STEPS: dict[str, Callable[[Context], Step]] = {
    "build": build.build,
    "test": tests.test,
    "sanitize": sanitize.sanitize,
    "bench": bench.bench,
}


# ---- the document -------------------------------------------------------------------------------------
def describe(commit: str | None) -> dict[str, Any]:
    """Everything but the steps."""
    fields = {
        "name": "name",
        "driver": "driver_version",
        "compute_capability": "compute_cap",
        "memory": "memory.total",
    }
    gpu = {name: value for name, value in ((name, smi(field)) for name, field in fields.items()) if value}
    nvcc = find_tool("nvcc")
    cuda = nvcc_release(output_of([nvcc, "--version"])) if nvcc else None
    if cuda:
        gpu["cuda"] = cuda
    return {
        "schema": SCHEMA,
        "commit": commit or checkout_commit(),
        "when": utc_now(),
        "machine": {
            "cpu": cpu_model(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "gpu": gpu,
        "versions": versions(),
        "conflicts": [],
        "steps": {},
    }


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The steps of both, the new ones first; what the parts do not agree on is said.

    Raises ValueError for a file of another schema.
    """
    if old.get("schema") != SCHEMA:
        raise ValueError(f"--merge: expected schema {SCHEMA}, got {old.get('schema')!r}")
    steps = {**old["steps"], **new["steps"]}
    ordered = {name: steps[name] for name in STEPS if name in steps}
    return {**new, "steps": ordered, "conflicts": conflicts(ordered)}


def conflicts(steps: dict[str, Any]) -> list[str]:
    """Commits and GPUs, where these are not the same in all steps."""
    found = []
    for what in ("commit", "gpu"):
        values = {name: step[what] for name, step in steps.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found.append(f"{what}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return found


def table(document: dict[str, Any]) -> str:
    """A line per step, and the first failures."""
    gpu = document["gpu"]
    lines = [
        f"commit {document['commit']}, {gpu.get('name', 'no GPU')}, driver {gpu.get('driver', 'unknown')}"
    ]
    for name, step in document["steps"].items():
        lines.append(f"{name:9} {step['status']:8} {step['seconds']:7.1f} s  {step['summary']}")
    for name, step in document["steps"].items():
        for failure in step["failures"][:10]:
            text = (failure["text"].strip().splitlines() or [""])[0][:120]
            lines.append(f"  {name}: {failure['where']}: {text}")
    return "\n".join([*lines, *(f"CONFLICT {text}" for text in document["conflicts"])])


def nvcc_release(text: str) -> str | None:
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def checkout_commit() -> str | None:
    """None outside a checkout of git, or where git is missing."""
    head = output_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    if not head:
        return None
    changed = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}-dirty" if changed.strip() else head


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---- the program --------------------------------------------------------------------------------------
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument(
        "--out", type=Path, help="the JSON file (default: the one of --merge, else gpu_check.json)"
    )
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep the other steps of this file")
    parser.add_argument("--quick", action="store_true", help="fewer sanitizer runs and benchmark cases")
    parser.add_argument("--time-budget", type=float, default=540.0, metavar="S", help="seconds for each step")
    parser.add_argument("--wheel", metavar="PATH", help="install this wheel instead of building")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build/gpu_check", help="what is installed and written"
    )
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="processes of pytest")
    parser.add_argument("--commit", help="where git does not say")
    arguments = parser.parse_args(argv)
    arguments.steps = [name.strip() for name in arguments.steps.split(",")]
    for name in arguments.steps:
        if name not in STEPS:
            parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {name!r}")
    if arguments.time_budget <= 0 or arguments.jobs < 1:
        parser.error("--time-budget and --jobs: expected numbers above 0")
    if arguments.wheel is not None and not Path(arguments.wheel).is_file():
        parser.error(f"--wheel: no such file: {arguments.wheel}")
    arguments.out = arguments.out or arguments.merge or Path("gpu_check.json")
    return arguments


def run_step(name: str, context: Context) -> dict[str, Any]:
    """The step's record; whatever it raises is its failure."""
    start = time.monotonic()
    context.deadline = start + context.budget
    try:
        step = STEPS[name](context)
    except Exception as error:  # the other steps go on
        text = f"{type(error).__name__}: {error}"
        step = Step("failed", text, failures=[{"where": name, "text": text}])
    return {**step.record(), "when": utc_now(), "seconds": round(time.monotonic() - start, 2)}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    scratch = arguments.scratch.resolve()
    wheel = None if arguments.wheel is None else str(Path(arguments.wheel).resolve())
    context = Context(scratch, wheel, arguments.quick, arguments.time_budget, arguments.jobs)
    old = json.loads(arguments.merge.read_text()) if arguments.merge is not None else None
    document = describe(arguments.commit)
    for name in arguments.steps:
        print(f"{name} ...", flush=True)
        record = run_step(name, context)
        document["steps"][name] = {**record, "commit": document["commit"], "gpu": document["gpu"]}
        whole = document if old is None else merge(old, document)
        # After each step: a machine that goes away leaves what was done.
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(table(whole))
    print(f"wrote {arguments.out}")
    asked = [document["steps"][name]["status"] for name in arguments.steps]
    return 1 if "failed" in asked or "partial" in asked else 0


if __name__ == "__main__":
    sys.exit(main())
