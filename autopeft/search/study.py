"""The driver: a study from its first question to its last answer, read from top to bottom.

    suggest -> cost -> feasible? -> assign to a worker -> stretch ends -> record -> race -> promote, stop, pause
    -> ... -> last rung -> complete; when the search's share is spent: finalists -> retrain with seeds -> score on test

Workers train; only this process decides, keeps the ledger, and writes. It never imports torch.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.backends.base import Broken, CostReply, Ended, Finished, Pack, Progress, Purpose, Ready, Stretch
from autopeft.budget import Purpose as LedgerPurpose
from autopeft.errors import SpecError, WorkerError
from autopeft.executors.base import Executor, WorkerEvent
from autopeft.methods import METHODS, refuse_spec
from autopeft.records import (
    Completed,
    Confirmation,
    Cost,
    Failed,
    Inference,
    Refused,
    RungScore,
    Segment,
    Stopped,
    StudyRecord,
    TrialSource,
    TrialSpec,
)
from autopeft.search.account import Account
from autopeft.search.candidates import draw_candidates, settings_of
from autopeft.search.front import cost_value, cost_vector
from autopeft.search.limits import Limits
from autopeft.search.outlook import GainModel
from autopeft.search.plan import first_specs
from autopeft.search.policy import Promote, Situation, StartNew, Wait, choose_next, next_rung
from autopeft.search.racing import Contender, LossCurve, PairedRacing, RacingRule, Verdict, beats_majority, paired_z
from autopeft.search.results import analyze, build_record, plan_confirmations
from autopeft.search.speed import Speed
from autopeft.search.store import StudyStore, Trial
from autopeft.search.surrogate import Encoder, Row, encode_spec
from autopeft.search.worth import Appraiser, Newcomer
from autopeft.spaces.load import default_dimensions
from autopeft.spaces.space import SearchSpace, make_spec

_MOST_DEATHS = 2
"""Workers that may die under one trial before it is given up."""
_MOST_REFUSED = 50
"""Suggestions refused in a row before the space is taken to hold nothing more that fits."""
_MOST_IDLE_DEATHS = 3
_WAIT_SECONDS = 0.5
_BEST_REFERENCE = 0.999
_WORST_LATENCY = 2.0
"""Times the base's: the worst that counts."""

Phase = Literal["search", "confirm", "done"]


class Status(NamedTuple):
    """A moment of a study, for whoever displays it."""

    phase: Phase
    trials: list[Trial]
    running: dict[int, tuple[int, Purpose, int, int]]
    """Worker -> (trial, purpose, step reached, step to reach)."""
    spent_share: float | None
    """Of the budget, in [0, 1]; None where only trials bound it."""
    seconds_left: float
    trials_left: float
    message: str = ""


class _Running(NamedTuple):
    worker: int
    stretch: Stretch
    trial: Trial
    step: int


class _Rest(NamedTuple):
    """What the rest of the budget was expected to bring when so many scores and ends were recorded."""

    scored: int
    gain: float | None


class Search:
    """Runs one study on one executor."""

    def __init__(
        self,
        store: StudyStore,
        executor: Executor,
        space: SearchSpace,
        *,
        wall_seconds_limit: float = math.inf,
        free_bytes: int | None = None,
        racing: RacingRule | None = None,
        on_change: Callable[[Status], None] = lambda status: None,
    ) -> None:
        """`wall_seconds_limit` bounds this run beside the budget (`--until`); `free_bytes` is what a worker's GPU has
        free before it starts."""
        self.store = store
        self.executor = executor
        self.space = space
        self.config = store.config
        self.account = Account(store, executor, wall_seconds_limit)
        self.limits = Limits(self.config, store.trials, free_bytes)
        self.racing = racing or PairedRacing()
        self.on_change = on_change
        self.speed = Speed()
        self.phase: Phase = "search"
        self._running: dict[int, _Running] = {}
        self._next_job = 0
        self._can_suggest = True
        self._refused_in_a_row = 0
        self._idle_deaths = 0
        self._confirm_queue: list[tuple[Trial, int]] = []
        self._rest = _Rest(-1, None)
        self._ends_early = False
        self._costs: dict[str, CostReply] = {}
        self._latencies: dict[str, float] = {}
        self._base_latency: float | None = None
        self._keys: list[str] = []
        self._encoder = Encoder(space)
        self._rows: dict[int, Row | None] = {}
        self._recipes: list[TrialSpec] = []
        self._losses: dict[str, npt.NDArray[np.float64] | None] = {}

    # --- the whole study

    def run(self) -> StudyRecord:
        """`drive`, and the study as it stands then."""
        self.drive()
        return build_record(self.store)

    def drive(self) -> None:
        """Runs until the budget is spent or nothing is left to do. KeyboardInterrupt leaves everything written."""
        self._start()
        try:
            while self.phase != "done":
                self._assign_idle_workers()
                if not self._running:
                    self._advance_phase()
                    continue
                for event in self.executor.wait(_WAIT_SECONDS if self.account.budget.is_clocked else 3600.0):
                    self._take(event)
                self.account.heartbeat()
                self.on_change(self.status())
        except BaseException:
            self._abandon_running()
            raise
        finally:
            self.account.write()
            self.executor.close()
        self.store.save_study(finished=True, running=[])

    def _start(self) -> None:
        self.account.reopen()
        self._recover()
        self._note_workers(self.executor.start())
        self.account.start_clock()
        for trial in [*self.store.trials, *([self.store.baseline] if self.store.baseline else [])]:
            before = 0
            for score in trial.rungs:
                self.speed.learn(trial.spec, score, score.step - before, self.executor.device_rate)
                before = score.step
        if not self.store.reference and not self._awaits_base():
            self._fix_reference()
        first = first_specs(self.config, self.space)
        self._recipes = [spec for source, spec in first if source == "recipe"]
        if all(trial.source in ("included", "prior") for trial in self.store.trials):
            for source, spec in first:
                waiting = sum(trial.state == "waiting" for trial in self.store.trials)
                if source == "included" or (source == "prior" and waiting < self.account.ledger.trials_left()):
                    self._add_first(spec, source)
        # A driver killed between a score and its consequences left them to its successor.
        self._race_all()

    def _add_first(self, spec: TrialSpec, source: TrialSource) -> None:
        if spec.key() not in self._known():
            self.store.add(spec, source, self.space)

    def _note_workers(self, ready: list[Ready]) -> None:
        first = ready[0]
        if "latency" in self.config.objectives:
            assert first.latency is not None
            # A resumed study goes on comparing with what it began with.
            known = self.store.reference.get("latency", _WORST_LATENCY * first.latency.single_seconds)
            self._base_latency = known / _WORST_LATENCY
            for trial in self.store.trials:
                if trial.cost is not None and trial.cost.latency_seconds is not None:
                    self._latencies[trial.spec.modules_key()] = trial.cost.latency_seconds
        if first.notes:
            self.store.save_study(notes=[*self.store.notes, *first.notes])
        if not self.store.provenance.model_digest:
            self.store.save_provenance(
                replace(
                    self.store.provenance,
                    device=first.device_name if self.config.device_kind == "cuda" else self.store.provenance.device,
                    model_digest=first.model_digest,
                    packages=first.packages or self.store.provenance.packages,
                )
            )

    def _fix_reference(self) -> None:
        """The worst that counts in the hypervolume: the majority class, or for a generation task the untrained base, at
        the cost of full fine-tuning and at twice the base's latency."""
        recipe = METHODS["full"].recipe
        full = replace(
            self._template(), method="full", settings=dict(recipe.settings), target_modules=None,
            bits=16 if self.config.device_kind == "cuda" else 32,
        )  # fmt: skip
        cost = self._cost(full).cost
        # Nothing can be above 1; a base that is there already would leave no room to scale qualities to.
        reference = {"quality": min(self.config.majority_quality, _BEST_REFERENCE)}
        if cost is not None:
            for name in self.config.objectives:
                if name == "latency":
                    assert self._base_latency is not None
                    reference[name] = _WORST_LATENCY * self._base_latency
                elif name != "quality":
                    reference[name] = cost_value(cost, name)
        self.store.save_study(reference=reference)

    def _template(self) -> TrialSpec:
        """Where the baseline and the reference take their batch size and schedule from."""
        for spec in (*self.space.recipes, *self.config.included):
            return spec
        dimensions = default_dimensions(METHODS["head"], self.config.device_kind)
        values = {name: dimension.default for name, dimension in dimensions.items()}
        return make_spec("head", values, max_steps=self.config.rungs[-1], seed=self.config.seed)

    # --- crash recovery

    def _recover(self) -> None:
        """After a driver that died: what it had running is paused or requeued."""
        self.store.repair(self.space)
        for trial in self.store.trials:
            if trial.state in ("running", "paused"):
                self._requeue(trial)
        baseline = self.store.baseline
        if baseline is not None and baseline.state == "running":
            baseline.state = "waiting"
        # What the earlier run had to say of its end is said anew at the end of this one.
        self.store.save_study(finished=False, notes=[])

    def _requeue(self, trial: Trial) -> None:
        """Back to its last checkpoint, or to the start where that is gone."""
        if trial.rungs and not self.store.has_checkpoint(trial):
            trial.rungs.clear()
            trial.checkpoint = trial.checkpoint_digest = None
        trial.state = "paused" if trial.rungs else "waiting"
        if not trial.rungs:
            # It will be started, and counted, again.
            self.account.ledger.trials_started -= 1
        self.store.save(trial)

    def _abandon_running(self) -> None:
        """An interrupt: the workers are ended, and what they had begun is charged and requeued."""
        for running in self._running.values():
            self._charge(running, "lost")
            if running.stretch.purpose == "search":
                self._requeue(running.trial)
            elif running.stretch.purpose == "baseline":
                running.trial.state = "waiting"
                self.store.save(running.trial)
        self._running.clear()
        self.account.heartbeat(force=True)

    # --- assign

    def _assign_idle_workers(self) -> None:
        for worker in range(self.executor.num_workers):
            if worker not in self._running:
                stretch = self._next_stretch()
                if stretch is None:
                    return
                self._assign(worker, *stretch)

    def _next_stretch(self) -> tuple[Trial, Stretch] | None:
        if self.phase == "confirm":
            return self._next_confirmation()
        if self.store.baseline is None or self.store.baseline.state == "waiting":
            return self._next_baseline()
        if self._awaits_base():
            # Nothing can be compared before it is known what there is to beat.
            self._cost_first()
            return None
        while True:
            appraiser = self._make_appraiser()
            choice = choose_next(
                self._situation(), self.speed, appraiser, functools.partial(self._find_newcomers, appraiser)
            )
            self._ends_early = not isinstance(choice, Wait) and self._is_enough()
            if self._ends_early:
                return None
            if isinstance(choice, Promote):
                return self._stretch_of(self._trial(choice.number))
            if not isinstance(choice, StartNew):
                return None
            trial = self._begin(choice)
            if trial is None:
                self._can_suggest = False
            elif self._is_feasible(trial):
                self._refused_in_a_row = 0
                self.account.ledger.trials_started += 1
                return self._stretch_of(trial)
            elif trial.source == "sampler":
                self._refused_in_a_row += 1
                self._can_suggest = self._refused_in_a_row < _MOST_REFUSED

    def _is_enough(self) -> bool:
        """Whether what is left of the budget promises less than the user wants of it.

        Asked anew when a trial has ended or paused: where a running one then adds more than was expected, the search
        goes on.
        """
        least = self.config.least_gain
        if least is None or any(trial.state == "waiting" for trial in self.store.trials):
            return False
        scored = sum(len(trial.rungs) + (trial.outcome is not None) for trial in self.store.trials)
        if self._rest.scored != scored:
            self._rest = _Rest(scored, self._estimate_rest())
        return self._rest.gain is not None and self._rest.gain < least

    def _estimate_rest(self) -> float | None:
        """Expected growth of the front with the rest of the search's budget; None where too little was tried to say."""
        model = GainModel(self.store.trials, self.store.reference)
        if not model.can_tell:
            return None
        seconds, trials = self.account.search_seconds_left(), self.account.ledger.trials_left()
        gains = []
        if math.isfinite(seconds):
            gains.append(model.estimate(max(0.0, seconds) * self.executor.device_rate * self.executor.num_workers))
        if math.isfinite(trials):
            gains.append(model.estimate_trials(max(0.0, trials)))
        return min((gain.expected for gain in gains), default=None)

    def _situation(self) -> Situation:
        return Situation(
            trials=self.store.trials,
            rungs=self.config.rungs,
            seconds_left=self.account.search_seconds_left(),
            trials_left=self.account.ledger.trials_left(),
            can_suggest=self._can_suggest,
            is_one_waiting=self._next_waiting() is not None,
            revivable=[trial for trial in self.store.trials if self.store.may_revive(trial)],
        )

    def _make_appraiser(self) -> Appraiser:
        return Appraiser(
            self.store.trials,
            self.config.rungs,
            self.store.reference,
            self.speed,
            is_clocked=self.account.budget.is_clocked,
            rows=self._encode_all(),
            most=self.limits.most(),
        )

    def _encode_all(self) -> dict[int, Row | None]:
        for trial in self.store.trials[len(self._rows) :]:
            self._rows[trial.number] = encode_spec(self._encoder, self.space, trial.spec)
        return self._rows

    def _next_waiting(self) -> Trial | None:
        """What the user included, what did well elsewhere, and what was begun in vain, in that order."""
        return next((trial for trial in self.store.trials if trial.state == "waiting"), None)

    def _find_newcomers(self, appraiser: Appraiser) -> list[Newcomer]:
        """Recipes that were not tried yet, and what the space holds beside."""
        known = self._known()
        recipes = [self._make_newcomer(spec, "recipe") for spec in self._recipes if spec.key() not in known]
        return [*recipes, *self._draw_newcomers(appraiser)]

    def _make_newcomer(self, spec: TrialSpec, source: TrialSource) -> Newcomer:
        return Newcomer(
            spec.method,
            encode_spec(self._encoder, self.space, spec),
            spec=spec,
            source=source,
            cost=self._cost(spec).cost,
        )

    def _draw_newcomers(self, appraiser: Appraiser) -> list[Newcomer]:
        """A function of the study's state, so that a resumed search draws what an uninterrupted one would have."""
        if not self.space.methods:
            return []
        rng = random.Random(f"{self.config.seed} {len(self.store.trials)}")
        drawn = draw_candidates(self.space, appraiser.find_parents(), rng)
        return [Newcomer(str(answers["method"]), self._encoder.encode(answers)) for answers in drawn]

    def _cost_first(self) -> None:
        """So that decisions need not wait for them; recipes' costs are also what others' are interpolated from."""
        for spec in (*self.config.included, *self._recipes):
            self._cost(spec)

    def _begin(self, choice: StartNew) -> Trial | None:
        """The first that is new and that the machine can train; None where none is."""
        if not choice.newcomers:
            return self._next_waiting()
        known = self._known()
        for newcomer in choice.newcomers:
            spec = newcomer.spec or self._make_spec(newcomer)
            if spec is not None and spec.key() not in known:
                return self.store.add(spec, newcomer.source, self.space)
        return None

    def _make_spec(self, newcomer: Newcomer) -> TrialSpec | None:
        """None where the settings do not go together, or not on this machine."""
        assert newcomer.row is not None
        settings = settings_of(self.space.methods[newcomer.method], newcomer.row.answers)
        try:
            spec = make_spec(newcomer.method, settings, max_steps=self.config.rungs[-1], seed=self.config.seed)
        except SpecError:
            return None
        return spec if refuse_spec(spec, self.config.device_kind) is None else None

    def _known(self) -> set[str]:
        for trial in self.store.trials[len(self._keys) :]:
            self._keys.append(trial.spec.key())
        return set(self._keys)

    def _is_feasible(self, trial: Trial) -> bool:
        """Costs are known before anything is trained; what they forbid is recorded as refused and never started."""
        rule = refuse_spec(trial.spec, self.config.device_kind)
        if rule is None:
            reply = self._cost(trial.spec)
            trial.cost, rule = reply.cost, reply.refused
        if rule is None and trial.cost is not None:
            trial.cost = self._with_latency(self.limits.correct(trial.cost, trial.spec.bits), trial.spec)
            rule = self.limits.judge(trial).rule
        if rule is None:
            return True
        trial.state, trial.outcome = "refused", Refused(rule=rule)
        self.store.save(trial)
        return False

    def _cost(self, spec: TrialSpec) -> CostReply:
        key = spec.cost_key()
        if key not in self._costs:
            self._costs[key] = self.executor.cost(spec)
        return self._costs[key]

    def _lacks_latency(self, trial: Trial) -> bool:
        return (
            self._base_latency is not None
            and trial.step == 0
            and trial.cost is not None
            and trial.cost.latency_seconds is None
        )

    def _with_latency(self, cost: Cost, spec: TrialSpec) -> Cost:
        """With the latency at which the configuration would be served, where that is an objective and known.

        What merges is served as the base is. Anything else is timed by the worker that builds it first, before its
        first rung; whatever has the same modules shares the value, so that noise never ranks equals.
        """
        if self._base_latency is None:
            return cost
        merges = METHODS[spec.method].merges
        return replace(cost, latency_seconds=self._base_latency if merges else self._latencies.get(spec.modules_key()))

    def _learn_latency(self, spec: TrialSpec, inference: Inference) -> None:
        """Relative to the base, as the worker timed both at once: workers and hours differ, the ratio hardly."""
        assert self._base_latency is not None
        assert inference.base is not None
        ratio = inference.unmerged.single_seconds / inference.base.single_seconds
        self._latencies.setdefault(spec.modules_key(), ratio * self._base_latency)

    def _stretch_of(self, trial: Trial) -> tuple[Trial, Stretch]:
        to_step = next_rung(trial, self.config.rungs)
        return trial, self._make_stretch(trial, trial.spec, "search", trial.step, to_step)

    def _make_stretch(self, trial: Trial, spec: TrialSpec, purpose: Purpose, from_step: int, to_step: int) -> Stretch:
        self._next_job += 1
        return Stretch(
            job=self._next_job,
            trial=trial.number,
            spec=spec,
            purpose=purpose,
            from_step=from_step,
            to_step=to_step,
            checkpoint=trial.checkpoint if from_step else None,
            checkpoint_digest=trial.checkpoint_digest if from_step else None,
            save=purpose == "search" and to_step < spec.max_steps,
            # The untrained base's test score is known as early as its others, and chooses nothing either.
            score_test=purpose == "confirm" or (purpose == "baseline" and self._is_generation),
            measure_inference=purpose == "confirm" or (purpose == "search" and self._lacks_latency(trial)),
            score_batch_size=trial.cost.scoring_batch_size if trial.cost is not None else None,
        )

    def _next_baseline(self) -> tuple[Trial, Stretch]:
        """A trained head on the frozen base, once, at full length: what the adapters must beat. A language model has no
        head, so for a generation task it is the base as it is."""
        recipe = METHODS["head"].recipe
        spec = replace(
            self._template(), method="head", settings=dict(recipe.settings), target_modules=None,
            learning_rate=recipe.learning_rate, bits=16 if self.config.device_kind == "cuda" else 32,
        )  # fmt: skip
        if self.store.baseline is None:
            baseline = Trial(number=-1, spec=spec, source="baseline")
            cost = self._cost(spec).cost
            baseline.cost = None if cost is None else self._with_latency(cost, spec)
            self.store.save_baseline(baseline)
        assert self.store.baseline is not None
        to_step = 0 if self._is_generation else spec.max_steps
        return self.store.baseline, self._make_stretch(self.store.baseline, spec, "baseline", 0, to_step)

    def _assign(self, worker: int, trial: Trial, stretch: Stretch) -> None:
        if stretch.purpose != "confirm":
            trial.state, trial.outcome = "running", None
            self.store.save(trial)
        self._running[worker] = _Running(worker, stretch, trial, stretch.from_step)
        self.account.open(worker, trial.number)
        self.executor.assign(worker, Pack(stretches=(stretch,)))
        self.on_change(self.status())

    # --- record

    def _take(self, event: WorkerEvent) -> None:
        if event.event is None or isinstance(event.event, Broken):
            self._bury(event)
            return
        running = self._running.get(event.worker)
        if isinstance(event.event, Ready) or running is None:
            return
        if isinstance(event.event, Progress):
            self._running[event.worker] = running._replace(step=event.event.step)
            return
        del self._running[event.worker]
        purpose = running.stretch.purpose
        seconds = self._charge(running, purpose, event.at_seconds)
        if isinstance(event.event, Ended):
            self._record_end(running, event.event)
        else:
            assert isinstance(event.event, Finished)
            self._record_score(running, event.event, seconds)
        self.account.heartbeat(force=True)
        self.on_change(self.status())

    def _charge(self, running: _Running, purpose: LedgerPurpose, at: float | None = None) -> float:
        """Device-seconds from assignment to release, into the ledger and the timeline."""
        bill = self.account.settle(running.worker, purpose, at)
        trial = running.trial
        if running.stretch.purpose != "confirm":
            trial.device_seconds += bill.device_seconds
        trial.segments.append(
            Segment(
                worker=running.worker,
                trial=trial.number,
                purpose=purpose,
                start_seconds=bill.start_seconds,
                end_seconds=bill.end_seconds,
                step=running.step if purpose == "lost" else running.stretch.to_step,
            )
        )
        return bill.device_seconds

    def _record_score(self, running: _Running, finished: Finished, seconds: float) -> None:
        trial, stretch = running.trial, running.stretch
        if stretch.purpose == "confirm":
            assert finished.test is not None
            trial.confirmations.append(
                Confirmation(
                    seed=stretch.spec.seed,
                    quality=finished.validation.quality,
                    loss=finished.validation.loss,
                    test_quality=finished.test.quality,
                    test_loss=finished.test.loss,
                    test_quality_sd=finished.test.quality_sd,
                    num_test_examples=finished.test.num_examples,
                    device_seconds=seconds,
                    scores_file=finished.scores_file,
                    scores_digest=finished.scores_digest,
                    inference=self._name_device(finished.inference),
                )
            )
            self.store.save(trial)
            return
        score = RungScore(
            rung=len(trial.rungs) if stretch.purpose == "search" else len(self.config.rungs) - 1,
            step=stretch.to_step,
            quality=finished.validation.quality,
            quality_sd=finished.validation.quality_sd,
            loss=finished.validation.loss,
            num_examples=finished.validation.num_examples,
            device_seconds=seconds,
            train_seconds=finished.train_seconds,
            scores_file=finished.scores_file,
            scores_digest=finished.scores_digest,
        )
        trial.rungs.append(score)
        self.speed.learn(trial.spec, score, stretch.to_step - stretch.from_step, self.executor.device_rate)
        cost = trial.cost
        if finished.peak_vram_bytes is not None and trial.cost is not None:
            trial.cost = measured_cost(trial.cost, finished.peak_vram_bytes, finished.reserved_vram_bytes)
        if finished.inference is not None and trial.cost is not None:
            self._learn_latency(trial.spec, finished.inference)
            trial.cost = self._with_latency(trial.cost, trial.spec)
        trial.checkpoint, trial.checkpoint_digest = finished.checkpoint, finished.checkpoint_digest
        if stretch.purpose == "baseline" and self._is_generation:
            # Before the baseline is written as complete: a driver killed in between scores it again.
            assert finished.test is not None
            self._set_floor(finished.validation.quality, finished.test.quality)
        if stretch.to_step >= trial.spec.max_steps or stretch.purpose == "baseline":
            trial.state, trial.outcome = "complete", Completed()
        else:
            trial.state = "paused"
        self.store.save(trial)
        self.store.drop_checkpoints(trial, keep=trial.checkpoint)
        if stretch.purpose == "search":
            if trial.cost != cost and len(trial.rungs) > 1:
                # A new measurement changes what was compared at earlier rungs.
                self._race_all()
            else:
                self._race(trial)

    def _name_device(self, inference: Inference | None) -> Inference | None:
        """With the device's name as the study has it; a worker on CPU knows only the architecture."""
        provenance = self.store.provenance
        count = "1 thread" if provenance.threads == 1 else f"{provenance.threads} threads"
        device = provenance.device if self.config.device_kind == "cuda" else f"{provenance.device}, {count}"
        return None if inference is None else replace(inference, device=device)

    def _record_end(self, running: _Running, ended: Ended) -> None:
        trial = running.trial
        if running.stretch.purpose == "confirm":
            self.store.save_study(
                notes=[
                    *self.store.notes,
                    f"A confirmation of trial {trial.number} ended: {ended.reason}, {ended.detail}.",
                ]
            )
            return
        if ended.peak_vram_bytes is not None and trial.cost is not None:
            trial.cost = measured_cost(trial.cost, ended.peak_vram_bytes, None)
        trial.state, trial.outcome = "failed", Failed(reason=ended.reason, detail=ended.detail)
        self.store.save(trial)
        self.store.drop_checkpoints(trial)
        if running.stretch.purpose == "baseline" and self._is_generation:
            note = f"The untrained base could not be scored ({ended.reason}), so trials are compared with 0 instead."
            self.store.save_study(notes=[*self.store.notes, note])
            self._set_floor(0.0, 0.0)

    def _set_floor(self, quality: float, test_quality: float) -> None:
        """What trials of a generation task must beat, known once the untrained base was scored."""
        self.config = replace(self.config, majority_quality=quality, majority_test_quality=test_quality)
        self.store.save_config(self.config)
        self._fix_reference()

    def _bury(self, event: WorkerEvent) -> None:
        """A worker died: its unfinished stretch is lost, its trial goes back to its checkpoint, a new worker starts."""
        detail = event.event.detail if isinstance(event.event, Broken) else event.detail
        running = self._running.get(event.worker)
        if running is None:
            self._idle_deaths += 1
            if self._idle_deaths > _MOST_IDLE_DEATHS:
                raise WorkerError(f"Workers die even without work, so the search was ended. Last words: {detail}")
            self.executor.restart(event.worker)
            return
        self._charge(running, "lost", event.at_seconds)
        del self._running[event.worker]
        trial = running.trial
        trial.deaths += 1
        if running.stretch.purpose == "search":
            if trial.deaths >= _MOST_DEATHS:
                trial.state = "failed"
                trial.outcome = Failed(reason="worker_died", detail=detail[-300:])
                self.store.save(trial)
                self.store.drop_checkpoints(trial)
            else:
                self._requeue(trial)
        elif running.stretch.purpose == "confirm" and trial.deaths < _MOST_DEATHS:
            self._confirm_queue.insert(0, (trial, running.stretch.spec.seed))
        elif running.stretch.purpose == "baseline":
            if trial.deaths >= _MOST_DEATHS:
                raise WorkerError(f"The baseline cannot be trained: its worker died twice. {detail}")
            trial.state = "waiting"
            self.store.save(trial)
        if sum(t.deaths for t in self.store.trials) > 3 * self.executor.num_workers + 3:
            raise WorkerError(f"Workers keep dying, so the search was ended. The last one's words: {detail}")
        self.executor.restart(event.worker)

    # --- race

    def _race(self, newcomer: Trial) -> None:
        """Stops what is clearly beaten, now that one more trial was scored at a rung."""
        if newcomer.state == "complete":
            if self.racing.learn(self._loss_curves()) != self.racing:
                self._race_all()
            return
        step = newcomer.step
        field = {trial.number: self._contender(trial, step) for trial in self._scored_at(step)}
        self._judge(newcomer, field[newcomer.number], list(field.values()))
        for number, contender in field.items():
            self._judge(self._trial(number), contender, [field[newcomer.number]])

    def _race_all(self) -> None:
        """Compares all paused trials with all that were ever scored at their rungs."""
        self.racing = self.racing.learn(self._loss_curves())
        for step in self.config.rungs[:-1]:
            field = {trial.number: self._contender(trial, step) for trial in self._scored_at(step)}
            for number, contender in field.items():
                self._judge_again(self._trial(number), contender, list(field.values()))
                self._judge(self._trial(number), contender, list(field.values()))

    def _judge(self, trial: Trial, contender: Contender, rivals: Sequence[Contender]) -> None:
        """`contender` is the trial at the rung where `rivals` were scored, which it may have left behind."""
        if trial.state != "paused" or trial.step != contender.step:
            return
        verdict = self._verdict(contender, rivals)
        if verdict is not None:
            trial.state = "stopped"
            trial.outcome = Stopped(rung=trial.rungs[-1].rung, rival=verdict.rival, detail=verdict.detail)
            self.store.save(trial)

    def _judge_again(self, trial: Trial, contender: Contender, rivals: Sequence[Contender]) -> None:
        """A stopped trial goes on where nothing would stop it now: noise may cost time, but never a member of the
        front."""
        if self.store.may_revive(trial) and trial.step == contender.step and self._verdict(contender, rivals) is None:
            trial.state, trial.outcome = "paused", None
            self.store.save(trial)

    def _verdict(self, contender: Contender, rivals: Sequence[Contender]) -> Verdict | None:
        floor = self.config.majority_quality
        if self._is_generation:
            # The untrained base was scored on the same examples, so that beating it can be told by pairs.
            rivals = [rival for rival in rivals if self._beats_base(rival.losses)]
            floor = -math.inf
        return self.racing.judge(contender, rivals, progress=self._progress(contender.step), majority_quality=floor)

    def _scored_at(self, step: int) -> list[Trial]:
        return [trial for trial in self.store.trials if any(score.step == step for score in trial.rungs)]

    def _loss_curves(self) -> list[LossCurve]:
        return [{self._progress(s.step): s.loss for s in trial.rungs} for trial in self.store.trials if trial.rungs]

    def _progress(self, step: int) -> float:
        return step / self.config.rungs[-1]

    def _contender(self, trial: Trial, step: int) -> Contender:
        score = next(score for score in trial.rungs if score.step == step)
        assert trial.cost is not None
        return Contender(
            number=trial.number,
            step=step,
            costs=cost_vector(trial.cost, self.config.objectives),
            quality=score.quality,
            num_examples=score.num_examples,
            loss=score.loss,
            losses=self._read_losses(score.scores_file),
        )

    # --- confirm

    def _advance_phase(self) -> None:
        if self.phase == "search":
            self.store.tell_stopped()
            self.phase = "confirm"
            self._confirm_queue = self._plan_confirmations()
            self.on_change(self.status())
        else:
            self.phase = "done"
            self._conclude()

    def _plan_confirmations(self) -> list[tuple[Trial, int]]:
        """What is still to be done of them: a resumed study has some already."""
        front = analyze(self.store, confirmed=False)
        wanted = plan_confirmations(front, first_seed=self.config.seed + 1, num_seeds=self.config.confirm_seeds)
        queue = [(self._trial(number), seed) for number, seed in wanted]
        return [(t, seed) for t, seed in queue if all(c.seed != seed for c in t.confirmations)]

    def _next_confirmation(self) -> tuple[Trial, Stretch] | None:
        for index, (trial, seed) in enumerate(self._confirm_queue):
            needed = self.speed.predict(trial.spec.method, trial.spec.max_steps)
            if needed <= self.account.seconds_left():
                del self._confirm_queue[index]
                spec = replace(trial.spec, seed=seed)
                return trial, self._make_stretch(trial, spec, "confirm", 0, spec.max_steps)
        return None

    def _conclude(self) -> None:
        """What a reader must know about how it ended."""
        notes = list(self.store.notes)
        complete = [trial for trial in self.store.trials if trial.state == "complete"]
        if not complete:
            notes.append(
                "The budget was too small: no trial reached its full length, so nothing can be recommended. Give a "
                "larger --budget or a smaller --max-steps."
            )
        elif len(complete) < 3:
            notes.append(f"The budget was small: only {len(complete)} trials reached their full length.")
        if complete and not any(self._beats_majority(trial) for trial in complete):
            floor = "the untrained base" if self._is_generation else "always answering the most frequent label"
            notes.append(
                f"No trial clearly beats {floor}, so the picks mean nothing yet. Give trials more steps (--max-steps), "
                "or a stronger --model."
            )
        if complete and not any(trial.confirmations for trial in complete) and self.config.confirm_seeds:
            notes.append(
                "No finalist could be confirmed with another seed within the budget: there are no test scores."
            )
        elif self._confirm_queue:
            count = len(self._confirm_queue)
            notes.append(f"{count} planned confirmation{'s' * (count > 1)} did not fit into the budget.")
        if self._ends_early:
            assert self._rest.gain is not None
            notes.append(
                f"The search was ended early: the rest of its budget was expected to enlarge the front's hypervolume "
                f"by {self._rest.gain:.2%}, less than --stop-when-gain-below {self.config.least_gain:.2%}. To go on "
                f"all the same: autopeft resume {self.config.name}."
            )
        overrun = -self.account.budget_seconds_left()
        if overrun > 0 and math.isfinite(overrun):
            notes.append(f"The budget was overrun by {overrun:.0f} s of wall time, the end of the last stretch.")
        if not self._can_suggest:
            notes.append("The sampler found nothing new in the space that fits before the budget ended.")
        self.store.save_study(notes=list(dict.fromkeys(notes)))

    # --- small things

    def _beats_majority(self, trial: Trial) -> bool:
        last = trial.rungs[-1]
        if self._is_generation:
            return self._beats_base(self._read_losses(last.scores_file))
        return beats_majority(last.quality, self.config.majority_quality, last.num_examples)

    def _beats_base(self, losses: npt.NDArray[np.float64] | None) -> bool:
        """Whether by more than two standard errors of the paired differences in loss."""
        baseline = self.store.baseline
        if losses is None or baseline is None or not baseline.rungs:
            return True
        base_losses = self._read_losses(baseline.rungs[-1].scores_file)
        return base_losses is None or paired_z(base_losses, losses) > 2

    def _read_losses(self, scores_file: str) -> npt.NDArray[np.float64] | None:
        if scores_file not in self._losses:
            self._losses[scores_file] = self.store.read_losses(scores_file)
        return self._losses[scores_file]

    @property
    def _is_generation(self) -> bool:
        return self.config.task_kind == "generation"

    def _awaits_base(self) -> bool:
        """Whether a generation task's untrained base has yet to be scored."""
        baseline = self.store.baseline
        return self._is_generation and (baseline is None or baseline.state in ("waiting", "running"))

    def _trial(self, number: int) -> Trial:
        return self.store.trials[number]

    def status(self) -> Status:
        left, total = self.account.seconds_left(), self.account.total_seconds
        return Status(
            phase=self.phase,
            trials=self.store.trials,
            running={
                worker: (r.trial.number, r.stretch.purpose, r.step, r.stretch.to_step)
                for worker, r in self._running.items()
            },
            spent_share=None if math.isinf(total) else min(1.0, 1 - left / total),
            seconds_left=left,
            trials_left=self.account.ledger.trials_left(),
        )


def measured_cost(cost: Cost, peak_bytes: int, reserved_bytes: int | None) -> Cost:
    """The cost with its VRAM replaced by what the probe measured; the estimate is kept beside it."""
    return replace(
        cost,
        peak_vram_bytes=peak_bytes,
        vram_source="measured",
        reserved_vram_bytes=reserved_bytes,
        estimated_vram_bytes=cost.estimated_vram_bytes or cost.peak_vram_bytes,
    )
