"""bench/sharing.py: what it measures, writes and refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from bench_tools import same_threads  # noqa: F401

PATH = Path(__file__).resolve().parents[1] / "bench/sharing.py"


@pytest.fixture
def sharing() -> Any:
    spec = importlib.util.spec_from_file_location("sharing", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_callers_call_at_the_same_time(sharing: Any) -> None:
    together = threading.Barrier(2)  # one caller alone would wait in vain
    assert sharing.callers(lambda: together.wait(timeout=60), 2, 0.0) >= 0.0
    calls: list[int] = []
    sharing.callers(lambda: calls.append(threading.get_ident()), 3, 0.0)
    assert len(calls) == 3


def test_busy_processes_run_and_end(sharing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(sharing, "subprocess", type("", (), {"Popen": staticmethod(start)}))
    with contextlib.suppress(KeyboardInterrupt), sharing.busy(2):
        assert [each.poll() for each in started] == [None, None]
        raise KeyboardInterrupt
    assert len(started) == 2
    assert all(each.poll() is not None for each in started)


@pytest.mark.usefixtures("same_threads")
def test_a_run_is_written(
    sharing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sharing.json"
    options = ["--cases", "tiny", "--peers", "numpy", "--rounds", "2", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["sharing.py", *options, "--json", str(out)])
    assert sharing.main() == 0
    document = json.loads(out.read_text())
    assert document["mode"] == "sharing"
    assert [(x["case"], x["implementation"]) for x in document["results"]] == [
        *(("tiny", "fastattn"), ("tiny", "numpy")),
    ]
    for result in document["results"]:
        for name in ("seconds_alone", "two_callers", "busy_machine"):
            rounds = result["per_round"][name]
            assert len(rounds) == 2
            assert min(rounds) <= result[name] <= max(rounds)
            assert min(rounds) > 0
    assert "two callers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--cases", "nobody"], "nobody"), (["--rounds", "0"], "rounds"), (["--peers", "abacus"], "abacus")],
)
def test_wrong_options(
    sharing: Any,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["sharing.py", *options])
    with pytest.raises(SystemExit):
        sharing.main()
    assert message in capsys.readouterr().err
