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
import configparser
import contextlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
TAIL = 4000  # characters of a command's output, and of a failure
MOST_FAILURES = 200
POLL_SECONDS = 0.05
GRACE_SECONDS = 25.0  # before the end a command is interrupted, so that it can write what it has
PACKAGES = (
    *("numpy", "torch", "jax", "cupy", "cupy-cuda13x", "ml_dtypes", "pytest", "pytest-timeout", "hypothesis"),
    *("scikit-build-core", "pybind11", "cmake", "ninja", "nvidia-cublas", "cuda-pathfinder"),
)
SELECTED_TESTS = "cuda- or test_cuda_"  # ids have the kernel's name; and the files about CUDA
FUSED = {  # kernel, cases
    "hopper": ("cuda-flash-sm90", "*-bf16"),
    "fused": ("cuda-flash-sm80", "*-bf16"),
    "decode": ("cuda-decode", "decode-*-bf16"),
}
SMALL_PROBLEMS = ("odd sizes, mask", "bias, alibi, negative scale", "dropout", "decode with lengths")
FACTS = """
import json, fastattn
from fastattn import _core
print(json.dumps({"kernels": [k._asdict() for k in fastattn.kernels()], "build_info": _core.build_info(),
                  "path": fastattn.__file__, "version": fastattn.__version__}))
"""


# ---- commands -----------------------------------------------------------------------------------------
@dataclass
class Done:
    """A command that ran."""

    argv: list[str]
    seconds: float
    rc: int | None  # None: killed
    timed_out: bool
    output: str

    def record(self) -> dict[str, Any]:
        return {
            "argv": self.argv,
            "seconds": round(self.seconds, 2),
            "rc": self.rc,
            "timed_out": self.timed_out,
            "tail": self.output[-TAIL:],
        }


@dataclass
class Step:
    """What a step found."""

    status: str
    summary: str
    commands: list[Done] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        kept = self.failures[:MOST_FAILURES]
        if len(self.failures) > MOST_FAILURES:
            kept.append({"where": "", "text": f"{len(self.failures) - MOST_FAILURES} more"})
        return {
            "status": self.status,
            "summary": self.summary,
            "commands": [done.record() for done in self.commands],
            "failures": [{"where": x["where"], "text": x["text"][:TAIL]} for x in kept],
            "results": self.results,
        }


@dataclass
class Context:
    """Where and how the steps run."""

    scratch: Path
    wheel: str | None
    quick: bool
    budget: float
    jobs: int
    deadline: float = 0.0

    @property
    def site(self) -> Path:
        return self.scratch / "site"

    def environment(self) -> dict[str, str]:
        """The installed package first; no settings of fastattn, and JAX must leave memory to others."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
        paths = [str(self.site), *filter(None, [clean.get("PYTHONPATH")])]
        return clean | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(self.scratch / "cache"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }

    def run(self, *commands: Sequence[str], share: float = 1.0, **extra: str) -> list[Done]:
        """The commands at once, until `share` of what is left of the step's time has passed."""
        now = time.monotonic()
        end = now + share * max(0.0, self.deadline - now)
        return run_all(commands, end, self.environment() | extra, self.scratch)


def run_all(
    commands: Sequence[Sequence[str]], end: float, environment: dict[str, str], folder: Path
) -> list[Done]:
    """Runs commands beside each other; interrupts, then kills, those that are not over in time."""
    folder.mkdir(parents=True, exist_ok=True)
    running = [
        Running(list(argv), folder / f"output-{i}.log", environment) for i, argv in enumerate(commands)
    ]
    grace = min(GRACE_SECONDS, 0.2 * max(0.0, end - time.monotonic()))
    for until, number in ((end - grace, signal.SIGINT), (end, signal.SIGKILL)):
        while sum(each.goes_on() for each in running) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        for each in running:
            each.stop(number)
    return [each.done() for each in running]


class Running:
    """A command that was started, in a process group of its own; its output goes to a file."""

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str]) -> None:
        self.argv, self.log = argv, log
        self.start = time.monotonic()
        self.seconds: float | None = None
        self.timed_out = False
        self.process: subprocess.Popen[bytes] | None = None
        with log.open("wb") as file:
            try:
                self.process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                    # A shell's background job ignores SIGINT; a child would inherit that.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                )
            except OSError as error:
                file.write(str(error).encode())
                self.seconds = 0.0

    def goes_on(self) -> bool:
        if self.seconds is None and self.process is not None and self.process.poll() is not None:
            self.seconds = time.monotonic() - self.start
        return self.seconds is None

    def stop(self, number: int) -> None:
        """Sends the signal to all that it started, if it goes on, or went on when the time was over."""
        self.timed_out = self.timed_out or self.goes_on()
        if self.timed_out and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def done(self) -> Done:
        rc = 127 if self.process is None else self.process.wait()
        self.goes_on()
        output = self.log.read_text(errors="replace")
        return Done(self.argv, self.seconds or 0.0, rc if rc >= 0 else None, self.timed_out, output)


# ---- build --------------------------------------------------------------------------------------------
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


# ---- test ---------------------------------------------------------------------------------------------
def test(context: Context) -> Step:
    """pytest of the CUDA kernels, its files divided among a few processes."""
    if util.find_spec("pytest") is None:
        return Step("skipped", "pytest is not installed")
    ini = context.scratch / "pytest.ini"
    ini.parent.mkdir(parents=True, exist_ok=True)
    ini.write_text(
        pytest_ini(read_toml(ROOT / "pyproject.toml"), util.find_spec("pytest_timeout") is not None)
    )
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: -path.stat().st_size)
    parts = [files[i :: context.jobs] for i in range(context.jobs)]
    reports = [context.scratch / f"tests-{i}.xml" for i in range(context.jobs)]
    for report in reports:
        report.unlink(missing_ok=True)
    commands = [pytest_command(ini, xml, part) for xml, part in zip(reports, parts, strict=True) if part]
    done = context.run(*commands)
    counts = empty_counts()
    failures: list[dict[str, str]] = []
    for each, xml in zip(done, reports, strict=False):
        found, failed = read_tests(xml.read_text(errors="replace") if xml.exists() else "", each)
        add_counts(counts, found)
        failures += failed
        # 1: tests failed; 2: interrupted; 5: none selected.
        if each.rc not in (0, 1, 5) and not each.timed_out:
            failures.append({"where": f"pytest ended with {each.rc}", "text": each.output[-TAIL:]})
    return Step(*judge_tests(counts, failures, any(each.timed_out for each in done)), done, counts, failures)


def pytest_command(ini: Path, xml: Path, files: Sequence[Path]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-k", SELECTED_TESTS]
    command += ["-p", "no:cacheprovider", "-v", "--tb=short", f"--junitxml={xml}"]
    return [*command, *map(str, files)]


def pytest_ini(pyproject: dict[str, Any], has_timeout: bool) -> str:
    """The project's own settings, without those of a plugin that is not here: that would be an error."""
    options = dict(pyproject["tool"]["pytest"]["ini_options"])
    if not has_timeout:
        options.pop("timeout", None)
    ini = configparser.RawConfigParser()
    ini["pytest"] = {
        name: _ini_value(value, " " if name == "addopts" else "\n")
        for name, value in options.items()
        if name not in ("testpaths", "minversion")
    }
    text = io.StringIO()
    ini.write(text)
    return text.getvalue()


def _ini_value(value: Any, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list) else str(value)


def read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    return tomllib.loads(path.read_text())


def empty_counts() -> dict[str, Any]:
    return {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "skip_reasons": {}, "seconds_of_slowest": {}}


def add_counts(total: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name == "skip_reasons":
            for reason, count in value.items():
                total[name][reason] = total[name].get(reason, 0) + count
        elif name == "seconds_of_slowest":
            both = {**total[name], **value}
            total[name] = dict(sorted(both.items(), key=lambda item: -item[1])[:10])
        else:
            total[name] += value


def parse_junit(text: str) -> tuple[dict[str, Any], list[dict[str, str]]] | None:
    """Counts and failures of pytest's XML; None where it is missing or cut off."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    counts, failures = empty_counts(), []
    for case in root.iter("testcase"):
        where = f"{case.get('classname', '')}::{case.get('name', '')}"
        add_counts(counts, {"seconds_of_slowest": {where: float(case.get("time") or 0.0)}})
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed" if child.tag == "failure" else "errors"
                failures.append(
                    {"where": where, "text": f"{child.get('message') or ''}\n{child.text or ''}".strip()}
                )
            elif child.tag == "skipped":
                outcome = "skipped"
                add_counts(counts, {"skip_reasons": {child.get("message") or "": 1}})
        counts[outcome] += 1
    return counts, failures


OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
VERBOSE = re.compile(rf"^(?P<where>\S+\.py::.+?) (?P<outcome>{'|'.join(OUTCOMES)})\b", re.MULTILINE)
SEE_OUTPUT = "see the output"


def parse_verbose(output: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The same from the lines of `pytest -v`, of a run that was killed, with the test that was running."""
    counts, failures = empty_counts(), []
    lines = output.partition("short test summary info")[0]
    for match in VERBOSE.finditer(lines):
        counts[OUTCOMES[match["outcome"]]] += 1
        if match["outcome"] in ("FAILED", "ERROR"):
            failures.append({"where": match["where"], "text": SEE_OUTPUT})
    for line in lines.splitlines():
        if re.match(r"\S+\.py::", line) and not VERBOSE.match(line):
            failures.append({"where": line.strip(), "text": "was running when pytest ended"})
    return counts, failures


def read_tests(xml: str, done: Done) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Of one process. The XML of one that was interrupted has the test that was running as passed."""
    report, lines = parse_junit(xml), parse_verbose(done.output)
    if report is None:
        return lines
    if not done.timed_out:
        return report
    return {**report[0], **{name: lines[0][name] for name in OUTCOMES.values()}}, [
        *report[1],
        *(failure for failure in lines[1] if failure["text"] != SEE_OUTPUT),
    ]


def judge_tests(counts: dict[str, Any], failures: Sequence[Any], timed_out: bool) -> tuple[str, str]:
    """Status and summary."""
    names = ("passed", "failed", "errors", "skipped")
    text = ", ".join(f"{counts[name]} {name}" for name in names if counts[name]) or "no tests"
    if counts["failed"] or counts["errors"] or (failures and not timed_out):
        return "failed", text + (", cut short" if timed_out else "")
    if timed_out:
        return "partial", f"{text}, cut short"
    return ("passed", text) if counts["passed"] else ("failed", f"{text}: nothing ran")


# ---- sanitize -----------------------------------------------------------------------------------------
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


def find_tool(name: str) -> str | None:
    """In PATH, or where CUDA is installed."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [shutil.which(name), *(shutil.which(name, path=f"{folder}/bin") for folder in folders if folder)]
    return next((path for path in paths if path), None)


# ---- bench --------------------------------------------------------------------------------------------
def bench(context: Context) -> Step:
    """tune, the benchmark beside torch, the same of each fused kernel by its name, the one with transfers."""
    # Shares of the time that is left.
    names = {"tune": 0.15, "bench": 0.5, "hopper": 0.4, "fused": 0.4, "decode": 0.4, "transfers": 1.0}
    commands, failures = [], []
    results: dict[str, Any] = {}
    states = []
    for name, share in names.items():
        path = context.scratch / f"{name}.json"
        path.unlink(missing_ok=True)
        if name == "tune":
            path = context.scratch / "cache" / "fastattn" / "tune.json"
            path.unlink(missing_ok=True)
        (done,) = context.run(bench_command(name, path, context.quick), share=share)
        commands.append(done)
        results[name] = read_json(path)
        state, failed = judge_bench(name, done, results[name])
        states.append((name, state))
        failures += failed
    status = next((x for x in ("failed", "partial") if x in (state for _, state in states)), "passed")
    return Step(status, bench_summary(states, results), commands, results, failures)


def bench_command(name: str, path: Path, quick: bool) -> list[str]:
    module = [sys.executable, "-m", "fastattn"]
    if name == "tune":
        return [*module, "tune"]
    command = [*module, "bench", "--device", "cuda"]
    if name in FUSED:
        kernel, cases = FUSED[name]
        peers = ["--peers", "torch-flash,torch-cudnn"]
        options = ["--kernel", kernel, "--cases", cases, *peers, "--rounds", "5"]
    else:
        options = ["--quick"] * quick + ["--transfers"] * (name == "transfers")
    return [*command, *options, "--json", str(path)]


def judge_bench(name: str, done: Done, document: Any) -> tuple[str, list[dict[str, str]]]:
    """passed, partial or failed, and the wrong results and failures of the document."""
    failures = []
    for case in (document or {}).get("cases", []):
        failures += [
            {"where": f"{name}, {case['name']}, {who}", "text": why} for who, why in case["errors"].items()
        ]
    for case_name, why in (document or {}).get("failed", {}).items():
        failures.append({"where": f"{name}, {case_name}", "text": why})
    if document is None or (done.rc != 0 and not done.timed_out and not failures):
        text = done.output[-TAIL:].strip() or f"ended with {done.rc}, without output"
        failures.append({"where": name, "text": "cut short: " * done.timed_out + text})
    if done.timed_out:
        return ("partial" if document is not None else "failed"), failures
    return ("failed" if failures else "passed"), failures


def bench_summary(states: Sequence[tuple[str, str]], results: dict[str, Any]) -> str:
    parts = []
    for name, state in states:
        cases = (results[name] or {}).get("cases")
        ratios = [
            case["ratio_to_best_peer"] for case in cases or [] if case["ratio_to_best_peer"] is not None
        ]
        won = f", faster than every peer in {sum(x > 1 for x in ratios)} of {len(ratios)}" if ratios else ""
        parts.append(f"{name} {state}" + (f", {len(cases)} cases{won}" if cases is not None else ""))
    return "; ".join(parts)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ---- the document -------------------------------------------------------------------------------------
STEPS: dict[str, Callable[[Context], Step]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
}


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


def smi(what: str) -> str | None:
    """A property of the first GPU."""
    lines = output_of(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


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


def output_of(command: Sequence[str]) -> str:
    """Its stdout; nothing where it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


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
