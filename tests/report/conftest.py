"""Studies as the search would hand them over, from made-up but plausible learning curves."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.records import (
    Completed,
    Confirmation,
    Cost,
    Failed,
    FrontMember,
    LedgerRecord,
    Outcome,
    Pick,
    Provenance,
    Refused,
    RungScore,
    Segment,
    Stopped,
    StudyConfig,
    StudyRecord,
    TrialRecord,
    TrialSource,
    TrialSpec,
    TrialState,
    VramSource,
)
from autopeft.tasks.spec import find_task_text

RUNGS = (50, 150, 450)
MIB = 2**20
BASE_BYTES = 270 * MIB

# method -> (settings from a random source, trainable parameters from settings, final quality, VRAM above the base)
METHODS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], Callable[[dict[str, Any]], int], float, float]] = {
    "lora": (
        lambda r: {
            "rank": r.choice([2, 4, 8, 16, 64]),
            "alpha_over_rank": 2.0,
            "dropout": 0.0,
            "dora": r.random() < 0.3,
        },
        lambda s: 18_432 * s["rank"],
        0.853,
        150,
    ),
    "bottleneck": (
        lambda r: {"bottleneck_size": r.choice([8, 32, 128]), "activation": "gelu"},
        lambda s: 9_312 * s["bottleneck_size"],
        0.842,
        120,
    ),
    "prefix_tuning": (
        lambda r: {"num_virtual_tokens": r.choice([4, 16, 32])},
        lambda s: 4_608 * s["num_virtual_tokens"],
        0.802,
        90,
    ),
    "prompt_tuning": (
        lambda r: {"num_virtual_tokens": r.choice([8, 16, 32])},
        lambda s: 384 * s["num_virtual_tokens"],
        0.741,
        130,
    ),
    "ia3": (lambda r: {"feedforward": r.random() < 0.7}, lambda s: 9_216 if s["feedforward"] else 4_608, 0.821, 80),
    "full": (lambda r: {}, lambda s: 22_713_216, 0.861, 620),
}


def make_spec(method: str = "lora", **changes: Any) -> TrialSpec:
    spec = TrialSpec(
        method=method,
        settings=changes.pop("settings", {"rank": 8, "alpha_over_rank": 2.0} if method == "lora" else {}),
        target_modules="all-linear" if method == "lora" else None,
        bits=32,
        learning_rate=2.1e-3,
        batch_size=16,
        max_steps=RUNGS[-1],
        warmup_ratio=0.06,
        schedule="linear",
        weight_decay=0.01,
        seed=7,
    )
    return dataclasses.replace(spec, **changes)


def make_rungs(
    number: int, final: float, upto: int, noise: random.Random, chance: float = 0.509
) -> tuple[RungScore, ...]:
    scores = []
    for rung, step in enumerate(RUNGS[:upto]):
        grown = chance + (final - chance) * (1 - math.exp(-3.2 * step / RUNGS[-1])) / (1 - math.exp(-3.2))
        quality = round(min(max(grown + noise.gauss(0, 0.006), 0.0), 1.0), 3)
        scores.append(
            RungScore(
                rung=rung,
                step=step,
                quality=quality,
                loss=round(0.70 - 0.85 * (quality - chance), 4),
                num_examples=500,
                device_seconds=8.0 + step / 11,
                train_seconds=step / 13,
                scores_file=f"scores/{number}-{rung}.npy",
                scores_digest="0" * 16,
            )
        )
    return tuple(scores)


def make_trial(
    number: int,
    state: TrialState = "complete",
    *,
    spec: TrialSpec | None = None,
    final: float = 0.84,
    upto: int | None = None,
    confirmed: int = 0,
    source: TrialSource = "sampler",
    parameters: int = 147_456,
    vram_bytes: int = 420 * MIB,
    vram_source: VramSource = "estimated",
    outcome: Outcome | None = None,
) -> TrialRecord:
    noise = random.Random(number)
    unscored = state in ("refused", "failed", "waiting", "running")
    rungs = make_rungs(number, final, (0 if unscored else len(RUNGS)) if upto is None else upto, noise)
    return TrialRecord(
        number=number,
        spec=spec or make_spec(learning_rate=1e-3 * (number + 1)),
        source=source,
        state=state,
        cost=Cost(
            trainable_parameters=parameters,
            head_parameters=770,
            peak_vram_bytes=vram_bytes,
            vram_source=vram_source,
        ),
        rungs=rungs,
        outcome=Completed() if state == "complete" else outcome,
        device_seconds=sum(rung.device_seconds for rung in rungs),
        confirmations=tuple(
            Confirmation(
                seed=100 + i,
                quality=round(rungs[-1].quality + noise.gauss(0, 0.005), 3),
                loss=0.4,
                test_quality=round(rungs[-1].quality - 0.01 + noise.gauss(0, 0.005), 4),
                test_loss=0.42,
                num_test_examples=872,
                device_seconds=55.0,
                scores_file=f"scores/{number}-confirm-{i}.npy",
                scores_digest="0" * 16,
            )
            for i in range(confirmed)
        ),
    )


def _sampled_trial(number: int, vram_source: VramSource) -> TrialRecord:
    noise = random.Random(1000 + number)
    method = list(METHODS)[number % len(METHODS)]
    settings_of, parameters_of, final, extra = METHODS[method]
    settings = settings_of(noise)
    spec = make_spec(
        method,
        settings=settings,
        target_modules=noise.choice(["attention", "all-linear", "mlp"]) if method == "lora" else None,
        learning_rate=10 ** noise.uniform(-4, -2),
    )
    state: TrialState = "complete"
    outcome: Outcome | None = None
    upto = len(RUNGS)
    fate = noise.random()
    if number >= len(METHODS) and fate < 0.5:
        state, upto = "stopped", noise.choice([1, 1, 2])
        outcome = Stopped(rung=upto - 1, rival=number - 1, detail="")
    elif number >= len(METHODS) and fate < 0.58:
        state, upto = "paused", noise.choice([1, 2])
    elif number % 17 == 16:
        state, upto, outcome = "failed", 0, Failed(reason="diverged", detail="the loss was NaN at step 31")
    elif number % 17 == 13:
        rule = "PiSSA needs an unquantized base, but bits is 4. Use bits 32, or LoRA's default initialisation."
        state, upto, outcome = "refused", 0, Refused(rule=rule)
    return make_trial(
        number,
        state,
        spec=spec,
        final=final - abs(noise.gauss(0, 0.02)) - (0.05 if state == "stopped" else 0.0),
        upto=upto,
        source="recipe" if number < len(METHODS) else "sampler",
        parameters=parameters_of(settings),
        vram_bytes=BASE_BYTES + int((extra + noise.uniform(0, 60)) * MIB),
        vram_source=vram_source,
        outcome=outcome,
    )


def _is_beaten(trial: TrialRecord, others: list[TrialRecord]) -> bool:
    def point(t: TrialRecord) -> tuple[float, int, int]:
        assert t.cost is not None
        return (-(t.quality or 0.0), t.cost.peak_vram_bytes, t.cost.trainable_parameters)

    mine = point(trial)
    return any(point(o) != mine and all(a <= b for a, b in zip(point(o), mine, strict=True)) for o in others)


def make_study(
    num_trials: int = 30,
    *,
    name: str = "sst2-evening",
    uid: str = "5f1c2a90",
    vram_source: VramSource = "estimated",
    trials: list[TrialRecord] | None = None,
    with_baseline: bool = True,
    with_picks: bool = True,
    finished: bool = True,
    notes: tuple[str, ...] = (),
    created_at: str = "2026-05-04T18:30:00",
    **config: Any,
) -> StudyRecord:
    """A study of six methods unless trials are given; front and picks are worked out from them."""
    if trials is None:
        trials = [_sampled_trial(number, vram_source) for number in range(num_trials)]
        if num_trials > 7:
            trials[7] = make_trial(7, source="included", final=0.845, vram_bytes=470 * MIB, vram_source=vram_source)
    complete = [trial for trial in trials if trial.state == "complete"]
    front = [trial for trial in complete if not _is_beaten(trial, complete)]
    front.sort(key=lambda trial: -(trial.quality or 0.0))
    picks: list[Pick] = []
    if with_picks and front:
        numbers = {"best": front[0], "knee": front[len(front) // 2], "smallest": front[min(2, len(front) - 1)]}
        confirmed = {trial.number for trial in numbers.values()}
        trials = [_confirm(trial) if trial.number in confirmed else trial for trial in trials]
        why = {
            "best": "The highest mean quality on the front.",
            "knee": "Beyond it, quality costs more VRAM than it is worth.",
            "smallest": "The fewest trainable parameters within noise of the best (paired difference, 95%).",
        }
        picks = [Pick(name=n, number=t.number, why=why[n]) for n, t in numbers.items()]  # type: ignore[arg-type]
    return StudyRecord(
        uid=uid,
        config=make_config(name, **config),
        provenance=make_provenance(created_at),
        trials=tuple(trials),
        baseline=_make_baseline(vram_source) if with_baseline else None,
        ledger=LedgerRecord(
            search_seconds=1180.0, confirm_seconds=520.0, baseline_seconds=41.0, lost_seconds=22.0, wall_seconds=905.0
        ),
        segments=tuple(_make_segments(trials)),
        front=tuple(FrontMember(number=t.number, confidence=round(0.95 - 0.07 * i, 2)) for i, t in enumerate(front)),
        picks=tuple(picks),
        hypervolume=0.6213 if front else None,
        notes=notes,
        finished=finished,
    )


def _confirm(trial: TrialRecord) -> TrialRecord:
    again = make_trial(trial.number, final=trial.rungs[-1].quality, confirmed=2)
    return dataclasses.replace(trial, confirmations=again.confirmations)


def _make_baseline(vram_source: VramSource) -> TrialRecord:
    spec = make_spec("head", settings={}, target_modules=None, learning_rate=1e-2)
    return make_trial(
        -1, spec=spec, final=0.795, source="baseline", parameters=0, vram_bytes=300 * MIB, vram_source=vram_source
    )


def _make_segments(trials: list[TrialRecord]) -> list[Segment]:
    free, segments = [0.0, 0.0], []
    for trial in trials:
        stretches = [("search", rung.device_seconds, rung.step) for rung in trial.rungs]
        stretches += [("confirm", c.device_seconds, RUNGS[-1]) for c in trial.confirmations]
        for purpose, seconds, step in stretches:
            worker = free.index(min(free))
            end = free[worker] + seconds
            kind: Any = "lost" if trial.number == 11 and step == RUNGS[0] else purpose
            segments.append(
                Segment(
                    worker=worker,
                    trial=trial.number,
                    purpose=kind,
                    start_seconds=free[worker],
                    end_seconds=end,
                    step=step,
                )
            )
            free[worker] = end
    return segments


def make_config(name: str = "sst2-evening", **changes: Any) -> StudyConfig:
    config = StudyConfig(
        name=name,
        task=find_task_text("sst2"),
        task_name="sst2",
        model="minilm",
        budget="30cpu-min",
        objectives=("quality", "vram", "params"),
        rungs=RUNGS,
        seed=0,
        workers=2,
        device_kind="cpu",
        space="methods: {}",
        space_name="default",
        methods=None,
        fixed={},
        included=(),
        max_vram_bytes=None,
        confirm_share=0.3,
        confirm_seeds=2,
        until=None,
        price_per_device_hour=None,
        majority_quality=0.509,
        majority_test_quality=0.5092,
        scorer="accuracy",
        backend="fake",
    )
    return dataclasses.replace(config, **changes)


def make_provenance(created_at: str = "2026-05-04T18:30:00", **changes: Any) -> Provenance:
    provenance = Provenance(
        autopeft="0.1.0",
        python="3.11.7",
        packages={"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
        platform="Linux-6.1-x86_64",
        device="Intel Xeon",
        device_count=1,
        threads=1,
        model_digest="53aa51172d142c89",
        task_digest="9b1deb4d3b7d4bad",
        num_train=4500,
        num_validation=500,
        num_test=872,
        created_at=created_at,
    )
    return dataclasses.replace(provenance, **changes)


@pytest.fixture(scope="session")
def study_of() -> Callable[..., StudyRecord]:
    return make_study


@pytest.fixture(scope="session")
def trial_of() -> Callable[..., TrialRecord]:
    return make_trial


@pytest.fixture(scope="session")
def spec_of() -> Callable[..., TrialSpec]:
    return make_spec


@pytest.fixture(scope="session")
def study() -> StudyRecord:
    return make_study()
