"""Whether what is left of a budget promises less than the user wants of it (`--stop-when-gain-below`)."""

from __future__ import annotations

from autopeft.search.account import Account
from autopeft.search.outlook import expect_rest
from autopeft.search.store import StudyStore


class EarlyEnd:
    """Asks the outlook anew whenever a trial has paused, ended or gone on after all: where a running one then adds more
    than was expected, the search goes on."""

    def __init__(self, store: StudyStore, account: Account) -> None:
        self._store = store
        self._account = account
        self._told: list[tuple[int, bool]] | None = None
        """How many scores of each trial `expected` knows of, and whether of its end."""
        self.expected: float | None = None
        """Growth of the front's hypervolume with the rest of the budget, as a share of it; None where too little was
        tried to say."""

    def is_due(self) -> bool:
        """Asked where nothing is waiting that the budget could begin."""
        least, trials = self._store.config.least_gain, self._store.trials
        if least is None:
            return False
        told = [(len(trial.rungs), trial.outcome is not None) for trial in trials]
        if told != self._told:
            self._told = told
            self.expected = expect_rest(
                trials,
                self._store.reference,
                device_seconds=self._account.search_device_seconds_left(),
                num_trials=self._account.ledger.trials_left(),
            )
        return self.expected is not None and self.expected < least
