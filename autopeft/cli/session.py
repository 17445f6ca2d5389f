"""Running a study in a terminal: progress, interrupts, and what is written at the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from autopeft.errors import BudgetError, NothingFeasibleError
from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.executors.base import Executor
    from autopeft.records import StudyRecord
    from autopeft.search.plan import Plan
    from autopeft.search.store import StudyStore
    from autopeft.spaces.space import SearchSpace

STUDIES = Path("studies")
REPORTS = Path("reports")
LEADERBOARDS = Path("leaderboards")

_LOCAL = "local.json"
"""Where model and data lie on this machine; kept beside the study, never in its records."""


def say(text: str) -> None:
    """Prints, as long as anybody listens: a search goes on without a terminal, and without whoever read its pipe."""
    try:
        print(text, flush=True)
    except OSError:
        stop_printing()


def stop_printing() -> None:
    # What is buffered would fail once more when the interpreter ends.
    with contextlib.suppress(OSError, ValueError):
        descriptor = sys.stdout.fileno()
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, descriptor)
        os.close(nobody)
    sys.stdout = _Nobody()


class _Nobody(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def run_new_study(plan: Plan) -> int:
    from autopeft.executors.local import LocalExecutor
    from autopeft.hub import fetch_model, is_hub_id
    from autopeft.search.plan import make_provenance
    from autopeft.search.store import StudyStore, delete_study

    check_outputs()
    if is_hub_id(plan.model_argument):
        fetch_model(plan.model_argument, print)
    # A time of day comes no later for a download, of rows or of weights.
    limit = plan.wall_seconds_limit - (time.monotonic() - plan.limit_read_at)
    if limit <= 0:
        raise BudgetError(
            f"The study was to end by {plan.config.until}, which has passed while '{plan.model_argument}' was fetched. "
            "It is in the cache now, so run this again."
        )
    store = StudyStore.create(STUDIES, plan.config, make_provenance(plan), plan.validation_labels())
    try:
        keep_places(store, plan.model_argument, plan.data_dir)
        executor = LocalExecutor(plan.setup(STUDIES), list(plan.devices))
        return run_study(store, executor, plan.space, limit)
    except Exception:
        # It ended before it began: a model that cannot be had, or workers that cannot start, must not leave the name
        # taken. Scoring an untrained base may have taken long.
        has_scored = store.baseline is not None and store.baseline.rungs
        if not (store.trials or has_scored or store.finished):
            delete_study(STUDIES, plan.config.name)
        raise


def name_study(given: str) -> str:
    """A study's name, which may be given as its folder: so a shell completes it."""
    path = Path(given)
    return path.name if path.parent.resolve() == STUDIES.resolve() else given


def open_study(given: str) -> StudyStore:
    """Raises StudyError with the nearest name where there is no such study."""
    from autopeft.search.store import StudyStore

    return StudyStore.open(STUDIES, name_study(given))


def read_local(store: StudyStore) -> dict[str, str | None]:
    """Raises StudyError where it is damaged."""
    from autopeft.errors import StudyError

    path = store.folder / _LOCAL
    try:
        local: dict[str, str | None] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as exc:
        raise StudyError(
            f"'{path}' must be readable JSON that says where a study's model and data lie, but is not: {exc}. Delete "
            f"it, then name them: autopeft resume {store.config.name} --model MODEL --data-dir DIR."
        ) from exc
    return {"model": store.config.model, "data_dir": None} | local


def keep_places(store: StudyStore, model: str, data_dir: str | None) -> None:
    """For whatever is done with the study from here on."""
    from autopeft.report.files import write_atomically

    local = {"model": model, "data_dir": str(Path(data_dir).resolve()) if data_dir else None}
    write_atomically(store.folder / _LOCAL, json.dumps(local))


class Places(NamedTuple):
    """Where what a study was made from is now."""

    task: str
    """The task file's text."""
    model: str
    data_dir: str | None


def find_places(store: StudyStore, *, model: str | None = None, data_dir: str | None = None) -> Places:
    """`model` and `data_dir` are given where they have moved. Raises DataError where a file of the task is nowhere."""
    from autopeft.production.places import find_task, keep_folder, list_data_folders
    from autopeft.production.recipe import find_task_files, make_task_portable

    config, local = store.config, read_local(store)
    asked = list_data_folders(data_dir, config.task_name)
    data_dir = data_dir or keep_folder(local["data_dir"]) or os.environ.get("AUTOPEFT_DATA_DIR")
    task = find_task(
        make_task_portable(config.task), config.task_name, find_task_files(config.task),
        list_data_folders(data_dir, config.task_name), asked=asked,
    )  # fmt: skip
    model = model or local["model"]
    assert model is not None
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Places(task, model, data_dir)


def run_study(store: StudyStore, executor: Executor, space: SearchSpace, limit: float) -> int:
    """Runs to the end or to an interrupt, and writes report and leaderboard either way."""
    from autopeft.cli.progress import show_progress
    from autopeft.executors.devices import find_free_bytes
    from autopeft.search.results import build_record
    from autopeft.search.study import Search

    # Not by the study's workers: it may be resumed where there are fewer GPUs.
    free_bytes = find_free_bytes(executor.num_workers) if store.config.device_kind == "cuda" else None
    # A terminal that is closed ends it as Ctrl-C does, but for one that nohup keeps.
    hangup = getattr(signal, "SIGHUP", None)
    signals = [signal.SIGTERM, *([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else [])]
    previous = {number: signal.signal(number, _interrupt) for number in signals}
    try:
        with store.lock(), show_progress(store.config) as display:
            # Whoever held the lock until now may have written since this was opened.
            store.reread()
            search = Search(store, executor, space, wall_seconds_limit=limit, free_bytes=free_bytes, on_change=display)
            record = search.run()
    except KeyboardInterrupt:
        say(f"\nInterrupted. Go on with: autopeft resume {store.config.name}")
        if store.trials:
            write_outputs(build_record(store))
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    write_outputs(record)
    if not record.picks:
        raise NothingFeasibleError(_why_nothing(record))
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _why_nothing(record: StudyRecord) -> str:
    states = [trial.state for trial in record.trials]
    refused = next((t.outcome.rule for t in record.trials if t.outcome and t.outcome.kind == "refused"), None)
    why = f" One was refused: {refused.rstrip('.')}." if refused else ""
    return (
        f"The budget '{record.config.budget}' ended before any configuration was feasible and trained to its full "
        f"length: of {say_count(len(states), 'trial')}, refused: {states.count('refused')}, failed: "
        f"{states.count('failed')}.{why}"
        f" To go on with more: autopeft resume {record.config.name} --budget LARGER. With a higher limit, or a smaller "
        "--max-steps, search anew."
    )


def check_outputs() -> None:
    """Raises StudyError before hours are spent, if what they lead to could not be written."""
    from autopeft.errors import StudyError

    for folder in (STUDIES, REPORTS, LEADERBOARDS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StudyError(
                f"autopeft writes to {STUDIES}/, {REPORTS}/ and {LEADERBOARDS}/ in the current folder, but "
                f"'{folder}' cannot be made: {exc.strerror}. Change to a folder that you may write to."
            ) from exc
        if not os.access(folder, os.W_OK):
            raise StudyError(
                f"autopeft writes to '{folder}' in the current folder, which must be writable, but is not."
            )


def write_outputs(record: StudyRecord) -> None:
    """Raises StudyError where there is no room for them."""
    from autopeft.errors import StudyError
    from autopeft.export import find_way
    from autopeft.report.leaderboard import update_leaderboard
    from autopeft.report.page import write_page

    # First: a page that cannot be written, or a leaderboard that is held, is no reason to say nothing of the study.
    # Nor is nobody's listening any reason not to write them.
    try:
        print_summary(record)
        sys.stdout.flush()
    except OSError:
        stop_printing()
    name = record.config.name
    page = REPORTS / f"{name}.html"
    try:
        write_page(record, page, find_way=lambda trial: find_way(record, trial))
        say(f"\nreport       {page}")
        say(f"leaderboard  {update_leaderboard(record, LEADERBOARDS)}")
    except OSError as exc:
        raise StudyError(
            f"The study '{name}' is kept, but {REPORTS}/ and {LEADERBOARDS}/ must be writable for its report, and are "
            f"not: {exc.strerror or exc}. Mend that, then: autopeft report {name}."
        ) from exc


def print_summary(record: StudyRecord) -> None:
    """The picks, and what they are worth, in a few lines."""
    from autopeft.export import find_way
    from autopeft.report.cards import take_home_command
    from autopeft.report.certainty import say_more, say_stopped, say_ties
    from autopeft.report.words import describe_spec, format_bytes, format_count, format_quality

    scorer = record.config.scorer
    floor = format_quality(record.config.majority_quality, scorer)
    baseline = None if record.baseline is None else record.baseline.quality
    if record.config.task_kind == "generation":
        test = format_quality(record.config.majority_test_quality, scorer)
        print(
            f"\nuntrained base {floor}, test {test}" if baseline is not None else "\nthe untrained base was not scored"
        )
    else:
        head = f", head on the frozen base {format_quality(baseline, scorer)}" if baseline is not None else ""
        print(f"\nmajority class {floor}{head}")
    for note in record.notes:
        print(f"note: {note}")
    for pick in record.picks:
        trial = next(t for t in record.trials if t.number == pick.number)
        assert trial.cost is not None
        assert trial.quality is not None
        test = "" if trial.test_quality is None else f", test {format_quality(trial.test_quality, scorer)}"
        seeds = say_count(1 + len(trial.confirmations), "seed")
        print(
            f"{pick.name:<9} trial {trial.number}: {format_quality(trial.quality, scorer)} ({seeds})"
            f"{test}, {format_count(trial.cost.trainable_parameters)} parameters, "
            f"{format_bytes(trial.cost.peak_vram_bytes)} {trial.cost.vram_source}\n"
            f"          {describe_spec(trial.spec)}"
        )
    if record.picks:
        for sentence in filter(None, [*say_ties(record), say_stopped(record), say_more(record)]):
            print(sentence)
        knee = next(pick for pick in record.picks if pick.name == "knee")
        way = find_way(record, next(trial for trial in record.trials if trial.number == knee.number))
        print(f"\ntake it home with: {take_home_command(record.config.name, knee.name, way.target)}")
