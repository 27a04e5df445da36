"""``python -m fastattn bench --scaling``: time and memory of one call as the sequence grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_tools import quick_limits, same_threads  # noqa: F401

import fastattn
from attnbench import extra_memory, scaling
from attnbench.peers import base as peers
from fastattn.__main__ import main

pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.usefixtures("same_threads", "quick_limits")
TELLS_MEMORY = sys.platform == "linux" and Path("/proc/self/clear_refs").exists()


def test_scaling_writes_times_and_memory_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "SIZES", (64, 128))
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--peers", "none", "--threads", "1", "--rounds", "2", "--json", str(path)]
    assert main(["bench", "--scaling", *options, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run-roofline.png").exists()
    document = json.loads(path.read_text())
    assert (document["mode"], document["schema"]) == ("scaling", scaling.SCHEMA)
    assert {"machine", "commit", "versions", "when", "command"} <= set(document)
    (run,) = document["runs"]
    points = run["points"]
    assert [(x["dtype"], x["size"]) for x in points] == [
        (dtype, size) for dtype in scaling.SCALED_DTYPES for size in (64, 128)
    ]
    for point in points:
        (entry,) = point["results"]
        assert len(entry["seconds_per_round"]) == len(point["peak_gflops_per_round"]) == 2
        assert entry["gflops"] == pytest.approx(point["flops"] / entry["seconds"] / 1e9)
        assert entry["fraction_of_limit"] > 0.0
        assert (entry["extra_bytes"] is not None) == TELLS_MEMORY
        # O(S) at most, and far below the scores.
        assert 0 < point["workspace_bytes"] < 4_000_000
    text = capsys.readouterr().out
    assert "extra memory" in text
    assert "128" in text


def test_torch_is_timed_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(scaling, "SIZES", (64,))
    monkeypatch.setattr(scaling, "extra_bytes", lambda *_: 5)
    (run,) = scaling.run(threads=1, rounds=1)["runs"]
    assert run["peers"] == ["torch"]
    assert [entry["name"] for entry in run["points"][0]["results"]] == ["fastattn", "torch"]


def test_the_lengths_double_up_to_32k() -> None:
    assert scaling.SIZES == (1024, 2048, 4096, 8192, 16384, 32768)


@pytest.mark.skipif(not TELLS_MEMORY, reason="the system does not tell peak memory")
def test_the_memory_that_a_call_takes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = extra_memory.measure("fastattn", 512, "float32", 1)
    assert before is not None
    assert before < 16e6
    honest = fastattn.mha

    def wasteful(*arrays: object, **options: object) -> object:
        out = honest(*arrays, **options)  # type: ignore[arg-type]
        if np.asarray(arrays[0]).shape[1] > extra_memory.WARM_SIZE:
            np.ones(8_000_000)
        return out

    monkeypatch.setattr(fastattn, "mha", wasteful)
    after = extra_memory.measure("fastattn", 512, "float32", 1)
    assert after is not None
    assert 60e6 < after < 90e6


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_memory, "reset_peak", lambda: False)
    assert extra_memory.measure("fastattn", 64, "float32", 1) is None


def test_a_wrong_peer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SIZES", (64,))
    honest = fastattn.mha
    monkeypatch.setattr(fastattn, "mha", lambda *a, **kw: 1.1 * honest(*a, **kw))
    with pytest.raises(RuntimeError, match="fastattn: wrong result"):
        scaling.run(threads=1, rounds=1, peer_names="none")


def test_the_case_is_the_one_that_is_promised() -> None:
    case = scaling.scaling_case(2048, "bfloat16")
    assert case.shape == "B1 H8 S2048 D64 causal"
    assert peers.Inputs.of(scaling.scaling_case(64, "bfloat16")).options == {"causal": True}
