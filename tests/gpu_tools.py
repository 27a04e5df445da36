"""What the tests of tools/gpu_check.py and of its steps share: commands that nobody runs."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_steps.commands import Context, Done


def done(output: str = "", rc: int | None = 0, timed_out: bool = False) -> Any:
    return Done(["x"], 1.0, rc, timed_out, output)


def fake_runs(monkeypatch: pytest.MonkeyPatch, *results: Any) -> list[list[str]]:
    """The next commands end so; what they were."""
    left, asked = list(results), []

    def run(self: Any, *commands: list[str], share: float = 1.0, **extra: str) -> list[Any]:
        asked.extend(list(command) for command in commands)
        return [left.pop(0) for _ in commands]

    monkeypatch.setattr(Context, "run", run)
    return asked
