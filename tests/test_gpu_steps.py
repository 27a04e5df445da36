"""The steps of tools/gpu_check.py, without a GPU: what they run, parse and say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_steps import bench, build, sanitize, tests
from gpu_steps.commands import Context, run_all
from gpu_tools import done, fake_runs

import fastattn
from fastattn._check import problems

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def context(tmp_path: Path) -> Any:
    made = Context(tmp_path / "scratch", None, quick=False, budget=60.0, jobs=2)
    made.deadline = time.monotonic() + 60.0
    return made


def test_the_environment_of_a_step(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("FASTATTN_KERNEL", "cpu-scalar")
    found = context.environment()
    assert found["PYTHONPATH"] == f"{context.site}{os.pathsep}/somewhere"
    assert "FASTATTN_KERNEL" not in found
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert found["XDG_CACHE_HOME"].startswith(str(context.scratch))


# ---- build --------------------------------------------------------------------------------------------


def test_the_architecture_is_the_gpus() -> None:
    assert build.cuda_architecture("9.0") == "90"
    assert build.cuda_architecture(" 12.0\n") == "120"
    assert build.cuda_architecture("[N/A]") is None
    assert build.cuda_architecture(None) is None


def test_what_pip_is_told(context: Any, tmp_path: Path) -> None:
    command = build.install_command(context, "90")
    assert command[1:4] == ["-m", "pip", "install"]
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(command)
    assert "--config-settings=cmake.define.FASTATTN_CUDA=ON" in command
    assert "--config-settings=cmake.define.FASTATTN_CUDA_ARCHITECTURES=90" in command
    assert command[-1] == str(ROOT)
    assert command[command.index("--target") + 1] == str(context.site)
    assert not any("ARCHITECTURES" in part for part in build.install_command(context, None))
    context.wheel = str(tmp_path / "x.whl")
    command = build.install_command(context, "90")
    assert command[-1] == context.wheel
    assert not any("config-settings" in part for part in command)


def facts(site: Path, usable: bool = True) -> dict[str, Any]:
    kernel = {
        "name": "cuda-cublas",
        "device": "cuda",
        "usable": usable,
        "reason": "" if usable else "no driver",
    }
    return {"path": str(site / "fastattn/__init__.py"), "kernels": [kernel]}


def test_the_build_must_have_a_usable_kernel_and_be_the_one_that_is_imported(tmp_path: Path) -> None:
    assert build.cuda_kernels(facts(tmp_path), tmp_path) == (["cuda-cublas"], "")
    assert build.cuda_kernels(facts(tmp_path, usable=False), tmp_path) == ([], "cuda-cublas: no driver")
    none = {**facts(tmp_path), "kernels": []}
    assert build.cuda_kernels(none, tmp_path) == ([], "this build has no CUDA kernel")
    usable, problem = build.cuda_kernels(facts(Path("/usr/lib")), tmp_path)
    assert usable == []
    assert "another fastattn" in problem


def test_a_build(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "smi", lambda what: "9.0")
    context.site.mkdir(parents=True)
    (context.site / "old").write_text("")
    asked = fake_runs(monkeypatch, done("built"), done(f"noise\n{json.dumps(facts(context.site))}\n"))
    step = build.build(context)
    assert (step.status, step.summary) == ("passed", "usable: cuda-cublas")
    assert step.results["architecture"] == "90"
    assert not context.site.exists()
    assert len(asked) == len(step.commands) == 2
    fake_runs(monkeypatch, done("built"), done(json.dumps(facts(context.site, usable=False))))
    step = build.build(context)
    assert (step.status, step.summary) == ("failed", "cuda-cublas: no driver")
    fake_runs(monkeypatch, done("error: nvcc", rc=1))
    step = build.build(context)
    assert (step.status, step.failures[0]["text"]) == ("failed", "error: nvcc")
    fake_runs(monkeypatch, done("half", rc=None, timed_out=True))
    assert build.build(context).status == "partial"
    fake_runs(monkeypatch, done("built"), done("ImportError: libcudart", rc=1))
    assert build.build(context).summary == "it cannot be imported"


def test_the_question_for_the_kernels_is_answered() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", build.FACTS], capture_output=True, text=True, timeout=120, check=True
    )
    found = build.json_line(f"{{not json\n{ended.stdout}\nlast")
    assert [kernel["name"] for kernel in found["kernels"]] == [k.name for k in fastattn.kernels()]
    assert found["version"] == fastattn.__version__
    assert build.json_line("nothing\n{broken") is None


# ---- test ---------------------------------------------------------------------------------------------

TESTS = """
import time
import pytest

@pytest.mark.parametrize("kernel", ["cuda-cublas", "cpu-scalar"])
def test_good(kernel):
    pass

def test_bad_cuda_():
    assert 1 == 2, "no"

@pytest.mark.skip(reason="not here")
def test_cuda_skipped():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("setup")

def test_cuda_error(broken):
    pass
"""
SLOW = "\n\ndef test_cuda_slow():\n    time.sleep(100)\n"


def run_pytest(folder: Path, text: str, seconds: float) -> tuple[Any, Path]:
    project = {"tool": {"pytest": {"ini_options": {"addopts": ["-ra", "--strict-config"], "timeout": 300}}}}
    ini, xml, file = folder / "pytest.ini", folder / "out.xml", folder / "test_cuda_sample.py"
    ini.write_text(tests.pytest_ini(project, has_timeout=False))
    file.write_text(text)
    command = tests.pytest_command(ini, xml, [file])
    command[command.index("--rootdir") + 1] = str(folder)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # as where pytest-timeout is missing
    (ended,) = run_all([command], time.monotonic() + seconds, environment, folder / "logs")
    return ended, xml


def test_pytest_runs_and_its_report_is_read(tmp_path: Path) -> None:
    ended, xml = run_pytest(tmp_path, TESTS, 60.0)
    assert ended.rc == 1, ended.output
    counts, failures = tests.parse_junit(xml.read_text())
    # The file is one about CUDA, so all of its tests are chosen.
    assert [counts[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    assert counts["skip_reasons"] == {"not here": 1}
    assert [failure["where"] for failure in failures] == [
        *("test_cuda_sample::test_bad_cuda_", "test_cuda_sample::test_cuda_error")
    ]
    assert "assert 1 == 2" in failures[0]["text"]
    assert tests.judge_tests(counts, failures, False) == (
        *("failed", "2 passed, 1 failed, 1 errors, 1 skipped"),
    )
    assert len(counts["seconds_of_slowest"]) == 5
    # The same from the lines alone.
    lines, failed = tests.parse_verbose(ended.output)
    assert [lines[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    assert len(failed) == 2


def test_pytest_over_its_time_still_reports(tmp_path: Path) -> None:
    ended, xml = run_pytest(tmp_path, TESTS + SLOW, 8.0)
    assert ended.timed_out
    counts, failures = tests.read_tests(xml.read_text(), ended)
    assert [counts[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    texts = {failure["where"].rpartition("/")[2]: failure["text"] for failure in failures}
    assert "assert 1 == 2" in texts["test_cuda_sample::test_bad_cuda_"]
    assert texts["test_cuda_sample.py::test_cuda_slow"] == "was running when pytest ended"
    assert len(texts) == 3
    assert tests.read_tests("", ended)[0]["passed"] == 2
    status, summary = tests.judge_tests(counts, failures, True)
    assert (status, summary[-9:]) == ("failed", "cut short")
    assert tests.judge_tests({**counts, "failed": 0, "errors": 0}, [], True)[0] == "partial"


def test_reports_that_are_cut_off() -> None:
    assert tests.parse_junit("") is None
    assert tests.parse_junit("<testsuites><testsuite>") is None
    output = (
        "tests/test_a.py::test_one[cuda-cublas-float32] PASSED [  5%]\n"
        "tests/test_a.py::test_two FAILED [ 10%]\n"
        "tests/test_b.py::test_three[a b] SKIPPED (why) [ 15%]\n"
        "tests/test_b.py::test_four "
    )
    counts, failures = tests.parse_verbose(output)
    assert [counts[x] for x in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert failures[0] == {"where": "tests/test_a.py::test_two", "text": "see the output"}
    assert failures[1] == {"where": "tests/test_b.py::test_four", "text": "was running when pytest ended"}


def test_no_test_at_all_is_no_success() -> None:
    assert tests.judge_tests(tests.empty_counts(), [], False) == ("failed", "no tests: nothing ran")


def test_the_projects_settings_become_an_ini_file() -> None:
    text = tests.pytest_ini(tests.read_toml(ROOT / "pyproject.toml"), has_timeout=True)
    assert text.startswith("[pytest]\n")
    assert "timeout = 300" in text
    assert "\n\terror\n" in text or "= error\n" in text
    assert r"ignore:os\.fork\(\) was called:RuntimeWarning" in text
    assert "addopts = -ra --strict-markers --strict-config\n" in text
    without = tests.pytest_ini(tests.read_toml(ROOT / "pyproject.toml"), has_timeout=False)
    assert "timeout" not in without


def test_the_test_step_divides_the_files(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = done("Fatal Python error", rc=None)
    asked = fake_runs(monkeypatch, done("tests/test_a.py::test_one PASSED\n", rc=0), crash)
    step = tests.test(context)
    files = [part for command in asked for part in command if part.endswith(".py")]
    assert sorted(files) == sorted(map(str, ROOT.glob("tests/test_*.py")))
    assert step.status == "failed"
    assert step.results["passed"] == 1
    assert step.failures == [{"where": "pytest ended with None", "text": "Fatal Python error"}]


# ---- sanitize -----------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n30 problems, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void fastattn::cuda::softmax_kernel<float>(fastattn::cuda::SoftmaxArguments)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f1ff2c00400 is out of bounds
=========
========= Invalid __global__ read of size 2 bytes
=========     at gemm_kernel+0x10
=========
30 problems, 1 wrong
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fastattn::cuda::merge+0x10 and Read access at x
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("result", "verdict", "errors", "ours"),
    [
        (done(CLEAN), "passed", 0, 0),
        (
            done(
                CLEAN.replace(
                    "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 w)"
                )
            ),
            "passed",
            0,
            0,
        ),
        (done(INVALID, rc=1), "failed", 2, 1),
        (done(RACE), "failed", 1, 1),
        (done(CLEAN, rc=1), "failed", 0, 0),
        (done("Segmentation fault", rc=None), "failed", None, 0),
        (done("========= COMPUTE-SANITIZER\n", rc=None, timed_out=True), "partial", None, 0),
        (done(INVALID.rpartition("=========")[0], rc=None, timed_out=True), "failed", None, 1),
        (done(f"no CUDA kernel is usable here\n{CLEAN}", rc=3), "skipped", 0, 0),
    ],
)
def test_verdicts(result: Any, verdict: str, errors: int | None, ours: int) -> None:
    found = sanitize.parse_sanitizer("memcheck", result)
    assert (found["verdict"], found["errors"], found["ours"]) == (verdict, errors, ours)
    assert found["reason"] or verdict == "passed"


def test_our_reports_come_first() -> None:
    text = INVALID.replace("void fastattn::cuda::softmax_kernel", "x").replace("fastattn::cuda::", "")
    text = text.replace("gemm_kernel", "fastattn::gemm")
    assert sanitize.parse_sanitizer("memcheck", done(text, rc=1))["reports"].startswith(
        "Invalid __global__ read"
    )


def test_sanitizer_runs_and_their_commands(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "find_tool", lambda name: "/cuda/bin/compute-sanitizer")
    help_text = done("  --track-stream-ordered-races arg\n")
    results = [done(CLEAN), done(RACE), done(CLEAN), done("torch is missing", rc=3), done(CLEAN)]
    asked = fake_runs(monkeypatch, help_text, *results)
    step = sanitize.sanitize(context)
    assert step.status == "failed"
    assert "racecheck (numpy): failed" in step.summary
    assert "memcheck (torch): skipped" in step.summary
    assert [failure["where"] for failure in step.failures] == ["racecheck, numpy arrays"]
    assert "fastattn::cuda::merge" in step.failures[0]["text"]
    assert "--track-stream-ordered-races" in asked[1]
    assert "--track-stream-ordered-races" not in asked[2]
    assert asked[2][1:3] == ["--tool", "racecheck"]
    context.quick = True
    fake_runs(monkeypatch, done(), done(CLEAN), done(CLEAN), done(CLEAN))
    assert sanitize.sanitize(context).status == "passed"
    fake_runs(monkeypatch, done(), *[done(rc=3)] * 3)
    assert sanitize.sanitize(context).status == "skipped"
    monkeypatch.setattr(sanitize, "find_tool", lambda name: None)
    step = sanitize.sanitize(context)
    assert (step.status, step.summary) == ("skipped", "compute-sanitizer was not found")


def test_the_problems_for_the_sanitizer_exist() -> None:
    assert set(sanitize.SMALL_PROBLEMS) <= set(problems.PROBLEMS)


# ---- bench --------------------------------------------------------------------------------------------


def bench_document(**changes: Any) -> dict[str, Any]:
    case = {"name": "bert-f16", "errors": {}, "ratio_to_best_peer": 0.5}
    return {"cases": [case, {**case, "ratio_to_best_peer": 2.0}], "failed": {}, **changes}


def test_the_benchmarks_verdict() -> None:
    assert bench.judge_bench("bench", done(), bench_document()) == ("passed", [])
    wrong = bench_document()
    wrong["cases"][0]["errors"] = {"fastattn": "wrong result, off by 1"}
    state, failures = bench.judge_bench("bench", done(rc=1), wrong)
    assert state == "failed"
    assert failures == [{"where": "bench, bert-f16, fastattn", "text": "wrong result, off by 1"}]
    state, failures = bench.judge_bench("bench", done(rc=1), bench_document(failed={"x": "no memory"}))
    assert (state, failures) == ("failed", [{"where": "bench, x", "text": "no memory"}])
    cut = done("output", rc=None, timed_out=True)
    assert bench.judge_bench("bench", cut, bench_document()) == ("partial", [])
    state, failures = bench.judge_bench("bench", cut, None)
    assert (state, failures) == ("failed", [{"where": "bench", "text": "cut short: output"}])
    silent = bench.judge_bench("tune", done(rc=130), None)[1]
    assert silent == [{"where": "tune", "text": "ended with 130, without output"}]
    assert bench.judge_bench("bench", done("Traceback", rc=1), bench_document())[0] == "failed"
    assert bench.judge_bench("tune", done(), {"speeds": {"to_host": 1.0}}) == ("passed", [])


def test_the_bench_step_keeps_every_document(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(self: Any, command: list[str], share: float = 1.0, **extra: str) -> list[Any]:
        asked.append(command)
        tuned = command[3] == "tune"
        path = context.scratch / "cache/fastattn/tune.json" if tuned else Path(command[-1])
        path = Path(command[command.index("--json") + 1]) if not tuned else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"speeds": {}} if tuned else bench_document()))
        return [done(timed_out="--transfers" in command)]

    monkeypatch.setattr(Context, "run", run)
    context.quick = True
    step = bench.bench(context)
    assert step.status == "partial"
    assert set(step.results) == {"tune", "bench", "hopper", "fused", "decode", "transfers"}
    assert "bench passed, 2 cases, faster than every peer in 1 of 2" in step.summary
    assert "transfers partial" in step.summary
    assert asked[1][1:7] == ["-m", "fastattn", "bench", "--device", "cuda", "--quick"]
    assert "cuda-flash-sm90" in asked[2]
    assert "cuda-flash-sm80" in asked[3]
    assert asked[4][asked[4].index("--kernel") + 1 :][:3] == ["cuda-decode", "--cases", "decode-*-bf16"]
    assert "--transfers" in asked[5]
    # Files of an earlier run do not count.
    monkeypatch.setattr(Context, "run", lambda *a, **kw: [done("gone", rc=2)])
    step = bench.bench(context)
    assert step.status == "failed"
    assert set(step.results.values()) == {None}
