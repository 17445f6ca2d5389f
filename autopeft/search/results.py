"""What a study has found: its front, its finalists, and the record that reports, leaderboards and exports read."""

from __future__ import annotations

from dataclasses import replace

from autopeft.budget import Ledger, parse_budget
from autopeft.records import StudyRecord
from autopeft.search.front import Front, Run, analyze_front
from autopeft.search.outlook import find_outlook
from autopeft.search.store import StudyStore, Trial, is_ended, scored_runs

MAX_FINALISTS = 5


def analyze(store: StudyStore, *, confirmed: bool = True) -> Front:
    """The front as it stands, from the answers kept on disk.

    `confirmed=False` leaves the confirmations out: the search alone chooses finalists, so that a study interrupted
    while it confirms goes on with the same ones.
    """
    trials, awaited = store.trials, set[int]()
    if not confirmed:
        trials = [replace(trial, confirmations=[], failed_confirmations=[]) for trial in trials]
    elif any(trial.confirmations for trial in trials):
        awaited = {pick.number for pick in analyze(store, confirmed=False).picks}
    baseline = store.baseline
    scored = scored_runs([*trials, *([baseline] if baseline is not None and baseline.rungs else [])])
    runs = [Run(number, store.read_scores(file, "validation_predictions")) for number, file in scored]
    return analyze_front(
        [trial.to_record() for trial in trials],
        baseline.to_record() if baseline is not None else None,
        runs,
        store.read_labels(),
        objectives=store.config.objectives,
        scorer=store.config.scorer,
        reference=store.reference,
        seed=store.config.seed,
        awaited=awaited,
    )


def plan_confirmations(front: Front, *, first_seed: int, num_seeds: int) -> list[tuple[int, int]]:
    """(trial, seed) in order of worth: the picks with all their seeds, then the rest of the front, most certain first.

    Within each group every trial gets one more seed before any gets a second. At most `MAX_FINALISTS` trials.
    """
    picks = list(dict.fromkeys(pick.number for pick in front.picks))
    by_confidence = sorted(front.members, key=lambda member: -member.confidence)
    rest = [member.number for member in by_confidence if member.number not in picks][: MAX_FINALISTS - len(picks)]
    return [(number, first_seed + i) for group in (picks, rest) for i in range(num_seeds) for number in group]


def find_confirmations(store: StudyStore) -> list[tuple[Trial, int]]:
    """(trial, seed) still to be trained, in order of worth: a resumed study has some already."""
    config = store.config
    if not config.confirm_seeds:
        return []
    front = analyze(store, confirmed=False)
    wanted = plan_confirmations(front, first_seed=config.seed + 1, num_seeds=config.confirm_seeds)
    queue = [(store.trials[number], seed) for number, seed in wanted]
    return [(trial, seed) for trial, seed in queue if seed not in _list_tried(trial)]


def _list_tried(trial: Trial) -> set[int]:
    """Seeds; what diverged would again, and whatever else befell a confirmation may pass."""
    diverged = {failed.seed for failed in trial.failed_confirmations if failed.reason == "diverged"}
    return diverged | {done.seed for done in trial.confirmations}


def build_record(store: StudyStore) -> StudyRecord:
    """The study as it stands, finished or not."""
    front = analyze(store)
    ledger = Ledger(parse_budget(store.config.budget))
    store.read_ledger(ledger)
    baseline = store.baseline
    every = [*store.trials, *([baseline] if baseline else [])]
    return StudyRecord(
        uid=store.uid,
        config=store.config,
        provenance=store.provenance,
        trials=tuple(trial.to_record() for trial in store.trials),
        baseline=baseline.to_record() if baseline is not None and is_ended(baseline) else None,
        ledger=ledger.to_record(),
        segments=tuple(sorted((s for t in every for s in t.segments), key=lambda s: (s.start_seconds, s.worker))),
        front=front.members,
        picks=front.picks,
        hypervolume=front.hypervolume if front.members else None,
        notes=tuple(store.notes),
        finished=store.finished,
        reference=store.reference,
        ties=front.ties,
        beats_baseline=front.beats_baseline,
        outlook=find_outlook(store.trials, store.config.rungs, store.reference),
    )
