"""tools/gpu_steps/commands.py: commands end in time, what a step found is cut, tools are found."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from gpu_steps.commands import MOST_FAILURES, TAIL, Step, find_tool, run_all, smi
from gpu_tools import done


def test_commands_run_beside_each_other_and_say_how_they_ended(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD'], 'out'); print('err', file=sys.stderr); sys.exit(3)"
    commands = [[sys.executable, "-c", code], ["/no/such/program"], [sys.executable, "-c", "print(2)"]]
    environment = {**os.environ, "WORD": "given"}
    first, missing, last = run_all(commands, time.monotonic() + 60, environment, tmp_path / "new")
    assert (first.rc, first.timed_out) == (3, False)
    assert "given out" in first.output
    assert "err" in first.output
    assert missing.rc == 127
    assert "/no/such/program" in missing.output
    assert last.output.strip() == "2"
    assert first.record()["argv"] == commands[0]


def test_a_command_over_its_time_is_interrupted_first(tmp_path: Path) -> None:
    code = """
import sys, time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(2)
"""
    (ended,) = run_all([[sys.executable, "-c", code]], time.monotonic() + 4.0, dict(os.environ), tmp_path)
    assert ended.timed_out
    assert ended.rc == 2
    assert ended.output.split() == ["started", "interrupted"]


def test_each_of_several_commands_has_time_after_the_interrupt(tmp_path: Path) -> None:
    code = """
import time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("wrote", flush=True)
"""
    quick = [sys.executable, "-c", "pass"]
    commands = [[sys.executable, "-c", code], quick, [sys.executable, "-c", code]]
    ended = run_all(commands, time.monotonic() + 5.0, dict(os.environ), tmp_path)
    assert [each.timed_out for each in ended] == [True, False, True]
    assert [each.output.split() for each in ended] == [["started", "wrote"], [], ["started", "wrote"]]
    assert ended[1].seconds < ended[0].seconds


def test_a_command_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    (ended,) = run_all([[sys.executable, "-c", code]], time.monotonic() + 3.0, dict(os.environ), tmp_path)
    assert ended.timed_out
    assert ended.rc is None
    pid = int(ended.output)
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a killed command still runs")


def test_long_lists_and_texts_are_cut() -> None:
    step = Step("failed", "", [done("x" * 9999)])
    step.failures = [{"where": "a", "text": "y" * 9999}] * 500
    found = step.record()
    assert len(found["failures"]) == MOST_FAILURES + 1
    assert found["failures"][-1]["text"] == "300 more"
    assert len(found["failures"][0]["text"]) == len(found["commands"][0]["tail"]) == TAIL


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_steps.commands.output_of", lambda command: "NVIDIA H200\nNVIDIA H200\n")
    assert smi("name") == "NVIDIA H200"
    monkeypatch.setattr("gpu_steps.commands.output_of", lambda command: "")
    assert smi("name") is None


def test_tools_are_found_where_cuda_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("compute-sanitizer-of-a-test") is None
    program = tmp_path / "bin" / "compute-sanitizer-of-a-test"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_tool("compute-sanitizer-of-a-test") == str(program)
