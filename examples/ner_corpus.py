"""Sentences with tagged persons, places and organisations, of data/ner_templates.txt and ner_names.txt.

Both files mark with ``*`` what is held out: training sentences use neither those templates nor those names. A
name is one of several kinds where the world has it so (Lincoln: surname, city, the team of the city, part of
a firm's name), and some names are common words as well (rose, orange, mark), so that only the context
decides. As in CoNLL-2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050) a city's name that stands for
its team is an organisation, a country's team is the country, and articles and titles are not part of a name.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).resolve().parent / "data"
KINDS = "PER", "LOC", "ORG"
TAGS = "O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI")

# What a slot may be, and how often; a slot that stands nowhere here is a section of ner_names.txt.
FORMS = {
    "per": {
        "{first} {last}": 72,
        "{first} {initial} {last}": 10,
        "{initial} {last}": 8,
        "{first} {first} {last}": 5,
        "{first} {last}-{last}": 5,
    },
    "loc": {"{city}": 50, "{country}": 25, "{region}": 25},
    "company": {
        "{stem}": 30,
        "{stem} {trade}": 35,
        "{last} {trade}": 10,
        "{last} & Sons": 7,
        "{last} & {last}": 6,
        "{city} {trade}": 12,
    },
    "institution": {
        "the University of {city}": 20,
        "{city} University": 15,
        "the Ministry of {field}": 15,
        "the Institute of {field}": 20,
        "the {city} Institute of {field}": 10,
        "{group}": 20,
    },
    "org": {"{company}": 60, "{institution}": 40},
    "club": {"{city} {suffix}": 60, "FC {city}": 15, "{city} FC": 15, "Real {city}": 10},
    "clubcity": {"{city}": 1},
}
SLOTS = {
    **dict.fromkeys(("per", "first", "last"), "PER"),
    **dict.fromkeys(("loc", "city", "country", "region"), "LOC"),
    **dict.fromkeys(("org", "company", "institution", "club", "clubcity"), "ORG"),
}
DAYS = "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"
MONTHS = "January", "March", "April", "May", "July", "August", "September", "October", "November"
FILLERS = {
    "n": lambda rng: str(rng.randrange(2, 60)),
    "date": lambda rng: str(rng.randrange(1, 29)),
    "day": lambda rng: rng.choice(DAYS),
    "month": lambda rng: rng.choice(MONTHS),
    "year": lambda rng: str(rng.randrange(1740, 1960)),
    "lately": lambda rng: str(rng.randrange(1980, 2025)),
    "time": lambda rng: f"{rng.randrange(1, 12)}:{rng.randrange(60):02}",
    "initial": lambda rng: rng.choice("ABCDEFGHJKLMNPRSTW") + ".",
}
PARTS = re.compile(r"\{(?P<slot>\w+)\}|\[(?P<choice>[^]]+)\]|(?P<text>[^{\[]+)")
WORDS = re.compile(r"'s\b|\w+(?:['.:-]\w+)*|[^\w\s]")


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]  # one of TAGS for each word
    template: str


class Corpus(NamedTuple):
    train: list[Sentence]
    new_names: list[Sentence]  # templates of the training sentences, names that are held out
    new_templates: list[Sentence]  # templates and names that are held out


class Lists(NamedTuple):
    """One of the two sides, for training or held out."""

    names: dict[str, list[str]]
    templates: list[str]


def read(path):
    """{section: (entries of lines without a star, entries of lines with one)}; '# section' above each."""
    sections, entries = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            entries = sections.setdefault(line.lstrip("#").strip(), ([], []))
        elif line.strip():
            entries[line.startswith("*")].append(line.lstrip("*").strip())
    return sections


def load():
    """The Lists for training and those held out."""
    names, templates = read(DATA / "ner_names.txt"), read(DATA / "ner_templates.txt")
    sides = []
    for held_out in (False, True):
        lists = {
            section: [name.strip() for line in lines[held_out] for name in line.split(",")]
            for section, lines in names.items()
        }
        for general in ("trade", "suffix"):  # common words of names: FC, Bank
            lists[general] = [name.strip() for line in names[general][False] for name in line.split(",")]
        lines = [line for topic in templates.values() for line in topic[held_out]]
        sides.append(Lists(lists, lines))
    return sides


def expand(slot, names, rng, used):
    """Text for a slot: a filler, a form whose own slots are expanded, or a name that is not in `used` yet."""
    if slot in FILLERS:
        return FILLERS[slot](rng)
    if slot in FORMS:
        form = rng.choices(list(FORMS[slot]), FORMS[slot].values())[0]
        return re.sub(r"\{(\w+)\}", lambda match: expand(match[1], names, rng, used), form)
    name = rng.choice([name for name in names[slot] if name not in used])
    used.add(name)
    return name


def fill(template, names, rng):
    """A Sentence: every {slot} and [choice|of|words] of the template replaced at random."""
    words, tags, used = [], [], set()
    for part in PARTS.finditer(template):
        text = part["text"] or (rng.choice(part["choice"].split("|")) if part["choice"] else None)
        kind = SLOTS.get(part["slot"])
        if text is None:
            text = expand(part["slot"], names, rng, used)
        if kind is None:
            new = WORDS.findall(text)
            labels = ["O"] * len(new)
        else:
            new = text.split()
            article = new[0] == "the"
            labels = ["O"] * article + [f"B-{kind}"] + [f"I-{kind}"] * (len(new) - 1 - article)
        words += new
        tags += labels
    words[0] = words[0][0].upper() + words[0][1:]
    return Sentence(words, tags, template)


def sentences(count, templates, names, rng, tries=20):
    """`count` different sentences; the templates take turns, and are passed over when they have no more."""
    made, seen = [], set()
    order = rng.sample(templates, len(templates))
    idle = 0
    for template in itertools.cycle(order):
        if len(made) == count:
            return made
        for _ in range(tries):
            sentence = fill(template, names, rng)
            if tuple(sentence.words) not in seen:
                break
        else:
            idle += 1
            if idle > 10 * len(order):
                raise ValueError(f"{count} different sentences asked for, the templates give {len(made)}")
            continue
        idle = 0
        seen.add(tuple(sentence.words))
        made.append(sentence)


def make(count=2400, held_out=400, seed=0):
    """The Corpus of this seed: `count` training sentences, `held_out` of each kind of test sentence."""
    train, test = load()
    rng = random.Random(f"ner {seed}")
    return Corpus(
        sentences(count, train.templates, train.names, rng),
        sentences(held_out, train.templates, test.names, rng),
        sentences(held_out, test.templates, test.names, rng),
    )
