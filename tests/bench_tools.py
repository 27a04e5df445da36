"""What the tests of ``bench`` share."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

import fastattn
from attnbench import limits
from attnbench.case_list import CASES
from attnbench.cases import Case
from fastattn._check import machine


@pytest.fixture
def same_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Peers set the threads of their libraries for the whole process: that is undone here."""
    monkeypatch.setenv("NPROC", "1")
    before = fastattn.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(fastattn.set_num_threads, before)
        if machine.installed_version("threadpoolctl") is not None:
            stack.enter_context(importlib.import_module("threadpoolctl").threadpool_limits())
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
        yield


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures each limit briefly, in small buffers."""
    monkeypatch.setattr(limits, "SECONDS", 0.002)
    monkeypatch.setattr(limits, "DRAM_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "caches", lambda: {"L1": "32K", "L2": "64K", "L3": "128K"})


def shrunk(case: Case, most: int = 40) -> Case:
    """The same problem with few tokens and features: every route, in no time."""
    factor = max(1, -(-max(case.q_size, case.kv_size) // most))
    window = case.window
    if window is not None:
        left, right = (side if side is None else max(1, side // factor) for side in window)
        window = left, right
    return replace(
        case,
        batch=min(2, case.batch),
        q_size=-(-case.q_size // factor),
        kv_size=-(-case.kv_size // factor),
        head_dim=32,
        value_dim=None if case.value_dim is None else 16,
        window=window,
    )


def named(name: str) -> Case:
    (case,) = [case for case in CASES if case.name == name]
    return case


def routes(backward: bool = False) -> list[Case]:
    """One case of each kind of problem, shrunk."""
    found: dict[object, Case] = {}
    for case in CASES:
        if (case.kind == "backward") != backward:
            continue
        key = replace(
            case,
            **dict.fromkeys(("name", "title", "family", "plain"), ""),
            **dict.fromkeys(("q_size", "kv_size", "head_dim"), 0),
            kind=str((case.q_size == 1, case.q_size == case.kv_size)),
            batch=min(2, case.batch),
        )
        found.setdefault(key, shrunk(case))
    return list(found.values())
