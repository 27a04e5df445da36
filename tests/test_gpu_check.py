"""tools/gpu_check.py, without a GPU: what it merges, says and writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_steps.commands import Step
from gpu_tools import done

# ---- the document -------------------------------------------------------------------------------------


def record(status: str = "passed", commit: str = "a", gpu: str = "H200", failures: int = 0) -> dict[str, Any]:
    step = Step(status, f"{status}, with words", [done("text")])
    step.failures = [{"where": f"test {i}", "text": "line one\nline two"} for i in range(failures)]
    made: dict[str, Any] = {**step.record(), "when": "now", "seconds": 1.5}
    return {**made, "commit": commit, "gpu": {"name": gpu}}


def document(**steps: Any) -> dict[str, Any]:
    found = {
        "schema": 1,
        "commit": "a",
        "when": "now",
        "machine": {},
        "gpu": {"name": "H200"},
        "versions": {},
    }
    return {**found, "conflicts": [], "steps": steps}


def test_parts_merge_in_the_order_of_the_steps() -> None:
    old = document(test=record("failed"), bench=record())
    merged = gpu_check.merge(old, document(build=record(), test=record("passed")))
    assert list(merged["steps"]) == ["build", "test", "bench"]
    assert merged["steps"]["test"]["status"] == "passed"
    assert merged["conflicts"] == []
    again = gpu_check.merge(merged, document(sanitize=record(commit="b", gpu="H100")))
    assert list(again["steps"]) == ["build", "test", "sanitize", "bench"]
    assert len(again["conflicts"]) == 2
    assert again["conflicts"][0] == "commit: build a, test a, sanitize b, bench a"
    with pytest.raises(ValueError, match="expected schema 1, got 7"):
        gpu_check.merge({"schema": 7}, document())


def test_the_table_names_steps_failures_and_conflicts() -> None:
    text = gpu_check.table(
        {**document(build=record(), test=record("failed", failures=12)), "conflicts": ["c"]}
    )
    lines = text.splitlines()
    assert lines[0].startswith("commit a, H200")
    assert lines[1].split() == ["build", "passed", "1.5", "s", "passed,", "with", "words"]
    assert sum("line one" in line for line in lines) == 10
    assert lines[-1] == "CONFLICT c"


def test_the_machine_is_described_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_check.describe("abc")
    assert found["commit"] == "abc"
    assert found["machine"]["cpus"] >= 1
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    answers = {
        "name": "NVIDIA H200",
        "driver_version": "580.1",
        "compute_cap": "9.0",
        "memory.total": "1 MiB",
    }
    monkeypatch.setattr(gpu_check, "smi", lambda what: answers[what])
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: name)
    monkeypatch.setattr(gpu_check, "output_of", lambda command: "Cuda tools, release 13.0, V13.0.88\n")
    assert gpu_check.describe("abc")["gpu"] == {
        "name": "NVIDIA H200",
        "driver": "580.1",
        "compute_capability": "9.0",
        "memory": "1 MiB",
        "cuda": "13.0.88",
    }
    assert gpu_check.nvcc_release("nothing") is None


# ---- the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "build,dance"], "'dance'"),
        (["--time-budget", "0"], "--time-budget"),
        (["--jobs", "0"], "--jobs"),
        (["--wheel", "/no/such.whl"], "no such file"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(options)
    assert message in capsys.readouterr().err


def test_each_step_is_written_and_a_failed_one_does_not_keep_the_next_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    def bad(context: Any) -> Any:
        raise RuntimeError("surprise")

    def good(context: Any) -> Any:
        assert json.loads(out.read_text())["steps"]["build"]["status"] == "failed"
        assert context.deadline > time.monotonic()
        return Step("passed", "fine")

    monkeypatch.setitem(gpu_check.STEPS, "build", bad)
    monkeypatch.setitem(gpu_check.STEPS, "test", good)
    common = ["--scratch", str(tmp_path / "scratch"), "--commit", "abc"]
    assert gpu_check.main([*common, "--steps", "build,test", "--out", str(out)]) == 1
    assert "RuntimeError: surprise" in capsys.readouterr().out
    # The next part goes into the same file.
    monkeypatch.setitem(gpu_check.STEPS, "build", lambda context: Step("passed", "now"))
    assert gpu_check.main([*common, "--steps", "build", "--merge", str(out)]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"build": "passed", "test": "passed"}
    monkeypatch.setitem(gpu_check.STEPS, "bench", lambda context: Step("skipped", "no tool"))
    assert gpu_check.main([*common, "--steps", "bench", "--merge", str(out)]) == 0
    monkeypatch.setitem(gpu_check.STEPS, "bench", lambda context: Step("partial", "cut short"))
    assert gpu_check.main([*common, "--steps", "bench", "--merge", str(out)]) == 1
