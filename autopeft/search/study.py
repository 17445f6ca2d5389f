"""The driver: a study from its first question to its last answer, read from top to bottom.

    suggest -> cost -> feasible? -> assign to a worker -> stretch ends -> record -> race -> promote, stop, pause
    -> ... -> last rung -> complete; when the search's share is spent: finalists -> retrain with seeds -> score on test

Workers train; only this process decides, keeps the ledger, and writes. It never imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopeft.backends.base import Broken, Ended, Finished, Pack, Progress, Ready, Stretch
from autopeft.budget import Purpose as LedgerPurpose
from autopeft.errors import StudyError
from autopeft.executors.base import Executor, WorkerEvent, make_worker_error
from autopeft.methods import refuse_spec
from autopeft.records import (
    Bits,
    Completed,
    Failed,
    FailedConfirmation,
    FailureReason,
    Refused,
    Stopped,
    StudyConfig,
    StudyRecord,
    TrialSpec,
)
from autopeft.search.account import Account
from autopeft.search.baseline import make_baselines, make_dearest, make_reference
from autopeft.search.conclusion import Ending, conclude, say_failed
from autopeft.search.costs import WORST_LATENCY, Costs, measured_cost
from autopeft.search.early_end import EarlyEnd
from autopeft.search.lengths import next_rung
from autopeft.search.limits import Limits
from autopeft.search.plan import complete_provenance
from autopeft.search.policy import Promote, Situation, StartNew, StartWaiting, Wait, choose_next
from autopeft.search.race import Decision, Race
from autopeft.search.racing import PairedRacing, RacingRule
from autopeft.search.recovery import find_held, recover, requeue
from autopeft.search.results import build_record, find_confirmations
from autopeft.search.sampler import Sampler, enqueue_first
from autopeft.search.speed import Speed, kind_of
from autopeft.search.status import Phase, Status
from autopeft.search.store import StudyStore, Trial
from autopeft.search.stretches import make_confirmation, make_rung_score, make_stretch
from autopeft.search.worth import Appraiser
from autopeft.spaces.dimensions import widest_bits
from autopeft.spaces.space import SearchSpace
from autopeft.wording import last_line

_MOST_DEATHS = 2
"""Workers that may die under one trial before it is given up."""
_MOST_REFUSED = 50
"""Suggestions refused in a row before the space is taken to hold nothing more that fits."""
_MUCH_UNQUANTIZED = 0.25
"""Of the weights in blocks. What is no linear layer is under 1% of them where there are no experts."""
_MOST_IDLE_DEATHS = 3
"""Times that a worker may die while it comes up or waits, since it last finished a stretch, until it is given up."""
_WAIT_SECONDS = 0.5


class _Running(NamedTuple):
    worker: int
    stretch: Stretch
    trial: Trial
    step: int
    loading_seconds: float = 0.0
    """Wall seconds in which its worker came up first."""
    base_seconds: float = 0.0
    """Wall seconds in which its worker loaded a base that it did not hold."""


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
        self.account = Account(store, executor, wall_seconds_limit)
        self.early_end = EarlyEnd(store, self.account)
        self.limits = Limits(store.config, store.trials, free_bytes)
        self.costs = Costs(executor.cost)
        self.sampler = Sampler(store, space, self.costs)
        self.race = Race(store, racing or PairedRacing())
        self.on_change = on_change
        self.speed = Speed()
        self.phase: Phase = "search"
        self._running: dict[int, _Running] = {}
        self._held: dict[int, Bits] = {}
        """By worker, as far as it ran something: the width of the base it ran last."""
        self._jobs = itertools.count(1)
        self._found_nothing_new = False
        """Whether the last decision had nothing new to choose from."""
        self._deaths_in_a_row = 0
        self._idle_deaths = Counter[int]()
        """By worker: without work or while coming up, which is no trial's doing."""
        self._coming_up = set[int]()
        """Workers that were restarted and are not ready yet."""
        self._given_up = set[int]()
        self._confirm_queue: list[tuple[Trial, int]] = []
        self._confirmation_deaths: Counter[tuple[int, int]] = Counter()
        """By trial and seed."""
        self._ends_early = False

    # --- the whole study

    def run(self) -> StudyRecord:
        """`drive`, and the study as it stands then."""
        self.drive()
        return build_record(self.store)

    def drive(self) -> None:
        """Runs until the budget is spent or nothing is left to do. KeyboardInterrupt leaves everything written."""
        self.account.reopen()
        recover(self.store, self.account.ledger)
        with contextlib.ExitStack() as leaving:
            # From the last to the first, whatever becomes of the others. The workers are ended before anything is
            # written: where that fails, or takes long, they would go on without a driver.
            leaving.callback(self.account.write)
            leaving.callback(self._abandon_running)
            leaving.callback(self.executor.close)
            self._start()
            while self.phase != "done":
                self._assign_idle_workers()
                if not self._running:
                    self._advance_phase()
                    continue
                events = self.executor.wait(_WAIT_SECONDS if self.account.budget.is_clocked else 3600.0)
                # What ends the study comes last: other workers' scores are no worse for it.
                for event in sorted(events, key=_ends_study):
                    self._take(event)
                self.account.heartbeat()
                self.on_change(self.status())
        self.store.save_study(finished=True, running=[])

    def _start(self) -> None:
        self._note_workers(self.executor.start())
        self.account.start_clock()
        every = [*self.store.trials, *([self.store.baseline] if self.store.baseline else [])]
        self.speed.learn_all(every)
        self._held = find_held(every)
        # It may lack what could not be told when the study began.
        if not set(self.config.objectives) <= self.store.reference.keys() and not self._awaits_base():
            self._fix_reference()
        enqueue_first(self.store, self.space, self.account.ledger.trials_left())
        # A driver killed between a score and its consequences left them to its successor.
        self._carry_out(self.race.judge_all())

    def _note_workers(self, ready: list[Ready]) -> None:
        first = ready[0]
        provenance = self.store.provenance
        for each in ready:
            provenance = complete_provenance(provenance, each, self.config)
        if provenance != self.store.provenance:
            self.store.save_provenance(provenance)
        if "latency" in self.config.objectives:
            assert first.latency is not None
            # A resumed study goes on comparing with what it began with.
            known = self.store.reference.get("latency")
            base_seconds = first.latency.single_seconds if known is None else known / WORST_LATENCY
            self.costs.begin_latency(base_seconds, self.store.trials)
        self._note(*first.notes)
        if first.unquantized_share > _MUCH_UNQUANTIZED and self.space.quantizes:
            self._note(
                f"Of the weights in this model's blocks 4 and 8 bits leave {first.unquantized_share:.0%} as they are: "
                "bitsandbytes quantizes linear layers alone, and experts that are one fused parameter are none."
            )

    def _fix_reference(self) -> None:
        reply = self.costs.find(make_dearest(self.config, self.space))
        if reply.cost is None:
            self._note(
                f"What full fine-tuning costs cannot be told ({reply.refused}), so hypervolumes are of quality alone, "
                "and the search goes by it."
            )
        worst_latency = self.costs.worst_latency if "latency" in self.config.objectives else None
        self.store.save_study(reference=make_reference(self.config, reply.cost, worst_latency))

    def _abandon_running(self) -> None:
        """An interrupt: the workers are ended, and what they had begun is charged and requeued."""
        if not self._running:
            return
        abandoned = list(self._running.values())
        for running in abandoned:
            self._charge(running, "lost")
        self._running.clear()
        # Before checkpoints are read, which takes long: a second interrupt must not have it charged twice.
        self.account.heartbeat(force=True)
        for running in abandoned:
            if running.stretch.purpose == "search":
                requeue(running.trial, self.store, self.account.ledger)
            elif running.stretch.purpose == "baseline":
                running.trial.state = "waiting"
                self.store.save(running.trial)
        self.account.heartbeat(force=True)

    # --- assign

    def _assign_idle_workers(self) -> None:
        in_vain = set[Bits | None]()
        begins_baseline = False
        for worker in range(self.executor.num_workers):
            held = self._find_held(worker)
            if worker in self._running or worker in self._given_up or held in in_vain:
                continue
            stretch = self._next_stretch(held)
            if stretch is not None:
                self._assign(worker, *stretch)
                begins_baseline |= stretch[1].purpose == "baseline"
            elif self._ends_early and self.phase == "search":
                return
            else:
                # What it holds decides what may still be in time: another worker may have something to do.
                in_vain.add(held)
        if begins_baseline:
            # Each takes seconds, which the first decision would wait for: it compares all recipes, and interpolates the
            # costs of others from theirs.
            for spec in (*self.config.included, *self.sampler.recipes):
                self.costs.find(spec)

    def _next_stretch(self, held: Bits | None) -> tuple[Trial, Stretch] | None:
        if self.phase == "confirm":
            return self._next_confirmation(held)
        if self.store.baseline is None or self.store.baseline.state == "waiting":
            return self._next_baseline()
        if self._awaits_base():
            # Nothing can be compared before it is known what there is to beat.
            return None
        self._found_nothing_new = self._count_refused() >= _MOST_REFUSED
        while True:
            appraiser = self._make_appraiser(held)
            choice = choose_next(
                self._situation(held), self.speed, appraiser, functools.partial(self.sampler.find_newcomers, appraiser)
            )
            self._ends_early = isinstance(choice, StartNew | Promote) and self.early_end.is_due()
            if self._ends_early:
                return None
            if isinstance(choice, Promote):
                return self._stretch_of(self.store.trials[choice.number])
            if isinstance(choice, Wait):
                return None
            trial = self.store.trials[choice.number] if isinstance(choice, StartWaiting) else self._add(choice)
            if trial is None:
                self._found_nothing_new = True
            elif self._is_feasible(trial):
                self.account.ledger.trials_started += 1
                return self._stretch_of(trial)
            elif trial.source == "sampler":
                self._found_nothing_new = self._count_refused() >= _MOST_REFUSED

    def _count_refused(self) -> int:
        """Suggestions refused since a trial was last begun, by the study's state: a resumed search knows them too.

        Only those that would be refused again: a GPU may have had less room then.
        """
        refused = 0
        for trial in reversed(self.store.trials):
            if trial.rungs or trial.state not in ("refused", "waiting"):
                break
            if trial.state == "waiting" or trial.source != "sampler":
                continue
            if trial.cost is not None and self.limits.judge(trial).rule is None:
                break
            refused += 1
        return refused

    def _find_held(self, worker: int) -> Bits | None:
        """A GPU has room for one base, and begins with the unquantized one; on a CPU all stay."""
        return self._held.get(worker, widest_bits("cuda")) if self.config.device_kind == "cuda" else None

    def _situation(self, held: Bits | None = None) -> Situation:
        return Situation(
            trials=self.store.trials,
            rungs=self.config.rungs,
            seconds_left=self.account.search_seconds_left(),
            trials_left=self.account.ledger.trials_left(),
            can_suggest=not self._found_nothing_new,
            # What the user included, what did well elsewhere, and what was begun in vain, in that order.
            waiting=[trial for trial in self.store.trials if trial.state == "waiting"],
            revivable=[trial for trial in self.store.trials if self.store.may_revive(trial)],
            held=held,
        )

    def _make_appraiser(self, held: Bits | None = None) -> Appraiser:
        return Appraiser(
            self.store.trials,
            self.config.rungs,
            self.store.reference,
            self.speed,
            is_clocked=self.account.budget.is_clocked,
            has_learned=self.race.beats_floor,
            rows=self.sampler.encode_trials(),
            most=self.limits.most(),
            held=held,
        )

    def _add(self, choice: StartNew) -> Trial | None:
        """The trial to start, not yet known to be feasible; None where all that was drawn is known."""
        chosen = self.sampler.choose_new(choice.newcomers)
        return None if chosen is None else self.store.add(chosen.spec, chosen.source, self.space)

    def _is_feasible(self, trial: Trial) -> bool:
        """Costs are known before anything is trained; what they forbid is recorded as refused and never started."""
        rule = refuse_spec(trial.spec, self.config.device_kind)
        if rule is None:
            reply = self.costs.find(trial.spec)
            trial.cost, rule = reply.cost, reply.refused
        if rule is None and trial.cost is not None:
            trial.cost = self.costs.with_latency(self.limits.correct(trial.cost, trial.spec.bits), trial.spec)
            rule = self.limits.judge(trial).rule
        if rule is None:
            return True
        trial.state, trial.outcome = "refused", Refused(rule=rule)
        self.store.save(trial)
        return False

    def _stretch_of(self, trial: Trial) -> tuple[Trial, Stretch]:
        to_step = next_rung(trial.step, self.config.rungs)
        measures = self.costs.lacks_latency(trial)
        return trial, make_stretch(next(self._jobs), trial, "search", to_step, measure_inference=measures)

    def _next_baseline(self) -> tuple[Trial, Stretch]:
        """Once, at full length."""
        baseline = self.store.baseline
        if baseline is None:
            widths = make_baselines(self.config, self.space)
            # What a GPU has no room for unquantized is held against a baseline that has room.
            baseline = next((each for each in map(self._cost_baseline, widths) if self._has_room(each)), None)
            baseline = baseline or self._cost_baseline(widths[0])
            self.store.save_baseline(baseline)
        to_step = 0 if self._is_generation else baseline.spec.max_steps
        # The untrained base's test score is known as early as its others, and chooses nothing either.
        return baseline, make_stretch(next(self._jobs), baseline, "baseline", to_step, score_test=self._is_generation)

    def _cost_baseline(self, spec: TrialSpec) -> Trial:
        cost = self.costs.find(spec).cost
        return Trial(
            number=-1,
            spec=spec,
            source="baseline",
            cost=None if cost is None else self.costs.with_latency(cost, spec),
        )

    def _has_room(self, baseline: Trial) -> bool:
        """On a CPU nothing is known of that."""
        is_judged = self.config.device_kind == "cuda" and baseline.cost is not None
        return not is_judged or self.limits.judge(baseline).rule is None

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
        if isinstance(event.event, Ready):
            complete_provenance(self.store.provenance, event.event, self.config)
            self._coming_up.discard(event.worker)
            if running is not None:
                loading = self.account.measure_open(event.worker, event.at_seconds)
                self._running[event.worker] = running._replace(loading_seconds=loading)
            return
        if running is None:
            return
        if isinstance(event.event, Progress):
            self._running[event.worker] = running._replace(step=event.event.step)
            return
        del self._running[event.worker]
        purpose = running.stretch.purpose
        if isinstance(event.event, Finished):
            running = running._replace(base_seconds=event.event.load_seconds)
        self._held[running.worker] = running.stretch.spec.bits
        if isinstance(event.event, Ended) and self._may_pass(running, event.event):
            self._held.pop(running.worker)
            self._charge(running, "lost", event.at_seconds)
            self._lose_stretch(running, event.event.detail, counts=True)
            self.account.heartbeat(force=True)
            return
        seconds = self._charge(running, purpose, event.at_seconds)
        if isinstance(event.event, Ended):
            self._record_end(running, event.event)
        else:
            assert isinstance(event.event, Finished)
            # The machine is well: those that died before did so of their trials.
            self._deaths_in_a_row = self._idle_deaths[event.worker] = 0
            self._record_score(running, event.event, seconds)
        self.account.heartbeat(force=True)
        self.on_change(self.status())

    def _charge(self, running: _Running, purpose: LedgerPurpose, at: float | None = None) -> float:
        """Device-seconds from assignment to release, into the ledger and the timeline."""
        trial, stretch = running.trial, running.stretch
        step = running.step if purpose == "lost" else stretch.to_step
        bill = self.account.settle(
            running.worker, purpose, step, at,
            loading_seconds=running.loading_seconds, base_seconds=running.base_seconds,
        )  # fmt: skip
        if stretch.purpose != "confirm":
            trial.device_seconds += bill.device_seconds
        trial.segments.append(bill.segment)
        return bill.device_seconds

    def _record_score(self, running: _Running, finished: Finished, seconds: float) -> None:
        trial, stretch = running.trial, running.stretch
        if stretch.purpose == "confirm":
            confirmation = make_confirmation(
                finished, stretch, self.store.provenance, device_kind=self.config.device_kind, device_seconds=seconds
            )
            trial.confirmations.append(confirmation)
            self.store.save(trial)
            return
        rung = len(trial.rungs) if stretch.purpose == "search" else len(self.config.rungs) - 1
        score = make_rung_score(finished, rung=rung, step=stretch.to_step, device_seconds=seconds)
        trial.rungs.append(score)
        wall = seconds / self.executor.device_rate - running.loading_seconds - running.base_seconds
        self.speed.learn(trial.spec, score, stretch.to_step - stretch.from_step, wall)
        self.speed.learn_load(trial.spec.bits, running.base_seconds)
        cost = trial.cost
        if finished.peak_vram_bytes is not None and trial.cost is not None:
            trial.cost = measured_cost(trial.cost, finished.peak_vram_bytes, finished.reserved_vram_bytes)
        if finished.inference is not None and trial.cost is not None:
            self.costs.learn_latency(trial.spec, finished.inference)
            trial.cost = self.costs.with_latency(trial.cost, trial.spec)
        trial.checkpoint, trial.checkpoint_digest = finished.checkpoint, finished.checkpoint_digest
        if stretch.purpose == "baseline" and self._is_generation:
            # Before the baseline is written as complete: a driver killed in between scores it again.
            assert finished.test is not None
            self._set_floor(finished.validation.quality, finished.test.quality)
        rule = None
        if finished.peak_vram_bytes is not None and trial.cost is not None and stretch.purpose == "search":
            rule = self.limits.judge_measured(trial.cost)
        if rule is not None:
            # It would be on the front of what fits, and may be picked.
            trial.state, trial.outcome, trial.checkpoint = "refused", Refused(rule=rule), None
        elif stretch.to_step >= trial.spec.max_steps or stretch.purpose == "baseline":
            trial.state, trial.outcome = "complete", Completed()
        else:
            trial.state = "paused"
        self.store.save(trial)
        self.store.drop_checkpoints(trial, keep=trial.checkpoint)
        if stretch.purpose == "search":
            if trial.cost != cost and len(trial.rungs) > 1:
                # A new measurement changes what was compared at earlier rungs.
                self._carry_out(self.race.judge_all())
            elif rule is None:
                self._carry_out(self.race.judge_newcomer(trial))

    def _record_end(self, running: _Running, ended: Ended) -> None:
        trial = running.trial
        if running.stretch.purpose == "confirm":
            self._give_up_confirmation(running, ended.reason, ended.detail)
            return
        if ended.peak_vram_bytes is not None and trial.cost is not None:
            trial.cost = measured_cost(trial.cost, ended.peak_vram_bytes, None)
        room = self.limits.room_bytes if ended.reason == "out_of_memory" else None
        trial.state, trial.outcome = "failed", Failed(reason=ended.reason, detail=ended.detail, room_bytes=room)
        self._give_up(trial)
        if running.stretch.purpose == "baseline" and self._is_generation:
            self._note(
                f"The untrained base could not be scored ({ended.reason}), so trials are compared with 0 instead."
            )
            self._set_floor(0.0, 0.0)

    def _may_pass(self, running: _Running, ended: Ended) -> bool:
        """Whether it ran out of memory and is tried once more, as if its worker had died: another process may have had
        what it lacked."""
        trial, stretch = running.trial, running.stretch
        if ended.reason != "out_of_memory" or stretch.purpose == "baseline" or not self.limits.has_ample_room(trial):
            return False
        deaths = (
            trial.deaths if stretch.purpose == "search" else self._confirmation_deaths[trial.number, stretch.spec.seed]
        )
        return deaths + 1 < _MOST_DEATHS

    def _give_up_confirmation(self, running: _Running, reason: FailureReason, detail: str) -> None:
        trial, failed = running.trial, FailedConfirmation(seed=running.stretch.spec.seed, reason=reason, detail=detail)
        others = [other for other in trial.failed_confirmations if other.seed != failed.seed]
        trial.failed_confirmations = [*others, failed]
        self.store.save(trial)
        self._note(say_failed(trial, failed))

    def _give_up(self, failed: Trial) -> None:
        self.store.save(failed)
        self.store.drop_checkpoints(failed)
        self._carry_out(self.race.judge_beaten_by(failed))

    def _set_floor(self, quality: float, test_quality: float) -> None:
        """What trials of a generation task must beat, known once the untrained base was scored."""
        changed = replace(self.config, majority_quality=quality, majority_test_quality=test_quality)
        self.store.save_config(changed)
        self._fix_reference()

    def _bury(self, event: WorkerEvent) -> None:
        """A worker died: its unfinished stretch is lost, its trial goes back to its checkpoint, a new worker starts."""
        detail = event.event.detail if isinstance(event.event, Broken) else event.detail
        if _ends_study(event):
            raise StudyError(detail)
        self._held.pop(event.worker, None)
        running = self._running.get(event.worker)
        # Before it was ready it had not looked at the trial that waited for it.
        has_begun = running is not None and event.worker not in self._coming_up
        if running is not None:
            self._charge(running, "lost", event.at_seconds)
            del self._running[event.worker]
            self._lose_stretch(running, detail, counts=has_begun)
        if has_begun:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row > 3 * self.executor.num_workers + 3:
                raise make_worker_error("Workers keep dying, so the search was ended. The last one's words:", detail)
        else:
            self._idle_deaths[event.worker] += 1
        if self._idle_deaths[event.worker] > _MOST_IDLE_DEATHS:
            self._give_up_worker(event.worker, detail)
        else:
            self._coming_up.add(event.worker)
            self.executor.restart(event.worker)

    def _lose_stretch(self, running: _Running, detail: str, *, counts: bool) -> None:
        """Its trial is tried again, unless workers have died of it too often; `counts` says whether this one did."""
        trial, stretch = running.trial, running.stretch
        trial.deaths += counts
        if stretch.purpose == "search":
            if trial.deaths >= _MOST_DEATHS:
                trial.state = "failed"
                trial.outcome = Failed(reason="worker_died", detail=detail[-300:])
                self._give_up(trial)
            else:
                requeue(trial, self.store, self.account.ledger)
                if not trial.rungs:
                    self._carry_out(self.race.judge_beaten_by(trial))
        elif stretch.purpose == "confirm":
            confirmed = (trial.number, stretch.spec.seed)
            self._confirmation_deaths[confirmed] += counts
            if self._confirmation_deaths[confirmed] >= _MOST_DEATHS:
                self._give_up_confirmation(running, "worker_died", detail[-300:])
            else:
                self._confirm_queue.insert(0, (trial, stretch.spec.seed))
        elif stretch.purpose == "baseline":
            if trial.deaths >= _MOST_DEATHS:
                raise make_worker_error("The baseline cannot be trained: its worker died twice. Last words:", detail)
            trial.state = "waiting"
            self.store.save(trial)

    def _give_up_worker(self, worker: int, detail: str) -> None:
        """The others go on, and have its share of the budget."""
        self._given_up.add(worker)
        self.account.lose_worker()
        if self.account.num_workers == 0:
            raise make_worker_error("Workers die even without work, so the search was ended. Last words:", detail)
        self._note(
            f"Worker {worker} died {self._idle_deaths[worker]} times while it came up or waited, so it was given up "
            f"and the others went on: {last_line(detail)}"
        )

    # --- race

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        """Stops what is clearly beaten; what was stopped goes on where nothing would stop it now."""
        for trial, verdict in decisions:
            if verdict is None:
                trial.state, trial.outcome = "paused", None
            else:
                trial.state = "stopped"
                trial.outcome = Stopped(rung=trial.rungs[-1].rung, rival=verdict.rival, detail=verdict.detail)
            self.store.save(trial)

    # --- confirm

    def _advance_phase(self) -> None:
        if self.phase == "search":
            self.store.tell_stopped()
            self.phase = "confirm"
            self._confirm_queue = find_confirmations(self.store)
            self.on_change(self.status())
        else:
            self.phase = "done"
            self._conclude()

    def _next_confirmation(self, held: Bits | None) -> tuple[Trial, Stretch] | None:
        promised = sum(map(self._predict_rest, self._running.values()))
        # Of device-seconds one worker can have what others do not need: idle they cost nothing.
        left = self.account.seconds_left_for_one(promised)
        for index, (trial, seed) in enumerate(self._confirm_queue):
            if self._predict_confirmation(trial) + self.speed.predict_load(trial.spec.bits, held) <= left:
                del self._confirm_queue[index]
                return trial, make_stretch(
                    next(self._jobs), trial, "confirm", trial.spec.max_steps, spec=replace(trial.spec, seed=seed),
                    score_test=True, measure_inference=True,
                )  # fmt: skip
        return None

    def _predict_rest(self, running: _Running) -> float:
        """Wall seconds that a confirmation under way still needs."""
        needed = self._predict_confirmation(running.trial)
        if running.worker in self._coming_up:
            return needed
        needed += self.speed.predict_load(running.trial.spec.bits, self._find_held(running.worker))
        return max(0.0, needed + running.loading_seconds - self.account.measure_open(running.worker))

    def _predict_confirmation(self, trial: Trial) -> float:
        """Wall seconds; the test split is scored as well."""
        provenance = self.store.provenance
        passes = 1 + provenance.num_test / max(provenance.num_validation, 1)
        return self.speed.predict(kind_of(trial.spec), trial.spec.max_steps, passes=passes)

    def _conclude(self) -> None:
        complete = [trial for trial in self.store.trials if trial.state == "complete"]
        ending = Ending(
            beats_floor=any(self.race.beats_floor(trial.rungs[-1]) for trial in complete),
            num_unconfirmed=len(self._confirm_queue),
            early_gain=self.early_end.expected if self._ends_early else None,
            overrun_seconds=-self.account.budget_seconds_left(),
            found_nothing_new=self._found_nothing_new,
        )
        self._note(*conclude(self.config, self.store.trials, ending))

    # --- small things

    def _note(self, *sentences: str) -> None:
        """What a reader of the study must know, each once."""
        notes = list(dict.fromkeys([*self.store.notes, *sentences]))
        if notes != self.store.notes:
            self.store.save_study(notes=notes)

    @property
    def config(self) -> StudyConfig:
        return self.store.config

    @property
    def _is_generation(self) -> bool:
        return self.config.task_kind == "generation"

    def _awaits_base(self) -> bool:
        """Whether a generation task's untrained base has yet to be scored."""
        baseline = self.store.baseline
        return self._is_generation and (baseline is None or baseline.state in ("waiting", "running"))

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


def _ends_study(event: WorkerEvent) -> bool:
    return isinstance(event.event, Broken) and event.event.ends_study
