"""What the steps share: commands that end in time, what a step found, and programs of CUDA."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of a command's output, and of a failure
MOST_FAILURES = 200
POLL_SECONDS = 0.05
GRACE_SECONDS = 25.0  # before the end a command is interrupted, so that it can write what it has


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


def output_of(command: Sequence[str]) -> str:
    """Its stdout; nothing where it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def smi(what: str) -> str | None:
    """A property of the first GPU."""
    lines = output_of(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


def find_tool(name: str) -> str | None:
    """In PATH, or where CUDA is installed."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [shutil.which(name), *(shutil.which(name, path=f"{folder}/bin") for folder in folders if folder)]
    return next((path for path in paths if path), None)
