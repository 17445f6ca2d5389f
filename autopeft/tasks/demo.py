"""The embedded task `demo`: short review sentences with a binary sentiment, generated from a seed.

Every sentence, template and word list here was written for autopeft, so the task carries no third-party licence.

The label follows the opinion the writer holds now, about the thing reviewed. Most rows also contain sentiment words
that do not decide: a conceded clause, hearsay, a former opinion, a negated word. Counting words is therefore not
enough, and a method that barely changes the encoder stays well below one that adapts it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, TypeVar

T = TypeVar("T")

NUM_TRAIN_ROWS = 2_500
NUM_TEST_ROWS = 500
NOISE_PERCENT = 3
"""Share of rows, per class and per split, whose label is flipped: no honest method saturates at 100%."""


class DemoRow(TypedDict):
    text: str
    label: int
    """0 negative, 1 positive."""


class DemoSplits(NamedTuple):
    train: tuple[DemoRow, ...]
    test: tuple[DemoRow, ...]


class _Pool(NamedTuple):
    """Words or templates, and those among them that only the test split may use."""

    shared: tuple[str, ...]
    held_out: tuple[str, ...]


def _words(shared: str, held_out: str = "") -> _Pool:
    return _Pool(tuple(shared.split()), tuple(held_out.split()))


# Adjectives and verbs are listed as (negative, positive), so that a label is an index.
_ADJECTIVES = (
    _words(
        """awful bad bland boring careless cheap clumsy confusing depressing dire dismal disappointing dreadful dreary
        dull feeble forgettable frustrating grim hopeless horrible irritating lacklustre lousy mediocre messy miserable
        nasty painful pathetic pointless poor ridiculous shabby shoddy sloppy stale tasteless tedious terrible tiresome
        ugly unpleasant useless weak worthless wretched""",
        "abysmal annoying deplorable atrocious crude drab flimsy lame rotten unbearable",
    ),
    _words(
        """admirable amazing appealing astonishing beautiful brilliant captivating charming clever dazzling delightful
        elegant enchanting engaging enjoyable excellent exceptional exciting fabulous fantastic fine fresh glorious good
        gorgeous graceful great impressive inspired inventive likeable lively lovely magical magnificent marvellous
        memorable perfect pleasant polished refreshing remarkable satisfying splendid superb terrific wonderful""",
        "awesome exquisite first-rate flawless incredible outstanding pleasing stunning sublime thrilling",
    ),
)
_VERBS = (
    _words("annoyed bored disappointed disgusted frustrated irritated", "angered exasperated"),
    _words("amazed charmed delighted enchanted impressed pleased", "dazzled thrilled"),
)

# One entry per kind of thing reviewed: both nouns of a sentence come from the same one, or it would read as nonsense.
_NOUNS = (
    _words("plot acting soundtrack ending dialogue camerawork script cast opening finale", "screenplay editing"),
    _words("soup service dessert bread coffee menu waiter kitchen sauce salad", "pudding seating"),
    _words("room breakfast view lobby bathroom garden bed terrace pool reception", "balcony hallway"),
    _words("screen battery keyboard sound design camera packaging software display case", "charger speaker"),
    _words("prose story narrator heroine cover chapter writing villain translation preface", "epilogue humour"),
)

_INTENSITY = _words("very truly really utterly thoroughly quite simply completely rather so", "genuinely downright")
_NEGATIONS = _Pool(
    ("not", "not at all", "never", "far from", "by no means"),
    ("in no way", "not in the least"),
)
_SOURCES = _Pool(
    ("the critics", "my sister", "the neighbours", "my colleagues", "a friend", "the advert", "everyone", "my uncle"),
    ("the papers", "our guide"),
)

_LEAD_INS = _Pool(
    (
        "this time round",
        "in my view",
        "to be honest",
        "all things considered",
        "on a rainy Sunday",
        "for the money",
        "on the second day",
        "as a regular customer, I must say",
        "between you and me",
        "seen with a clear head",
    ),
    ("at the end of the week", "looking back on it"),
)

# Slots: {same} and {other} are an adjective of the clause's polarity and of the opposite one.
_PLAIN_CLAUSES = _Pool(
    (
        "the {noun} is {same}",
        "the {noun} was {very} {same}",
        "the {noun} is {very} {same}",
        "I found the {noun} {very} {same}",
        "the {noun} turned out to be {same}",
        "the {noun} {same_verb} me",
    ),
    ("the {noun} remains {same} to this day",),
)
_NEGATED_CLAUSES = _Pool(
    (
        "the {noun} is {negation} {other}",
        "the {noun} was {negation} {other}",
        "the {noun} never {other_verb} me",
        "nobody could call the {noun} {other}",
        "I did not find the {noun} {other}",
    ),
    ("there is nothing {other} about the {noun}",),
)

# Slots: {same_clause} decides; {other_clause} is the opposite and does not; {any} is an adjective of either polarity.
_AGREEMENTS = _Pool(
    (
        "{same_clause}, and {agreeing_clause}",
        "{same_clause}; moreover, {agreeing_clause}",
        "{same_clause}, just as {agreeing_clause}",
    ),
    ("{same_clause}; likewise, {agreeing_clause}",),
)
_CONTRASTS = _Pool(
    (
        "{other_clause}, but {same_clause}",
        "{other_clause}, yet {same_clause}",
        "{other_clause}; even so, {same_clause}",
        "although {other_clause}, {same_clause}",
        "even though {other_clause}, {same_clause}",
        "{same_clause}, although {other_clause}",
        "{same_clause}, even though {other_clause}",
    ),
    (
        "{other_clause}; nevertheless, {same_clause}",
        "while {other_clause}, {same_clause}",
        "{same_clause}, though {other_clause}",
    ),
)
_DISTRACTIONS = _Pool(
    (
        "{source} called it {other}, but {same_clause}",
        "{source} said it would be {other}, yet {same_clause}",
        "I expected something {other}, but {same_clause}",
        "I was hoping for something {any}, and {same_clause}",
        "whatever {source} said about it being {any}, {same_clause}",
        "I once thought the {noun} {other}, but now I find it {very} {same}",
        "{same_clause}, and {source} that called it {other} got it wrong",
    ),
    (
        "someone told me to expect something {other}, yet {same_clause}",
        "{source} had warned me about something {other}; in fact {same_clause}",
    ),
)

_SINGLE_SHARE = 0.36
_AGREEMENT_SHARE = 0.2
_CONTRAST_SHARE = 0.28
"""The remaining rows carry a distraction."""
_NEGATED_SHARE = 0.34
_LEAD_IN_SHARE = 0.4


def generate_demo(seed: int = 0) -> DemoSplits:
    """Balanced train and test rows; the same seed gives the same rows on every machine and Python version."""
    rng = random.Random(seed)
    clean = _write_clean_splits(rng)
    return DemoSplits(train=_flip_labels(rng, clean.train), test=_flip_labels(rng, clean.test))


def _write_clean_splits(rng: random.Random) -> DemoSplits:
    """Both splits before label noise, in the order `generate_demo` returns them."""
    seen: set[str] = set()
    return DemoSplits(
        train=_write_rows(_Writer(rng, may_use_held_out=False), NUM_TRAIN_ROWS, seen),
        test=_write_rows(_Writer(rng, may_use_held_out=True), NUM_TEST_ROWS, seen),
    )


def _write_rows(writer: "_Writer", num_rows: int, seen: set[str]) -> tuple[DemoRow, ...]:
    rows: list[DemoRow] = []
    while len(rows) < num_rows:
        label = len(rows) % 2
        text = writer.sentence(label)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return tuple(_shuffled(writer.rng, rows))


def _flip_labels(rng: random.Random, rows: tuple[DemoRow, ...]) -> tuple[DemoRow, ...]:
    """The rows with the same number of labels flipped in either class, which keeps them balanced."""
    num_flips_per_class = len(rows) * NOISE_PERCENT // 200
    flipped: set[int] = set()
    for label in (0, 1):
        of_class = [index for index, row in enumerate(rows) if row["label"] == label]
        flipped.update(_shuffled(rng, of_class)[:num_flips_per_class])
    return tuple(
        {"text": row["text"], "label": 1 - row["label"] if index in flipped else row["label"]}
        for index, row in enumerate(rows)
    )


@dataclass(frozen=True, slots=True)
class _Writer:
    """Fills templates at random; `polarity` is 0 negative or 1 positive throughout."""

    rng: random.Random
    may_use_held_out: bool

    def sentence(self, polarity: int) -> str:
        first_noun, second_noun = _shuffled(self.rng, self._choices(_pick(self.rng, _NOUNS)))[:2]
        deciding = self.clause(polarity, first_noun)
        kind = self.rng.random()
        if kind < _SINGLE_SHARE:
            return self._finish(deciding)
        if kind < _SINGLE_SHARE + _AGREEMENT_SHARE:
            pool = _AGREEMENTS
        elif kind < _SINGLE_SHARE + _AGREEMENT_SHARE + _CONTRAST_SHARE:
            pool = _CONTRASTS
        else:
            pool = _DISTRACTIONS
        return self._finish(
            self._choose(pool).format(
                same_clause=deciding,
                agreeing_clause=self.clause(polarity, second_noun),
                other_clause=self.clause(1 - polarity, second_noun),
                noun=first_noun,
                same=self._choose(_ADJECTIVES[polarity]),
                other=self._choose(_ADJECTIVES[1 - polarity]),
                any=self._choose(_pick(self.rng, _ADJECTIVES)),
                very=self._choose(_INTENSITY),
                source=self._choose(_SOURCES),
            )
        )

    def clause(self, polarity: int, noun: str) -> str:
        pool = _NEGATED_CLAUSES if self.rng.random() < _NEGATED_SHARE else _PLAIN_CLAUSES
        return self._choose(pool).format(
            noun=noun,
            same=self._choose(_ADJECTIVES[polarity]),
            other=self._choose(_ADJECTIVES[1 - polarity]),
            same_verb=self._choose(_VERBS[polarity]),
            other_verb=self._choose(_VERBS[1 - polarity]),
            very=self._choose(_INTENSITY),
            negation=self._choose(_NEGATIONS),
        )

    def _finish(self, body: str) -> str:
        if self.rng.random() < _LEAD_IN_SHARE:
            body = f"{self._choose(_LEAD_INS)}, {body}"
        return f"{body[0].upper()}{body[1:]}."

    def _choose(self, pool: _Pool) -> str:
        return _pick(self.rng, self._choices(pool))

    def _choices(self, pool: _Pool) -> tuple[str, ...]:
        return pool.shared + pool.held_out if self.may_use_held_out else pool.shared


# Only `Random.random` is promised to keep its sequence across Python versions; `choice` and `shuffle` are not.


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, options: Sequence[T]) -> list[T]:
    keyed = [(rng.random(), index) for index in range(len(options))]
    return [options[index] for _, index in sorted(keyed)]
