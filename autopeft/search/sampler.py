"""What a study could start: what it is to try first, recipes, and what is drawn from its space."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from autopeft.errors import SpecError
from autopeft.methods import refuse_spec
from autopeft.records import StudyConfig, TrialSource, TrialSpec, WarmStart
from autopeft.search.candidates import draw_candidates
from autopeft.search.costs import Costs
from autopeft.search.speed import Kind, kind_of
from autopeft.search.store import StudyStore
from autopeft.search.surrogate import Answers, Encoder, Row, encode_spec
from autopeft.search.worth import Appraiser, Newcomer
from autopeft.spaces.space import SearchSpace, make_spec


class Proposal(NamedTuple):
    """A configuration to try, and where it comes from."""

    source: TrialSource
    spec: TrialSpec


def first_specs(config: StudyConfig, space: SearchSpace) -> list[Proposal]:
    """The user's own and what did well elsewhere, which are tried first and in that order; then recipes of the methods
    of which nothing is known, which are candidates beside what the space holds."""
    warm = config.warm_start or WarmStart(sources=(), first=(), weighed=())
    recipes = [spec for spec in space.recipes if spec.method not in warm.weighed]
    return [
        *(Proposal("included", spec) for spec in config.included),
        *(Proposal("prior", spec) for spec in warm.first),
        *(Proposal("recipe", spec) for spec in recipes),
    ]


def enqueue_first(store: StudyStore, space: SearchSpace, trials_left: float) -> None:
    """Adds what is tried first to a study that has begun nothing else: all of the user's own, and what did well
    elsewhere as far as the budget starts it."""
    if not all(trial.source in ("included", "prior") for trial in store.trials):
        return
    known = {trial.spec.key() for trial in store.trials}
    for source, spec in first_specs(store.config, space):
        waiting = sum(trial.state == "waiting" for trial in store.trials)
        is_wanted = source == "included" or (source == "prior" and waiting < trials_left)
        if is_wanted and spec.key() not in known:
            store.add(spec, source, space)
            known.add(spec.key())


class Sampler:
    """Finds newcomers: a function of the study's state, so that a resumed search draws what an uninterrupted one would
    have."""

    def __init__(self, store: StudyStore, space: SearchSpace, costs: Costs) -> None:
        self.store = store
        self.space = space
        self.costs = costs
        self.encoder = Encoder(space)
        self.recipes = [spec for source, spec in first_specs(store.config, space) if source == "recipe"]
        self._keys: set[str] = set()
        self._num_keys = 0
        self._rows: dict[int, Row | None] = {}

    def find_newcomers(self, appraiser: Appraiser) -> list[Newcomer]:
        """Recipes that were not tried yet, and what the space holds beside."""
        known = self.known_keys()
        recipes = [self.make_newcomer(spec, "recipe") for spec in self.recipes if spec.key() not in known]
        return [*recipes, *self.draw(appraiser)]

    def draw(self, appraiser: Appraiser) -> list[Newcomer]:
        """Around what promises most so far, and anywhere."""
        if not self.space.methods:
            return []
        rng = random.Random(f"{self.store.config.seed} {len(self.store.trials)}")
        drawn = draw_candidates(self.space, appraiser.find_parents(), rng)
        return [Newcomer(self._read_kind(answers), self.encoder.encode(answers)) for answers in drawn]

    def choose_new(self, newcomers: Sequence[Newcomer]) -> Proposal | None:
        """The first that is new and that the machine can train; None where none is."""
        known = self.known_keys()
        for newcomer in newcomers:
            spec = newcomer.spec or self._make_spec(newcomer)
            if spec is not None and spec.key() not in known:
                return Proposal(newcomer.source, spec)
        return None

    def make_newcomer(self, spec: TrialSpec, source: TrialSource) -> Newcomer:
        row = encode_spec(self.encoder, self.space, spec)
        return Newcomer(kind_of(spec), row, spec=spec, source=source, cost=self.costs.find(spec).cost)

    def encode_trials(self) -> dict[int, Row | None]:
        """All trials in the space's terms, by number; None where it cannot express one."""
        for trial in self.store.trials[len(self._rows) :]:
            self._rows[trial.number] = encode_spec(self.encoder, self.space, trial.spec)
        return self._rows

    def known_keys(self) -> set[str]:
        """Of all trials' configurations."""
        for trial in self.store.trials[self._num_keys :]:
            self._keys.add(trial.spec.key())
        self._num_keys = len(self.store.trials)
        return self._keys

    def _read_kind(self, answers: Answers) -> Kind:
        method = str(answers["method"])
        fixed = self.space.methods[method].fixed
        bits, batch_size = (answers.get(f"{method}.{name}", fixed.get(name)) for name in ("bits", "batch_size"))
        return Kind(method, bits, batch_size)  # type: ignore[arg-type]

    def _make_spec(self, newcomer: Newcomer) -> TrialSpec | None:
        """None where the settings do not go together, or not on this machine."""
        assert newcomer.row is not None
        config = self.store.config
        settings = self.space.methods[newcomer.kind.method].read_answers(newcomer.row.answers)
        try:
            spec = make_spec(newcomer.kind.method, settings, max_steps=config.rungs[-1], seed=config.seed)
        except SpecError:
            return None
        return spec if refuse_spec(spec, config.device_kind) is None else None
