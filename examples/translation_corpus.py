"""Pairs of English and French sentences made by a small grammar, such as

    the old cats do not see a white bird .   les vieux chats ne voient pas d' oiseau blanc .

French articles, adjectives and participles agree with their noun in gender and number, most adjectives follow
it, ne and pas stand around the verb, words are elided before a vowel (l', n', cet, vieil), the past takes
avoir or être, and an indefinite object becomes de after pas. English has do for negations and questions.
Every sentence has exactly one translation within the grammar, either way: vous is you, ils is they.

Some pairs of verb and object, and of adjective and noun, are held out: no training sentence has one, every
test sentence has at least one, so that a translation cannot be remembered and has to be composed.
"""

from __future__ import annotations

import random
from typing import NamedTuple

VOWELS = "aeiouyàâéèêëîïôœh"  # every h in the lexicon is mute

PERSONS = "je", "il", "nous", "vous", "ils"  # the columns of the verbs' tables
HAVE = ["ai", "a", "avons", "avez", "ont"]
BE = ["suis", "est", "sommes", "êtes", "sont"]
WAS = ["étais", "était", "étions", "étiez", "étaient"]
FUTURE = ["ai", "a", "ons", "ez", "ont"]

# French singular, plural and gender, English singular and plural, kind.
NOUNS = """
chat chats m cat cats animate
chien chiens m dog dogs animate
fille filles f girl girls animate
garçon garçons m boy boys animate
femme femmes f woman women animate
homme hommes m man men animate
enfant enfants m child children animate
ami amis m friend friends animate
voisin voisins m neighbour neighbours animate
médecin médecins m doctor doctors animate
cheval chevaux m horse horses animate
oiseau oiseaux m bird birds animate
reine reines f queen queens animate
souris souris f mouse mice animate
vache vaches f cow cows animate
pomme pommes f apple apples food
poire poires f pear pears food
gâteau gâteaux m cake cakes food
œuf œufs m egg eggs food
fromage fromages m cheese cheeses food
soupe soupes f soup soups food
livre livres m book books text
lettre lettres f letter letters text
histoire histoires f story stories text
journal journaux m newspaper newspapers text
fenêtre fenêtres f window windows opening
porte portes f door doors opening
boîte boîtes f box boxes opening
sac sacs m bag bags opening
maison maisons f house houses thing
table tables f table tables thing
voiture voitures f car cars thing
clé clés f key keys thing
chapeau chapeaux m hat hats thing
arbre arbres m tree trees thing
chaise chaises f chair chairs thing
montre montres f watch watches thing
image images f picture pictures thing
couteau couteaux m knife knives thing
bateau bateaux m boat boats thing
hôtel hôtels m hotel hotels thing
avion avions m plane planes thing
"""

# Masculine, feminine, English, the nouns it goes with; with a fifth word it stands before the noun in French
# too, and that word is the masculine before a vowel.
ADJECTIVES = """
noir noire black any
blanc blanche white any
gris grise grey any
propre propre clean any
lourd lourde heavy any
étrange étrange strange any
rouge rouge red inanimate
vert verte green inanimate
bleu bleue blue inanimate
rond ronde round inanimate
cher chère expensive inanimate
fatigué fatiguée tired animate
heureux heureuse happy animate
intelligent intelligente clever animate
patient patiente patient animate
petit petite small any petit
grand grande big any grand
vieux vieille old any vieil
beau belle beautiful any bel
nouveau nouvelle new inanimate nouvel
joli jolie pretty any joli
jeune jeune young animate jeune
"""

# Present for PERSONS, participle, stem of the future; English infinitive, third person, past; the objects it
# takes.
VERBS = """
mange mange mangeons mangez mangent mangé manger eat eats ate food
écris écrit écrivons écrivez écrivent écrit écrir write writes wrote text
oublie oublie oublions oubliez oublient oublié oublier forget forgets forgot text
ouvre ouvre ouvrons ouvrez ouvrent ouvert ouvrir open opens opened opening
ferme ferme fermons fermez ferment fermé fermer close closes closed opening
achète achète achetons achetez achètent acheté achèter buy buys bought inanimate
vends vend vendons vendez vendent vendu vendr sell sells sold inanimate
prends prend prenons prenez prennent pris prendr take takes took inanimate
perds perd perdons perdez perdent perdu perdr lose loses lost inanimate
vois voit voyons voyez voient vu verr see sees saw any
trouve trouve trouvons trouvez trouvent trouvé trouver find finds found any
dessine dessine dessinons dessinez dessinent dessiné dessiner draw draws drew any
aime aime aimons aimez aiment aimé aimer like likes liked any
cherche cherche cherchons cherchez cherchent cherché chercher seek seeks sought any
dors dort dormons dormez dorment dormi dormir sleep sleeps slept none
chante chante chantons chantez chantent chanté chanter sing sings sang none
travaille travaille travaillons travaillez travaillent travaillé travailler work works worked none
cours court courons courez courent couru courr run runs ran none
tombe tombe tombons tombez tombent tombé tomber fall falls fell être
arrive arrive arrivons arrivez arrivent arrivé arriver arrive arrives arrived être
pars part partons partez partent parti partir leave leaves left être
"""

# Definite, this, my, our, your: masculine, feminine, masculine before a vowel, feminine before a vowel,
# plural.
DETERMINERS = {
    ("the", "the"): ("le", "la", "l'", "l'", "les"),
    ("this", "these"): ("ce", "cette", "cet", "cette", "ces"),
    ("my", "my"): ("mon", "ma", "mon", "mon", "mes"),
    ("our", "our"): ("notre", "notre", "notre", "notre", "nos"),
    ("your", "your"): ("votre", "votre", "votre", "votre", "vos"),
}
PRONOUNS = (  # English, French, column of PERSONS, gender, plural
    ("I", "je", 0, "m", False),
    ("he", "il", 1, "m", False),
    ("she", "elle", 1, "f", False),
    ("we", "nous", 2, "m", True),
    ("you", "vous", 3, "m", False),  # the polite one: one person
    ("they", "ils", 4, "m", True),
)
PLACES = (
    ("in the garden", "dans le jardin"),
    ("near the station", "près de la gare"),
    ("in Paris", "à Paris"),
    ("at home", "à la maison"),
    ("behind the church", "derrière l' église"),
)
TIMES = {
    "present": (("today", "aujourd'hui"), ("this morning", "ce matin")),
    "past": (("yesterday", "hier"), ("last week", "la semaine dernière")),
    "future": (("tomorrow", "demain"), ("next week", "la semaine prochaine")),
}


class Noun(NamedTuple):
    french: tuple[str, str]  # singular, plural
    gender: str
    english: tuple[str, str]
    kind: str


class Adjective(NamedTuple):
    masculine: str
    feminine: str
    english: str
    kind: str
    before_vowel: str | None  # None: it follows its noun


class Verb(NamedTuple):
    present: list[str]
    participle: str
    future: str
    english: str
    third: str
    past: str
    objects: str  # kind of noun, any, none, or être: none, and the past with être


class Phrase(NamedTuple):
    """A subject or an object, in both languages."""

    english: str
    french: str
    person: int  # column of PERSONS
    gender: str
    plural: bool
    noun: Noun | None = None
    combinations: frozenset[tuple[str, str]] = frozenset()


class Pair(NamedTuple):
    english: str
    french: str
    combinations: frozenset[tuple[str, str]]  # English (verb or adjective, noun) that it contains


class Corpus(NamedTuple):
    train: list[Pair]
    test: list[Pair]
    held_out: frozenset[tuple[str, str]]


def read(table):
    return [line.split() for line in table.strip().splitlines()]


def read_noun(singular, plural, gender, english, english_plural, kind):
    return Noun((singular, plural), gender, (english, english_plural), kind)


NOUN_LIST = [read_noun(*words) for words in read(NOUNS)]
ADJECTIVE_LIST = [Adjective(*(*words, None)[:5]) for words in read(ADJECTIVES)]
VERB_LIST = [Verb(words[:5], *words[5:]) for words in read(VERBS)]


def fits(kind, noun):
    """May a verb or an adjective of this kind go with the noun?"""
    return kind in ("any", noun.kind) or (kind == "inanimate" and noun.kind != "animate")


def agree(masculine, feminine, gender, plural):
    word = masculine if gender == "m" else feminine
    if not plural or word[-1] in "sx":
        return word
    return word + ("x" if word.endswith("eau") else "s")


def elide(words):
    """je, ne, de, que before a vowel: j', n', d', qu'."""
    pairs = zip(words, [*words[1:], "."], strict=True)
    short = "je", "ne", "de", "que"
    return [w[:-1] + "'" if w in short and after[0] in VOWELS else w for w, after in pairs]


def noun_phrase(noun, adjectives, determiner, plural, after_pas=False):
    """A Phrase; determiner: a key of DETERMINERS, or None for the indefinite article."""
    english = [adjective.english for adjective in adjectives] + [noun.english[plural]]
    before, after = [], []
    for adjective in adjectives:
        if adjective.before_vowel is None:
            after.append(agree(adjective.masculine, adjective.feminine, noun.gender, plural))
        elif noun.gender == "m" and not plural and noun.french[0][0] in VOWELS:
            before.append(adjective.before_vowel)
        else:
            before.append(agree(adjective.masculine, adjective.feminine, noun.gender, plural))
    french = [*before, noun.french[plural], *after]
    if determiner:
        english.insert(0, determiner[plural])
        column = 4 if plural else (noun.gender == "f") + 2 * (french[0][0] in VOWELS)
        french.insert(0, DETERMINERS[determiner][column])
    else:
        if not plural:
            english.insert(0, "an" if english[0][0] in "aeiou" else "a")
        if after_pas or (plural and before):
            french.insert(0, "de")
        else:
            french.insert(0, "des" if plural else "un" if noun.gender == "m" else "une")
    return Phrase(
        " ".join(english),
        " ".join(elide(french)),
        4 if plural else 1,
        noun.gender,
        plural,
        noun,
        frozenset((adjective.english, noun.english[0]) for adjective in adjectives),
    )


def random_noun_phrase(rng, kind, after_pas=False):
    noun = rng.choice([noun for noun in NOUN_LIST if fits(kind, noun)])
    adjectives = []
    for stands_before, chance in ((True, 0.3), (False, 0.35)):  # the English order
        if rng.random() < chance:
            fitting = [a for a in ADJECTIVE_LIST if (a.before_vowel is not None) == stands_before]
            adjectives.append(rng.choice([a for a in fitting if fits(a.kind, noun)]))
    determiner = rng.choice([*DETERMINERS, None])
    return noun_phrase(noun, adjectives, determiner, rng.random() < 0.4, after_pas)


def random_subject(rng, kind):
    return Phrase(*rng.choice(PRONOUNS)) if rng.random() < 0.55 else random_noun_phrase(rng, kind)


def english_verb(subject, verb, tense, negated, question):
    """The words before the object: subject, auxiliary, not, verb in their order; verb None is to be."""
    third = subject.person == 1
    if verb is None:
        helper = {
            "present": "am" if subject.person == 0 else "is" if third else "are",
            "past": "was" if subject.person < 2 else "were",
            "future": "will",
        }[tense]
        rest = ["be"] if tense == "future" else []
    elif negated or question or tense == "future":
        helper = {"present": "does" if third else "do", "past": "did", "future": "will"}[tense]
        rest = [verb.english]
    else:
        helper = {"present": verb.third if third else verb.english, "past": verb.past}[tense]
        rest = []
    start = [helper, subject.english] if question else [subject.english, helper]
    return [*start, *["not"] * negated, *rest]


def french_verb(subject, verb, tense, negated):
    """The words of the verb, with ne and pas around the first of them; verb None is être."""
    if verb is None:
        form = {"present": BE, "past": WAS, "future": ["ser" + ending for ending in FUTURE]}[tense]
        words = [form[subject.person]]
    elif tense == "past":
        with_be = verb.objects == "être"
        participle = verb.participle
        if with_be:
            participle = agree(participle, participle + "e", subject.gender, subject.plural)
        words = [(BE if with_be else HAVE)[subject.person], participle]
    else:
        words = [verb.present[subject.person] if tense == "present" else verb.future + FUTURE[subject.person]]
    return ["ne", words[0], "pas", *words[1:]] if negated else words


def random_pair(rng):
    tense = rng.choice(("present", "past", "future"))
    negated, question = rng.random() < 0.35, rng.random() < 0.25
    if rng.random() < 0.25:  # to be
        verb = None
        adjective = rng.choice(ADJECTIVE_LIST)
        subject = random_subject(rng, adjective.kind)
        while subject.noun is None and adjective.kind == "inanimate":
            subject = random_subject(rng, adjective.kind)
        combinations = subject.combinations
        if subject.noun:
            combinations |= {(adjective.english, subject.noun.english[0])}
        form = agree(adjective.masculine, adjective.feminine, subject.gender, subject.plural)
        objects = [adjective.english], [form]
    else:
        verb = rng.choice(VERB_LIST)
        subject = random_subject(rng, "animate")
        combinations, objects = subject.combinations, ([], [])
        if verb.objects not in ("none", "être"):
            thing = random_noun_phrase(rng, verb.objects, negated)
            combinations |= thing.combinations | {(verb.english, thing.noun.english[0])}
            objects = [thing.english], [thing.french]
    end = ("", "")
    if rng.random() < 0.4:
        end = rng.choice((*PLACES, *TIMES[tense]))
    mark = "?" if question else "."
    english = [*english_verb(subject, verb, tense, negated, question), *objects[0], end[0], mark]
    french = [*["est-ce", "que"] * question, subject.french, *french_verb(subject, verb, tense, negated)]
    french = " ".join([*french, *objects[1], end[1], mark]).split()
    return Pair(" ".join(" ".join(english).split()), " ".join(elide(french)), combinations)


def make(count=8000, test=400, seed=0, share=0.1):
    """The Corpus of this seed: different pairs; `share` of all combinations is held out, but no word."""
    rng = random.Random(f"translation {seed}")
    words = [(a.english, a.kind) for a in ADJECTIVE_LIST] + [(v.english, v.objects) for v in VERB_LIST]
    possible = [(word, noun.english[0]) for noun in NOUN_LIST for word, kind in words if fits(kind, noun)]
    held_out = frozenset(rng.sample(possible, round(share * len(possible))))
    seen = set()

    def draw(size, wanted):
        chosen = []
        while len(chosen) < size:
            pair = random_pair(rng)
            if pair.english not in seen and wanted(pair):
                seen.add(pair.english)
                chosen.append(pair)
        return chosen

    def words_of(pair):
        return {*pair.english.split(), *pair.french.split()}

    train = draw(count, lambda pair: not pair.combinations & held_out)
    known = set().union(*map(words_of, train))
    test = draw(test, lambda pair: pair.combinations & held_out and words_of(pair) <= known)
    return Corpus(train, test, held_out)
