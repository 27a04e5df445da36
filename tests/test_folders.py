"""Includes between the folders of csrc run one way: what is below knows nothing of what is above it."""

from __future__ import annotations

import graphlib
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include ["<]([^">]+)[">]', re.MULTILINE)


def folder_graph(root: Path) -> dict[str, set[str]]:
    """Folder -> the other folders whose files it includes."""
    graph: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.*")):
        folder = path.parent.relative_to(root).as_posix()
        included = graph.setdefault(folder, set())
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            for base in (root, root / "include"):
                if (base / name).is_file():
                    included.add((base / name).parent.relative_to(root).as_posix())
        included.discard(folder)
    return graph


def test_no_circle_of_folders():
    graph = folder_graph(CSRC)
    assert {"core", "cpu/flash", "cuda/fused/sm90", "bindings"} <= graph.keys()
    order = list(graphlib.TopologicalSorter(graph).static_order())
    # What every CUDA kernel stands on, and the fused ones, know nothing of cuBLAS.
    assert not {"cuda/blas", "cuda/cublas"} & (graph["cuda/simt"] | graph["cuda/host"] | graph["cuda/fused"])
    assert order.index("threads") < order.index("core") < order.index("cpu") < order.index("bindings")


def test_python_is_in_the_bindings_alone_and_cuda_in_its_folder():
    for path in CSRC.rglob("*.*"):
        folder = path.relative_to(CSRC).parts[0]
        names = INCLUDE.findall(path.read_text(encoding="utf-8"))
        assert folder == "bindings" or not [n for n in names if n.startswith(("pybind11", "Python.h"))], path
        assert folder == "cuda" or not [n for n in names if n.startswith(("cuda_", "cublas", "mma.h"))], path


def test_a_circle_is_found(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.h").write_text(f'#include "{other}/x.h"\n')
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(folder_graph(tmp_path)).static_order())
