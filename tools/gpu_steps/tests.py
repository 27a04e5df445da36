"""The step that tests."""

from __future__ import annotations

import configparser
import io
import re
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_steps.commands import ROOT, TAIL, Context, Done, Step

SELECTED_TESTS = "cuda- or test_cuda_"  # ids have the kernel's name; and the files about CUDA
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
VERBOSE = re.compile(rf"^(?P<where>\S+\.py::.+?) (?P<outcome>{'|'.join(OUTCOMES)})\b", re.MULTILINE)
SEE_OUTPUT = "see the output"


def test(context: Context) -> Step:
    """pytest of the CUDA kernels, its files divided among a few processes."""
    if util.find_spec("pytest") is None:
        return Step("skipped", "pytest is not installed")
    ini = context.scratch / "pytest.ini"
    ini.parent.mkdir(parents=True, exist_ok=True)
    ini.write_text(
        pytest_ini(read_toml(ROOT / "pyproject.toml"), util.find_spec("pytest_timeout") is not None)
    )
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda path: -path.stat().st_size)
    parts = [files[i :: context.jobs] for i in range(context.jobs)]
    reports = [context.scratch / f"tests-{i}.xml" for i in range(context.jobs)]
    for report in reports:
        report.unlink(missing_ok=True)
    commands = [pytest_command(ini, xml, part) for xml, part in zip(reports, parts, strict=True) if part]
    done = context.run(*commands)
    counts = empty_counts()
    failures: list[dict[str, str]] = []
    for each, xml in zip(done, reports, strict=False):
        found, failed = read_tests(xml.read_text(errors="replace") if xml.exists() else "", each)
        add_counts(counts, found)
        failures += failed
        # 1: tests failed; 2: interrupted; 5: none selected.
        if each.rc not in (0, 1, 5) and not each.timed_out:
            failures.append({"where": f"pytest ended with {each.rc}", "text": each.output[-TAIL:]})
    return Step(*judge_tests(counts, failures, any(each.timed_out for each in done)), done, counts, failures)


def pytest_command(ini: Path, xml: Path, files: Sequence[Path]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT), "-k", SELECTED_TESTS]
    command += ["-p", "no:cacheprovider", "-v", "--tb=short", f"--junitxml={xml}"]
    return [*command, *map(str, files)]


def pytest_ini(pyproject: dict[str, Any], has_timeout: bool) -> str:
    """The project's own settings, without those of a plugin that is not here: that would be an error."""
    options = dict(pyproject["tool"]["pytest"]["ini_options"])
    if not has_timeout:
        options.pop("timeout", None)
    ini = configparser.RawConfigParser()
    ini["pytest"] = {
        name: _ini_value(value, " " if name == "addopts" else "\n")
        for name, value in options.items()
        if name not in ("testpaths", "minversion")
    }
    text = io.StringIO()
    ini.write(text)
    return text.getvalue()


def _ini_value(value: Any, separator: str) -> str:
    return separator.join(map(str, value)) if isinstance(value, list) else str(value)


def read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    return tomllib.loads(path.read_text())


def empty_counts() -> dict[str, Any]:
    return {"passed": 0, "failed": 0, "errors": 0, "skipped": 0, "skip_reasons": {}, "seconds_of_slowest": {}}


def add_counts(total: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name == "skip_reasons":
            for reason, count in value.items():
                total[name][reason] = total[name].get(reason, 0) + count
        elif name == "seconds_of_slowest":
            both = {**total[name], **value}
            total[name] = dict(sorted(both.items(), key=lambda item: -item[1])[:10])
        else:
            total[name] += value


def parse_junit(text: str) -> tuple[dict[str, Any], list[dict[str, str]]] | None:
    """Counts and failures of pytest's XML; None where it is missing or cut off."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    counts, failures = empty_counts(), []
    for case in root.iter("testcase"):
        where = f"{case.get('classname', '')}::{case.get('name', '')}"
        add_counts(counts, {"seconds_of_slowest": {where: float(case.get("time") or 0.0)}})
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed" if child.tag == "failure" else "errors"
                failures.append(
                    {"where": where, "text": f"{child.get('message') or ''}\n{child.text or ''}".strip()}
                )
            elif child.tag == "skipped":
                outcome = "skipped"
                add_counts(counts, {"skip_reasons": {child.get("message") or "": 1}})
        counts[outcome] += 1
    return counts, failures


def parse_verbose(output: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The same from the lines of `pytest -v`, of a run that was killed, with the test that was running."""
    counts, failures = empty_counts(), []
    lines = output.partition("short test summary info")[0]
    for match in VERBOSE.finditer(lines):
        counts[OUTCOMES[match["outcome"]]] += 1
        if match["outcome"] in ("FAILED", "ERROR"):
            failures.append({"where": match["where"], "text": SEE_OUTPUT})
    for line in lines.splitlines():
        if re.match(r"\S+\.py::", line) and not VERBOSE.match(line):
            failures.append({"where": line.strip(), "text": "was running when pytest ended"})
    return counts, failures


def read_tests(xml: str, done: Done) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Of one process. The XML of one that was interrupted has the test that was running as passed."""
    report, lines = parse_junit(xml), parse_verbose(done.output)
    if report is None:
        return lines
    if not done.timed_out:
        return report
    return {**report[0], **{name: lines[0][name] for name in OUTCOMES.values()}}, [
        *report[1],
        *(failure for failure in lines[1] if failure["text"] != SEE_OUTPUT),
    ]


def judge_tests(counts: dict[str, Any], failures: Sequence[Any], timed_out: bool) -> tuple[str, str]:
    """Status and summary."""
    names = ("passed", "failed", "errors", "skipped")
    text = ", ".join(f"{counts[name]} {name}" for name in names if counts[name]) or "no tests"
    if counts["failed"] or counts["errors"] or (failures and not timed_out):
        return "failed", text + (", cut short" if timed_out else "")
    if timed_out:
        return "partial", f"{text}, cut short"
    return ("passed", text) if counts["passed"] else ("failed", f"{text}: nothing ran")
