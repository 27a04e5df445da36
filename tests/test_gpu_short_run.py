"""tools/gpu_short_run.py, without a GPU: it checks each problem and says what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import gpu_short_run
import numpy as np
import pytest
from gpu_steps.sanitize import SMALL_PROBLEMS

import fastattn
from fastattn._check import gate, problems


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best kernel of the CPU as the only one of a GPU."""
    kernel = next(k for k in fastattn.kernels() if k.usable and len(k.dtypes) == 4)
    monkeypatch.setattr(fastattn, "kernels", lambda: [kernel._replace(device="cuda")])


@pytest.mark.usefixtures("cuda")
def test_the_short_run_checks_each_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--problems", *SMALL_PROBLEMS, "--dtypes", "float32", "float64"]
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
    assert gpu_short_run.main(["--problems", *SMALL_PROBLEMS, "--dtypes", "float32"]) == 0
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
