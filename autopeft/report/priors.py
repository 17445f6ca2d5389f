"""Sources for a warm start: what studies and leaderboards say of configurations, without what they say of runs.

python -m autopeft.report.priors [LEADERBOARD.json ...]    # the shipped priors, from leaderboards/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from autopeft.errors import SpecError
from autopeft.records import StudyRecord, to_record
from autopeft.report.entries import Entry, list_entries
from autopeft.report.leaderboard import read_leaderboard
from autopeft.report.standings import rank_entries
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore
from autopeft.search.warm_start import PRIORS, Source, Trained, read_priors
from autopeft.tasks.scorers import GENERATION_SCORERS
from autopeft.wording import say_count

_MOST_TRAINED = 100
"""Of one source in the shipped priors, the best first."""


def read_sources(names: Sequence[str], studies: Path) -> list[Source]:
    """Sources by the names of studies in `studies` and the paths of leaderboards; the shipped ones where none is named.

    Raises StudyError with the nearest name, RecordError for what is no leaderboard, and SpecError where nothing was
    trained to its full length.
    """
    if not names:
        return list(read_priors())
    sources = []
    for name in dict.fromkeys(names):
        found = _read_leaderboard(Path(name)) if name.endswith(".json") else _read_study(name, studies)
        if not any(source.trained for source in found):
            raise SpecError(
                f"--warm-start takes what was trained to its full length, but '{name}' holds no such configuration. "
                "Leave it away, or name another study."
            )
        sources += found
    return sources


def _read_study(name: str, studies: Path) -> list[Source]:
    return list_study_sources(build_record(StudyStore.open(studies, name)))


def list_study_sources(study: StudyRecord) -> list[Source]:
    return _group(list_entries(study), study.config.task_name, study.config.model, f"study {study.config.name}")


def _read_leaderboard(path: Path) -> list[Source]:
    board = read_leaderboard(path)
    return _group(board.entries, board.task_name, board.model, f"leaderboard {board.task_name}/{board.model}")


def _group(entries: Iterable[Entry], task_name: str, model: str, title: str) -> list[Source]:
    """One source for each version of the data, the weights and the scoring: scores by others do not compare."""
    groups: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.rivalry(), []).append(entry)
    return [
        Source(
            title=f"{title} ({', '.join([f'{task[:8]}-{weights[:8]}', *_tell_apart(rivalry, groups)])})",
            task_name=task_name,
            model=model,
            majority_quality=max(
                (run.quality for entry in group if entry.kind in ("majority", "base") for run in entry.runs),
                default=0.0,
            ),
            trained=_list_trained(group),
            task_kind="generation" if scorer in GENERATION_SCORERS else "classification",
        )
        for rivalry, group in sorted(groups.items())
        for task, weights, scorer, _ in [rivalry]
    ]


def _tell_apart(rivalry: tuple[str, str, str, str], groups: Iterable[tuple[str, str, str, str]]) -> list[str]:
    """How it was scored, where others have the same data and weights."""
    same = [other for other in groups if other[:2] == rivalry[:2]]
    return [part for part in rivalry[2:] if part] if len(same) > 1 else []


def _list_trained(entries: Sequence[Entry]) -> tuple[Trained, ...]:
    """The best first."""
    return tuple(
        Trained(
            spec=standing.entry.spec,
            quality=standing.quality,
            num_seeds=standing.num_seeds,
            peak_vram_bytes=standing.cost.peak_vram_bytes,
            trainable_parameters=standing.cost.trainable_parameters,
        )
        for standing in rank_entries(entries)
        if standing.entry.kind == "trial" and standing.entry.spec is not None and standing.cost is not None
    )


def encode_priors(sources: Sequence[Source]) -> str:
    """JSON, one configuration a line."""
    blocks = []
    for source in sources:
        record = to_record(source)
        trained = ",\n".join(f"  {json.dumps(item, sort_keys=True)}" for item in record.pop("trained")[:_MOST_TRAINED])
        head = json.dumps(record, sort_keys=True)
        blocks.append(f'{head[:-1]}, "trained": [\n{trained}\n]}}')
    return "[\n" + ",\n".join(blocks) + "\n]\n"


def main(arguments: Sequence[str]) -> None:
    paths = [Path(name) for name in arguments] or sorted(Path("leaderboards").glob("*/*.json"))
    sources = [source for path in paths for source in _read_leaderboard(path) if source.trained]
    PRIORS.write_text(encode_priors(sources), encoding="utf-8")
    trained = sum(len(source.trained) for source in sources)
    print(f"{PRIORS}: {say_count(trained, 'configuration')} of {say_count(len(sources), 'source')}")


if __name__ == "__main__":
    main(sys.argv[1:])
