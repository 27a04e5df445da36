"""The options of ``python -m fastattn bench``, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from bench_tools import quick_limits, same_threads  # noqa: F401

from attnbench import case_list
from attnbench import options as bench_options
from attnbench import run as bench
from fastattn.__main__ import main
from fastattn._check import machine

pytestmark = pytest.mark.usefixtures("same_threads", "quick_limits")
ROOT = Path(__file__).resolve().parents[1]
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


# ---- the benchmark is in the sources, not in the package -----------------------------------------------


def bench_in(folder: Path, installed_from: str | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m fastattn bench`` in a folder, of a package that pip says was installed from somewhere."""
    text = None if installed_from is None else json.dumps({"url": installed_from, "dir_info": {}})
    code = f"""
    import sys
    from importlib import metadata
    import fastattn.__main__ as program
    real = metadata.PathDistribution.read_text
    metadata.PathDistribution.read_text = (
        lambda self, name: {text!r} if name == "direct_url.json" else real(self, name)
    )
    sys.exit(program.main(["bench", "--cases", "tiny", "--rounds", "1", "--peers", "none"]))
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_it_is_found_in_the_checkout_and_where_the_package_was_installed_from(tmp_path: Path) -> None:
    (odd := tmp_path / "with space").symlink_to(ROOT)
    for folder, source in ((ROOT, None), (tmp_path, ROOT.as_uri()), (tmp_path, odd.as_uri())):
        done = bench_in(folder, source)
        assert done.returncode == 0, done.stderr
        assert "tiny" in done.stdout or "one small call" in done.stdout


@pytest.mark.parametrize("source", [None, "https://example.org/fastattn.whl", "file:///nowhere", ""])
def test_without_it_the_message_says_where_it_is(tmp_path: Path, source: str | None) -> None:
    done = bench_in(tmp_path, source)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench: the benchmark is in the sources of fastattn")
    assert "pip install '.[bench]'" in done.stderr
