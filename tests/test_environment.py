"""Environment variables, what import loads and leaves alone."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from subproc import run

import fastattn

CALL = """
a = qkv("float32", 1, 8, 2, 16)
out = fastattn.mha(*a)
"""


def test_import_needs_only_numpy():
    out, _ = run(
        """
        import sys
        import numpy
        before = set(sys.modules)
        import fastattn
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - set(sys.stdlib_module_names)))
        fastattn.mha(*[numpy.ones((1, 2, 1, 4), numpy.float32)] * 3)
        for name in ("torch", "jax", "ml_dtypes", "cupy", "threadpoolctl", "onnxruntime"):
            assert name not in sys.modules, name
        """,
        prelude=False,
    )
    assert out.split() == ["fastattn"]


def test_import_is_quick():
    """What fastattn adds to numpy."""
    out, _ = run(
        """
        import time
        import numpy
        begin = time.perf_counter()
        import fastattn
        print(time.perf_counter() - begin)
        """,
        prelude=False,
    )
    assert float(out) < 0.5


def test_num_threads():
    code = "print(fastattn.get_num_threads())"
    assert run(code, env={"FASTATTN_NUM_THREADS": "3"})[0] == "3\n"
    default = int(run(code, env={"OMP_NUM_THREADS": ""})[0])
    assert (
        1
        <= default
        <= (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_num_threads_respects_affinity():
    out, _ = run(
        """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import fastattn
        print(fastattn.get_num_threads())
        """,
        env={"OMP_NUM_THREADS": ""},
        prelude=False,
    )
    assert out == "1\n"


def threads_with(**env):
    return int(run("print(fastattn.get_num_threads())", env={"OMP_NUM_THREADS": ""} | env)[0])


def test_num_threads_of_openmp():
    """What joblib and DataLoader set for their workers; a list has one number for each level of nesting."""
    assert threads_with(OMP_NUM_THREADS="5") == 5
    assert threads_with(OMP_NUM_THREADS="7,2,1") == 7
    assert threads_with(OMP_NUM_THREADS=" 6 , 2 ") == 6
    assert threads_with(OMP_NUM_THREADS="5", FASTATTN_NUM_THREADS="3") == 3
    assert threads_with(OMP_NUM_THREADS="5", FASTATTN_NUM_THREADS="") == 5
    assert threads_with(OMP_NUM_THREADS="5", FASTATTN_NUM_THREADS="many") == 5
    assert threads_with(OMP_NUM_THREADS="100000") == 1024  # the most that there are


@pytest.mark.parametrize(
    "value", ["", " ", "0", "-2", "many", "1.5", "3,", ",3", "3,x", "3,0", "3;2", "9" * 20]
)
def test_num_threads_that_openmp_ignores(value):
    """OpenMP itself complains where it is loaded: nothing from here."""
    out, err = run("print(fastattn.get_num_threads())", env={"OMP_NUM_THREADS": value})
    assert int(out) == threads_with()
    assert "OMP_NUM_THREADS" not in err or "libgomp" in err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this platform")
def test_openmp_goes_before_the_cpus():
    out, _ = run(
        """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import fastattn, numpy
        x = numpy.ones((64, 512, 64), "f")
        print(fastattn.get_num_threads(), fastattn.explain(x, x, x).threads)
        fastattn.set_num_threads(2)
        print(fastattn.get_num_threads())
        """,
        env={"OMP_NUM_THREADS": "3"},
        prelude=False,
    )
    assert out.split() == ["3", "3", "2"]


@pytest.mark.parametrize("value", ["0", "-2", "many", "1.5", "", "99999999999999999999"])
def test_num_threads_that_make_no_sense(value):
    """Neither a crash nor silence: a warning or error that names the variable; empty is the default."""
    code = "\ntry:\n    print(fastattn.get_num_threads()); fastattn.mha(*qkv('float32', 1, 8, 2, 16))\n"
    code += "except ValueError as e:\n    print(e)\n"
    out, err = run(
        "import warnings; warnings.simplefilter('always')" + code, env={"FASTATTN_NUM_THREADS": value}
    )
    if value == "":
        assert out.strip() == run("print(fastattn.get_num_threads())")[0].strip()
    else:
        assert "FASTATTN_NUM_THREADS" in out + err


def test_kernel(kernel):
    code = f"""
        a = qkv(dtype_of({kernel!r}), 1, 8, 2, 16)
        fastattn.mha(*a)
        print(fastattn.explain(*a).kernel)
    """
    assert run(code, env={"FASTATTN_KERNEL": kernel})[0] == kernel + "\n"
    # An argument goes before the variable.
    code = code.replace("fastattn.explain(*a)", "fastattn.explain(*a, kernel='cpu-reference')")
    assert run(code, env={"FASTATTN_KERNEL": kernel})[0] == "cpu-reference\n"


def test_kernel_unknown():
    code = """
        try:
            fastattn.mha(*qkv("float32", 1, 8, 2, 16))
        except ValueError as error:
            print(error)
    """
    assert "cpu-nonsense" in run(code, env={"FASTATTN_KERNEL": "cpu-nonsense"})[0]
    assert run(code, env={"FASTATTN_KERNEL": ""})[0] == ""


def test_device():
    code = """
        a = qkv("float32", 1, 8, 2, 16)
        print(fastattn.explain(*a).device)
        fastattn.mha(*a)
    """
    assert run(code, env={"FASTATTN_DEVICE": "cpu"})[0].startswith("cpu")
    if not any(info.usable and info.device == "cuda" for info in fastattn.kernels()):
        code = """
            a = qkv("float32", 1, 8, 2, 16)
            fastattn.mha(*a, device="cpu")
            try:
                fastattn.mha(*a)
            except fastattn.UnsupportedError as error:
                print(error)
        """
        assert "cuda" in run(code, env={"FASTATTN_DEVICE": "cuda"})[0]


def test_verbose_proves_which_kernel_ran(kernel):
    """One line on stderr for each call, with the kernel and the time; nothing without the variable."""
    code = f"""
        a = qkv(dtype_of({kernel!r}), 2, 37, 4, 16)
        print("begin", file=sys.stderr, flush=True)
        fastattn.mha(*a, kernel={kernel!r}, causal=True)
        fastattn.mha(*a, kernel={kernel!r})
    """
    lines = run(code, env={"FASTATTN_VERBOSE": "1"})[1].split("begin\n")[1].splitlines()
    assert len(lines) == 2
    others = {info.name for info in fastattn.kernels()} - {kernel}
    for line in lines:
        words = line.replace(",", " ").replace(":", " ").replace("=", " ").split()
        assert kernel in words, line
        assert not others & set(words), line
        assert "fastattn" in line
        assert any(unit in line for unit in ("us", "µs", "ms", " s")), line
    for quiet in ({}, {"FASTATTN_VERBOSE": "0"}):
        assert run(code, env=quiet)[1] == "begin\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no denormal difference to see")
def test_floating_point_environment_is_left_alone():
    """Denormals stay denormal after import and after calls, on this thread and on new ones."""
    run("""
        import threading
        def denormal():
            tiny = np.full(64, np.finfo(np.float32).tiny)
            half = tiny * np.float32(0.5)
            assert (half > 0).all(), "denormals are flushed"
            assert (half * np.float32(2) == tiny).all(), "denormals are zero"
        denormal()
        fastattn.set_num_threads(4)
        for name in [k.name for k in fastattn.kernels() if k.usable]:
            fastattn.mha(*qkv(dtype_of(name), 2, 200, 4, 32), kernel=name)
            denormal()
        t = threading.Thread(target=denormal)
        t.start(); t.join()
        assert not np.seterr() is None
    """)  # fmt: skip


def test_no_numpy_warnings_and_no_fp_flags_needed():
    """Overflow and NaN inside a kernel raise nothing, even with np.seterr(all="raise")."""
    with np.errstate(all="raise"):
        x = np.full((1, 9, 1, 4), 1e30, np.float32)
        fastattn.mha(x, x, x)
        fastattn.mha(x * np.nan, x, x)
