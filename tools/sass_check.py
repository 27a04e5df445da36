"""Reads the machine code of the fused CUDA kernels and says whether it is what their sources mean.

    cd build/ci/CMakeFiles
    python tools/sass_check.py [--assemble 80,90] fastattn_cuda_*.dir/csrc/cuda/fused/*/launch.cu.o

It reads the machine code in the files, and with --assemble what their PTX becomes on these architectures. For
each kernel of each architecture: the tensor-core and copy instructions that it is written for are there; its
main loop, which is what lies between its first and its last product, keeps everything in registers; and
Hopper's products run asynchronously (the compiler serialises them, with no more than a remark, where it does
not see that it need not).

Needs ``cuobjdump`` and ``nvdisasm``, in PATH, beside ``$CUDACXX`` or from the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    """What the code of a kernel has to have."""

    product: str  # the tensor-core instruction
    others: tuple[str, ...]
    # Products that end a group, which is waited for: one for each place in the source that queues products.
    groups: int | None = None


RULES = {
    "decode_forward": Rule("HMMA.16816.F32", ("LDSM", "LDGSTS")),
    "flash_forward": Rule("HMMA.16816.F32", ("LDSM", "LDGSTS")),
    "flash_forward_sm90": Rule("HGMMA", ("UTMALDG", "SYNCS", "USETMAXREG"), groups=4),
}
# Accesses to local memory in a main loop that are known, by kernel and the tile's template arguments. Else
# it is 0, or, with elementwise arguments, whose rows' addresses come on top, at most ELEMENTWISE_LOCAL.
ELEMENTWISE_LOCAL = 8
KNOWN_LOCAL = {
    # 160 registers for a thread of three computing warp groups: counters of tiles wait in memory.
    ("flash_forward_sm90", "true, 64, 64, 128, 3, 32, 160, 4"): 10,
    # 88 registers are scores, 44 weights, 64 the output.
    ("flash_forward_sm90", "true, 128, 128, 176, 2, 40, 232, 0"): 6,
    # 128 of the registers are the output.
    ("flash_forward_sm90", "true, 256, 256, 80, 2, 40, 232, 0"): 6,
    ("flash_forward_sm90", "false, 256, 256, 80, 2, 40, 232, 0"): 120,
}


def find(program: str) -> str:
    """The path of a CUDA program."""
    beside = Path(os.environ.get("CUDACXX", "nvcc")).parent
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    folders = [os.environ.get("PATH", ""), str(beside), "/usr/local/cuda/bin", str(wheels)]
    found = shutil.which(program, path=os.pathsep.join(folders))
    if found is None:
        sys.exit(f"{program} is not here: see the extra cuda-inspect, or a CUDA toolkit")
    return found


@dataclass(frozen=True)
class Function:
    """One kernel's code for one architecture."""

    architecture: str
    name: str  # mangled
    kernel: str
    arguments: str  # of its tile
    instructions: list[str]


def parse(listing: str) -> list[Function]:
    """The fused kernels in what ``cuobjdump -sass`` prints."""
    functions = []
    for part in re.split(r"\n\s*code for (?=sm_)", listing)[1:]:
        architecture = part.split(None, 1)[0]
        for text in re.split(r"\n\s*Function : ", part)[1:]:
            mangled = text.split("\n", 1)[0].strip()
            kernel = next((name for name in RULES if f"{len(name)}{name}I" in mangled), None)
            if kernel is None:
                continue
            # Template arguments: Lb0E is false, Li64E is 64.
            numbers = re.findall(r"L([bi])(\d+)E", mangled)
            arguments = ", ".join(
                ("true" if n == "1" else "false") if kind == "b" else n for kind, n in numbers
            )
            kind = "bf16" if "BF16" in mangled else "f16"
            instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", text)
            functions.append(Function(f"{architecture} {kind}", mangled, kernel, arguments, instructions))
    return functions


def faults(function: Function) -> list[str]:
    """What is wrong with a kernel's code."""
    rule = RULES[function.kernel]
    code = function.instructions
    at = [n for n, text in enumerate(code) if rule.product in text]
    missing = [name for name in (rule.product, *rule.others) if not any(name in text for text in code)]
    if missing:
        return [f"no {', no '.join(missing)}"]
    wrong = []
    local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in code[at[0] : at[-1]])
    spare = ELEMENTWISE_LOCAL if "false" in function.arguments else 0
    allowed = KNOWN_LOCAL.get((function.kernel, function.arguments), spare)
    if local > allowed:
        wrong.append(f"{local} accesses to local memory in the main loop, {allowed} are known")
    if rule.groups is not None:
        groups = sum(rule.product in text and "gsb0" in text for text in code)
        if groups > rule.groups:
            wrong.append(f"products are serialised: {groups} groups of them, not {rule.groups}")
    return wrong


def registers(usage: str) -> dict[str, int]:
    """Registers of a thread by mangled name, of what ``cuobjdump -res-usage`` prints."""
    return {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}


def faults_of_pool(function: Function, given: int) -> list[str]:
    """Whether the warp groups find the registers that they ask for; else they would wait for ever."""
    if function.kernel != "flash_forward_sm90":
        return []
    groups, loader, computing = (int(x) for x in function.arguments.split(", ")[4:7])
    wanted, pool = loader + groups * computing, given * (1 + groups)
    return [] if wanted <= pool else [f"warp groups want {wanted} registers, the launch has {pool}"]


def run(*command: str, cwd: str | None = None) -> str:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(find("nvdisasm")).parent), os.environ.get("PATH", "")])
    }
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def printed_of(path: str, architecture: str | None) -> list[str]:
    """What ``cuobjdump`` prints of an object file's code, or of what the assembler makes of its PTX."""
    cuobjdump, options = find("cuobjdump"), ("-sass", "-res-usage")
    if architecture is None:
        return [run(cuobjdump, option, path) for option in options]
    nvcc = find(os.environ.get("CUDACXX", "nvcc"))
    printed = [["", ""]]
    with tempfile.TemporaryDirectory() as folder:
        run(cuobjdump, "-xptx", "all", str(Path(path).resolve()), cwd=folder)
        for ptx in sorted(Path(folder).glob("*.ptx")):
            cubin = str(ptx.with_suffix(".cubin"))
            run(nvcc, "-cubin", f"-arch=sm_{architecture}", str(ptx), "-o", cubin)
            printed.append([run(cuobjdump, option, cubin) for option in options])
    return ["".join(parts) for parts in zip(*printed, strict=True)]


def main(paths: list[str], architectures: Sequence[str] = ()) -> int:
    """Prints a line for each kernel; 1 when one is wrong."""
    failed = False
    seen: set[str] = set()
    jobs = [(path, architecture) for architecture in (*architectures, None) for path in paths]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        printed = list(pool.map(lambda job: printed_of(*job), jobs))
    for listing, usage in printed:
        given = registers(usage)
        for function in parse(listing):
            seen.add(function.kernel)
            wrong = faults(function) + faults_of_pool(function, given.get(function.name, 0))
            failed = failed or bool(wrong)
            print(
                f"{function.architecture:12} {function.kernel:20} {function.arguments:40} "
                f"{len(function.instructions):6} instructions  {'; '.join(wrong) or 'ok'}"
            )
    for kernel in RULES.keys() - seen:
        failed = True
        print(f"{kernel}: no code of it in {', '.join(paths)}")
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="file")
    parser.add_argument("--assemble", default="", metavar="80,90")
    given = parser.parse_args()
    sys.exit(main(given.paths, [x for x in given.assemble.split(",") if x]))
