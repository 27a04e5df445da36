"""The options of ``python -m fastattn bench``, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bench_tools import quick_limits, same_threads  # noqa: F401

from fastattn.__main__ import main
from fastattn._cli import bench, bench_options, case_list, machine

pytestmark = pytest.mark.usefixtures("same_threads", "quick_limits")
PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["bench", "--cases", "tiny", "--rounds", "2", "--threads", "1"]


def test_several_numbers_of_threads_are_a_run_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    options = ["--peers", "none", "--threads", "2,1", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "--cases", "tiny", *options, "--plot", str(tmp_path / "run.png")]) == 0
    document = json.loads(path.read_text())
    assert [run["threads"] for run in document["runs"]] == [2, 1]
    assert document["command"][:4] == ["python", "-m", "fastattn", "bench"]
    assert (tmp_path / "run-roofline.png").read_bytes().startswith(PNG)
    text = capsys.readouterr().out
    assert "threads: 2, " in text
    assert "threads: 1, " in text


def test_a_failed_run_of_several_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--peers", "none", "--threads", "1,2", "--kernel", "cpu-mmx"]
    assert main(["bench", "--cases", "tiny", *options]) == 2
    text = capfd.readouterr().err
    assert "cpu-mmx" in text
    assert "the run with 1 ended with 2" in text


def test_plot_has_a_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--peers", "none", "--plot"]) == 0
    assert sorted(os.listdir()) == ["bench-roofline.png", "bench.png"]


def test_without_peers_and_with_a_forced_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--peers", "none", "--kernel", "cpu-reference"]) == 0
    text = capsys.readouterr().out
    assert "fastattn (cpu-reference)" in text
    assert "peers: none" in text


def test_quick_takes_the_headline_cases_and_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def run(**kwargs: Any) -> dict[str, Any]:
        asked.append(kwargs)
        return {"runs": [], "machine": machine.describe(), "versions": {"fastattn": "0"}}

    monkeypatch.setattr(bench, "run", run)
    for options in (["--quick"], ["--quick", "--rounds", "2"], ["--cases", "tiny"]):
        assert main(["bench", *options]) == 0
    assert [(x["cases"], x["rounds"]) for x in asked] == [
        (case_list.QUICK, bench_options.QUICK_ROUNDS),
        (case_list.QUICK, 2),
        ("tiny", bench.ROUNDS),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "tiny,nonsense"], "nonsense"),
        (["--peers", "tensorflow"], "tensorflow"),
        (["--cases", "tiny", "--threads", "0"], "--threads: expected at least 1"),
        (["--cases", "tiny", "--threads", "1,two"], "--threads: expected numbers"),
        (["--cases", "tiny", "--threads", "1,1"], "--threads: expected different numbers"),
        (["--cases", "tiny", "--rounds", "0"], "--rounds"),
        (["--cases", "tiny", "--threads", "1,2", "--rounds", "0"], "--rounds"),
        (["--cases", "tiny", "--kernel", "cpu-mmx"], "cpu-mmx"),
        (["--cases", "tiny", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["--cases", "tiny", "--plot", "run.docx"], "run.docx"),
        (["--cases", "tiny", "--quick"], "--quick"),
        (["--cases", "tiny", "--scaling"], "--scaling"),
        (["--quick", "--scaling"], "--scaling"),
        (["--kernel", "cpu-scalar", "--scaling"], "--scaling"),
        (["--peers", "numpy", "--scaling"], "--scaling: expected --peers torch"),
    ],
)
def test_bench_refuses_wrong_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(["--peers", "none"] if "--peers" not in options else []), *options]) == 2
    assert message in capsys.readouterr().err
