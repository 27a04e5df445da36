"""``python -m fastattn tune`` and what the CUDA backend asks of Python, without a GPU."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastattn
from fastattn import _core, _cuda
from fastattn.__main__ import main
from fastattn._check import machine, tune

DEFAULTS = {name: 1.0 + i for i, name in enumerate(_cuda.SPEEDS)}
HERE = {"cpu": "a CPU", "gpu": "a GPU"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of a machine with known names; the file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cuda, "this_machine", lambda: dict(HERE))
    return tmp_path / "fastattn" / "tune.json"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures little and briefly."""
    monkeypatch.setattr(tune, "LONG_ENOUGH", 0.0)
    for name in ("INPUTS", "RESULTS", "CPU_SHAPE", "GPU_SHAPE"):
        shape = getattr(tune, name)
        shrunk = replace(shape, q_size=min(shape.q_size, 32), kv_size=min(shape.kv_size, 32))
        monkeypatch.setattr(tune, name, shrunk)
    monkeypatch.setattr(_core, "device_speeds", lambda: dict(DEFAULTS), raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU kernels answer for the GPU; the devices that were asked for."""
    honest, asked = fastattn.mha, []

    def mha(*arrays: Any, device: str | None = None, **options: Any) -> Any:
        asked.append(device)
        return honest(*arrays, **options)

    monkeypatch.setattr(fastattn, "mha", mha)
    return asked


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "cuda_problem", lambda: "device 'cuda': no GPU")


# ---- the command ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_with_a_gpu_every_speed_is_measured_and_kept(
    gpu: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--seconds", "0.01"]) == 0
    document = json.loads(cache.read_text())
    assert document["machine"] == HERE
    assert document["version"] == fastattn.__version__
    has_bfloat16 = machine.installed_version("ml_dtypes") is not None
    assert set(document["speeds"]) == set(_cuda.SPEEDS) - (set() if has_bfloat16 else {"cpu_per_thread_bf16"})
    assert all(value > 0 for value in document["speeds"].values())
    assert _cuda.stored_speeds() == document["speeds"]
    assert set(gpu) == {"cpu", "cuda"}
    text = capsys.readouterr().out
    assert f"wrote {cache}" in text
    assert all(name in text for name in _cuda.SPEEDS)
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.usefixtures("small", "no_gpu")
def test_without_a_gpu_the_rest_keeps_its_defaults(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--seconds", "0.01"]) == 0
    stored = _cuda.stored_speeds()
    assert stored is not None
    assert set(stored) <= {"cpu_per_thread_f64", "cpu_per_thread_f32", "cpu_per_thread_bf16", "cpu_seconds"}
    lines = capsys.readouterr().out.splitlines()
    assert "no GPU was measured: device 'cuda': no GPU" in lines
    (line,) = [line for line in lines if line.startswith("to_device ")]
    assert line.endswith("not measured")
    (line,) = [line for line in lines if line.startswith("cpu_per_thread_f32 ")]
    assert line.endswith("GFLOP/s")


@pytest.mark.usefixtures("small", "no_gpu")
def test_without_ml_dtypes_bfloat16_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    speeds, notes = tune.measure(0.0, has_gpu=False)
    assert set(speeds) == {"cpu_per_thread_f64", "cpu_per_thread_f32", "cpu_seconds"}
    assert notes == ["cpu_per_thread_bf16 keeps its default: needs ml_dtypes"]


@pytest.mark.usefixtures("small", "no_gpu")
def test_a_dry_run_writes_nothing(cache: Path) -> None:
    assert main(["tune", "--seconds", "0.01", "--dry-run"]) == 0
    assert not cache.exists()


def test_wrong_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--seconds", "0"]) == 2
    assert "--seconds: expected a number above 0" in capsys.readouterr().err


def test_the_reason_without_a_gpu() -> None:
    usable = any(kernel.usable and kernel.device == "cuda" for kernel in fastattn.kernels())
    reason = tune.cuda_problem()
    assert reason is None if usable else reason


# ---- the figures ----------------------------------------------------------------------------------------


def modelled(shape: Any, speeds: dict[str, float], flops_per_second: float) -> tune.Timed:
    """What the choice's estimate says of a call, taken for a measurement."""
    seconds = speeds["gpu_seconds"] + shape.flops / flops_per_second
    seconds += shape.bytes_in / speeds["to_device"] + shape.bytes_out / speeds["to_host"]
    return tune.Timed(shape, seconds)


def test_the_speeds_of_a_machine_that_behaves_as_estimated_come_out() -> None:
    speeds = {"gpu_seconds": 1e-4, "to_device": 2e10, "to_host": 1e10}
    empty = tune.Timed(tune.TINY, 1e-4)
    inputs, results = (modelled(shape, speeds, 1e30) for shape in (tune.INPUTS, tune.RESULTS))
    rates = tune.transfer_rates(empty, inputs, results)
    assert rates == pytest.approx({"to_device": 2e10, "to_host": 1e10}, rel=1e-3)
    for dtype, flops_per_second in (("float64", 3e13), ("float32", 4e13), ("float16", 3e14)):
        shape = replace(tune.GPU_SHAPE, dtype=dtype, q_size=1 << 14, kv_size=1 << 17)
        speed, hidden = tune.gpu_speed(modelled(shape, speeds, flops_per_second), speeds | rates)
        assert not hidden
        assert speed == pytest.approx(flops_per_second, rel=0.01)
    call = modelled(replace(tune.GPU_SHAPE, dtype="float16"), speeds, 1e30)
    speed, hidden = tune.gpu_speed(call, speeds | rates)
    assert hidden
    assert speed == pytest.approx(call.shape.flops / (tune.LEAST_SHARE * call.seconds))


def test_transfers_in_both_directions_at_once_give_positive_speeds() -> None:
    empty = tune.Timed(tune.TINY, 1e-4)
    rates = tune.transfer_rates(empty, tune.Timed(tune.INPUTS, 1.0), tune.Timed(tune.RESULTS, 1.1e-4))
    assert all(rate > 0 for rate in rates.values())
    # Faster than an empty call: nonsense in, but no speed that is not above 0.
    rates = tune.transfer_rates(empty, tune.Timed(tune.INPUTS, 1e-5), tune.Timed(tune.RESULTS, 1e-5))
    assert all(rate > 0 for rate in rates.values())


def test_the_speed_of_a_thread() -> None:
    timed = tune.Timed(tune.CPU_SHAPE, 1.1)
    assert tune.cpu_speed(timed, 0.1, 4) == pytest.approx(tune.CPU_SHAPE.flops / 4)
    assert tune.cpu_speed(timed, 2.0, 4) > 0


def test_bytes_of_a_call() -> None:
    timed = tune.Timed(replace(tune.RESULTS, dtype="float16"), 1.0)
    assert timed.shape.bytes_out == 8 * 16384 * 256 * 2
    assert timed.shape.bytes_in == 8 * 16384 * 8 * 2 + 8 * (8 + 256) * 2


def test_a_call_grows_until_it_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def fastest(shape: Any, device: str, seconds: float) -> tune.Timed:
        asked.append((shape.kv_size, seconds))
        return tune.Timed(shape, shape.kv_size / 2048 * tune.LONG_ENOUGH)

    monkeypatch.setattr(tune, "fastest", fastest)
    assert tune.long_enough(tune.CPU_SHAPE, "cpu", 0.5).shape.kv_size == 2048
    assert asked == [(512, 0.0), (1024, 0.0), (2048, 0.0), (2048, 0.5)]
    monkeypatch.setattr(tune, "fastest", lambda shape, device, seconds: tune.Timed(shape, 0.0))
    assert tune.long_enough(tune.GPU_SHAPE, "cuda", 0.5).shape.kv_size == tune.MOST_KEYS["cuda"]


def test_the_fastest_call_of_at_least_two() -> None:
    calls: list[int] = []
    assert tune.fastest_call(lambda: calls.append(1), 0.0) >= 0.0
    assert len(calls) == 2


# ---- the file ---------------------------------------------------------------------------------------------


def write(path: Path, **changes: Any) -> None:
    document = {"schema": _cuda.TUNE_SCHEMA, "machine": HERE, "speeds": {"to_host": 1e9}, **changes}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))


def test_no_file_and_files_of_other_machines_are_silent(cache: Path) -> None:
    assert _cuda.stored_speeds() is None
    write(cache)
    assert _cuda.stored_speeds() == {"to_host": 1e9}
    for other in ({"cpu": "another", "gpu": "a GPU"}, {"cpu": "a CPU", "gpu": None}, {"cpu": "a CPU"}):
        write(cache, machine=other)
        assert _cuda.stored_speeds() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema"),
        ({"machine": "this one"}, "machine: expected"),
        ({"speeds": [1, 2]}, "speeds: expected names"),
        ({"speeds": {"warp": 9}}, "'warp' is none of"),
        ({"speeds": {"to_host": "fast"}}, "to_host: expected a number, got 'fast'"),
        ({"speeds": {"to_host": True}}, "to_host: expected a number, got True"),
        ({"speeds": {"to_host": 0}}, "to_host: expected a finite number above 0"),
        ({"speeds": {"to_host": -1.0}}, "to_host: expected a finite number above 0"),
        ({"speeds": {"to_host": float("nan")}}, "to_host: expected a finite number above 0"),
        ({"speeds": {"to_host": float("inf")}}, "to_host: expected a finite number above 0"),
        ({"speeds": {"to_host": 10**400}}, "to_host: expected a finite number above 0"),
    ],
)
def test_a_bad_file_is_ignored_with_a_warning(changes: dict[str, Any], message: str, cache: Path) -> None:
    write(cache, **changes)
    with pytest.warns(RuntimeWarning, match=r"is ignored: .*write it again") as caught:
        assert _cuda.stored_speeds() is None
    assert message in str(caught[0].message)
    assert str(cache) in str(caught[0].message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_file_that_is_no_document(content: bytes, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert _cuda.stored_speeds() is None


def a_folder(root: Path) -> None:
    (root / "fastattn" / "tune.json").mkdir(parents=True)


def a_file_for_a_folder(root: Path) -> None:
    (root / "fastattn").write_text("")


def a_device_for_a_folder(root: Path) -> None:
    (root / "fastattn").symlink_to("/dev/null")


def a_loop(root: Path) -> None:
    (root / "fastattn").symlink_to(root / "fastattn")


def a_dangling_link(root: Path) -> None:
    (root / "fastattn").mkdir()
    (root / "fastattn" / "tune.json").symlink_to(root / "nothing")


def a_device(root: Path) -> None:
    (root / "fastattn").mkdir()
    (root / "fastattn" / "tune.json").symlink_to("/dev/zero")


def a_pipe_without_an_end(root: Path) -> None:
    (root / "fastattn").mkdir()
    os.mkfifo(root / "fastattn" / "tune.json")


@pytest.mark.parametrize(
    "make",
    [
        a_folder,
        a_file_for_a_folder,
        a_device_for_a_folder,
        a_loop,
        a_dangling_link,
        a_device,
        a_pipe_without_an_end,
    ],
)
def test_what_is_no_file_is_as_good_as_absent(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    assert _cuda.stored_speeds() is None


@pytest.mark.parametrize("function", ["stat", "open"])
def test_a_file_that_one_may_not_read(function: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's home. (The super-user may read all, so the refusal is made.)"""
    write(cache)
    module: Any = os if function == "stat" else io
    honest = getattr(module, function)

    def refuse(path: Any, *args: Any, **keywords: Any) -> Any:
        if str(path).startswith(str(cache.parent)):
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path, *args, **keywords)

    monkeypatch.setattr(module, function, refuse)
    assert _cuda.stored_speeds() is None


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent", "/proc/1/root", "/", "", "relative", None])
def test_any_home_is_silent(home: str | None, tmp_path: Path) -> None:
    """In a call that asks for the speeds, where a warning is an error."""
    code = (
        "import os, pwd, sys\n"
        "if 'HOME' not in os.environ: pwd.getpwuid = {}.__getitem__  # KeyError: nobody's\n"
        "import numpy as np, fastattn\n"
        "k = np.broadcast_to(np.float32(1), (1, 1 << 20, 1, 64))\n"
        "fastattn.mha(k[:, :1], k, k)\n"
        "print('fastattn._cuda' in sys.modules)\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    env |= {} if home is None else {"HOME": home}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_tune_without_a_home_says_so_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    assert _cuda.tune_file() is None
    assert main(["tune"]) == 2
    assert "XDG_CACHE_HOME: expected an absolute path" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache)
    before = cache.read_text()

    def fail(*names: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tune.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tune.write(cache, {"new": 1})
    assert cache.read_text() == before
    assert list(cache.parent.iterdir()) == [cache]


def test_the_file_is_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert _cuda.tune_file() == tmp_path / ".cache" / "fastattn" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cuda.tune_file() == tmp_path / ".cache" / "fastattn" / "tune.json"


# ---- cuBLAS and the driver -----------------------------------------------------------------------------


def pathfinder(path: str | None, error: Exception | None = None) -> types.ModuleType:
    def load(name: str) -> Any:
        assert name == "cublasLt"
        if error is not None:
            raise error
        return types.SimpleNamespace(abs_path=path)

    module = types.ModuleType("cuda.pathfinder")
    module.load_nvidia_dynamic_lib = load  # type: ignore[attr-defined]
    return module


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sys.path with NVIDIA's package in it."""
    library = tmp_path / "site" / "nvidia" / "cu13" / "lib" / _cuda.CUBLAS
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nothing"), str(tmp_path / "site")])
    return library


def offer(module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None if module is None else types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", module)


def test_cublas_of_pathfinder(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(pathfinder("/opt/cuda/lib64/libcublasLt.so.13"), monkeypatch)
    assert _cuda.find_cublas() == "/opt/cuda/lib64/libcublasLt.so.13"
    offer(pathfinder("/opt/cuda/lib64/libcublasLt.so.13.0.0.19"), monkeypatch)
    assert _cuda.find_cublas() == "/opt/cuda/lib64/libcublasLt.so.13.0.0.19"


@pytest.mark.parametrize(
    "module",
    [
        None,
        pathfinder(None),
        pathfinder("/opt/cuda-12/lib64/libcublasLt.so.12"),
        pathfinder(None, RuntimeError("not found")),
    ],
    ids=["not installed", "no path", "cuBLAS 12", "not found"],
)
def test_cublas_of_the_packages(
    module: types.ModuleType | None, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(module, monkeypatch)
    assert _cuda.find_cublas() == str(wheel)
    wheel.unlink()
    assert _cuda.find_cublas() is None


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, fastattn; from fastattn import _cuda; _cuda.stored_speeds(); _cuda.find_cublas();"
        "print([n for n in ('torch', 'jax', 'cupy', 'ml_dtypes') if n in sys.modules],"
        " 'fastattn._cuda' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n")[0] == "[] True"
    code = "import sys, fastattn; print('fastattn._cuda' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


class Driver:
    """libcuda.so.1 with one GPU; `fails` names the function that does not succeed."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def cuInit(self, flags: int) -> int:
        return 100 if self.fails == "cuInit" else 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 101 if self.fails == "cuDeviceGet" else 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA H200"
        return 999 if self.fails == "cuDeviceGetName" else 0


def test_the_name_of_the_gpu_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda.ctypes, "CDLL", lambda name: Driver())
    assert _cuda.gpu_name() == "NVIDIA H200"
    for function in ("cuInit", "cuDeviceGet", "cuDeviceGetName"):
        monkeypatch.setattr(_cuda.ctypes, "CDLL", lambda name, function=function: Driver(function))
        assert _cuda.gpu_name() is None

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(_cuda.ctypes, "CDLL", missing)
    assert _cuda.gpu_name() is None


def test_a_machine_is_its_cpu_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_cuda, "gpu_name", lambda: "NVIDIA H200")
    assert _cuda.this_machine() == {"cpu": machine.cpu_model(), "gpu": "NVIDIA H200"}


def test_values_have_units() -> None:
    assert tune.value_text("cpu_seconds", 3e-6) == "3.00 us"
    assert tune.value_text("to_host", 8e9) == "8.00 GB/s"
    assert tune.value_text("gpu_half", 1.5e14) == "150000 GFLOP/s"


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("it was measured"))
    assert main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("error: XDG_CACHE_HOME: expected a folder to write ")
