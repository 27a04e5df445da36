"""``python -m fastattn info|check``: what they print, and when they fail; parts that ``bench`` shares."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from inputs import PARTIAL

import fastattn
from fastattn import _core, reference
from fastattn.__main__ import main
from fastattn._check import gate, output, problems
from fastattn._check import run as check


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
        taken = 2 if kernel.name in PARTIAL else 3  # not the odd sizes
        checked = [line for line in lines if line.startswith(kernel.name + " ") and f"/{taken} " in line]
        assert len(checked) == (len(kernel.dtypes) if kernel.usable else 0)
        assert all(f"{taken}/{taken} ok" in line for line in checked)
        if kernel.device == "cpu":  # the gradients too
            assert all(line.split()[4:6] == [f"{taken}/{taken}", "ok"] for line in checked)
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


@pytest.mark.parametrize("name", fastattn.Gradients._fields)
def test_check_fails_on_a_wrong_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_it = "window, softcap, sinks" if name == "dsinks" else "bias, alibi, negative scale"
    monkeypatch.setattr(problems, "PROBLEMS", {with_it: problems.PROBLEMS[with_it]})
    monkeypatch.setattr(check, "_seconds", lambda *_: 1.0)
    only = [kernel for kernel in fastattn.kernels() if kernel.name == "cpu-scalar"]
    monkeypatch.setattr(fastattn, "kernels", lambda: only)
    honest = fastattn.mha_backward

    def mha_backward(dout: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = honest(dout, *args, **kwargs)
        if dout.dtype != np.float32:
            return gradients
        return gradients._replace(**{name: 1.001 * getattr(gradients, name)})

    monkeypatch.setattr(fastattn, "mha_backward", mha_backward)
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAILED")]
    assert failed.startswith(f"FAILED cpu-scalar float32: {with_it}: error of {name} ")
    (cells,) = [row for row in map(str.split, lines) if row[:2] == ["cpu-scalar", "float32"]]
    assert cells[2:6] == ["1/1", "ok", "0/1", "FAILED"]
    assert lines[-1].startswith("1 of ")


@pytest.mark.usefixtures("few_problems")
def test_check_goes_on_after_gradients_that_raise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = fastattn.mha_backward

    def mha_backward(*args: Any, kernel: str, **kwargs: Any) -> Any:
        if kernel == "cpu-scalar":
            raise MemoryError("no room")
        return honest(*args, kernel=kernel, **kwargs)

    monkeypatch.setattr(fastattn, "mha_backward", mha_backward)
    assert main(["check"]) == 1
    text = capsys.readouterr().out
    assert "FAILED cpu-scalar float32: gradients of plain: MemoryError: no room" in text
    assert "FAILED cpu-reference" not in text


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("refuses", [1, 3])
def test_check_counts_the_gradients_that_a_kernel_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refuses: int
) -> None:
    """Without any it has no backward pass, which is no failure."""
    honest, names = fastattn.mha_backward, list(problems.PROBLEMS)[:refuses]
    refused = [problems.make(name, "float32")[0] for name in names]

    def mha_backward(dout: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["kernel"] == "cpu-scalar" and any(np.array_equal(q, x) for x in refused):
            raise fastattn.UnsupportedError("too odd")
        return honest(dout, q, *args, **kwargs)

    monkeypatch.setattr(fastattn, "mha_backward", mha_backward)
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (cells,) = [row for row in map(str.split, lines) if row[:3] == ["cpu-scalar", "float32", "3/3"]]
    assert cells[4:6] == ["2/2", "ok"] if refuses == 1 else cells[4] == "-"
    assert ("cpu-scalar float32 refuses gradients of plain: too odd" in lines) == (refuses == 1)


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


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("refuses", [1, 3])
def test_check_counts_what_a_kernel_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refuses: int
) -> None:
    """A kernel for some problems is fine; one for none is not."""
    real, names = fastattn.mha, list(problems.PROBLEMS)[:refuses]
    refused = [problems.make(name, "float32")[0] for name in names]

    def mha(q: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["kernel"] == "cpu-scalar" and any(np.array_equal(q, x) for x in refused):
            raise fastattn.UnsupportedError("too odd")
        return real(q, *args, **kwargs)

    monkeypatch.setattr(fastattn, "mha", mha)
    assert main(["check"]) == (1 if refuses == 3 else 0)
    text = capsys.readouterr().out
    assert f"cpu-scalar float32 refuses {names[0]}: too odd" in text
    assert ("it refuses every problem" in text) == (refuses == 3)


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


@pytest.mark.parametrize("name", list(problems.PROBLEMS))
@pytest.mark.parametrize("dtype_name", ["float64", "float32", "float16", "bfloat16"])
def test_the_gate_lets_rounded_gradients_through_and_little_more(name: str, dtype_name: str) -> None:
    if dtype_name == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v, kwargs = problems.make(name, dtype_name)
    want = gate.expected_gradients(problems.dout(q, v), q, k, v, **kwargs)
    rounded = fastattn.Gradients(*(None if x is None else x.astype(q.dtype) for x in want.gradients))
    assert gate.worst_gradient(rounded, want)[0] <= 1.0
    for field, gradient, limit in zip(rounded._fields, want.gradients, want.limits, strict=True):
        if gradient is None:
            continue
        assert 0.0 < limit < 0.2 * float(np.abs(gradient).max()), field
        wrong = gradient.copy()
        wrong.flat[-1] += 1.01 * limit
        of_gate, _, worst = gate.worst_gradient(want.gradients._replace(**{field: wrong}), want)
        assert of_gate > 1.0
        assert worst == field


def test_the_textbook_is_the_same_attention_as_the_reference() -> None:
    for name in problems.PROBLEMS:
        q, k, v, kwargs = problems.make(name, "float64")
        np.testing.assert_allclose(
            gate.textbook(q, k, v, **kwargs), reference.mha(q, k, v, **kwargs), atol=1e-13, err_msg=name
        )
        dout = problems.dout(q, v)
        gradients, _ = gate.textbook_gradients(dout, q, k, v, **kwargs)
        for got, want in zip(gradients, reference.mha_backward(dout, q, k, v, **kwargs), strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                np.testing.assert_allclose(got, want, atol=1e-12 * np.abs(want).max(), err_msg=name)


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
