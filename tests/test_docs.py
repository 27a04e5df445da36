"""The code blocks of README.md, CONTRIBUTING.md and docs/ run, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def check_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / "tools/check_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_python_blocks_run_and_links_lead_somewhere(check_docs, page):
    text = page.read_text(encoding="utf-8")
    assert not check_docs.python_errors(page, text) + check_docs.link_errors(page, text)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something is preloaded into every process")
def test_cpp_blocks_compile(check_docs):
    page = ROOT / "docs/cpp.md"
    text = page.read_text(encoding="utf-8")
    assert check_docs.blocks(text, "cpp")
    assert not check_docs.cpp_errors(page, text)


def test_the_checker_finds_what_is_wrong(check_docs, tmp_path):
    page = tmp_path / "page.md"
    text = "[nowhere](gone.md)\n```python\nvalue = 1\n```\n\n```python\nassert value == 2\n```\n"
    assert "gone.md" in check_docs.link_errors(page, text)[0]
    errors = check_docs.python_errors(page, text)
    assert len(errors) == 1
    assert "line 7" in errors[0]
    assert not check_docs.python_errors(page, text.replace("== 2", "== 1"))
    assert check_docs.python_errors(page, "```python\nfor\n```\n")
