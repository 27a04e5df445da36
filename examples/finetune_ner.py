"""Fine-tunes all-MiniLM-L6-v2 to tag persons, places and organisations, with fastattn as its attention.

    pip install '.[examples]'
    python examples/finetune_ner.py
    python examples/finetune_ner.py --attention fastattn --epochs 5

The encoder is that of minilm.py, here as transformers' AutoModel: after fastattn.torch.register() it takes
attn_implementation="fastattn". A linear layer on top gives each word one of seven tags (O, and B- or I- of
three kinds: the IOB2 scheme of Tjong Kim Sang and Veenstra 1999, arXiv:cs/9907006), trained with AdamW
(Loshchilov and Hutter 2019, arXiv:1711.05101) and a learning rate that rises and falls linearly, as for BERT
(Devlin et al. 2018, arXiv:1810.04805). The sentences are made by ner_corpus.py; names and templates of the
test sentences are held out. Letters in the shapes: B sentences, S word pieces of the longest one, E = 384.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import ner_corpus
import torch
import training
from minilm import INSTALL, model_path
from ner_corpus import KINDS, TAGS
from torch import nn

IGNORED = -100  # the label of a piece that is not the first of its word; cross_entropy skips it
ALLOWED = torch.tensor([[b[0] != "I" or a[1:] == b[1:] for b in TAGS] for a in TAGS])  # may b follow a?
WARM_UP = 0.1  # of all steps
DROPOUT = 0.1
SHOWN = 6  # tagged sentences to print


class Pieces(NamedTuple):
    """One sentence for the model."""

    ids: list[int]  # word pieces with [CLS] and [SEP]
    labels: list[int]  # index into TAGS at the first piece of each word, else IGNORED


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float
    entities: int  # in the right answer


class Tagger(nn.Module):
    def __init__(self, attention):
        super().__init__()
        from transformers import AutoModel

        if attention == "fastattn":
            import fastattn.torch

            fastattn.torch.register()
        # No dropout of attention weights: each implementation draws a mask of its own, so that the loss
        # curves of two could not be compared. The other dropouts are torch's, and are the same for both.
        self.encoder = AutoModel.from_pretrained(
            str(model_path()),
            local_files_only=True,
            attn_implementation=attention,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=DROPOUT,
            dtype=torch.float32,
            add_pooling_layer=False,
        )
        # Names that training never shows keep vectors that go with those it does show.
        self.encoder.embeddings.requires_grad_(False)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(TAGS))

    def forward(self, ids, mask):
        """Logits (B,S,7) for ids (B,S); mask (B,S) is 1 for word pieces and 0 for padding."""
        vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B,S,E)
        return self.head(self.dropout(vectors))


def load_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_path()), local_files_only=True)


def to_pieces(sentences, tokenizer):
    """Pieces of each Sentence: a word's tag is the label of its first piece."""
    encoded = tokenizer([sentence.words for sentence in sentences], is_split_into_words=True)
    result = []
    for n, sentence in enumerate(sentences):
        labels, before = [], None
        for word in encoded.word_ids(n):
            first = word is not None and word != before
            labels.append(TAGS.index(sentence.tags[word]) if first else IGNORED)
            before = word
        result.append(Pieces(encoded["input_ids"][n], labels))
    return result


def collate(pieces):
    """ids, mask and labels (B,S) of a batch."""
    ids = training.padded([p.ids for p in pieces], fill=0)
    mask = training.padded([[1] * len(p.ids) for p in pieces], fill=0)
    return ids, mask, training.padded([p.labels for p in pieces], fill=IGNORED)


def make_batches(pieces, size, epochs, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(p.ids) for p in pieces]
    return [
        collate([pieces[n] for n in chosen])
        for _ in range(epochs)
        for chosen in training.batches_of_alike_lengths(lengths, size, generator)
    ]


def loss_of(model, batch):
    ids, mask, labels = batch
    return nn.functional.cross_entropy(model(ids, mask).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def make_optimizer(model, lr):
    """AdamW; biases and LayerNorm weights are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim == 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=lr)


def warm_up_and_decay(total):
    """factor(step): from 0 up to 1 in the first tenth of `total` steps, then down to 0."""
    rise = max(1, round(WARM_UP * total))
    return lambda step: min((step + 1) / rise, (total - step) / max(1, total - rise), 1.0)


def train(names, pieces, batch_size, epochs, lr, seed):
    """{attention: model} and {attention: training.Curve}: all from the same weights, on the same batches."""
    models = {}
    for name in names:
        torch.manual_seed(seed)
        models[name] = Tagger(name)
    batches = make_batches(pieces, batch_size, epochs, seed)
    factor = warm_up_and_decay(len(batches))
    curves = training.train(models, batches, loss_of, lambda m: make_optimizer(m, lr), factor, seed)
    return models, curves


def best_tags(scores):
    """The most probable sequence of tags for scores (words,7), log-probabilities, by Viterbi's algorithm.

    I- may only follow B- or I- of the same kind.
    """
    best, steps = scores[0].masked_fill(~ALLOWED[TAGS.index("O")], -torch.inf), []  # as after an O
    for word in scores[1:]:
        best, before = torch.where(ALLOWED, best[:, None], -torch.inf).max(dim=0)
        best = best + word
        steps.append(before)
    path = [int(best.argmax())]
    for before in reversed(steps):
        path.append(int(before[path[-1]]))
    return [TAGS[n] for n in reversed(path)]


@torch.inference_mode()
def tag(model, pieces, batch_size=64):
    """The tag of each word of each sentence."""
    model.eval()
    result = []
    for start in range(0, len(pieces), batch_size):
        ids, mask, labels = collate(pieces[start : start + batch_size])
        for scores, label in zip(model(ids, mask).log_softmax(-1), labels, strict=True):
            result.append(best_tags(scores[label != IGNORED]))
    return result


def entities(tags):
    """{(first word, end, kind)} of a sentence's tags; an I- that continues nothing of its kind begins one."""
    found, start, kind = set(), 0, None
    for n, one in enumerate([*tags, "O"]):
        prefix, _, new = one.partition("-")
        if kind and (prefix != "I" or new != kind):
            found.add((start, n, kind))
            kind = None
        if new and kind is None:
            start, kind = n, new
    return found


def score(right, predicted):
    """{kind or "all": Score} of lists of tags: one counts where its words and kind are exactly right."""
    hits, wanted, got = Counter(), Counter(), Counter()
    for a, b in zip(right, predicted, strict=True):
        for counter, chosen in ((hits, entities(a) & entities(b)), (wanted, entities(a)), (got, entities(b))):
            for *_, kind in chosen:
                counter.update((kind, "all"))
    result = {}
    for kind in (*KINDS, "all"):
        precision = hits[kind] / got[kind] if got[kind] else 0.0
        recall = hits[kind] / wanted[kind] if wanted[kind] else 0.0
        f1 = 2 * hits[kind] / (got[kind] + wanted[kind]) if hits[kind] else 0.0
        result[kind] = Score(precision, recall, f1, wanted[kind])
    return result


def show(words, tags):
    """A line of text with brackets around the entities."""
    starts = {start: None for start, _, _ in entities(tags)}
    ends = {end: kind for _, end, kind in entities(tags)}
    line = ""
    for n, word in enumerate(words):
        glue = "" if n == 0 or word in {".", ",", "?", "!", ":", "'s"} else " "
        line += glue + "[" * (n in starts) + word + (f" {ends[n + 1]}]" if n + 1 in ends else "")
    return line


def print_scores(title, right, predictions):
    """The table of the first attention, and the F1 of each."""
    name, predicted = next(iter(predictions.items()))
    print(f"\n{title}, {len(right)} sentences, attention {name}")
    print(f"{'':<6}{'precision':>10}{'recall':>10}{'F1':>10}{'entities':>10}")
    for kind, s in score(right, predicted).items():
        print(f"{kind:<6}{s.precision:>10.3f}{s.recall:>10.3f}{s.f1:>10.3f}{s.entities:>10}")
    for other, predicted in list(predictions.items())[1:]:
        print(f"F1 of all with attention {other}: {score(right, predicted)['all'].f1:.3f}")


def parse_arguments(argv):
    defaults = {"epochs": 3, "batch_size": 32, "sentences": 2400, "test_sentences": 400, "lr": 3e-4}
    return training.parser_of(__doc__.splitlines()[0], **defaults).parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import matplotlib  # noqa: F401  (needed only at the end: say now if it is missing)
        from transformers import logging

        logging.set_verbosity_error()  # it would report that the pooler's weights are not used
        logging.disable_progress_bar()
        tokenizer = load_tokenizer()
        corpus = ner_corpus.make(args.sentences, args.test_sentences, args.seed)
    except ModuleNotFoundError as error:
        needs = error if INSTALL in str(error) else f"the package {error.name} is not installed; {INSTALL}"
        raise SystemExit(f"finetune_ner.py: {needs}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"finetune_ner.py: {error}") from None
    templates = len({sentence.template for sentence in corpus.train})
    print(f"{len(corpus.train)} training sentences from {templates} templates, {args.epochs} epochs")

    names = training.attentions(args.attention)
    pieces = to_pieces(corpus.train, tokenizer)
    models, curves = train(names, pieces, args.batch_size, args.epochs, args.lr, args.seed)
    training.print_summary(curves)

    tests = {"held-out names in known templates": corpus.new_names}
    tests["held-out names in held-out templates"] = corpus.new_templates
    for title, sentences in tests.items():
        chosen = to_pieces(sentences, tokenizer)
        predictions = {name: tag(model, chosen) for name, model in models.items()}
        print_scores(title, [sentence.tags for sentence in sentences], predictions)
    print(f"\nthe first {SHOWN} of these with a name, as tagged")
    tagged = zip(sentences, predictions[names[0]], strict=True)
    for sentence, tags in [pair for pair in tagged if entities(pair[0].tags)][:SHOWN]:
        print("  " + show(sentence.words, tags))

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "finetune_ner_loss.png"
    training.plot_losses(picture, curves, "all-MiniLM-L6-v2 learns to tag names: loss of each step")
    print(f"\nsaved {picture}")


if __name__ == "__main__":
    main()
