#!/usr/bin/env python
"""The bits of many small calls, forward and backward, on every CPU kernel, to compare two builds.

    python tools/bits_grid.py OUT.json [--calls N]     # with the one build
    python tools/bits_grid.py OTHER.json [--calls N]   # with the other
    python tools/bits_grid.py --compare OUT.json OTHER.json

Each call has a name that says what is in it. A comparison lists the calls whose outputs differ, by what
they have in common: `padded` is q_lens or kv_lens, `strided` a last axis that is not contiguous. Both files
must come from one machine.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import fastattn as ft

DTYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def make_call(number: int) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Name, kernel, arrays and options of call ``number``."""
    rng = np.random.default_rng(number)
    kernels = [k.name for k in ft.kernels() if k.device == "cpu" and k.usable and k.name != "cpu-reference"]
    kernel = kernels[number % len(kernels)]
    dtype = "bf16" if kernel == "cpu-avx512bf16" else pick(rng, *DTYPES)
    tags = [kernel, dtype]
    b, hkv, g = pick(rng, 1, 1, 2, 3), pick(rng, 1, 1, 2, 3), pick(rng, 1, 1, 2, 4, 5)
    long = rng.random() < 0.08
    sq = int(pick(rng, 1, 1, 2, 3, 7, 17, 33, 65, 130) if not long else pick(rng, 1, 4, 40))
    sk = int(rng.integers(1, 300) if not long else rng.integers(1000, 6000))
    d, dv = int(pick(rng, 8, 16, 33, 64, 80, 128)), int(pick(rng, 8, 16, 31, 64, 96, 128))
    if long:
        b, hkv = 1, 1

    def array(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(DTYPES[dtype])

    q, k, v = array(b, sq, hkv * g, d), array(b, sk, hkv, d), array(b, sk, hkv, dv)
    options: dict[str, Any] = {"kernel": kernel}
    if rng.random() < 0.08:
        k = np.asfortranarray(k)
        if k.strides[-1] != k.itemsize:
            tags.append("strided")
    if rng.random() < 0.3:
        options["causal"] = True
    if rng.random() < 0.2:
        options["window"] = (int(rng.integers(0, sk + 1)), pick(rng, None, 0, 5))
    if rng.random() < 0.15:
        options["q_offset"] = int(rng.integers(-5, sk + 5))
    if rng.random() < 0.2:
        options["mask"] = rng.random((pick(rng, 1, b), pick(rng, 1, hkv * g), pick(rng, 1, sq), sk)) < 0.7
    if rng.random() < 0.2:
        options["bias"] = array(pick(rng, 1, b), pick(rng, 1, hkv * g), pick(rng, 1, sq), sk)
    if rng.random() < 0.12:
        options["alibi_slopes"] = rng.random(hkv * g).astype(np.float32)
    if rng.random() < 0.12:
        options["sinks"] = rng.standard_normal(hkv * g).astype(np.float32)
    if rng.random() < 0.12:
        options["softcap"] = 5.0
    if rng.random() < 0.1:
        options["dropout"], options["seed"] = 0.2, number
    if rng.random() < 0.25:
        options["kv_lens"] = rng.integers(0, sk + 1, b)
        tags.append("padded")
    if rng.random() < 0.15:
        options["q_lens"] = rng.integers(0, sq + 1, b)
        tags.append("padded")
    if rng.random() < 0.05:
        v.reshape(-1)[int(rng.integers(v.size))] = pick(rng, np.nan, np.inf)
        tags.append("bad")
    backward = rng.random() < 0.4
    if not backward and rng.random() < 0.15:
        options["return_weights"] = True
    name = f"{number} " + " ".join(
        [
            *tags,
            *(["backward"] if backward else []),
            f"{b}x{sq}x{sk}x{hkv * g}/{hkv}x{d}/{dv}",
            *list(options)[1:],
        ]
    )
    arrays = {"q": q, "k": k, "v": v}
    if backward:
        arrays["dout"] = array(b, sq, hkv * g, dv)
    return name, kernel, arrays, options


def digest(results: Any) -> str:
    found = hashlib.sha256()
    for x in results:
        found.update(b"-" if x is None else np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]


def hash_call(arrays: dict[str, Any], options: dict[str, Any]) -> str:
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    if "dout" not in arrays:
        results = ft.mha(q, k, v, return_lse=True, **options)
        return digest(results)
    out, lse = ft.mha(q, k, v, return_lse=True, **options)
    return digest([out, lse, *ft.mha_backward(arrays["dout"], q, k, v, out, lse, **options)])


def compare(first: Path, second: Path) -> int:
    old, new = json.loads(first.read_text()), json.loads(second.read_text())
    assert old.keys() == new.keys(), "the two files are of different calls"
    different = [name for name in old if old[name] != new[name]]
    plain = [name for name in different if not {"padded", "strided"} & set(name.split())]
    kinds = collections.Counter(
        " ".join(tag for tag in dict.fromkeys(name.split()) if tag in {"padded", "strided", "backward"})
        or "plain"
        for name in different
    )
    print(f"{len(old)} calls, {len(different)} differ: {dict(kinds)}")
    for name in plain[:40]:
        print("  ", name)
    return bool(plain)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--calls", type=int, default=16000)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.files)
    hashes = {}
    for number in range(args.calls):
        name, _, arrays, options = make_call(number)
        hashes[name] = hash_call(arrays, options)
    args.files[0].write_text(json.dumps(hashes, indent=0) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
