"""One command per chore: ``nox -s <session>``; arguments after ``--`` reach the tool that does the work."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from requirements import requirements

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "cpp", "tests"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *extras: str) -> None:
    """Installs what ``extras`` need, without building fastattn."""
    session.install(*requirements(*extras))


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy, clang-format; ``-- fix`` rewrites what it can."""
    install(session, "lint")
    session.run("tools/lint.sh", *session.posargs, external=True)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """pytest on the installed package, on every Python that is here."""
    session.install("-C", "build-dir=build/{wheel_tag}", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def models(session: nox.Session) -> None:
    """Every model class of Transformers beside "eager", about half an hour of one core; ``-- llama bert``."""
    session.install(".[test]")
    session.run("python", "tools/walk_models.py", *session.posargs)


@nox.session
def cpp(session: nox.Session) -> None:
    """C++ tests of the release preset; ``-- -R dispatch`` picks some."""
    install(session, "build")
    session.run("tools/cpp.sh", "release", *session.posargs, external=True)


@nox.session
def asan(session: nox.Session) -> None:
    """C++ tests and pytest under the address and undefined-behaviour sanitizers."""
    install(session, "build", "test")
    if not session.posargs:
        session.run("tools/cpp.sh", "asan", external=True)
    session.run("tools/sanitized_pytest.sh", "asan", *session.posargs, external=True)


@nox.session
def tsan(session: nox.Session) -> None:
    """C++ tests and the pytest tests of threads under the thread sanitizer."""
    install(session, "build", "test")
    if not session.posargs:
        session.run("tools/cpp.sh", "tsan", external=True)
    session.run("tools/sanitized_pytest.sh", "tsan", *session.posargs, external=True)


@nox.session
def emulated(session: nox.Session) -> None:
    """pytest of the CUDA kernels on the emulated GPU; no CUDA is needed."""
    install(session, "build", "test")
    session.run("tools/emulated_pytest.sh", *session.posargs, external=True)


@nox.session
def neon(session: nox.Session) -> None:
    """Cross build for AArch64; needs g++-aarch64-linux-gnu and qemu-user."""
    install(session, "build")
    session.run("tools/cpp.sh", "neon", *session.posargs, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The C++ benchmark, then ``python -m fastattn bench`` beside the installed peers."""
    install(session, "build", "bench")
    session.run("cmake", "--preset", "release")
    session.run("cmake", "--build", "--preset", "release", "--target", "bench_attention")
    session.run("build/release/bench_attention", external=True)
    session.install(".")
    session.run("python", "-m", "fastattn", "bench", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Runs the code blocks of README.md and docs/, and follows their links."""
    session.install(".")
    session.run("python", "tools/check_docs.py", *session.posargs)
