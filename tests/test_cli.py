"""``python -m fastattn info|check|bench``: what they print, what they write, and when they fail."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import _core, reference
from fastattn.__main__ import main
from fastattn._cli import bench, cases, check, gate, machine, onnx_model, output, peers, problems, report

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["bench", "--cases", "tiny", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _same_threads_afterwards(threads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers set the threads of their libraries for the whole process: that is undone here."""
    monkeypatch.setenv("NPROC", "1")
    with contextlib.ExitStack() as stack:
        if machine.installed_version("threadpoolctl") is not None:
            stack.enter_context(importlib.import_module("threadpoolctl").threadpool_limits())
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
        yield


@pytest.fixture
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` on three problems, without its timing."""
    names = ("plain", "odd sizes, mask", "NaN behind the length")
    monkeypatch.setattr(problems, "PROBLEMS", {name: problems.PROBLEMS[name] for name in names})
    monkeypatch.setattr(check, "_seconds", lambda *_: 1.0)


# ---- info -------------------------------------------------------------------------------------------


def test_info_names_version_threads_and_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert fastattn.__version__ in text
    assert f"threads   {fastattn.get_num_threads()}" in text
    assert np.__version__ in text
    for kernel in fastattn.kernels():
        (line,) = [x for x in text.splitlines() if x.startswith(kernel.name + " ")]
        assert ("yes" if kernel.usable else kernel.reason) in line
        assert all(dtype in line for dtype in kernel.dtypes)
    assert "cuda" in text


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "info"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fastattn  {fastattn.__version__}")
    assert done.stderr == ""


def test_info_imports_no_peer() -> None:
    code = (
        "import sys, fastattn.__main__ as m; m.main(['info']);"
        "print([n for n in ('torch', 'jax', 'onnxruntime', 'matplotlib', 'ml_dtypes') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- check ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_problems")
def test_check_passes_and_covers_every_usable_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for kernel in fastattn.kernels():
        checked = [line for line in lines if line.startswith(kernel.name + " ") and "/3 " in line]
        assert len(checked) == (len(kernel.dtypes) if kernel.usable else 0)
        assert all("3/3 ok" in line for line in checked)
    assert lines[-1] == "all passed"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, lse: (out * 1.001, lse), "allowed"),
        (lambda out, lse: (np.where(np.arange(out.shape[-1]) == 3, np.nan, out), lse), "error inf"),
        (lambda out, lse: (out, lse + 0.01), "lse"),
    ],
    ids=["wrong out", "one NaN", "wrong lse"],
)
@pytest.mark.usefixtures("few_problems")
def test_check_fails_on_a_broken_kernel(
    spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = next(k.name for k in fastattn.kernels() if k.usable and "float32" in k.dtypes)
    honest = fastattn.mha

    def mha(q: Any, k: Any, v: Any, *, kernel: str, **kwargs: Any) -> Any:
        result = honest(q, k, v, kernel=kernel, **kwargs)
        return spoil(*result) if kernel == broken and q.dtype == np.float32 else result

    monkeypatch.setattr(fastattn, "mha", mha)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 3
    assert all(line.startswith(f"FAILED {broken} float32: ") and message in line for line in failed)
    assert lines[-1].startswith("1 of ")


@pytest.mark.usefixtures("few_problems")
def test_check_goes_on_after_a_kernel_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = fastattn.mha

    def mha(q: Any, k: Any, v: Any, *, kernel: str, **kwargs: Any) -> Any:
        if kernel == "cpu-scalar":
            raise MemoryError("no room")
        return honest(q, k, v, kernel=kernel, **kwargs)

    monkeypatch.setattr(fastattn, "mha", mha)
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert "FAILED cpu-scalar float32: plain: MemoryError: no room" in text
    assert "FAILED cpu-reference" not in text


def test_check_fails_without_a_usable_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = [kernel._replace(usable=False, reason="not here") for kernel in fastattn.kernels()]
    monkeypatch.setattr(fastattn, "kernels", lambda: none)
    assert main(["check"]) == 1
    assert "no kernel is usable" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(problems.PROBLEMS))
@pytest.mark.parametrize("dtype_name", ["float64", "float32", "float16", "bfloat16"])
def test_the_gate_lets_a_rounded_reference_through_and_little_more(name: str, dtype_name: str) -> None:
    if dtype_name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v, kwargs = problems.make(name, dtype_name)
    want = gate.expected(q, k, v, **kwargs)
    rounded = want.out.astype(q.dtype)
    assert gate.worst(rounded, want.out, want.out_limit)[1] <= 1.0
    size = float(np.abs(want.out).max())
    assert 0.0 < want.out_limit < 0.1 * size
    assert gate.worst(want.out + 1.01 * want.out_limit, want.out, want.out_limit)[1] > 1.0


def test_the_textbook_is_the_same_attention_as_the_reference() -> None:
    for name in problems.PROBLEMS:
        q, k, v, kwargs = problems.make(name, "float64")
        np.testing.assert_allclose(
            gate.textbook(q, k, v, **kwargs), reference.mha(q, k, v, **kwargs), atol=1e-13, err_msg=name
        )


# ---- bench ------------------------------------------------------------------------------------------


def test_bench_writes_a_complete_json_and_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("threadpoolctl")
    before = fastattn.get_num_threads()
    json_file, plot_file = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--peers", "numpy", "--json", str(json_file), "--plot", str(plot_file)]
    assert (
        main(["bench", "--cases", "vit,decode-4k-f32,tiny", "--rounds", "2", "--threads", "1", *options]) == 0
    )
    assert fastattn.get_num_threads() == before
    assert plot_file.read_bytes().startswith(PNG)
    assert plot_file.stat().st_size > 20_000

    run = json.loads(json_file.read_text())
    assert run["schema"] == bench.SCHEMA
    assert run["threads"] == 1
    assert run["rounds"] == 2
    assert run["peers"] == ["numpy"]
    assert run["command"][:4] == ["python", "-m", "fastattn", *sys.argv[1:2]]
    assert run["machine"]["cpu"] == machine.cpu_model()
    assert run["machine"]["cpus"] >= 1
    assert run["versions"]["fastattn"] == fastattn.__version__
    assert run["versions"]["numpy"] == np.__version__
    assert {"commit", "when"} <= set(run)
    assert [case["name"] for case in run["cases"]] == ["vit", "decode-4k-f32", "tiny"]
    for case in run["cases"]:
        ours, numpy = case["results"]
        assert (ours["name"], numpy["name"]) == ("fastattn", "numpy")
        assert ours["implementation"] == case["kernel"]
        assert case["ratio_to_best_peer"] == pytest.approx(numpy["seconds"] / ours["seconds"])
        assert case["best_peer"] == "numpy"
        for entry in case["results"]:
            assert len(entry["seconds_per_round"]) == 2
            assert 0.0 < entry["seconds_min"] <= entry["seconds"] <= entry["seconds_max"] < 60.0
            assert entry["gflops"] == pytest.approx(case["flops"] / entry["seconds"] / 1e9)
            assert entry["max_error"] < 1e-4
    vit, decode, tiny = run["cases"]
    assert vit["limit"]["kind"] == "flops"
    assert decode["limit"]["kind"] == "bandwidth"
    assert tiny["limit"]["kind"] is None
    # A peak is a peak: nothing may be faster than it (but for a machine whose clock changes meanwhile).
    assert 0.0 < vit["results"][0]["fraction_of_limit"] < 1.1
    assert 0.0 < decode["results"][0]["fraction_of_limit"] < 1.1
    assert tiny["results"][0]["fraction_of_limit"] is None

    text = capsys.readouterr().out
    for case in run["cases"]:
        assert f"\n{case['name']}: " in text
    assert "geometric mean" in text


def test_plot_has_a_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--peers", "none", "--plot"]) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)


def test_bench_without_peers_and_with_a_forced_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--peers", "none", "--kernel", "cpu-reference"]) == 0
    text = capsys.readouterr().out
    assert "fastattn (cpu-reference)" in text
    assert "peers: none" in text


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "jax", "numpy"])
@pytest.mark.parametrize("case", ["bert", "gpt2", "llama-bf16", "llama-f16", "decode-4k-f32", "tiny"])
def test_each_peer_computes_the_same_attention(name: str, case: str) -> None:
    pytest.importorskip(name)
    if name == "jax":
        pytest.importorskip("ml_dtypes")
    (full,) = cases.select(case)
    # The case's heads, dtype and mask with few tokens: every route of the peer, in no time.
    tokens = min(40, full.q_size), min(40, full.kv_size)
    small = cases.Case(
        full.name,
        "",
        full.kind,
        full.batch,
        full.q_heads,
        full.kv_heads,
        *tokens,
        32,
        full.dtype,
        full.causal,
    )
    q, k, v = small.arrays()
    try:
        peer = peers.PEERS[name](1)
        runner = peer.prepare(small, q, k, v)
        out = runner.to_numpy(runner.run())
    except (peers.NotApplicable, NotImplementedError, ValueError) as reason:
        if small.dtype == "float32":  # which every peer has
            raise
        pytest.skip(str(reason).splitlines()[0])
    assert out.shape == q.shape
    want = reference.mha(q, k, v, causal=small.causal)
    assert np.abs(out.astype(np.float64) - want).max() < bench.SAME_COMPUTATION[small.dtype]


def test_a_peer_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("threadpoolctl")
    honest = peers.NumPy.prepare

    def prepare(self: peers.NumPy, *arguments: Any) -> peers.Runner:
        runner = honest(self, *arguments)
        return peers.Runner(lambda: 1.1 * runner.run(), runner.to_numpy, runner.implementation)

    monkeypatch.setattr(peers.NumPy, "prepare", prepare)
    assert main([*TINY, "--peers", "numpy"]) == 0
    text = capsys.readouterr().out
    assert "numpy: wrong result, off by 0.1" in text
    assert "geometric mean" not in text


def test_bench_stops_when_fastattn_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fastattn.mha
    monkeypatch.setattr(fastattn, "mha", lambda *a, **kw: 1.1 * honest(*a, **kw))
    with pytest.raises(RuntimeError, match="wrong result"):
        main([*TINY, "--peers", "none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "tiny,nonsense"], "nonsense"),
        (["--peers", "tensorflow"], "tensorflow"),
        (["--cases", "tiny", "--threads", "0"], "--threads"),
        (["--cases", "tiny", "--rounds", "0"], "--rounds"),
        (["--cases", "tiny", "--kernel", "cpu-mmx"], "cpu-mmx"),
        (["--cases", "tiny", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--cases", "tiny", "--plot", "run.docx"], "run.docx"),
    ],
)
def test_bench_refuses_wrong_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--peers", "none", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_cases_count_what_explain_counts() -> None:
    pytest.importorskip("ml_dtypes")
    for case in cases.CASES:
        # Views of a single number: explain reads no element.
        zero = np.zeros((), cases.numpy_dtype(case.dtype))
        q = np.broadcast_to(zero, (case.batch, case.q_size, case.q_heads, case.head_dim))
        k = v = np.broadcast_to(zero, (case.batch, case.kv_size, case.kv_heads, case.head_dim))
        assert case.flops == fastattn.explain(q, k, v, causal=case.causal).flops
        assert case.kv_bytes == k.nbytes + v.nbytes


# ---- parts ------------------------------------------------------------------------------------------


def test_measured_limits_are_plausible_and_check_their_arguments() -> None:
    best = next(k.name for k in fastattn.kernels() if k.usable and "float32" in k.dtypes)
    flops = _core.measure_fma_peak(best, "float32", 1, 0.02)
    assert 1e9 < flops < 1e13
    assert 1e8 < _core.measure_read_bandwidth(1 << 22, 1, 0.02) < 1e13
    with pytest.raises(ValueError, match="no CPU kernel is named 'nonsense'"):
        _core.measure_fma_peak("nonsense", "float32", 1, 0.02)
    with pytest.raises(ValueError, match="dtype: expected 'float64'"):
        _core.measure_fma_peak(best, "int8", 1, 0.02)
    with pytest.raises(ValueError, match="threads: expected"):
        _core.measure_fma_peak(best, "float32", 0, 0.02)
    with pytest.raises(ValueError, match="seconds: expected"):
        _core.measure_read_bandwidth(1 << 22, 1, float("nan"))
    with pytest.raises(ValueError, match="bytes: expected"):
        _core.measure_read_bandwidth(64, 1, 0.02)
    with pytest.raises(MemoryError):
        _core.measure_read_bandwidth(1 << 60, 1, 0.02)


def test_progress_draws_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = output.Progress(4, stream)
        progress.step("first", 0)
        progress.step("second", 2)
        progress.clear()
    assert "  0 %  first" in terminal.getvalue()
    assert " 50 %  second" in terminal.getvalue()
    assert pipe.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2e-6, "4.20 us"), (0.0173, "17.3 ms"), (0.9999, "1.00 s"), (123.4, "123 s")]
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert output.time_text(seconds) == text


def test_onnx_models_are_valid_protobuf() -> None:
    ort = pytest.importorskip("onnxruntime")
    model = onnx_model.one_node_model(
        "LeakyRelu",
        domain="",
        opset=23,
        inputs={"x": (2, 300)},
        output=("y", (2, 300)),
        dtype="float32",
        attributes={"alpha": 0.25},
    )
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.linspace(-1, 1, 600, dtype=np.float32).reshape(2, 300)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, np.where(x < 0, 0.25 * x, x), rtol=1e-6)


def test_the_report_of_a_run_where_a_peer_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    run = bench.run(cases="tiny", rounds=1, peer_names="none")
    (case,) = run["cases"]
    fast = dict(case["results"][0], name="torch", seconds=case["results"][0]["seconds"] / 4)
    case["results"].append(fast)
    case["best_peer"], case["ratio_to_best_peer"] = "torch", 0.25
    text = report.report(run)
    assert "0.25x the speed of torch" in text
    assert "faster than every peer in 0 of 1 cases" in text
