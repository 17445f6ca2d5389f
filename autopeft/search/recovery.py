"""Going back: what was left unfinished, by whomever, starts anew from its last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.budget import Ledger
from autopeft.records import Bits
from autopeft.search.store import StudyStore, Trial


def recover(store: StudyStore, ledger: Ledger) -> None:
    """After a driver that died or was interrupted: what it had running is paused or waits."""
    store.repair()
    for trial in store.trials:
        if trial.state in ("running", "paused"):
            requeue(trial, store, ledger)
    baseline = store.baseline
    if baseline is not None and baseline.state == "running":
        baseline.state = "waiting"
    # What the earlier run had to say of its end is said anew at the end of this one.
    store.save_study(finished=False, notes=[])


def find_held(trials: Sequence[Trial]) -> dict[int, Bits]:
    """By worker, the width of the base that it held when it was last heard of; none for what began anew since.

    What a resumed study's workers do not hold they load once, and decide as if they had not been interrupted.
    """
    held: dict[int, Bits] = {}
    segments = ((segment, trial.spec.bits) for trial in trials for segment in trial.segments)
    for segment, bits in sorted(segments, key=lambda each: (each[0].end_seconds, each[0].start_seconds)):
        if segment.purpose == "lost":
            held.pop(segment.worker, None)
        else:
            held[segment.worker] = bits
    return held


def requeue(trial: Trial, store: StudyStore, ledger: Ledger) -> None:
    """Back to its last checkpoint, or to the start where that is gone."""
    if trial.rungs and not store.has_checkpoint(trial):
        trial.rungs.clear()
        trial.checkpoint = trial.checkpoint_digest = None
    trial.state = "paused" if trial.rungs else "waiting"
    if not trial.rungs:
        # It will be started, and counted, again.
        ledger.trials_started -= 1
    store.save(trial)
