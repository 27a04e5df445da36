"""``python -m fastattn bench``: what it measures, prints and writes, and when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_tools import named, quick_limits, same_threads  # noqa: F401

import fastattn
from attnbench import case_list, host, limits, report, timing
from attnbench import run as bench
from attnbench.cases import Case
from attnbench.peers import base as peers
from attnbench.peers.numpy import NumPy
from attnbench.plots import bars as plot
from attnbench.plots import roofline
from fastattn.__main__ import main
from fastattn._check import machine

pytestmark = pytest.mark.usefixtures("same_threads", "quick_limits")
PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["bench", "--cases", "tiny", "--rounds", "2", "--threads", "1"]
SMALL = [
    Case("small", "small prefill", "one", "prefill", 1, 2, 2, 96, 96, 32, causal=True),
    Case("small-decode", "small decode", "two", "decode", 2, 4, 2, 1, 512, 32),
    Case("small-f64", "double", "one", "prefill", 1, 2, 2, 64, 64, 32, "float64"),
    Case("tiny", "one small call", "two", "latency", 1, 1, 1, 8, 8, 16),
    Case(
        *("small-softcap", "small, softcap", "three", "prefill", 1, 2, 2, 96, 96, 32),
        causal=True,
        softcap=50.0,
        plain="small",
    ),
    Case("small-backward", "small gradients", "four", "backward", 1, 4, 2, 96, 96, 32, causal=True),
]


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_list, "CASES", SMALL)


@pytest.mark.usefixtures("small_cases")
def test_a_run_writes_a_complete_json_and_two_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("threadpoolctl")
    before = fastattn.get_num_threads()
    json_file, plot_file = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--peers", "numpy", "--json", str(json_file), "--plot", str(plot_file)]
    assert main(["bench", "--rounds", "2", "--threads", "1", *options]) == 0
    assert fastattn.get_num_threads() == before
    for path in (plot_file, tmp_path / "run-roofline.png"):
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 20_000

    document = json.loads(json_file.read_text())
    assert document["schema"] == bench.SCHEMA
    assert document["command"][:4] == ["python", "-m", "fastattn", "bench"]
    assert document["machine"]["cpu"] == machine.cpu_model()
    assert document["versions"]["fastattn"] == fastattn.__version__
    assert document["versions"]["numpy"] == np.__version__
    assert {"commit", "when"} <= set(document)
    (run,) = document["runs"]
    assert (run["threads"], run["rounds"], run["peers"]) == (1, 2, ["numpy"])
    assert set(run["threads_limited_by"]) == {"fastattn", "numpy"}
    assert run["skipped_cases"] == run["unavailable_peers"] == {}
    assert [case["name"] for case in run["cases"]] == [case.name for case in SMALL]
    for case in run["cases"]:
        ours, numpy = case["results"]
        assert (ours["name"], numpy["name"]) == ("fastattn", "numpy")
        assert ours["implementation"] == case["kernel"]
        assert case["ratio_to_best_peer"] == pytest.approx(numpy["seconds"] / ours["seconds"])
        assert case["best_peer"] == "numpy"
        assert case["rounds"] == 2
        for entry in case["results"]:
            assert len(entry["seconds_per_round"]) == 2
            assert 0.0 < entry["seconds_min"] <= entry["seconds"] <= entry["seconds_max"] < 60.0
            assert entry["gflops"] == pytest.approx(case["flops"] / entry["seconds"] / 1e9)
            assert list(entry["candidates"]) == [entry["implementation"]]
            assert entry["max_error"] < 1e-4
    check_limits(run)
    check_costs(run["cases"])
    text = capsys.readouterr()
    for case in run["cases"]:
        assert f"\n{case['name']}: " in text.out
    assert "geometric mean" in text.out
    assert "FMA peak" in text.out
    assert "6 cases, 2 implementations, threads: 1: about " in text.err


def check_limits(run: dict[str, Any]) -> None:
    peaks = {(x["kernel"], x["dtype"]): x["gflops"] for x in run["limits"]["fma_peak"]}
    usable = {(k.name, dtype) for k in fastattn.kernels() if k.usable for dtype in k.dtypes}
    assert set(peaks) == usable
    levels = [x["level"] for x in run["limits"]["read_bandwidth"]]
    assert levels == ["L2", "L3", "DRAM"]
    assert all(x["gbytes"] > 0.1 for x in run["limits"]["read_bandwidth"])
    kinds = {case["name"]: case["limit"]["kind"] for case in run["cases"]}
    assert (kinds["small"], kinds["small-decode"], kinds["tiny"]) == ("flops", "bandwidth", None)
    assert kinds["small-backward"] == "flops"
    for case in run["cases"]:
        timed = case["kind"] != "latency"
        assert len(case["peak_gflops_per_round"]) == (2 if timed else 0)
        assert len(case["read_gbytes_per_round"]) == (2 if case["kind"] == "decode" else 0)
        for entry in case["results"]:
            assert (entry["fraction_of_limit"] is not None) == timed
            assert (entry["fraction_of_best_limit"] is not None) == timed
        if case["kind"] in ("prefill", "backward"):
            assert case["limit"]["gflops"] == peaks[case["kernel"], case["dtype"]]


def check_costs(found: list[dict[str, Any]]) -> None:
    by_name = {case["name"]: case for case in found}
    plain, capped = by_name["small"], by_name["small-softcap"]
    assert capped["plain_case"] == "small"
    ours, peer = capped["results"]
    ratios = zip(ours["seconds_per_round"], capped["plain_seconds_per_round"], strict=True)
    # Of two rounds the median is the mean; the case computes as many scores as its plain one.
    assert ours["slowdown"] == capped["slowdown"] == pytest.approx(sum(a / b for a, b in ratios) / 2)
    assert peer["slowdown"] == pytest.approx(peer["seconds"] / plain["results"][1]["seconds"])
    assert [entry["slowdown"] for entry in plain["results"]] == [None, None]
    assert plain["plain_seconds_per_round"] == []


@pytest.mark.usefixtures("small_cases")
def test_the_cost_of_a_window_is_per_computed_score(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = replace(SMALL[0], name="narrow", window=(3, None), plain="small")
    monkeypatch.setattr(case_list, "CASES", [narrow])
    (case,) = bench.run(rounds=1, peer_names="none")["runs"][0]["cases"]
    ratio = case["results"][0]["seconds"] / case["plain_seconds_per_round"][0]
    assert narrow.flops < 0.1 * SMALL[0].flops
    assert case["slowdown"] == pytest.approx(ratio * SMALL[0].flops / narrow.flops)


def test_a_fraction_belongs_to_the_peak_of_its_round() -> None:
    case = named("bert")
    runner = peers.Runner(lambda: None, np.asarray, "none", case.flops)
    # In the second round the whole machine is half as fast.
    entry = timing.Timed("torch", runner, 0.0, 1, 1.0, seconds=[1.0, 2.0, 1.0, 2.0])
    peaks = [2 * case.flops, case.flops, 2 * case.flops, case.flops]
    assert timing._result(case, entry, peaks, [])["fraction_of_limit"] == pytest.approx(0.5)


@pytest.mark.usefixtures("small_cases")
def test_long_rounds_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_ROUND_SECONDS", 0.0)
    document = bench.run(cases="tiny", rounds=5, peer_names="none")
    (case,) = document["runs"][0]["cases"]
    assert case["rounds"] == len(case["results"][0]["seconds_per_round"]) == timing.ROUNDS_OF_LONG_CASE


@pytest.mark.usefixtures("small_cases")
def test_peers_with_long_calls_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(timing, "LONG_CALL_SECONDS", 1e-9)
    (run,) = bench.run(cases="tiny,small", rounds=1, peer_names="numpy")["runs"]
    assert all(len(case["results"]) == 1 for case in run["cases"])
    assert "a call is expected to take" in run["cases"][0]["skipped"]["numpy"]
    assert run["cases"][0]["best_peer"] is None
    monkeypatch.setattr(timing, "NUMPY_FLOPS", 1e30)
    (run,) = bench.run(cases="small", rounds=1, peer_names="numpy")["runs"]
    assert "a call takes" in run["cases"][0]["skipped"]["numpy"]


def test_a_long_call_is_foreseen_from_the_largest_case_so_far() -> None:
    speeds = timing.Speeds()
    small, large = named("llama-512-f32"), named("llama-8k-f32")

    def runner(case: Case) -> peers.Runner:
        return peers.Runner(lambda: None, np.asarray, "sdpa", case.flops)

    speeds.refuse_long_call("torch", large, runner(large))
    speeds.add("torch", small, runner(small), 1.0)
    with pytest.raises(peers.NotApplicable, match=r"expected to take 25\d s"):
        speeds.refuse_long_call("torch", large, runner(large))
    speeds.refuse_long_call("torch", small, runner(small))
    speeds.refuse_long_call("jax", large, runner(large))


@pytest.mark.usefixtures("small_cases")
def test_cases_larger_than_the_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 50_000)
    (run,) = bench.run(cases="tiny,small", rounds=1, peer_names="none")["runs"]
    assert [case["name"] for case in run["cases"]] == ["tiny"]
    assert "of memory" in run["skipped_cases"]["small"]


def test_the_plot_shows_every_case_of_the_list(tmp_path: Path) -> None:
    """All cases with invented times: labels and legends have to fit."""
    matplotlib = pytest.importorskip("matplotlib")
    document = bench.run(cases="tiny", rounds=1, peer_names="none")
    (run,) = document["runs"]
    (template,) = run["cases"]
    ours = template["results"][0]
    run["peers"] = ["torch"]
    document["versions"].setdefault("torch", "0")
    run["cases"] = [
        {
            **template,
            **{key: getattr(case, key) for key in ("name", "title", "family", "kind", "shape", "dtype")},
            **{key: getattr(case, key) for key in ("flops", "bytes", "feature")},
            "results": [
                {**ours, "name": name, "gflops": speed, "gbytes": 1.0, "fraction_of_limit": share}
                for name, speed, share in (("fastattn", 9.0, 0.9), ("torch", 5.0, 0.5))
            ],
            "best_peer": "torch",
            "ratio_to_best_peer": 1.8,
        }
        for case in case_list.CASES
    ]
    bars, roofs = tmp_path / "run.svg", tmp_path / "roofs.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot.draw(document, str(bars))
        roofline.draw(document, str(roofs))
    text = bars.read_text()
    assert all(case.title in text and case.family in text for case in case_list.CASES)
    text = roofs.read_text()
    labels = {case.name.removesuffix(f"-{plot.SHORT[case.dtype]}") for case in case_list.CASES}
    assert all(f">{label}<" in text for label in labels - {"bert"})
    assert "FMA peak" in text
    assert "reading DRAM" in text
    run["cases"] = []
    with pytest.raises(ValueError, match="no cases"):
        plot.draw(document, str(bars))


def test_a_peer_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("threadpoolctl")
    honest = NumPy._maker

    def maker(self: NumPy, inputs: peers.Inputs) -> peers.Runner:
        runner = honest(self, inputs)
        return peers.Runner(lambda: 1.1 * runner.run(), runner.to_numpy, "wrong", runner.flops)

    monkeypatch.setattr(NumPy, "_maker", maker)
    assert main([*TINY, "--peers", "numpy"]) == 0
    text = capsys.readouterr().out
    assert "numpy: wrong result, off by 0.1" in text
    assert "geometric mean" not in text
    # Beside a right one it only loses.
    monkeypatch.setattr(NumPy, "candidates", lambda self, case: [self._maker, lambda x: honest(self, x)])
    (run,) = bench.run(cases="tiny", rounds=1, peer_names="numpy")["runs"]
    assert list(run["cases"][0]["results"][1]["candidates"]) == ["matmul, exp, matmul"]


@pytest.mark.usefixtures("small_cases")
def test_the_fastest_candidate_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    honest = NumPy._maker

    def slow(self: NumPy, inputs: peers.Inputs) -> peers.Runner:
        runner = honest(self, inputs)

        def run() -> Any:
            for _ in range(20):
                out = runner.run()
            return out

        return peers.Runner(run, runner.to_numpy, "slow", runner.flops)

    def candidates(self: NumPy, case: Case) -> list[peers.Maker]:
        return [lambda x: slow(self, x), lambda x: honest(self, x), lambda x: slow(self, x)]

    monkeypatch.setattr(NumPy, "candidates", candidates)
    (run,) = bench.run(cases="small", rounds=1, peer_names="numpy")["runs"]
    entry = run["cases"][0]["results"][1]
    assert entry["implementation"] == "matmul, exp, matmul"
    assert set(entry["candidates"]) == {"slow", "matmul, exp, matmul"}


def test_bench_stops_when_fastattn_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fastattn.mha
    monkeypatch.setattr(fastattn, "mha", lambda *a, **kw: 1.1 * honest(*a, **kw))
    with pytest.raises(RuntimeError, match="wrong result"):
        main([*TINY, "--peers", "none"])


@pytest.mark.usefixtures("small_cases")
def test_bench_stops_when_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fastattn.mha_backward

    def wrong(*arrays: Any, **options: Any) -> fastattn.Gradients:
        gradients = honest(*arrays, **options)
        return gradients._replace(dk=1.1 * gradients.dk)

    monkeypatch.setattr(fastattn, "mha_backward", wrong)
    with pytest.raises(RuntimeError, match="wrong result"):
        main(["bench", "--cases", "small-backward", "--rounds", "1", "--peers", "none"])


@pytest.mark.usefixtures("small_cases")
def test_a_forced_kernel_computes_the_gradients_too() -> None:
    (run,) = bench.run(cases="small-backward", rounds=1, peer_names="none", kernel="cpu-scalar")["runs"]
    (case,) = run["cases"]
    assert case["kernel"] == case["results"][0]["implementation"] == "cpu-scalar"


def test_the_report_of_a_run_where_a_peer_is_faster() -> None:
    document = bench.run(cases="tiny", rounds=1, peer_names="none")
    (case,) = document["runs"][0]["cases"]
    fast = dict(case["results"][0], name="torch", seconds=case["results"][0]["seconds"] / 4)
    case["results"].append(fast)
    case["best_peer"], case["ratio_to_best_peer"] = "torch", 0.25
    text = report.report(document)
    assert "0.25x the speed of torch" in text
    assert "faster than every peer in 0 of 1 cases" in text


def test_buffers_fit_their_level_of_memory() -> None:
    sizes = limits.level_bytes({"L1": "32K", "L2": "1024K", "L3": "32M"}, threads=2)
    assert sizes == {"L2": 1 << 20, "L3": 16 << 20, "DRAM": 256 << 20}
    # Many threads have more L2 than half of L3; unknown caches are taken for small ones.
    assert limits.level_bytes({"L2": "1M", "L3": "8M"}, threads=8)["L3"] == 8 << 20
    assert set(limits.level_bytes({}, threads=1)) == {"L2", "L3", "DRAM"}
    assert limits.level_bytes({"L2": "odd"}, 2)["L2"] == limits.CACHE_BYTES["L2"]
