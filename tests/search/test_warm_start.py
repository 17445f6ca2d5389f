"""What is tried first because it did well elsewhere: how it is chosen, moved into a space, and kept out of results."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpecError
from autopeft.records import TrialSpec
from autopeft.search.warm_start import MOST_FIRST, Source, Trained, choose_first, move_spec, read_priors
from autopeft.spaces.load import find_space, list_spaces, parse_space
from autopeft.spaces.space import SearchSpace

if TYPE_CHECKING:
    from conftest import FakeStudies

OBJECTIVES = ("quality", "vram", "params")


def shipped_space(name: str = "default", device_kind: str = "cpu", **changes: Any) -> SearchSpace:
    title, text = find_space(name)
    return parse_space(text, name=title, device_kind=device_kind, max_steps=200, **changes)


SPACE = shipped_space()


def trained(spec: TrialSpec, quality: float, vram: int = 100, params: int = 1000, num_seeds: int = 1) -> Trained:
    return Trained(
        spec=spec, quality=quality, num_seeds=num_seeds, peak_vram_bytes=vram, trainable_parameters=params
    )  # fmt: skip


def source(*items: Trained, title: str = "elsewhere", majority: float = 0.5) -> Source:
    return Source(title=title, task_name="t", model="m", majority_quality=majority, trained=items)


def lora(rank: int = 8, learning_rate: float = 1e-3, **changes: Any) -> TrialSpec:
    spec = next(recipe for recipe in SPACE.recipes if recipe.method == "lora")
    settings = {**spec.settings, "rank": rank, **changes.pop("settings", {})}
    return dataclasses.replace(spec, settings=settings, learning_rate=learning_rate, **changes)


def recipe(method: str) -> TrialSpec:
    return next(spec for spec in SPACE.recipes if spec.method == method)


def choose(*sources: Source, space: SearchSpace = SPACE) -> list[TrialSpec]:
    return list(choose_first(sources, space, objectives=OBJECTIVES, max_steps=200, seed=0).first)


def test_tasks_of_the_other_kind_are_refused() -> None:
    written = dataclasses.replace(source(trained(lora(), 0.9)), task_kind="generation")
    with pytest.raises(SpecError, match="of the same kind, here classification, but elsewhere is of generation"):
        choose(source(trained(lora(), 0.9)), written)


# --- moving into a space


@pytest.mark.parametrize("name", sorted(set(list_spaces()) - {"qlora-24gb", "decoder"}))
def test_every_recipe_of_a_space_moves_into_it_unchanged(name: str) -> None:
    space = shipped_space(name)
    for spec in space.recipes:
        assert move_spec(spec, space, max_steps=200, seed=0) == spec


def test_sizes_and_rates_move_to_the_nearest_that_the_space_offers() -> None:
    space = parse_space(
        "methods:\n  lora: {rank: {low: 4, high: 16}, learning_rate: {low: 0.0005, high: 0.002}}",
        name="narrow", device_kind="cpu", max_steps=200,
    )  # fmt: skip
    high = move_spec(lora(rank=64, learning_rate=1e-2), space, max_steps=200, seed=0)
    low = move_spec(lora(rank=1, learning_rate=1e-5), space, max_steps=200, seed=0)
    assert high is not None
    assert low is not None
    assert (high.settings["rank"], high.learning_rate) == (16, pytest.approx(2e-3))
    assert (low.settings["rank"], low.learning_rate) == (4, pytest.approx(5e-4))


def test_lengths_and_seeds_are_the_new_studys() -> None:
    moved = move_spec(lora(), SPACE, max_steps=321, seed=7)
    assert moved is not None
    assert (moved.max_steps, moved.seed) == (321, 7)


def test_the_unquantized_width_is_that_of_the_device() -> None:
    moved = move_spec(lora(bits=32), shipped_space(device_kind="cuda"), max_steps=200, seed=0)
    assert moved is not None
    assert moved.bits == 16


def test_what_the_space_fixes_for_all_trials_is_the_spaces() -> None:
    moved = move_spec(lora(batch_size=64, schedule="cosine"), SPACE, max_steps=200, seed=0)
    assert moved is not None
    assert (moved.batch_size, moved.schedule) == (16, "linear")


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": "names:q,v"}, {"settings": {"init": "gaussian"}}, {"method": "vblora", "settings": {}}],
)
def test_what_the_space_does_not_offer_is_left_out(changes: dict[str, Any]) -> None:
    settings = changes.get("settings", {}) if "method" not in changes else None
    spec = lora(settings=settings or {}, **{k: v for k, v in changes.items() if k not in ("settings",)})
    assert move_spec(spec, SPACE, max_steps=200, seed=0) is None


@given(st.data())
def test_what_is_moved_lies_in_the_space_and_moves_no_further(data: st.DataObject) -> None:
    """Whatever another space held."""
    wide = shipped_space("everything")
    method = data.draw(st.sampled_from(sorted(set(wide.methods) & set(SPACE.methods))))
    spec = next(s for s in wide.recipes if s.method == method)
    spec = dataclasses.replace(
        spec,
        learning_rate=10 ** data.draw(st.floats(-6, 0)),
        bits=data.draw(st.sampled_from([4, 8, 16, 32])),
        settings={
            name: data.draw(st.integers(1, 512)) if isinstance(value, int) and not isinstance(value, bool) else value
            for name, value in spec.settings.items()
        },
    )
    moved = move_spec(spec, SPACE, max_steps=200, seed=0)
    if moved is not None:
        assert SPACE.params(moved) is not None
        assert move_spec(moved, SPACE, max_steps=200, seed=0) == moved


# --- choosing


def test_both_ends_of_a_front_are_taken_and_what_they_dominate_is_not() -> None:
    good = trained(lora(), 0.9, vram=50, params=1000)
    cheap = trained(recipe("prompt_tuning"), 0.7, vram=40, params=10)
    beaten = trained(recipe("full"), 0.6, vram=100, params=100_000)
    assert {spec.key() for spec in choose(source(good, cheap, beaten))} == {good.spec.key(), cheap.spec.key()}


def test_what_adds_most_to_the_front_comes_first() -> None:
    best = trained(lora(), 0.9, vram=40, params=1000)
    cheaper = trained(recipe("prompt_tuning"), 0.6, vram=39, params=900)
    assert choose(source(best, cheaper, trained(recipe("full"), 0.6))) == [best.spec, cheaper.spec]


@pytest.mark.parametrize("objectives", [("quality",), ("quality", "latency"), ("quality", "size"), OBJECTIVES])
def test_any_objectives_can_be_chosen_for(objectives: tuple[str, ...]) -> None:
    sources = [source(trained(lora(), 0.9, vram=90), trained(recipe("ia3"), 0.8, vram=50, params=10))]
    first = choose_first(sources, SPACE, objectives=objectives, max_steps=200, seed=0).first
    # Where nothing that is sought tells them apart but quality, the better is enough.
    assert len(first) == (1 if objectives[1:] in ((), ("latency",)) else 2)


def test_no_better_than_the_most_frequent_label_is_never_chosen() -> None:
    chance = trained(recipe("prompt_tuning"), 0.5, params=1)
    assert chance.spec not in choose(source(trained(lora(), 0.9), chance))


def test_a_source_that_learned_nothing_shows_nothing() -> None:
    """Of as many at chance the cheapest would be the best."""
    qualities = {"prompt_tuning": 0.5, "ia3": 0.52}
    failed = source(*(trained(recipe(name), quality, params=1) for name, quality in qualities.items()), title="failed")
    with pytest.raises(SpecError, match="nothing that was trained to its full length in failed is clearly better"):
        choose(failed)
    learned = source(trained(lora(), 0.9), title="learned")
    assert choose(failed, learned) == choose(learned)
    both = choose_first([failed, learned], SPACE, objectives=("quality", "vram", "params"), max_steps=160, seed=0)
    # Of the others nothing is known, so their recipes are tried.
    assert (both.weighed, both.sources) == (("lora",), ("learned",))


def test_of_two_alike_one_is_enough() -> None:
    near = [trained(lora(learning_rate=1e-3 * (1 + i / 1000)), 0.9) for i in range(5)]
    assert len(choose(source(*near))) == 1


def test_a_lucky_score_among_worse_neighbours_is_not_believed() -> None:
    lucky = [trained(lora(learning_rate=rate), quality) for rate, quality in
             [(0.96e-3, 0.7), (1e-3, 0.86), (1.04e-3, 0.7)]]  # fmt: skip
    steady = [trained(lora(learning_rate=rate), 0.85) for rate in (9e-3, 9.5e-3, 1e-2)]
    assert choose(source(*lucky, *steady))[0] in [item.spec for item in steady]


def test_a_configuration_that_serves_both_sources_comes_before_one_that_serves_either() -> None:
    rates = {"first": 1e-4, "both": 1e-3, "second": 1e-2}
    specs = {name: lora(learning_rate=rate) for name, rate in rates.items()}
    one = source(*(trained(specs[n], q) for n, q in [("first", 0.9), ("both", 0.88), ("second", 0.5)]), title="a")
    two = source(*(trained(specs[n], q) for n, q in [("first", 0.5), ("both", 0.88), ("second", 0.9)]), title="b")
    assert choose(one, two)[0] == specs["both"]
    assert choose(one)[0] == specs["first"]


@st.composite
def source_lists(draw: st.DrawFn) -> list[Source]:
    methods = sorted(SPACE.methods)
    sources = []
    for number in range(draw(st.integers(1, 3))):
        items = []
        for turn in range(draw(st.integers(1, 12))):
            spec = recipe(draw(st.sampled_from(methods)))
            rate = spec.learning_rate * 10 ** draw(st.sampled_from([-0.5, 0.0, 0.5]))
            items.append(
                trained(
                    dataclasses.replace(spec, learning_rate=rate), draw(st.integers(40 if turn else 53, 99)) / 100,
                    draw(st.integers(1, 100)), draw(st.integers(1, 10**7)), draw(st.integers(1, 3)),
                )
            )  # fmt: skip
        sources.append(source(*items, title=f"s{number}"))
    return sources


@given(source_lists(), st.randoms())
def test_neither_the_order_of_sources_nor_of_what_they_trained_matters(sources: list[Source], random: Any) -> None:
    shuffled = [
        dataclasses.replace(item, trained=tuple(random.sample(item.trained, len(item.trained)))) for item in sources
    ]
    assert choose(*random.sample(shuffled, len(shuffled))) == choose(*sources)


@given(source_lists())
def test_the_portfolio_holds_distinct_configurations_of_the_space_and_no_more_than_it_may(
    sources: list[Source],
) -> None:
    first = choose(*sources)
    assert len(first) <= MOST_FIRST
    assert len({spec.key() for spec in first}) == len(first)
    assert all(SPACE.params(spec) is not None for spec in first)


def test_sources_of_which_nothing_fits_are_refused_with_what_they_hold() -> None:
    strange = trained(dataclasses.replace(lora(), method="vblora", settings={}), 0.9)
    with pytest.raises(SpecError, match=r"of the 1 .* none does: they have vblora, and the space"):
        choose(source(strange))


# --- the shipped ones


def test_the_shipped_priors_fit_the_shipped_spaces() -> None:
    first = choose(*read_priors())
    assert first
    assert len({spec.method for spec in first}) > 1


def test_shipped_priors_are_of_trained_configurations_with_finite_scores() -> None:
    for prior in read_priors():
        assert prior.trained
        assert all(math.isfinite(item.quality) and item.num_seeds >= 1 for item in prior.trained)


# --- in a study


def test_a_warm_start_comes_first_and_replaces_recipes_of_methods_that_were_weighed(studies: FakeStudies) -> None:
    space = shipped_space_of(studies)
    spec = dataclasses.replace(space.recipes[0], learning_rate=2e-3)
    warm = choose_first([source(trained(spec, 0.9))], space, objectives=OBJECTIVES, max_steps=160, seed=0)
    record = studies.run(studies.create(warm_start=warm, budget="5trials"))
    assert [trial.source for trial in record.trials].count("prior") == 1
    assert "recipe" in {trial.source for trial in record.trials}
    assert record.trials[0].spec == warm.first[0]
    assert record.config.warm_start == warm
    assert spec.method not in {trial.spec.method for trial in record.trials if trial.source == "recipe"}


def test_a_warm_start_brings_no_results_with_it(studies: FakeStudies) -> None:
    space = shipped_space_of(studies)
    warm = choose_first(
        [source(*(trained(spec, 0.99) for spec in space.recipes))], space, objectives=OBJECTIVES, max_steps=160, seed=0
    )
    store = studies.create(warm_start=warm, budget="1trials")
    assert store.trials == []
    record = studies.run(store)
    assert all(score.quality < 0.99 for trial in record.trials for score in trial.rungs)
    assert sum(bool(trial.rungs) for trial in record.trials) == 1


def test_a_warm_start_is_bounded_by_a_budget_in_trials(studies: FakeStudies) -> None:
    space = shipped_space_of(studies)
    warm = choose_first(
        [source(*(trained(spec, 0.9 - i / 100, params=10 ** (5 - i)) for i, spec in enumerate(space.recipes)))],
        space, objectives=OBJECTIVES, max_steps=160, seed=0,
    )  # fmt: skip
    assert len(warm.first) > 2
    record = studies.run(studies.create(warm_start=warm, budget="2trials"))
    assert [trial.spec for trial in record.trials] == list(warm.first[:2])


def shipped_space_of(studies: FakeStudies) -> SearchSpace:
    from autopeft.search.plan import restore_space

    return restore_space(studies.config())
