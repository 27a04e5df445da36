"""Trains an encoder-decoder Transformer to translate, with fastattn as all of its attention.

    pip install '.[examples]'
    python examples/translate.py
    python examples/translate.py --attention fastattn --source french

The model of Vaswani et al. 2017 (arXiv:1706.03762), small: 2 + 2 layers of width 128 with 4 heads, trained
from scratch with that paper's schedule, label smoothing and dropout, on sentences of translation_corpus.py.
Attention occurs in three places: among the words of the source, among the words translated so far (causal),
and from these to the source. A word is a token. Letters in the shapes: B sentences, S words of the longest
source, T of the longest target, H heads, D features of a head, E = H*D.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import NamedTuple

import torch
import training
import translation_corpus
from minilm import INSTALL
from torch import nn

import fastattn

PAD, BEGIN, END = 0, 1, 2
WIDTH, HEADS, LAYERS, INNER = 128, 4, 2, 512
DROPOUT = 0.1  # of embeddings and of what is added to the residual stream; not of attention weights
SMOOTHING = 0.1
WARM_UP = 0.2  # of all steps
SHOWN = 8


def attend_fastattn(q, k, v, lengths, causal):
    """(B,Sq,H,D) for q (B,Sq,H,D), k and v (B,Sk,H,D); lengths (B,): the keys that are not padding."""
    import fastattn.torch

    return fastattn.torch.mha(q, k, v, causal=causal, kv_lens=lengths)


def attend_sdpa(q, k, v, lengths, causal):
    """The same with torch: heads first, lengths as a mask."""
    mask = None
    if lengths is not None:
        mask = (torch.arange(k.shape[1]) < lengths[:, None])[:, None, None]  # (B,1,1,Sk)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


ATTEND = {"fastattn": attend_fastattn, "sdpa": attend_sdpa}


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def project(self, x, memory):
        """q (B,Sq,H,D) of x (B,Sq,E), k and v (B,Sk,H,D) of memory (B,Sk,E)."""
        return self.q(x).unflatten(-1, (HEADS, -1)), *self.kv(memory).unflatten(-1, (2, HEADS, -1)).unbind(2)

    def forward(self, x, memory, lengths=None, causal=False):
        return self.out(self.attend(*self.project(x, memory), lengths, causal).flatten(2))

    @torch.no_grad()
    def weights(self, x, memory, lengths):
        """Attention weights (B,H,Sq,Sk)."""
        return fastattn.mha(*self.project(x, memory), kv_lens=lengths, return_weights=True)[1]


class Layer(nn.Module):
    """Of the encoder; with `cross` of the decoder."""

    def __init__(self, attend, cross):
        super().__init__()
        self.self_attention = Attention(attend)
        self.cross_attention = Attention(attend) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 + cross))
        self.dropout = nn.Dropout(DROPOUT)

    def attend_to_self(self, x, lengths):
        """Padding stands at the end, so that causal attention never sees it from a real word."""
        causal = self.cross_attention is not None
        out = self.self_attention(x, x, None if causal else lengths, causal)
        return self.norms[0](x + self.dropout(out))

    def forward(self, x, lengths, memory=None):
        x = self.attend_to_self(x, lengths)
        if self.cross_attention is not None:
            x = self.norms[1](x + self.dropout(self.cross_attention(x, memory, lengths)))
        return self.norms[-1](x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    def __init__(self, source_words, target_words, attend):
        super().__init__()
        self.source_embedding = nn.Embedding(source_words, WIDTH)
        self.target_embedding = nn.Embedding(target_words, WIDTH)  # of the output too (section 3.4)
        self.encoder = nn.ModuleList(Layer(attend, cross=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(Layer(attend, cross=True) for _ in range(LAYERS))
        self.dropout = nn.Dropout(DROPOUT)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=WIDTH**-0.5)

    def embed(self, embedding, words):
        return self.dropout(embedding(words) * math.sqrt(WIDTH) + positions(words.shape[1]))

    def encode(self, source, lengths):
        """(B,S,E) for source (B,S), of which the first `lengths` (B,) are words."""
        x = self.embed(self.source_embedding, source)
        for layer in self.encoder:
            x = layer(x, lengths)
        return x

    def decode(self, target, memory, lengths):
        """Logits (B,T,V) of the word after each of target (B,T)."""
        x = self.embed(self.target_embedding, target)
        for layer in self.decoder:
            x = layer(x, lengths, memory)
        return x @ self.target_embedding.weight.T

    @torch.no_grad()
    def cross_weights(self, target, source, lengths):
        """Where each word of target (B,T) looks in source: (B,H,T,S) of the last layer."""
        memory, x = self.encode(source, lengths), self.embed(self.target_embedding, target)
        for layer in self.decoder[:-1]:
            x = layer(x, lengths, memory)
        last = self.decoder[-1]
        return last.cross_attention.weights(last.attend_to_self(x, None), memory, lengths)


def positions(length):
    """Sines and cosines (length,E) of Vaswani et al., section 3.5."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Vocabulary:
    def __init__(self, sentences):
        words = Counter(word for sentence in sentences for word in sentence.split())
        self.words = ["<pad>", "<begin>", "<end>", *sorted(words)]
        self.numbers = {word: n for n, word in enumerate(self.words)}

    def encode(self, sentence):
        return [self.numbers[word] for word in sentence.split()]

    def decode(self, numbers):
        """The sentence before <end>."""
        numbers = list(numbers)
        end = numbers.index(END) if END in numbers else len(numbers)
        return " ".join(self.words[n] for n in numbers[:end])


class Batch(NamedTuple):
    source: torch.Tensor  # (B,S)
    lengths: torch.Tensor  # (B,) words of each source
    given: torch.Tensor  # (B,T) <begin> and the target
    wanted: torch.Tensor  # (B,T) the target and <end>


class Task(NamedTuple):
    """Texts in one direction."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    source: Vocabulary
    target: Vocabulary


def make_task(corpus, source="english"):
    step = 1 if source == "english" else -1
    train, test = ([(p.english, p.french)[::step] for p in pairs] for pairs in (corpus.train, corpus.test))
    sources, targets = zip(*train, strict=True)
    return Task(train, test, Vocabulary(sources), Vocabulary(targets))


def collate(task, pairs):
    sources = [task.source.encode(source) for source, _ in pairs]
    targets = [task.target.encode(target) for _, target in pairs]
    return Batch(
        training.padded(sources, PAD),
        torch.tensor([len(source) for source in sources]),
        training.padded([[BEGIN, *target] for target in targets], PAD),
        training.padded([[*target, END] for target in targets], PAD),
    )


def make_batches(task, size, epochs, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(source.split()) for source, _ in task.train]
    return [
        collate(task, [task.train[n] for n in chosen])
        for _ in range(epochs)
        for chosen in training.batches_of_alike_lengths(lengths, size, generator)
    ]


def loss_of(model, batch):
    logits = model.decode(batch.given, model.encode(batch.source, batch.lengths), batch.lengths)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.wanted.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING
    )


def warm_up_and_root(total):
    """factor(step): linearly up to 1, then down with the root of the step (section 5.3)."""
    rise = max(1, round(WARM_UP * total))
    return lambda step: min((step + 1) / rise, math.sqrt(rise / (step + 1)))


def train(names, task, batch_size, epochs, lr, seed):
    """{attention: model} and {attention: training.Curve}: all from the same weights, on the same batches."""
    models = {}
    for name in names:
        torch.manual_seed(seed)
        models[name] = Transformer(len(task.source.words), len(task.target.words), ATTEND[name])
    batches = make_batches(task, batch_size, epochs, seed)

    def make_optimizer(model):
        return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9)

    factor = warm_up_and_root(len(batches))
    return models, training.train(models, batches, loss_of, make_optimizer, factor, seed)


@torch.no_grad()
def translate(model, task, sentences, limit=32):
    """The most probable next word again and again, until <end>."""
    model.eval()
    sources = [task.source.encode(sentence) for sentence in sentences]
    lengths = torch.tensor([len(source) for source in sources])
    memory = model.encode(training.padded(sources, PAD), lengths)
    words = torch.full((len(sources), 1), BEGIN)
    while words.shape[1] <= limit and not (words == END).any(1).all():
        best = model.decode(words, memory, lengths)[:, -1].argmax(-1, keepdim=True)
        words = torch.cat([words, best], dim=1)
    return [task.target.decode(row[1:].tolist()) for row in words]


def plot_attention(path, model, task, sentences):
    """Cross-attention of the last layer on some sentences, a row of pictures each: one for each head."""
    from matplotlib.figure import Figure

    model.eval()
    answers = translate(model, task, sentences)
    figure = Figure(figsize=(4 * HEADS, 4.3 * len(sentences)), dpi=120, layout="constrained")
    panels = figure.subplots(len(sentences), HEADS, squeeze=False)
    for row, source, target in zip(panels, sentences, answers, strict=True):
        batch = collate(task, [(source, target)])
        weights = model.cross_weights(batch.given, batch.source, batch.lengths)[0].numpy()  # (H,T,S)
        for head, axes in enumerate(row):
            image = axes.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks(range(weights.shape[2]), source.split(), rotation=90)
            axes.set_yticks(range(weights.shape[1]), [*target.split(), "<end>"])
            axes.tick_params(length=2)
            axes.set_title(f"head {head}", fontsize=11)
    figure.suptitle("where each word of the translation (row), when chosen, looks in the source (column)")
    figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.5, label="attention weight")
    figure.savefig(path)


def parse_arguments(argv):
    defaults = {"epochs": 10, "batch_size": 64, "sentences": 8000, "test_sentences": 400, "lr": 2e-3}
    parser = training.parser_of(__doc__.splitlines()[0], **defaults)
    what = "translate from this language (default: %(default)s)"
    parser.add_argument("--source", choices=["english", "french"], default="english", help=what)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        import matplotlib  # noqa: F401  (needed only at the end: say now if it is missing)
    except ModuleNotFoundError as error:
        raise SystemExit(f"translate.py: the package {error.name} is not installed; {INSTALL}") from None
    corpus = translation_corpus.make(args.sentences, args.test_sentences, args.seed)
    task = make_task(corpus, args.source)
    print(
        f"{len(task.train)} training sentences, {len(task.source.words)} and {len(task.target.words)} words, "
        f"{len(corpus.held_out)} combinations held out, {args.epochs} epochs"
    )
    names = training.attentions(args.attention)
    models, curves = train(names, task, args.batch_size, args.epochs, args.lr, args.seed)
    training.print_summary(curves)

    sources, right = zip(*task.test, strict=True)
    print(f"\nexact translations of {len(sources)} sentences with held-out combinations")
    for name, model in models.items():
        start = time.perf_counter()
        answers = translate(model, task, sources)
        seconds = time.perf_counter() - start
        exact = sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)
        print(f"{name:<10}{exact:>8.1%}   decoded in {seconds:.1f} s")
    print(f"\nthe first {SHOWN}, with attention {name}")
    for source, answer, wanted in list(zip(sources, answers, right, strict=True))[:SHOWN]:
        print(f"  {source}\n    {answer}" + (f"\n    wrong: {wanted}" if answer != wanted else ""))

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [args.out / f"translate_{name}.png" for name in ("loss", "attention")]
    title = f"a Transformer learns to translate from {args.source}: loss of each step"
    training.plot_losses(pictures[0], curves, title)
    chosen = [max((s for s in sources if s[-1] == mark), key=lambda s: len(s.split())) for mark in ".?"]
    plot_attention(pictures[1], models[names[0]], task, chosen)
    print(f"\nsaved {' and '.join(map(str, pictures))}")


if __name__ == "__main__":
    main()
