"""Checks README.md, CONTRIBUTING.md and docs/: the code blocks run, the links lead somewhere.

Blocks fenced as ``python`` run in the order of the file, in one namespace and one process per file;
blocks fenced as ``cpp`` that include a header must pass the compiler's syntax check against
csrc/include. A Python block whose fence says ``python no-run`` is only compiled. Other fences (bash,
text, cmake) are not looked at.

Usage: python tools/check_docs.py [file ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def blocks(text: str, language: str) -> list[tuple[int, list[str], str]]:
    """(line of the first code line, words after the language, code) of every block in ``language``."""
    found = []
    for match in FENCE.finditer(text):
        words = match["info"].split()
        if words and words[0] == language:
            found.append((text[: match.start("code")].count("\n") + 1, words[1:], match["code"]))
    return found


def python_errors(path: Path, text: str) -> list[str]:
    # The blocks keep their line numbers, so that a traceback points into the document.
    lines = [""] * text.count("\n")
    for line, words, code in blocks(text, "python"):
        try:
            compile(code, str(path), "exec")
        except SyntaxError as error:
            return [f"{path}:{line + (error.lineno or 1) - 1}: {error}"]
        if "no-run" not in words:
            for number, content in enumerate(code.splitlines()):
                lines[line - 1 + number] = content
    source = "\n".join(lines)
    if not source.strip():
        return []
    program = f"exec(compile({source!r}, {str(path)!r}, 'exec'), {{'__name__': '__main__'}})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    return [f"{path}: {done.stderr}"] if done.returncode else []


def cpp_errors(path: Path, text: str) -> list[str]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    errors = []
    for line, _, code in blocks(text, "cpp"):
        if "#include" not in code:
            continue
        if compiler is None:
            errors.append(f"{path}:{line}: no C++ compiler to check this block with")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "block.cpp"
            source.write_text(code)
            command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
            done = subprocess.run(
                [*command, f"-I{ROOT / 'csrc/include'}", str(source)],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            errors.append(f"{path}:{line}: {done.stderr}")
    return errors


def link_errors(path: Path, text: str) -> list[str]:
    prose = FENCE.sub("", text)
    targets = [match["target"].split("#")[0] for match in LINK.finditer(prose)]
    local = [
        target for target in targets if target and "://" not in target and not target.startswith("mailto:")
    ]
    return [f"{path}: broken link {target}" for target in local if not (path.parent / target).exists()]


def main(arguments: list[str]) -> int:
    paths = [Path(name).resolve() for name in arguments]
    paths = paths or [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    errors = []
    checked = 0
    for path in paths:
        text = path.read_text(encoding="utf-8")
        checked += len(blocks(text, "python")) + len(blocks(text, "cpp"))
        errors += python_errors(path, text) + cpp_errors(path, text) + link_errors(path, text)
    print("\n".join(errors) or f"{len(paths)} files, {checked} code blocks: all right")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
