"""``bench --device cuda``: everything but the GPU, with torch on the CPU in its place."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from bench_tools import shrunk
from cuda_tools import FakeGpu

import fastattn
from attnbench.cases import Case, select
from attnbench.gpu import cases as cuda_cases
from attnbench.gpu import check as cuda_check
from attnbench.gpu import device as cuda_device
from attnbench.gpu import limits as cuda_limits
from attnbench.gpu import peers as cuda_peers
from attnbench.gpu import report as cuda_report
from attnbench.gpu import run as cuda_bench
from attnbench.gpu import timing as cuda_timing
from attnbench.gpu import transfers as cuda_transfers
from attnbench.peers.base import NotApplicable
from fastattn.__main__ import main
from fastattn._check.output import Progress

COMMAND = ["python", "-m", "fastattn", "bench"]
SMALL = [
    dataclasses.replace(shrunk(case), name=case.name)
    for case in cuda_cases.CASES
    if case.name in ("bert-f32", "llama-2k-bf16", "decode-4k-f16", "tiny-f32", "bert-tf32", "bert-f64")
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A fake GPU with quick limits, on which fastattn's CPU kernels say that they are on CUDA."""
    for name, (dtype, _, tf32) in cuda_limits.PRODUCTS.items():
        monkeypatch.setitem(cuda_limits.PRODUCTS, name, (dtype, 32, tf32))
    for name in ("COPY_BYTES", "LINK_BYTES"):
        monkeypatch.setattr(cuda_limits, name, 1 << 12)
    monkeypatch.setattr(cuda_timing, "BURST_SECONDS", 1e-4)
    monkeypatch.setattr(cuda_transfers, "BURST_SECONDS", 1e-4)
    monkeypatch.setattr(fastattn, "explain", fake_explain)
    monkeypatch.delenv(cuda_cases.TF32_VARIABLE, raising=False)
    made = FakeGpu()
    monkeypatch.setattr(cuda_device, "Gpu", lambda: made)
    return made


def fake_explain(q: Any, k: Any, v: Any, **options: Any) -> Any:
    device = options.get("device") or "cuda"
    return types.SimpleNamespace(
        kernel=f"{device}-fake",
        device="cpu" if device == "cpu" else "cuda:0",
        algorithm="fake",
        workspace_bytes=12345,
        refused={},
    )


def small(name: str) -> Case:
    (case,) = [case for case in SMALL if case.name == name]
    return case


def run(gpu: FakeGpu, cases: list[Case], peers: list[str], **options: Any) -> dict[str, Any]:
    saved: list[str] = []
    document = cuda_bench.run(
        cases, 2, peers, None, gpu, COMMAND, lambda document: saved.append(json.dumps(document))
    )
    assert len(saved) == len(cases) + 1
    assert json.loads(saved[-1]) == json.loads(json.dumps(document))
    return document


# ---- the cases ----------------------------------------------------------------------------------------


def test_the_list_has_what_it_promises() -> None:
    names = [case.name for case in cuda_cases.CASES]
    assert len(set(names)) == len(names)
    for shape in (
        "bert",
        "bert-s128",
        "gpt2",
        "llama-512",
        "llama-2k",
        "llama-8k",
        "d128-8k",
        "d128-8k-causal",
    ):
        assert {f"{shape}-f16", f"{shape}-bf16"} <= set(names)
    for shape in (
        "d64-8k",
        "d256-4k",
        "decode-1k",
        "decode-4k",
        "decode-32k",
        "decode-b32-4k",
        "decode-b32-32k",
    ):
        assert {f"{shape}-f16", f"{shape}-bf16"} <= set(names)
    assert {"bert-f32", "bert-tf32", "bert-f64"} <= set(names)
    by_name = {case.name: case for case in cuda_cases.CASES}
    assert by_name["bert-f16"].shape == "B32 H12 S512 D64"
    assert by_name["bert-s128-bf16"].shape == "B256 H12 S128 D64"
    assert by_name["gpt2-f16"].shape == "B8 H12 S1024 D64 causal"
    assert by_name["llama-8k-f16"].shape == "B1 H32/8 S8192 D128 causal"
    assert by_name["d256-4k-f16"].shape == "B1 H32 S4096 D256"
    assert by_name["decode-b32-32k-f16"].shape == "B32 H32/8 S1x32768 D128"
    for case in cuda_cases.CASES:
        assert case.name.endswith(("-f16", "-bf16", "-f32", "-tf32", "-f64"))
        assert cuda_cases.DTYPES[case.name.rpartition("-")[2]] == case.dtype
        # The peers' is_causal is aligned to the first key.
        assert not case.causal or case.q_size == case.kv_size
    for quick, among in (
        (cuda_cases.QUICK, cuda_cases.CASES),
        (cuda_cases.QUICK_TRANSFERS, cuda_cases.TRANSFER_CASES),
    ):
        assert len(select(quick, among)) == len(quick.split(","))
    assert len(cuda_cases.TRANSFER_CASES) == 10


def test_flops_are_those_that_others_count() -> None:
    by_name = {case.name: case for case in cuda_cases.CASES}
    assert cuda_cases.flops(by_name["d128-8k-f16"]) == 4 * 32 * 8192**2 * 128
    assert cuda_cases.flops(by_name["d128-8k-causal-f16"]) == 2 * 32 * 8192**2 * 128


def test_tf32_needs_a_process_of_its_own() -> None:
    cases = [small(name) for name in ("bert-f32", "bert-tf32", "bert-f64", "decode-4k-f16")]

    def names(environment: dict[str, str]) -> list[list[str]]:
        return [[case.name for case in part] for part in cuda_cases.split(cases, environment)]

    assert names({}) == [["bert-f32", "bert-f64", "decode-4k-f16"], ["bert-tf32"]]
    assert names({"FASTATTN_TF32": "0"}) == names({})
    assert names({"FASTATTN_TF32": "1"}) == [["bert-tf32", "bert-f64", "decode-4k-f16"], ["bert-f32"]]
    assert cuda_cases.limit_name(small("bert-tf32")) == "tf32"
    assert cuda_cases.limit_name(small("bert-f32")) == "float32"


# ---- a run --------------------------------------------------------------------------------------------


def test_a_run_measures_checks_and_compares(gpu: FakeGpu) -> None:
    cases = [small(name) for name in ("bert-f32", "llama-2k-bf16", "decode-4k-f16", "tiny-f32", "bert-f64")]
    document = run(gpu, cases, ["torch-math"])
    assert document["mode"] == "cuda"
    assert document["complete"]
    assert document["failed"] == document["unavailable_peers"] == {}
    assert document["versions"]["fastattn"] == fastattn.__version__
    assert document["gpu"]["name"] == "fake GPU"
    assert {x["name"] for x in document["limits"]["gemm"]} == set(cuda_limits.PRODUCTS)
    peaks = {x["name"]: x["tflops"] for x in document["limits"]["gemm"]}
    for case, found in zip(cases, document["cases"], strict=True):
        assert found["name"] == case.name
        assert found["errors"] == found["skipped"] == {}
        assert found["flops"] == cuda_cases.flops(case)
        ours, math_backend = found["results"]
        assert (ours["name"], math_backend["name"]) == ("fastattn", "torch-math")
        assert ours["workspace_bytes"] == 12345
        assert "workspace_bytes" not in math_backend
        assert found["best_peer"] == "torch-math"
        assert found["ratio_to_best_peer"] == pytest.approx(math_backend["seconds"] / ours["seconds"])
        for entry in found["results"]:
            assert len(entry["seconds_per_round"]) == 2
            assert entry["seconds_min"] <= entry["seconds"] <= entry["seconds_max"]
            assert entry["host_seconds"] > 0.0
            assert entry["tflops"] == pytest.approx(found["flops"] / entry["seconds"] / 1e12)
            assert math.isfinite(entry["max_error"])
            share = entry["fraction_of_limit"]
            if case.kind == "prefill":
                assert share == pytest.approx(entry["tflops"] / peaks[case.dtype])
            elif case.kind == "decode":
                assert share == pytest.approx(entry["gbytes"] / document["limits"]["copy_gbytes"])
            else:
                assert share is None
    text = cuda_report.report(document)
    assert "fake GPU" in text
    assert all(f"\n{case.name}: " in text for case in cases)
    assert "products, TFLOP/s: float16 " in text
    assert "geometric mean" in text
    assert "2.10 MB" in text


def test_small_arrays_are_flushed_out_of_the_cache_and_large_ones_are_not(gpu: FakeGpu) -> None:
    gpu.l2_bytes = 1 << 30
    assert run(gpu, [small("bert-f32")], [])["cases"][0]["l2_flushed"]
    assert gpu.flushes > 0
    gpu.l2_bytes, gpu.flushes = 1, 0
    assert not run(gpu, [small("bert-f32")], [])["cases"][0]["l2_flushed"]
    assert gpu.flushes == 0


def test_a_wrong_result_is_an_error_and_not_a_time(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    honest = fastattn.mha
    monkeypatch.setattr(fastattn, "mha", lambda *a, **kw: honest(*a, **kw) * 1.1)
    monkeypatch.setattr(cuda_cases, "CASES", SMALL)
    path = tmp_path / "run.json"
    options = ["--cases", "bert-f32", "--rounds", "1", "--peers", "torch-math", "--json", str(path)]
    assert main(["bench", "--device", "cuda", *options]) == 1
    (case,) = json.loads(path.read_text())["cases"]
    assert [entry["name"] for entry in case["results"]] == ["torch-math"]
    assert "wrong result, off by" in case["errors"]["fastattn"]
    assert case["ratio_to_best_peer"] is None
    assert "ERROR fastattn: wrong result" in capsys.readouterr().out


def test_what_fastattn_refuses_is_an_error_and_what_a_peer_refuses_is_noted(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arrays: Any, **options: Any) -> Any:
        raise fastattn.UnsupportedError("device 'cuda': no kernel")

    class Refusing(cuda_peers.Sdpa):
        def make(self, case: Case, q: Any, k: Any, v: Any) -> cuda_peers.Runner:
            raise NotApplicable("not today")

    monkeypatch.setattr(fastattn, "explain", refuse)
    monkeypatch.setattr(cuda_peers, "Sdpa", Refusing)
    (case,) = run(gpu, [small("bert-f32")], ["torch-flash"])["cases"]
    assert case["results"] == []
    assert case["errors"] == {"fastattn": "device 'cuda': no kernel"}
    assert case["skipped"] == {"torch-flash": "not today"}


def test_a_case_that_fails_does_not_end_the_run(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gpu.draw

    def draw(case: Case, seed: int = 0) -> Any:
        if case.name == "bert-f32":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")
        return honest(case, seed)

    monkeypatch.setattr(gpu, "draw", draw)
    document = run(gpu, [small("bert-f32"), small("tiny-f32")], [])
    assert document["failed"] == {"bert-f32": "CUDA out of memory. Tried to allocate 20 GiB"}
    assert [case["name"] for case in document["cases"]] == ["tiny-f32"]
    assert "ERROR bert-f32: CUDA out of memory" in cuda_report.report(document)


def test_long_rounds_are_fewer(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timing, "LONG_ROUND_SECONDS", 0.0)
    implementations, _ = cuda_peers.implement(gpu, [])
    case = cuda_timing.bench_case(small("tiny-f32"), implementations, 9, gpu, Progress(9))
    assert len(case["results"][0]["seconds_per_round"]) == cuda_timing.ROUNDS_OF_LONG_CASE


def test_tf32_cases_come_from_a_child_and_a_child_that_dies_is_reported(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], str]] = []
    cases = [small("bert-f32"), small("bert-tf32")]
    template = run(gpu, [small("bert-f32")], [])["cases"][0]

    def child(command: list[str], env: dict[str, str], **options: Any) -> Any:
        seen.append((command, env[cuda_cases.TF32_VARIABLE]))
        found = {"cases": [{**template, "name": "bert-tf32", "limit_name": "tf32"}], "failed": {}}
        Path(command[-1]).write_text(json.dumps(found))
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(cuda_bench, "subprocess", types.SimpleNamespace(run=child))
    document = cuda_bench.run(cases, 2, ["torch-math"], "cuda-cublas", gpu, COMMAND, lambda _: None)
    assert [case["name"] for case in document["cases"]] == ["bert-f32", "bert-tf32"]
    ((command, value),) = seen
    assert value == "1"
    assert command[:6] == [sys.executable, "-m", "attnbench", "--device", "cuda", "--rounds"]
    assert command[command.index("--cases") + 1] == "bert-tf32"
    assert command[command.index("--kernel") + 1] == "cuda-cublas"
    assert "float32 as TF32" in cuda_report.report(document)

    def dead(command: list[str], **options: Any) -> Any:
        return types.SimpleNamespace(returncode=-6, stderr="line\nCUDA error: gone\n")

    monkeypatch.setattr(cuda_bench, "subprocess", types.SimpleNamespace(run=dead))
    document = cuda_bench.run(cases, 2, [], None, gpu, COMMAND, lambda _: None)
    assert document["failed"] == {"bert-tf32": "its process ended with -6: CUDA error: gone"}


# ---- parts --------------------------------------------------------------------------------------------


def test_the_reference_in_pieces_is_that_of_the_whole(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("x", "", "", "prefill", 3, 6, 3, 20, 20, 8, "float32", causal=True)
    q, k, v = gpu.draw(case)
    whole = cuda_check.Reference(gpu, case, q, k, v)
    monkeypatch.setattr(cuda_check, "SCORE_BYTES", 8.0 * 20 * 20 * 2 * 2)
    parts = cuda_check.Reference(gpu, case, q, k, v)
    np.testing.assert_allclose(parts.out.numpy(), whole.out.numpy(), rtol=1e-12)
    want = fastattn.reference.mha(*(x.transpose(1, 2).numpy() for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(whole.out.transpose(1, 2).numpy(), want, atol=1e-12)
    out = fastattn.mha(q, k, v, layout="bhsd", causal=True)
    assert whole.error(out) < 1e-5
    assert whole.error(out[:, :, :5]) == math.inf
    out[2, 5, 19, 7] = math.nan
    assert whole.error(out) == math.inf


@pytest.mark.parametrize("score_bytes", [1.0, 8.0 * 64 * 4, 8.0 * 64 * 4 * 3, 8.0 * 64 * 4 * 3 * 2, 1e12])
def test_pieces_cover_every_head_once(score_bytes: float) -> None:
    case = Case("x", "", "", "prefill", 5, 12, 3, 8, 8, 4)
    seen = np.zeros((5, 3), int)
    for b, h in cuda_check.pieces(case, score_bytes):
        seen[b, h] += 1
        scores = 8.0 * (b.stop - b.start) * (h.stop - h.start) * 4 * 64
        assert scores <= score_bytes or (b.stop - b.start, h.stop - h.start) == (1, 1)
    assert (seen == 1).all()


def test_a_refusal_holds_the_warnings_without_torchs_sources() -> None:
    warned = [
        "Flash attention kernel not used because: (Triggered internally at /pytorch/a.cpp:1.)",
        "Expected query, key, value to be half (Triggered internally at /pytorch/b.h:2.)",
        "Flash attention kernel not used because: (Triggered internally at /pytorch/a.cpp:1.)",
    ]
    text = cuda_peers.refusal(RuntimeError("No available kernel. Aborting execution.\n  stack"), warned)
    assert text == (
        "No available kernel. Aborting execution.; Flash attention kernel not used because:; "
        "Expected query, key, value to be half"
    )
    assert cuda_peers.refusal(RuntimeError(), []) == "RuntimeError()"
    assert len(cuda_peers.refusal(RuntimeError("x" * 5000), [])) == cuda_peers.LONGEST_REASON


def test_the_first_call_of_a_backend_that_refuses(gpu: FakeGpu) -> None:
    case = small("bert-f32")
    q, k, v = gpu.draw(case)
    runner = cuda_peers.Sdpa(gpu, "torch-cudnn").make(case, q, k, v)
    assert runner.implementation == "CUDNN_ATTENTION"
    with runner.context(), pytest.raises(NotApplicable, match=r"\w"):
        cuda_peers.first_call(runner, lambda run: run())


def test_peers_say_why_they_are_left_out(gpu: FakeGpu) -> None:
    large = dataclasses.replace(small("bert-f32"), q_size=1 << 17, kv_size=1 << 17)
    with pytest.raises(NotApplicable, match="scores would take"):
        cuda_peers.Sdpa(gpu, "torch-math").make(large, None, None, None)
    chunk = Case("x", "", "", "prefill", 1, 2, 2, 8, 16, 8, causal=True)
    with pytest.raises(NotApplicable, match="first key"):
        cuda_peers.Sdpa(gpu, "torch-flash").make(chunk, None, None, None)
    assert cuda_peers.choose(None) == list(cuda_peers.NAMES)
    assert cuda_peers.choose("none") == []
    assert cuda_peers.choose("cupy, torch-math") == ["cupy", "torch-math"]
    with pytest.raises(ValueError, match="torch-flash"):
        cuda_peers.choose("torch")


def test_cupy_computes_the_same_attention(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy in CuPy's place."""
    honest = importlib.import_module

    def imported(name: str) -> Any:
        return np if name == "cupy" else honest(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    peer = cuda_peers.CuPy(gpu)
    for case in (small("bert-f32"), dataclasses.replace(small("llama-2k-bf16"), dtype="float32")):
        q, k, v = gpu.draw(case)
        runner = peer.make(case, q, k, v)
        out = runner.to_torch(runner.run())
        assert cuda_check.Reference(gpu, case, q, k, v).error(out) < 1e-5
    with pytest.raises(NotApplicable, match="bfloat16"):
        peer.make(small("llama-2k-bf16"), None, None, None)


def test_without_cupy_it_is_unavailable(gpu: FakeGpu) -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy is installed")
    _, unavailable = cuda_peers.implement(gpu, ["cupy"])
    assert "cupy" in unavailable["cupy"]


def test_queueing_is_measured_between_synchronizations(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(gpu, "synchronize", lambda: events.append("sync"))
    assert cuda_timing.queue_seconds(gpu, lambda: events.append("call"), 3) > 0.0
    one = ["sync", "call", "call", "call"]
    assert events == one * cuda_timing.QUEUE_REPEATS + ["sync"]


def test_numbers_of_calls() -> None:
    assert cuda_device.calls_for(0.01, 0.03, 50) == 3
    assert cuda_device.calls_for(1e-12, 0.03, 50) == 50
    assert cuda_device.calls_for(10.0, 0.03, 50) == 1


def test_events_and_memory_of_a_real_gpu_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that `Gpu` makes, in their order, with a torch.cuda that only counts."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, other: Any) -> float:
            return 4.0

    free = iter([1000, 400, 500])
    cuda = types.SimpleNamespace(
        Event=Event,
        synchronize=lambda: log.append("synchronize"),
        empty_cache=lambda: log.append("empty_cache"),
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 50,
        max_memory_allocated=lambda: 350,
        mem_get_info=lambda: (next(free), 9999),
        is_available=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=1 << 20),
    )
    sizes: list[int] = []

    def empty(size: int, **options: Any) -> Any:
        sizes.append(size)
        return types.SimpleNamespace(zero_=lambda: log.append("flush"))

    torch = types.SimpleNamespace(cuda=cuda, empty=empty, int8="int8")
    monkeypatch.setattr(cuda_device.importlib, "import_module", lambda name: torch)
    gpu = cuda_device.Gpu()
    assert sizes == [cuda_device.FLUSH_BYTES]
    assert gpu.times(lambda: log.append("call"), 2, flush=True) == [4e-3, 4e-3]
    assert log == [*["flush", "record", "call", "record"] * 2, "synchronize"]
    log.clear()
    result, memory = gpu.call_memory(lambda: types.SimpleNamespace(nbytes=100))
    assert result.nbytes == 100
    assert memory == {"allocated": 200, "device": 500}
    assert log == ["synchronize", "empty_cache", "synchronize"]


def test_nvidia_smi_may_be_missing_or_odd(monkeypatch: pytest.MonkeyPatch) -> None:
    def done(stdout: str) -> Any:
        return lambda *a, **kw: types.SimpleNamespace(stdout=stdout)

    monkeypatch.setattr(cuda_device.subprocess, "run", done("580.95.05, 1980 MHz\nsecond GPU, 1\n"))
    fields = ("driver_version", "clocks.max.sm")
    assert cuda_device.smi(fields) == {"driver_version": "580.95.05", "clocks.max.sm": "1980 MHz"}
    monkeypatch.setattr(cuda_device.subprocess, "run", done("No devices were found\n"))
    assert cuda_device.smi(fields) == {}

    def missing(*a: Any, **kw: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(cuda_device.subprocess, "run", missing)
    assert cuda_device.smi(fields) == {}


def test_sizes_as_text() -> None:
    assert [cuda_report.bytes_text(x) for x in (0, 12345, 2_500_000, 3_000_000_000)] == [
        *("0.00 kB", "12.3 kB", "2.50 MB", "3.00 GB")
    ]


# ---- transfers ------------------------------------------------------------------------------------------


def test_transfers_stand_beside_torch_and_the_cpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    honest = fastattn.mha
    asked: list[str | None] = []

    def mha(*arrays: Any, device: str | None = None, **options: Any) -> Any:
        asked.append(device)
        return honest(*arrays, **options)

    monkeypatch.setattr(fastattn, "mha", mha)
    monkeypatch.setattr(cuda_cases, "TRANSFER_CASES", SMALL)
    monkeypatch.setattr(gpu.torch.Tensor, "pin_memory", lambda self: self)
    path = tmp_path / "run.json"
    options = ["--transfers", "--cases", "bert-f32,decode-4k-f16", "--rounds", "2", "--json", str(path)]
    assert main(["bench", "--device", "cuda", *options]) == 0
    document = json.loads(path.read_text())
    assert document["mode"] == "cuda transfers"
    assert document["complete"]
    assert set(document["link"]) == {
        *("pinned_to_device", "pinned_to_host", "pageable_to_device", "pageable_to_host")
    }
    for case in document["cases"]:
        names = [entry["name"] for entry in case["results"]]
        assert names == ["fastattn", "fastattn, no device", "fastattn, CPU", "torch"]
        assert case["errors"] == case["skipped"] == {}
        assert all(len(entry["seconds_per_round"]) == 2 for entry in case["results"])
    assert set(asked) == {"cuda", None, "cpu"}
    text = capsys.readouterr().out
    assert "copies: pinned to device" in text
    assert "GB/s of arrays" in text


def test_a_transfer_that_takes_too_long_or_is_wrong(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fastattn.mha

    def mha(*arrays: Any, device: str | None = None, **options: Any) -> Any:
        return honest(*arrays, **options) * (1.5 if device == "cuda" else 1.0)

    monkeypatch.setattr(fastattn, "mha", mha)
    case = cuda_transfers.bench_case(small("bert-f32"), 1, gpu, None)
    assert "wrong result" in case["errors"]["fastattn"]
    assert case["best_peer"] is None
    monkeypatch.setattr(cuda_transfers, "LONG_CALL_SECONDS", 0.0)
    case = cuda_transfers.bench_case(small("bert-f32"), 1, gpu, None)
    assert "a call takes" in case["skipped"]["torch"]


# ---- the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "rocm"], "--device: expected cpu or cuda"),
        (["--transfers"], "--transfers: needs --device cuda"),
        (["--device", "cuda", "--scaling"], "--scaling"),
        (["--device", "cuda", "--threads", "1"], "--threads"),
        (["--device", "cuda", "--cases", "vit"], "--cases: 'vit'"),
        (["--device", "cuda", "--quick", "--cases", "bert-f16"], "--quick"),
        (["--device", "cuda", "--rounds", "0"], "--rounds"),
        (["--device", "cuda", "--peers", "numpy"], "--peers"),
        (["--device", "cuda", "--transfers", "--peers", "cupy"], "--peers"),
        (["--device", "cuda", "--transfers", "--cases", "llama-8k-f16"], "--cases"),
        (["--device", "cuda", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_torch_or_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_gpu = types.SimpleNamespace(__version__="9.9", cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", no_gpu)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "PyTorch 9.9 sees no GPU" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "needs PyTorch" in capsys.readouterr().err
