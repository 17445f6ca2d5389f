"""What a decision takes: asking for a configuration, choosing what a free worker does, and telling a score. Beside it,
what writing takes: a new trial's and its score's, in the study's database.

    python benchmarks/deciding.py --out deciding

The study is as a long search leaves it: every trial scored at the first rung with 1,000 per-example losses, half of
them stopped there, the others paused, and one in eight at its end. Costs are known beforehand. The targets: to ask, to
decide and to tell below 50 ms together at 200 trials and below 250 ms at 2,000. Where a trial's end changes what is
known of reversals, to the nearest half octave, all verdicts are asked for anew; that is apart.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from configurations import draw_specs
from memory_study import MemoryStore
from written import tell_result

from autopeft.backends.replay import Curves, Recording, ReplayBackend, ReplayCostModel
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Completed, Cost, Provenance, RungScore, Stopped, StudyConfig
from autopeft.search.policy import Promote, StartNew, choose_next
from autopeft.search.store import StudyStore, Trial
from autopeft.search.study import Search
from autopeft.spaces.load import find_space, parse_space

_RUNGS = (40, 80, 160)
_NUM_EXAMPLES = 1000


class _Losses(ReplayBackend):
    """Per-example losses by the name of the scores file, drawn when they are asked for."""

    def read_scores(self, scores_file: str, key: str) -> npt.NDArray[np.float64]:
        number, mean = scores_file.split(":")
        noise = np.random.default_rng(int(number)).normal(0.0, 0.1, _NUM_EXAMPLES)
        return np.random.default_rng(7).exponential(float(mean), _NUM_EXAMPLES) + noise


class _Unsaved(MemoryStore):
    """Writing is not deciding."""

    def save(self, trial: Trial) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    lines = [
        "| trials | ask and decide, ms | tell, ms | together | all verdicts anew, ms | write, ms |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    record = []
    for count in arguments.trials:
        times = measure(count, arguments.repeat)
        written = measure_writing(count, arguments.repeat)
        record.append({"trials": count, **times, "write": written})
        decide, tell, anew = times.values()
        values = (decide, tell, decide + tell, anew, written)
        lines.append(f"| {count} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    tell_result("\n".join(lines), record, name=arguments.out)


def measure(count: int, repeat: int) -> dict[str, float]:
    """Milliseconds, medians."""
    search = make_search(count)
    search._carry_out(search.race.judge_all())
    paused = [trial for trial in search.store.trials if trial.state == "paused"]
    newcomer = paused[0]

    def decide() -> None:
        appraiser = search._make_appraiser()
        newcomers = functools.partial(search.sampler.find_newcomers, appraiser)
        choice = choose_next(search._situation(), search.speed, appraiser, newcomers)
        assert isinstance(choice, StartNew | Promote)

    def tell() -> None:
        search._carry_out(search.race.judge_newcomer(newcomer))
        for trial in paused:
            trial.state = "paused"

    calls = {"decide": decide, "tell": tell, "judge_all": search.race.judge_all}
    return {name: _time(call, repeat) for name, call in calls.items()}


def measure_writing(count: int, repeat: int) -> float:
    """Milliseconds, median, for a new trial and its first score."""
    search = make_search(count)
    config, rng = search.store.config, np.random.default_rng(1)
    space = parse_space(config.space, name=config.space_name, device_kind="cpu", max_steps=_RUNGS[-1])
    labels = np.zeros(_NUM_EXAMPLES, dtype=np.int64)
    specs = iter(draw_specs(space, count + repeat + 1, max_steps=_RUNGS[-1], seed=0))
    with tempfile.TemporaryDirectory() as folder:
        store = StudyStore.create(Path(folder), config, search.store.provenance, labels)

        def write() -> None:
            trial = store.add(next(specs), "sampler", space)
            store.save(_make_trial(trial, rng))

        for _ in range(count):
            write()
        return _time(write, repeat)


def _time(call: Callable[[], object], repeat: int) -> float:
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def make_search(count: int) -> Search:
    name, text = find_space("default")
    config = StudyConfig(
        name="deciding", task="name: demo", task_name="demo", model="minilm", budget=f"{count + 1}trials,1000h",
        objectives=("quality", "vram", "params"), rungs=_RUNGS, seed=0, workers=1, device_kind="cpu", space=text,
        space_name=name, methods=None, fixed={}, included=(), max_vram_bytes=None, confirm_share=0.0, confirm_seeds=0,
        until=None, price_per_device_hour=None, majority_quality=0.5, majority_test_quality=0.5, scorer="accuracy",
    )  # fmt: skip
    provenance = Provenance(
        autopeft="", python="", packages={}, platform="", device="", device_count=1, threads=1, model_digest="",
        task_digest="", num_train=0, num_validation=_NUM_EXAMPLES, num_test=0, created_at="",
    )  # fmt: skip
    recording = Recording(
        curves=Curves(
            config=config, provenance=provenance, device_rate=1.0, wall_seconds=(), machine={}, curves=(),
            reference={"quality": 0.5, "vram": 1e9, "params": 3e7},
        ),
        losses=None, predictions=None, labels=np.zeros(_NUM_EXAMPLES, dtype=np.int64),
    )  # fmt: skip
    backend = _Losses(recording)
    space = parse_space(text, name=name, device_kind="cpu", max_steps=_RUNGS[-1])
    store = _Unsaved(backend, config)
    rng = np.random.default_rng(0)
    for number, spec in enumerate(draw_specs(space, count, max_steps=_RUNGS[-1], seed=0)):
        store.trials.append(_make_trial(Trial(number=number, spec=spec, source="sampler"), rng))
    executor = InlineExecutor(None, 1, backend=backend, costs=ReplayCostModel(recording))
    search = Search(store, executor, space)
    search.account.start_clock()
    for trial in store.trials:
        for score in trial.rungs:
            search.speed.learn(trial.spec, score, 40, score.device_seconds)
    return search


def _make_trial(trial: Trial, rng: np.random.Generator) -> Trial:
    trial.cost = Cost(
        trainable_parameters=int(10 ** rng.uniform(3, 7.4)), head_parameters=770,
        peak_vram_bytes=int(rng.uniform(1e8, 9e8)), vram_source="estimated",
    )  # fmt: skip
    trial.state = "complete" if trial.number % 8 == 0 else "stopped" if trial.number % 2 else "paused"
    loss = float(rng.uniform(0.4, 0.7))
    for rung in range(len(_RUNGS) if trial.state == "complete" else 1):
        trial.rungs.append(
            RungScore(
                rung=rung, step=_RUNGS[rung], quality=float(np.clip(1.2 - loss, 0.4, 0.9)), loss=loss * 0.95**rung,
                num_examples=_NUM_EXAMPLES, device_seconds=5.0, train_seconds=4.0,
                scores_file=f"{trial.number}:{loss * 0.95**rung}", scores_digest="",
            )
        )  # fmt: skip
    if trial.state == "stopped":
        trial.outcome = Stopped(rung=0, rival=0, detail="")
    if trial.state == "complete":
        trial.outcome = Completed()
    return trial


if __name__ == "__main__":
    main()
