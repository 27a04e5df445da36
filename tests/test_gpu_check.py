"""tools/gpu_check.py and tools/gpu_short_run.py, without a GPU: what they run, parse, merge and say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn._cli import gate, problems

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check = load("gpu_check")
gpu_short_run = load("gpu_short_run")


@pytest.fixture
def context(tmp_path: Path) -> Any:
    made = gpu_check.Context(tmp_path / "scratch", None, quick=False, budget=60.0, jobs=2)
    made.deadline = time.monotonic() + 60.0
    return made


def done(output: str = "", rc: int | None = 0, timed_out: bool = False) -> Any:
    return gpu_check.Done(["x"], 1.0, rc, timed_out, output)


# ---- commands -----------------------------------------------------------------------------------------


def test_commands_run_beside_each_other_and_say_how_they_ended(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD'], 'out'); print('err', file=sys.stderr); sys.exit(3)"
    commands = [[sys.executable, "-c", code], ["/no/such/program"], [sys.executable, "-c", "print(2)"]]
    environment = {**os.environ, "WORD": "given"}
    first, missing, last = gpu_check.run_all(commands, time.monotonic() + 60, environment, tmp_path / "new")
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
    (ended,) = gpu_check.run_all(
        [[sys.executable, "-c", code]], time.monotonic() + 4.0, dict(os.environ), tmp_path
    )
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
    ended = gpu_check.run_all(commands, time.monotonic() + 5.0, dict(os.environ), tmp_path)
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
    (ended,) = gpu_check.run_all(
        [[sys.executable, "-c", code]], time.monotonic() + 3.0, dict(os.environ), tmp_path
    )
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
    assert gpu_check.cuda_architecture("9.0") == "90"
    assert gpu_check.cuda_architecture(" 12.0\n") == "120"
    assert gpu_check.cuda_architecture("[N/A]") is None
    assert gpu_check.cuda_architecture(None) is None


def test_what_pip_is_told(context: Any, tmp_path: Path) -> None:
    command = gpu_check.install_command(context, "90")
    assert command[1:4] == ["-m", "pip", "install"]
    assert {"--no-build-isolation", "--no-deps", "--no-index"} <= set(command)
    assert "--config-settings=cmake.define.FASTATTN_CUDA=ON" in command
    assert "--config-settings=cmake.define.FASTATTN_CUDA_ARCHITECTURES=90" in command
    assert command[-1] == str(ROOT)
    assert command[command.index("--target") + 1] == str(context.site)
    assert not any("ARCHITECTURES" in part for part in gpu_check.install_command(context, None))
    context.wheel = str(tmp_path / "x.whl")
    command = gpu_check.install_command(context, "90")
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
    assert gpu_check.cuda_kernels(facts(tmp_path), tmp_path) == (["cuda-cublas"], "")
    assert gpu_check.cuda_kernels(facts(tmp_path, usable=False), tmp_path) == ([], "cuda-cublas: no driver")
    none = {**facts(tmp_path), "kernels": []}
    assert gpu_check.cuda_kernels(none, tmp_path) == ([], "this build has no CUDA kernel")
    usable, problem = gpu_check.cuda_kernels(facts(Path("/usr/lib")), tmp_path)
    assert usable == []
    assert "another fastattn" in problem


def fake_runs(monkeypatch: pytest.MonkeyPatch, *results: Any) -> list[list[str]]:
    """The next commands end so; what they were."""
    left, asked = list(results), []

    def run(self: Any, *commands: list[str], share: float = 1.0, **extra: str) -> list[Any]:
        asked.extend(list(command) for command in commands)
        return [left.pop(0) for _ in commands]

    monkeypatch.setattr(gpu_check.Context, "run", run)
    return asked


def test_a_build(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "smi", lambda what: "9.0")
    context.site.mkdir(parents=True)
    (context.site / "old").write_text("")
    asked = fake_runs(monkeypatch, done("built"), done(f"noise\n{json.dumps(facts(context.site))}\n"))
    step = gpu_check.build(context)
    assert (step.status, step.summary) == ("passed", "usable: cuda-cublas")
    assert step.results["architecture"] == "90"
    assert not context.site.exists()
    assert len(asked) == len(step.commands) == 2
    fake_runs(monkeypatch, done("built"), done(json.dumps(facts(context.site, usable=False))))
    step = gpu_check.build(context)
    assert (step.status, step.summary) == ("failed", "cuda-cublas: no driver")
    fake_runs(monkeypatch, done("error: nvcc", rc=1))
    step = gpu_check.build(context)
    assert (step.status, step.failures[0]["text"]) == ("failed", "error: nvcc")
    fake_runs(monkeypatch, done("half", rc=None, timed_out=True))
    assert gpu_check.build(context).status == "partial"
    fake_runs(monkeypatch, done("built"), done("ImportError: libcudart", rc=1))
    assert gpu_check.build(context).summary == "it cannot be imported"


def test_the_question_for_the_kernels_is_answered() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", gpu_check.FACTS], capture_output=True, text=True, timeout=120, check=True
    )
    found = gpu_check.json_line(f"{{not json\n{ended.stdout}\nlast")
    assert [kernel["name"] for kernel in found["kernels"]] == [k.name for k in fastattn.kernels()]
    assert found["version"] == fastattn.__version__
    assert gpu_check.json_line("nothing\n{broken") is None


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
    ini.write_text(gpu_check.pytest_ini(project, has_timeout=False))
    file.write_text(text)
    command = gpu_check.pytest_command(ini, xml, [file])
    command[command.index("--rootdir") + 1] = str(folder)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # as where pytest-timeout is missing
    (ended,) = gpu_check.run_all([command], time.monotonic() + seconds, environment, folder / "logs")
    return ended, xml


def test_pytest_runs_and_its_report_is_read(tmp_path: Path) -> None:
    ended, xml = run_pytest(tmp_path, TESTS, 60.0)
    assert ended.rc == 1, ended.output
    counts, failures = gpu_check.parse_junit(xml.read_text())
    # The file is one about CUDA, so all of its tests are chosen.
    assert [counts[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    assert counts["skip_reasons"] == {"not here": 1}
    assert [failure["where"] for failure in failures] == [
        *("test_cuda_sample::test_bad_cuda_", "test_cuda_sample::test_cuda_error")
    ]
    assert "assert 1 == 2" in failures[0]["text"]
    assert gpu_check.judge_tests(counts, failures, False) == (
        *("failed", "2 passed, 1 failed, 1 errors, 1 skipped"),
    )
    assert len(counts["seconds_of_slowest"]) == 5
    # The same from the lines alone.
    lines, failed = gpu_check.parse_verbose(ended.output)
    assert [lines[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    assert len(failed) == 2


def test_pytest_over_its_time_still_reports(tmp_path: Path) -> None:
    ended, xml = run_pytest(tmp_path, TESTS + SLOW, 8.0)
    assert ended.timed_out
    counts, failures = gpu_check.read_tests(xml.read_text(), ended)
    assert [counts[x] for x in ("passed", "failed", "errors", "skipped")] == [2, 1, 1, 1]
    texts = {failure["where"].rpartition("/")[2]: failure["text"] for failure in failures}
    assert "assert 1 == 2" in texts["test_cuda_sample::test_bad_cuda_"]
    assert texts["test_cuda_sample.py::test_cuda_slow"] == "was running when pytest ended"
    assert len(texts) == 3
    assert gpu_check.read_tests("", ended)[0]["passed"] == 2
    status, summary = gpu_check.judge_tests(counts, failures, True)
    assert (status, summary[-9:]) == ("failed", "cut short")
    assert gpu_check.judge_tests({**counts, "failed": 0, "errors": 0}, [], True)[0] == "partial"


def test_reports_that_are_cut_off() -> None:
    assert gpu_check.parse_junit("") is None
    assert gpu_check.parse_junit("<testsuites><testsuite>") is None
    output = (
        "tests/test_a.py::test_one[cuda-cublas-float32] PASSED [  5%]\n"
        "tests/test_a.py::test_two FAILED [ 10%]\n"
        "tests/test_b.py::test_three[a b] SKIPPED (why) [ 15%]\n"
        "tests/test_b.py::test_four "
    )
    counts, failures = gpu_check.parse_verbose(output)
    assert [counts[x] for x in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert failures[0] == {"where": "tests/test_a.py::test_two", "text": "see the output"}
    assert failures[1] == {"where": "tests/test_b.py::test_four", "text": "was running when pytest ended"}


def test_no_test_at_all_is_no_success() -> None:
    assert gpu_check.judge_tests(gpu_check.empty_counts(), [], False) == ("failed", "no tests: nothing ran")


def test_the_projects_settings_become_an_ini_file() -> None:
    text = gpu_check.pytest_ini(gpu_check.read_toml(ROOT / "pyproject.toml"), has_timeout=True)
    assert text.startswith("[pytest]\n")
    assert "timeout = 300" in text
    assert "\n\terror\n" in text or "= error\n" in text
    assert r"ignore:os\.fork\(\) was called:RuntimeWarning" in text
    assert "addopts = -ra --strict-markers --strict-config\n" in text
    without = gpu_check.pytest_ini(gpu_check.read_toml(ROOT / "pyproject.toml"), has_timeout=False)
    assert "timeout" not in without


def test_the_test_step_divides_the_files(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = done("Fatal Python error", rc=None)
    asked = fake_runs(monkeypatch, done("tests/test_a.py::test_one PASSED\n", rc=0), crash)
    step = gpu_check.test(context)
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
    found = gpu_check.parse_sanitizer("memcheck", result)
    assert (found["verdict"], found["errors"], found["ours"]) == (verdict, errors, ours)
    assert found["reason"] or verdict == "passed"


def test_our_reports_come_first() -> None:
    text = INVALID.replace("void fastattn::cuda::softmax_kernel", "x").replace("fastattn::cuda::", "")
    text = text.replace("gemm_kernel", "fastattn::gemm")
    assert gpu_check.parse_sanitizer("memcheck", done(text, rc=1))["reports"].startswith(
        "Invalid __global__ read"
    )


def test_sanitizer_runs_and_their_commands(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: "/cuda/bin/compute-sanitizer")
    help_text = done("  --track-stream-ordered-races arg\n")
    results = [done(CLEAN), done(RACE), done(CLEAN), done("torch is missing", rc=3), done(CLEAN)]
    asked = fake_runs(monkeypatch, help_text, *results)
    step = gpu_check.sanitize(context)
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
    assert gpu_check.sanitize(context).status == "passed"
    fake_runs(monkeypatch, done(), *[done(rc=3)] * 3)
    assert gpu_check.sanitize(context).status == "skipped"
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: None)
    step = gpu_check.sanitize(context)
    assert (step.status, step.summary) == ("skipped", "compute-sanitizer was not found")


def test_the_problems_for_the_sanitizer_exist() -> None:
    assert set(gpu_check.SMALL_PROBLEMS) <= set(problems.PROBLEMS)


# ---- the short run ------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best kernel of the CPU as the only one of a GPU."""
    kernel = next(k for k in fastattn.kernels() if k.usable and len(k.dtypes) == 4)
    monkeypatch.setattr(fastattn, "kernels", lambda: [kernel._replace(device="cuda")])


@pytest.mark.usefixtures("cuda")
def test_the_short_run_checks_each_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--problems", *gpu_check.SMALL_PROBLEMS, "--dtypes", "float32", "float64"]
    assert gpu_short_run.main(options) == 0
    assert capsys.readouterr().out == "8 problems, 0 wrong\n"
    honest = fastattn.mha

    def mha(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        if "mask" in kwargs:
            raise fastattn.CudaError("an illegal memory access")
        out, lse = honest(q, k, v, **kwargs)
        return (out * 1.01 if "dropout" in kwargs else out), lse

    monkeypatch.setattr(fastattn, "mha", mha)
    assert gpu_short_run.main(options) == 1
    text = capsys.readouterr().out
    (kernel,) = fastattn.kernels()
    assert f"WRONG {kernel.name} float32 odd sizes, mask: CudaError: an illegal memory access" in text
    assert "dropout: " in text
    assert text.endswith("8 problems, 4 wrong\n")


@pytest.mark.usefixtures("cuda")
def test_the_short_run_leaves_out_what_a_kernel_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = fastattn.mha

    def mha(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        if q.shape[1] > 16:
            raise fastattn.UnsupportedError("takes up to 16 query rows")
        return honest(q, k, v, **kwargs)

    monkeypatch.setattr(fastattn, "mha", mha)
    assert gpu_short_run.main(["--problems", *gpu_check.SMALL_PROBLEMS, "--dtypes", "float32"]) == 0
    assert capsys.readouterr().out == "1 problems, 0 wrong\n"


@pytest.mark.usefixtures("cuda")
def test_the_short_run_with_torch_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    dtypes = ["float32", "float16"]
    if importlib.util.find_spec("ml_dtypes") is not None:
        dtypes.append("bfloat16")
    assert gpu_short_run.main(["--arrays", "torch", "--dtypes", *dtypes]) == 0
    assert f"{len(dtypes) * len(problems.PROBLEMS)} problems, 0 wrong" in capsys.readouterr().out


def test_the_short_run_without_a_kernel_or_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = fastattn.kernels()
    monkeypatch.setattr(fastattn, "kernels", lambda: [k._replace(device="cpu") for k in kernels])
    assert gpu_short_run.main([]) == 3
    assert "no CUDA kernel" in capsys.readouterr().out
    monkeypatch.setattr(fastattn, "kernels", lambda: [kernels[-1]._replace(device="cuda", usable=True)])
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu_short_run.main(["--arrays", "torch"]) == 3
    assert "torch" in capsys.readouterr().out


def test_the_short_run_sees_a_wrong_lse() -> None:
    q, k, v, options = problems.make("plain", "float32")
    want = gate.expected(q, k, v, **options)
    shifted = want._replace(lse=want.lse + 1.0)
    assert gpu_short_run.check("cpu-reference", ((q, k, v), options), want) == ""
    assert "times the error" in gpu_short_run.check("cpu-reference", ((q, k, v), options), shifted)
    assert isinstance(gpu_short_run.to_numpy(np.zeros(2)), np.ndarray)


# ---- bench --------------------------------------------------------------------------------------------


def bench_document(**changes: Any) -> dict[str, Any]:
    case = {"name": "bert-f16", "errors": {}, "ratio_to_best_peer": 0.5}
    return {"cases": [case, {**case, "ratio_to_best_peer": 2.0}], "failed": {}, **changes}


def test_the_benchmarks_verdict() -> None:
    assert gpu_check.judge_bench("bench", done(), bench_document()) == ("passed", [])
    wrong = bench_document()
    wrong["cases"][0]["errors"] = {"fastattn": "wrong result, off by 1"}
    state, failures = gpu_check.judge_bench("bench", done(rc=1), wrong)
    assert state == "failed"
    assert failures == [{"where": "bench, bert-f16, fastattn", "text": "wrong result, off by 1"}]
    state, failures = gpu_check.judge_bench("bench", done(rc=1), bench_document(failed={"x": "no memory"}))
    assert (state, failures) == ("failed", [{"where": "bench, x", "text": "no memory"}])
    cut = done("output", rc=None, timed_out=True)
    assert gpu_check.judge_bench("bench", cut, bench_document()) == ("partial", [])
    state, failures = gpu_check.judge_bench("bench", cut, None)
    assert (state, failures) == ("failed", [{"where": "bench", "text": "cut short: output"}])
    silent = gpu_check.judge_bench("tune", done(rc=130), None)[1]
    assert silent == [{"where": "tune", "text": "ended with 130, without output"}]
    assert gpu_check.judge_bench("bench", done("Traceback", rc=1), bench_document())[0] == "failed"
    assert gpu_check.judge_bench("tune", done(), {"speeds": {"to_host": 1.0}}) == ("passed", [])


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

    monkeypatch.setattr(gpu_check.Context, "run", run)
    context.quick = True
    step = gpu_check.bench(context)
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
    monkeypatch.setattr(gpu_check.Context, "run", lambda *a, **kw: [done("gone", rc=2)])
    step = gpu_check.bench(context)
    assert step.status == "failed"
    assert set(step.results.values()) == {None}


# ---- the document -------------------------------------------------------------------------------------


def record(status: str = "passed", commit: str = "a", gpu: str = "H200", failures: int = 0) -> dict[str, Any]:
    step = gpu_check.Step(status, f"{status}, with words", [done("text")])
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


def test_long_lists_and_texts_are_cut() -> None:
    step = gpu_check.Step("failed", "", [done("x" * 9999)])
    step.failures = [{"where": "a", "text": "y" * 9999}] * 500
    found = step.record()
    assert len(found["failures"]) == gpu_check.MOST_FAILURES + 1
    assert found["failures"][-1]["text"] == "300 more"
    assert len(found["failures"][0]["text"]) == len(found["commands"][0]["tail"]) == gpu_check.TAIL


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


def test_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "output_of", lambda command: "NVIDIA H200\nNVIDIA H200\n")
    assert gpu_check.smi("name") == "NVIDIA H200"
    monkeypatch.setattr(gpu_check, "output_of", lambda command: "")
    assert gpu_check.smi("name") is None


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
        return gpu_check.Step("passed", "fine")

    monkeypatch.setitem(gpu_check.STEPS, "build", bad)
    monkeypatch.setitem(gpu_check.STEPS, "test", good)
    common = ["--scratch", str(tmp_path / "scratch"), "--commit", "abc"]
    assert gpu_check.main([*common, "--steps", "build,test", "--out", str(out)]) == 1
    assert "RuntimeError: surprise" in capsys.readouterr().out
    # The next part goes into the same file.
    monkeypatch.setitem(gpu_check.STEPS, "build", lambda context: gpu_check.Step("passed", "now"))
    assert gpu_check.main([*common, "--steps", "build", "--merge", str(out)]) == 0
    steps = json.loads(out.read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"build": "passed", "test": "passed"}
    monkeypatch.setitem(gpu_check.STEPS, "bench", lambda context: gpu_check.Step("skipped", "no tool"))
    assert gpu_check.main([*common, "--steps", "bench", "--merge", str(out)]) == 0
    monkeypatch.setitem(gpu_check.STEPS, "bench", lambda context: gpu_check.Step("partial", "cut short"))
    assert gpu_check.main([*common, "--steps", "bench", "--merge", str(out)]) == 1


def test_tools_are_found_where_cuda_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find_tool("compute-sanitizer-of-a-test") is None
    program = tmp_path / "bin" / "compute-sanitizer-of-a-test"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert gpu_check.find_tool("compute-sanitizer-of-a-test") == str(program)
