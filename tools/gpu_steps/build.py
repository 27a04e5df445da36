"""The step that builds."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu_steps.commands import ROOT, TAIL, Context, Step, smi

FACTS = """
import json, fastattn
from fastattn import _core
print(json.dumps({"kernels": [k._asdict() for k in fastattn.kernels()], "build_info": _core.build_info(),
                  "path": fastattn.__file__, "version": fastattn.__version__}))
"""


def build(context: Context) -> Step:
    """Installs into the scratch folder, and asks the result for its kernels."""
    architecture = cuda_architecture(smi("compute_cap"))
    if context.site.exists():
        shutil.rmtree(context.site)
    (installed,) = context.run(install_command(context, architecture))
    commands = [installed]
    if installed.rc != 0:
        why = "cut short" if installed.timed_out else f"pip ended with {installed.rc}"
        text = installed.output[-TAIL:]
        failure = {"where": "pip install", "text": text}
        return Step("partial" if installed.timed_out else "failed", why, commands, {}, [failure])
    (asked,) = context.run([sys.executable, "-c", FACTS])
    commands.append(asked)
    facts = json_line(asked.output)
    if asked.rc != 0 or facts is None:
        return Step(
            "failed", "it cannot be imported", commands, {}, [{"where": "import", "text": asked.output}]
        )
    usable, problem = cuda_kernels(facts, context.site)
    results = {**facts, "architecture": architecture}
    if problem:
        return Step("failed", problem, commands, results, [{"where": "kernels", "text": problem}])
    return Step("passed", f"usable: {', '.join(usable)}", commands, results)


def install_command(context: Context, architecture: str | None) -> list[str]:
    """pip, into a folder of its own and without network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
    ]
    command += ["--target", str(context.site)]
    if context.wheel is not None:
        return [*command, context.wheel]
    settings = {"build-dir": str(context.scratch / "build"), "cmake.define.FASTATTN_CUDA": "ON"}
    if architecture is not None:
        settings["cmake.define.FASTATTN_CUDA_ARCHITECTURES"] = architecture
    command += ["--no-build-isolation", "--verbose"]
    return [*command, *(f"--config-settings={name}={value}" for name, value in settings.items()), str(ROOT)]


def cuda_architecture(compute_cap: str | None) -> str | None:
    """ "9.0" -> "90"; None where nvidia-smi says nothing that we understand."""
    found = re.fullmatch(r"(\d+)\.(\d)", (compute_cap or "").strip())
    return found[1] + found[2] if found else None


def cuda_kernels(facts: dict[str, Any], site: Path) -> tuple[list[str], str]:
    """The usable CUDA kernels, and what is wrong where there are none or another fastattn was imported."""
    if site.resolve() not in Path(facts["path"]).resolve().parents:
        return [], f"another fastattn was imported: {facts['path']}"
    kernels = [kernel for kernel in facts["kernels"] if kernel["device"] == "cuda"]
    usable = [kernel["name"] for kernel in kernels if kernel["usable"]]
    reasons = "; ".join(f"{kernel['name']}: {kernel['reason']}" for kernel in kernels if not kernel["usable"])
    return usable, "" if usable else reasons or "this build has no CUDA kernel"


def json_line(output: str) -> Any:
    """The last line that is a JSON object."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None
