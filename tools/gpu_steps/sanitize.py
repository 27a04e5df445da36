"""The step that looks for wrong accesses to memory and for races."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from gpu_steps.commands import ROOT, TAIL, Context, Done, Step, find_tool

SMALL_PROBLEMS = ("odd sizes, mask", "bias, alibi, negative scale", "dropout", "decode with lengths")


def sanitize(context: Context) -> Step:
    """compute-sanitizer on a short run: memory errors, races, reads of what nobody wrote, barriers."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return Step("skipped", "compute-sanitizer was not found")
    (help_text,) = context.run([tool, "--help"])
    runs, commands, failures = [], [], []
    wanted = sanitizer_runs(context.quick)
    for number, (name, arrays, options) in enumerate(wanted):
        argv = sanitizer_command(tool, name, arrays, options, help_text.output)
        # So that one slow run leaves time for the others.
        share = min(1.0, 2.0 / (len(wanted) - number))
        (done,) = context.run(argv, share=share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = parse_sanitizer(name, done)
        commands.append(done)
        runs.append({"tool": name, "arrays": arrays, **verdict})
        if verdict["verdict"] == "failed":
            failures.append(
                {"where": f"{name}, {arrays} arrays", "text": verdict["reports"] or done.output[-TAIL:]}
            )
    counts = {x: sum(run["verdict"] == x for run in runs) for x in ("passed", "failed", "partial", "skipped")}
    text = ", ".join(f"{run['tool']} ({run['arrays']}): {run['verdict']}" for run in runs)
    status = next((x for x in ("failed", "partial", "passed") if counts[x]), "skipped")
    return Step(status, text, commands, {"runs": runs}, failures)


def sanitizer_runs(quick: bool) -> list[tuple[str, str, list[str]]]:
    """Tool, arrays, and the options of gpu_short_run.py. Races are looked for at a hundredth of the speed."""
    tiny = ["--problems", *SMALL_PROBLEMS, "--dtypes", "float32", "float16"]
    runs = [
        ("memcheck", "numpy", tiny if quick else []),
        ("racecheck", "numpy", tiny),
        ("initcheck", "numpy", tiny),
    ]
    return runs if quick else [*runs, ("memcheck", "torch", tiny), ("synccheck", "numpy", tiny)]


def sanitizer_command(tool: str, name: str, arrays: str, options: Sequence[str], help_text: str) -> list[str]:
    command = [tool, "--tool", name, "--print-limit", "20"]
    # Our memory is of a pool, in the order of a stream; older versions cannot follow that.
    if name == "memcheck" and "--track-stream-ordered-races" in help_text:
        command += ["--track-stream-ordered-races", "all"]
    script = str(ROOT / "tools/gpu_short_run.py")
    return [*command, sys.executable, script, "--arrays", arrays, *options]


def parse_sanitizer(name: str, done: Done) -> dict[str, Any]:
    """Its summary line, the reports, and how many of these name fastattn; without a summary it has failed."""
    text = done.output
    found = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", text, re.MULTILINE)
    blocks = sanitizer_blocks(text)
    ours = [block for block in blocks if "fastattn" in block]
    record: dict[str, Any] = {
        "errors": int(found[1]) if found else None,
        "ours": len(ours),
        "reports": "\n\n".join([*ours, *(block for block in blocks if block not in ours)])[:TAIL],
        "seconds": round(done.seconds, 2),
    }
    if done.rc == 3:
        return {
            **record,
            "verdict": "skipped",
            "reason": text.strip().splitlines()[-1] if text.strip() else "",
        }
    if found and int(found[1]):
        return {
            **record,
            "verdict": "failed",
            "reason": f"{found[1]} errors, {len(ours)} reports name fastattn",
        }
    if done.timed_out:
        return {**record, "verdict": "failed" if blocks else "partial", "reason": "cut short"}
    if not found:
        return {**record, "verdict": "failed", "reason": f"{name} wrote no summary, and ended with {done.rc}"}
    if done.rc != 0:
        return {**record, "verdict": "failed", "reason": f"no errors, but the program ended with {done.rc}"}
    return {**record, "verdict": "passed", "reason": ""}


def sanitizer_blocks(text: str) -> list[str]:
    """Its reports: runs of marked lines, separated by an empty one; without its own first and last lines."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        marked = re.match(r"=========(?: (.*))?$", line)
        if not marked:
            continue
        content = (marked[1] or "").rstrip()
        if not content:
            blocks.append([])
        elif not re.match(r"COMPUTE-SANITIZER$|(ERROR|RACECHECK|LEAK) SUMMARY|.* not displayed", content):
            blocks[-1].append(content)
    return ["\n".join(block) for block in blocks if block]
