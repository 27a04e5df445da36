"""What a machine without a usable GPU gets: the reason, everywhere the same, and a CPU that works as ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from subproc import run

import fastattn
from fastattn._check import info

KERNELS = {kernel.name: kernel for kernel in fastattn.kernels()}
needs_no_gpu = pytest.mark.skipif(
    KERNELS["cuda-cublas"].usable, reason="needs a machine without a usable GPU"
)


@pytest.fixture
def q() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 300, 4, 64)).astype(np.float32)


@needs_no_gpu
def test_the_reason_is_the_same_everywhere(q):
    reason = KERNELS["cuda-cublas"].reason
    assert "cuda" in reason.lower() or "NVIDIA" in reason
    with pytest.raises(fastattn.UnsupportedError, match=r"^device: cuda:0 cannot be used: ") as by_device:
        fastattn.mha(q, q, q, device="cuda")
    with pytest.raises(fastattn.UnsupportedError, match=r"^kernel: .cuda-cublas. cannot") as by_kernel:
        fastattn.mha(q, q, q, kernel="cuda-cublas")
    plan = fastattn.explain(q, q, q)
    assert plan.device == "cpu"
    for text in [str(by_device.value), str(by_kernel.value), plan.refused["cuda-cublas"], plan.device_choice]:
        assert reason in text
    rows = sum(kernel.device == "cuda" for kernel in KERNELS.values())
    assert info.text().count(reason) == 1 + rows  # the line of CUDA, and its kernels


@needs_no_gpu
def test_large_calls_that_a_gpu_would_take_stay_here():
    q = np.zeros((1, 4096, 1, 16), np.float32)
    speeds = fastattn._core.device_speeds()
    try:
        fastattn._core.set_device_speeds(gpu_f32=1e18, to_device=1e18, to_host=1e18, gpu_seconds=1e-9)
        assert fastattn.explain(q, q, q).device == "cpu"
        assert fastattn.mha(q, q, q).shape == q.shape
    finally:
        fastattn._core.set_device_speeds(**speeds)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_import_and_small_calls_do_not_look_for_cuda():
    code = """
import sys
import numpy as np
import fastattn
q = np.zeros((1, 8, 1, 16), np.float32)
fastattn.mha(q, q, q)
libraries = [line.split()[-1] for line in open("/proc/self/maps") if "/" in line]
print([name for name in libraries if "cublas" in name or "libcuda" in name],
      [name for name in sys.modules if name.startswith(("cuda", "nvidia", "fastattn._cuda"))])
"""
    assert run(code)[0].strip() == "[] []"
