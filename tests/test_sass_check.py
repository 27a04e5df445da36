"""tools/sass_check.py on listings that are made up: what it reads, and what it objects to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass_check", ROOT / "tools/sass_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sass_check = load()

SM80 = ["LDGSTS.E [R1], [R2.64]", "LDSM.16.M88.4 R4, [R1]", "HMMA.16816.F32 R8, R4, R6, R8", "EXIT"]
SM90 = [
    "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R10], R15",
    "HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT",
    "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0",
    "UTMALDG.4D [UR8], [UR14]",
]


def listing(functions: dict[str, list[str]], architecture: str = "sm_80") -> str:
    text = f"\nFatbin elf code:\n\tcode for {architecture}\n"
    for name, instructions in functions.items():
        text += f"\t\tFunction : {name}\n"
        for n, instruction in enumerate(instructions):
            text += f"        /*{16 * n:04x}*/                   {instruction} ;  /* 0x0 */\n"
    return text


def mangled(kernel: str, types: str = "3F16", arguments: str = "Li64ELi2ELi64EEELb1") -> str:
    return f"_ZN8fastattn4cuda1_{len(kernel)}{kernel}INS1_{types}ENS1_9FlashTileI{arguments}EEEv"


def faults_of(kernel: str, instructions: list[str], arguments: str = "Li64ELi2ELi64EEELb1") -> Any:
    (function,) = sass_check.parse(listing({mangled(kernel, arguments=arguments): instructions}))
    return sass_check.faults(function)


def test_it_reads_kernel_types_and_arguments() -> None:
    functions = {mangled("flash_forward", "4BF16"): SM80, mangled("softmax_rows"): ["EXIT"]}
    (function,) = sass_check.parse(listing(functions, "sm_90"))
    assert (function.architecture, function.kernel) == ("sm_90 bf16", "flash_forward")
    assert function.arguments == "64, 2, 64, true"
    assert function.instructions == SM80


@pytest.mark.parametrize(
    ("name", "good", "product"),
    [
        ("flash_forward", SM80, "HMMA"),
        ("decode_forward", SM80, "HMMA"),
        ("flash_forward_sm90", SM90, "HGMMA"),
    ],
)
def test_what_is_missing_is_said(name: str, good: list[str], product: str) -> None:
    assert faults_of(name, good) == []
    for word in (product, good[0].split(".")[0], good[1].split(".")[0]):
        assert f"no {word}" in str(faults_of(name, [text for text in good if word not in text]))


def test_local_memory_between_products_is_a_spill() -> None:
    product = SM80[2]
    loop = [*SM80[:3], "STL [R1+0x4], R7", product, "LDL R7, [R1+0x4]", "EXIT"]
    assert faults_of("flash_forward", loop) == ["1 accesses to local memory in the main loop, 0 are known"]
    assert faults_of("flash_forward", loop, "Li64ELi2ELi64EEELb0") == []  # elementwise: a few are expected
    many = [*SM80[:3], *["STL [R1+0x4], R7"] * 9, product]
    assert "9 accesses" in str(faults_of("flash_forward", many, "Li64ELi2ELi64EEELb0"))


def test_serialised_products_are_found() -> None:
    serialised = [text + ", gsb0" if "HGMMA" in text and "gsb0" not in text else text for text in SM90 * 4]
    assert faults_of("flash_forward_sm90", SM90 * 4) == []
    assert "products are serialised: 8 groups" in str(faults_of("flash_forward_sm90", serialised))


def test_warp_groups_must_find_their_registers() -> None:
    name = mangled("flash_forward_sm90", arguments="Lb1ELi64ELi64ELi128ELi3ELi32ELi160ELi4EEELb1")
    (function,) = sass_check.parse(listing({name: SM90}))
    usage = f" Function {name}:\n  REG:128 STACK:0 SHARED:1024 LOCAL:0\n"
    assert sass_check.registers(usage) == {name: 128}
    assert sass_check.faults_of_pool(function, 128) == []
    assert "want 512 registers, the launch has 480" in str(sass_check.faults_of_pool(function, 120))


def test_a_kernel_without_code_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "cuobjdump"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{listing({mangled('flash_forward'): SM80})}\nEOF\n")
    program.chmod(0o755)
    monkeypatch.setattr(sass_check, "find", lambda name: str(program))
    assert sass_check.main(["library.a"]) == 1
    printed = capsys.readouterr().out
    assert "decode_forward: no code of it in library.a" in printed
    assert "flash_forward        64, 2, 64, true" in printed
