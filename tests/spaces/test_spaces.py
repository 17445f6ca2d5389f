"""Search spaces: what is shipped, what files may say, and that every suggestion is a valid configuration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from autopeft.errors import SpaceError, SpecError
from autopeft.methods import METHODS, check_spec, refuse_spec
from autopeft.records import Scalar
from autopeft.spaces.dimensions import default_dimensions
from autopeft.spaces.load import find_space, list_spaces, parse_space
from autopeft.spaces.space import SearchSpace, make_spec, spec_values

SHIPPED = sorted(list_spaces())
DEVICES = ("cpu", "cuda")


class RandomSuggester:
    """Answers at random inside the ranges, and remembers what it was asked."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.params: dict[str, Scalar] = {}

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return self._keep(name, self._random.randint(low, high))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._keep(name, self._random.choice([low, high, self._random.uniform(low, high)]))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._keep(name, self._random.choice(list(choices)))

    def _keep(self, name: str, value: Any) -> Any:
        assert name not in self.params, f"{name} is asked for twice"
        self.params[name] = value
        return value


def shipped(name: str, device_kind: str = "cpu", **options: Any) -> SearchSpace:
    return parse_space(find_space(name)[1], name=name, device_kind=device_kind, max_steps=160, **options)


def parse(text: str, device_kind: str = "cpu", **options: Any) -> SearchSpace:
    return parse_space(text, name="mine", device_kind=device_kind, max_steps=160, **options)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device_kind", DEVICES)
def test_every_suggestion_is_valid_and_encodes_back_to_its_answers(name: str, device_kind: str) -> None:
    space = shipped(name, device_kind)
    refused = 0
    for seed in range(200):
        suggester = RandomSuggester(seed)
        spec = space.suggest(suggester, max_steps=160, seed=3)
        check_spec(spec)
        refused += refuse_spec(spec, device_kind) is not None
        assert (spec.max_steps, spec.seed) == (160, 3)
        assert space.params(spec) == suggester.params
    # A combination may be forbidden, but no space may be made of such.
    assert refused <= 20


@pytest.mark.parametrize("name", SHIPPED)
def test_a_space_says_whom_it_serves_and_is_read_in_a_minute(name: str) -> None:
    text = list_spaces()[name].read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert text.startswith("# For ")
    assert data["title"]
    assert data["serves"]
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("device_kind", DEVICES)
def test_everything_is_every_method_with_its_recipe(device_kind: str) -> None:
    space = shipped("everything", device_kind)
    assert list(space.methods) == [method.name for method in METHODS.values() if method.searched]
    assert space.left_out == {}
    for recipe in space.recipes:
        assert dict(recipe.settings) == dict(METHODS[recipe.method].recipe.settings)
        assert recipe.target_modules == METHODS[recipe.method].recipe.target_modules


def test_every_shipped_space_for_four_bits_has_no_other_width() -> None:
    for device_kind in DEVICES:
        space = shipped("qlora-24gb", device_kind)
        assert {method.fixed["bits"] for method in space.methods.values()} == {4}


@pytest.mark.parametrize("name", SHIPPED)
def test_an_optuna_trial_is_a_suggester(name: str) -> None:
    space = shipped(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        assert space.params(space.suggest(trial, max_steps=160, seed=0)) == trial.params


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device_kind", DEVICES)
def test_there_is_a_recipe_of_every_method_and_it_lies_inside_the_space(name: str, device_kind: str) -> None:
    space = shipped(name, device_kind)
    assert [recipe.method for recipe in space.recipes] == list(space.methods)
    assert all(space.params(recipe) is not None for recipe in space.recipes)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(("device_kind", "widest"), [("cpu", 32), ("cuda", 16)])
def test_unquantized_is_the_devices_own_width(name: str, device_kind: str, widest: int) -> None:
    for method, space in shipped(name, device_kind).methods.items():
        widths = {d.name: d.choices for d in space.dimensions}.get("bits", (space.fixed.get("bits"),))
        assert set(widths) <= {4, 8, widest} & set(METHODS[method].bits)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dimension_carries_its_methods_name(name: str) -> None:
    suggester = RandomSuggester(0)
    spec = shipped(name).suggest(suggester, max_steps=160, seed=0)
    assert all(key == "method" or key.startswith(spec.method + ".") for key in suggester.params)


def test_an_unknown_space_gets_the_nearest_name() -> None:
    with pytest.raises(SpaceError, match="Did you mean 'default'"):
        find_space("defalt")


# --- what a file may say


def test_a_range_narrows_a_dimension() -> None:
    space = parse("methods: {lora: {rank: {low: 4, high: 8}}}")
    assert {space.suggest(RandomSuggester(i), max_steps=160, seed=0).settings["rank"] for i in range(60)} == set(
        range(4, 9)
    )


def test_a_list_offers_choices() -> None:
    space = parse("methods: {lora: {rank: [2, 32]}}")
    assert {space.suggest(RandomSuggester(i), max_steps=160, seed=0).settings["rank"] for i in range(20)} == {2, 32}


def test_a_single_value_stands_fixed() -> None:
    space = parse("methods: {lora: {rank: 4}}")
    assert space.methods["lora"].fixed["rank"] == 4
    assert space.recipes[0].settings["rank"] == 4


def test_a_learning_rate_written_as_people_write_it_is_a_number() -> None:
    # YAML 1.1 reads 1e-3 as text.
    space = parse("methods: {lora: {learning_rate: {low: 1e-3, high: 5e-3}}}")
    dimension = next(d for d in space.methods["lora"].dimensions if d.name == "learning_rate")
    assert (dimension.low, dimension.high) == (0.001, 0.005)
    assert parse("methods: {lora: {learning_rate: [1e-3]}}").methods["lora"].fixed["learning_rate"] == 0.001


def test_shared_settings_hold_for_every_method_that_has_them() -> None:
    space = parse("shared: {batch_size: [8], target_modules: [mlp]}\nmethods: {lora: {}, ia3: {}}")
    assert {name: method.fixed["batch_size"] for name, method in space.methods.items()} == {"lora": 8, "ia3": 8}
    assert space.methods["lora"].fixed["target_modules"] == "mlp"


def test_a_methods_own_entry_overrides_what_is_shared() -> None:
    space = parse("shared: {batch_size: [8]}\nmethods: {lora: {batch_size: [4]}, ia3: {}}")
    assert space.methods["lora"].fixed["batch_size"] == 4


def test_shared_widths_that_a_method_cannot_have_are_left_out_for_it() -> None:
    space = parse("shared: {bits: [4, unquantized]}\nmethods: {lora: {}, full: {}}")
    assert space.methods["full"].fixed["bits"] == 32


def test_shared_targets_that_a_method_cannot_have_are_left_out_for_it() -> None:
    shared = 'shared: {target_modules: [all, last-2, mlp, "attention:last-2"]}\n'
    space = parse(shared + "methods: {lora: {}, ia3: {}, bitfit: {}, full: {}, p_tuning: {}}")
    choices = {
        name: next((d.choices for d in method.dimensions if d.name == "target_modules"), None)
        for name, method in space.methods.items()
    }
    assert choices == {
        "lora": ("last-2", "mlp", "attention:last-2"), "ia3": ("all", "last-2"), "bitfit": ("all", "last-2"),
        "full": None, "p_tuning": None,
    }  # fmt: skip


def test_a_method_without_groups_is_put_on_all_layers_unless_the_space_says_otherwise() -> None:
    assert parse("methods: {bitfit: {}}").recipes[0].target_modules is None
    space = parse("methods: {bitfit: {target_modules: [all, last-2]}}")
    specs = [space.suggest(RandomSuggester(i), max_steps=160, seed=0) for i in range(20)]
    assert {spec.target_modules for spec in specs} == {None, "last-2"}
    assert {(space.params(spec) or {})["bitfit.target_modules"] for spec in specs} == {"all", "last-2"}


def test_the_optimizer_is_the_devices_default_or_what_a_space_names() -> None:
    optimizers = {
        device_kind: next(d.choices for d in [*default_dimensions(METHODS["qlora"], device_kind).values()]
                          if d.name == "optimizer")
        for device_kind in DEVICES
    }  # fmt: skip
    assert optimizers == {"cpu": ("adamw",), "cuda": ("paged_adamw_8bit", "adamw")}
    assert parse("methods: {lora: {optimizer: [adamw_8bit]}}").recipes[0].optimizer == "adamw_8bit"
    shared = "shared: {optimizer: [paged_adamw_8bit]}\nmethods: {lora: {}, ia3: {}}"
    assert {recipe.optimizer for recipe in parse(shared, "cuda").recipes} == {"paged_adamw_8bit"}
    # The CPU has no pages to turn, so the shared wish is left out there.
    assert {recipe.optimizer for recipe in parse(shared, "cpu").recipes} == {"adamw"}


def test_all_methods_are_written_out_for_the_record(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: Mine\nmethods: all  # really\n", encoding="utf-8")
    text = find_space(str(file))[1]
    assert list(yaml.safe_load(text)["methods"]) == [method.name for method in METHODS.values() if method.searched]
    assert list(parse(file.read_text(encoding="utf-8")).methods) == list(parse(text).methods)


def test_what_the_machine_cannot_train_is_left_out_and_said() -> None:
    space = parse("methods: {lora: {bits: [8], dora: [true]}, ia3: {}}")
    assert list(space.methods) == ["ia3"]
    assert [recipe.method for recipe in space.recipes] == ["ia3"]
    assert "DoRA on an int8 base" in space.left_out["lora"]
    with pytest.raises(SpaceError, match=r"leaves nothing of lora.*DoRA"):
        parse("methods: {lora: {bits: [8], dora: [true]}, ia3: {}}", methods=("lora", "ia3"))
    with pytest.raises(SpaceError, match=r"leaves nothing of lora.*DoRA"):
        parse("methods: {lora: {bits: [8], dora: [true]}}")


def test_what_the_kind_of_model_cannot_have_is_left_out_and_said() -> None:
    text = "methods: {p_tuning: {}, ia3: {}}"
    assert list(parse(text, model_kind="decoder").methods) == ["p_tuning", "ia3"]
    space = parse(text, model_kind="encoder-decoder")
    assert list(space.methods) == ["ia3"]
    assert (
        "trains encoder and decoder models, and this one is of the kind encoder-decoder" in space.left_out["p_tuning"]
    )
    with pytest.raises(SpaceError, match="leaves nothing of p_tuning"):
        parse(text, model_kind="encoder-decoder", methods=("p_tuning",))


def test_pissa_is_only_asked_for_on_an_unquantized_base() -> None:
    space = parse("methods: {lora: {init: [default, pissa]}}")
    for seed in range(60):
        suggester = RandomSuggester(seed)
        spec = space.suggest(suggester, max_steps=160, seed=0)
        assert ("lora.init" in suggester.params) == (spec.bits == 32)


def test_the_documented_file_means_what_is_said_of_it() -> None:
    document = Path(__file__).parents[2] / "docs/spaces.md"
    text = document.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    space = parse(text, "cuda", model_kind="decoder")
    lora = {d.name: d for d in space.methods["lora"].dimensions}
    assert (lora["rank"].low, lora["rank"].high, lora["rank"].log) == (4, 64, True)
    assert (lora["learning_rate"].low, lora["learning_rate"].high) == (5e-5, 2e-3)
    assert set(lora["bits"].choices) == {4, 16}
    assert space.methods["lora"].fixed["dropout"] == 0.0
    assert list(space.methods) == ["lora", "ia3", "bitfit"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: [", "'mine' must be YAML"),
        ("", "must name methods"),
        ("methods: [lora]", "must name methods"),
        ("methods: {lorra: {}}", "unknown method 'lorra'.*Did you mean 'lora'"),
        ("methods: {head: {}}", "unknown method 'head'"),
        ("methds: {}\nmethods: {lora: {}}", "unknown key 'methds'.*Did you mean 'methods'"),
        ("methods: {lora: {rnk: 8}}", "lora has the unknown dimension 'rnk'.*Did you mean 'rank'"),
        ("methods: {lora: {rank: {lo: 8}}}", "lora.rank.*unknown key 'lo'.*Did you mean 'low'"),
        ("methods: {lora: {rank: {low: 8, high: 4}}}", "lora.rank.*from low to high"),
        ("methods: {lora: {rank: {low: 8, high: 8}}}", "lora.rank.*from low to high"),
        ("methods: {lora: {rank: {low: 0}}}", "lora.rank.*takes 1"),
        ("methods: {lora: {rank: {low: 1.5, high: 4}}}", "lora.rank"),
        ("methods: {lora: {rank: {low: few}}}", "lora.rank.*numbers"),
        ("methods: {lora: {rank: [8, many]}}", "lora.rank.*'many'"),
        ("methods: {lora: {rank: []}}", "lora.rank.*at least one"),
        ("methods: {lora: {dora: {low: 0, high: 1}}}", "lora.dora.*choice"),
        ("methods: {lora: {dropout: {log: true}}}", "lora.dropout.*logarithmic"),
        ("methods: {lora: {target_modules: [atention]}}", "Did you mean 'attention'"),
        ("methods: {lora: {schedule: [liner]}}", "lora.schedule.*linear"),
        ("methods: {lora: {batch_size: [0]}}", "lora.batch_size.*1 to 4096"),
        ("methods: {lora: {learning_rate: [0]}}", "lora.learning_rate.*above 0"),
        ("methods: {lora: {bits: [5]}}", "lora.bits.*unquantized"),
        ("methods: {full: {bits: [4]}}", "full.bits"),
        ("methods: {full: {bits: [4]}}", "takes 16, 32, because that is what Full fine-tuning trains on"),
        ("methods: {lora: {optimizer: [sgd]}}", "lora.optimizer.*adamw_8bit"),
        ("methods: {lora: {optimizer: [paged_adamw_8bit]}}", "lora.optimizer.*no paged states on CPU"),
        ("methods: {lora: {target_modules: [all]}}", "lora.target_modules.*takes a group, such as all-linear"),
        ("methods: {lora: {target_modules: ['attention:last-x']}}", "with K from 1"),
        ("methods: {ia3: {target_modules: [mlp]}}", "ia3.target_modules.*takes all or the last blocks"),
        ("methods: {ia3: {target_modules: ['mlp:last-2']}}", "ia3.target_modules.*takes all or the last blocks"),
        ("methods: {full: {target_modules: [all]}}", "full has the unknown dimension 'target_modules'"),
        ("methods: every", "methods: all"),
        ("methods: {lora: 8}", "'lora' must hold settings"),
        ("shared: {rank: 8}\nmethods: {lora: {}}", "unknown setting 'rank'"),
        ("shared: 8\nmethods: {lora: {}}", "'shared' must hold settings"),
    ],
)
def test_a_mistake_in_a_file_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises((SpaceError, SpecError), match=words):
        parse(text)


@pytest.mark.parametrize(("device_kind", "bits"), [("cpu", 16), ("cuda", 32)])
def test_the_other_devices_width_is_refused(device_kind: str, bits: int) -> None:
    with pytest.raises(SpaceError, match=f"lora.bits.*{bits} bits need a"):
        parse(f"methods: {{lora: {{bits: [{bits}]}}}}", device_kind)


# --- --methods and --fix


def test_methods_keeps_only_those_named() -> None:
    assert list(shipped("default", methods=("ia3", "lora")).methods) == ["lora", "ia3"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(SpecError, match="Did you mean 'ia3'"):
        shipped("default", methods=("ia33",))


def test_a_method_that_the_space_lacks_is_refused() -> None:
    with pytest.raises(SpaceError, match="does not have"):
        parse("methods: {lora: {}}", methods=("ia3",))
    with pytest.raises(SpaceError, match=r"'head', which is the baseline that every study has in any case\. Name"):
        parse("methods: {lora: {}}", methods=("lora", "head"))


def test_fixed_bits_leave_out_methods_that_cannot_have_them() -> None:
    space = shipped("default", fixed={"bits": 4})
    assert "full" not in space.methods
    assert {method.fixed["bits"] for method in space.methods.values()} == {4}
    assert space.left_out["full"] == "Full fine-tuning trains on a base of 16, 32 bits, but --fix bits=4."
    with pytest.raises(SpaceError, match="leaves nothing of full"):
        shipped("default", fixed={"bits": 4}, methods=("lora", "full"))
    assert list(shipped("default", fixed={"bits": 4}, methods=("lora", "full"), is_stored=True).methods) == ["lora"]


def test_a_methods_own_value_goes_before_that_for_all() -> None:
    for fixed in ({"bits": 4, "lora.bits": 8}, {"lora.bits": 8, "bits": 4}):
        space = shipped("default", methods=("lora", "ia3"), fixed=fixed)
        assert [space.methods[name].fixed["bits"] for name in ("lora", "ia3")] == [8, 4]


def test_two_and_two_point_zero_are_one_configuration() -> None:
    recipe = next(spec for spec in shipped("default").recipes if spec.method == "lora")
    values = spec_values(recipe)
    whole, fraction = (
        make_spec("lora", {**values, "alpha_over_rank": value, "dropout": 0}, max_steps=160, seed=0)
        for value in (2, 2.0)
    )
    assert whole == fraction
    assert whole.key() == fraction.key()
    assert type(whole.settings["dropout"]) is float
    assert type(whole.settings["rank"]) is int
    assert type(whole.settings["dora"]) is bool


def test_fixed_bits_may_be_unquantized() -> None:
    space = shipped("default", "cuda", fixed={"bits": "unquantized"})
    assert {method.fixed["bits"] for method in space.methods.values()} == {16}


def test_sixteen_bits_are_refused_on_cpu() -> None:
    with pytest.raises(SpaceError, match="GPU"):
        shipped("default", fixed={"bits": 16})


def test_a_methods_setting_can_be_fixed() -> None:
    space = shipped("default", methods=("lora", "ia3"), fixed={"lora.rank": 8})
    assert space.methods["lora"].fixed["rank"] == 8
    assert {space.suggest(RandomSuggester(i), max_steps=160, seed=0).settings.get("rank") for i in range(50)} == {
        8,
        None,
    }


def test_a_setting_may_be_fixed_outside_the_spaces_range() -> None:
    assert shipped("demo", fixed={"lora.rank": 200}).methods["lora"].fixed["rank"] == 200


def test_a_setting_without_a_method_is_fixed_for_all_that_have_it() -> None:
    space = shipped("default", fixed={"num_virtual_tokens": 10})
    assert {m for m, s in space.methods.items() if s.fixed.get("num_virtual_tokens") == 10} == {
        "prefix_tuning", "prompt_tuning"
    }  # fmt: skip


def test_fixing_four_bits_closes_pissa() -> None:
    space = shipped("default", methods=("lora",), fixed={"bits": 4})
    assert space.methods["lora"].fixed["init"] == "default"


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"lora.rnk": 8}, "Did you mean 'rank'"),
        ({"loara.rank": 8}, "Did you mean 'lora'"),
        ({"bitz": 4}, "Did you mean 'bits'"),
        ({"lora.rank": 9999}, "lora.rank=9999.*1 to 256"),
        ({"lora.rank": "x"}, "1 to 256"),
        ({"bits": 5}, "unquantized"),
        ({"schedule": "liner"}, "linear"),
    ],
)
def test_a_mistake_in_fix_is_refused(fixed: dict[str, Scalar], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        shipped("default", fixed=fixed)


def test_nothing_left_to_search_is_refused() -> None:
    with pytest.raises(SpaceError, match="Nothing is left"):
        shipped("default", methods=("full",), fixed={"bits": 4})


@pytest.mark.parametrize("fixed", [{"bits": 4, "lora.init": "pissa"}, {"lora.init": "pissa", "bits": 4}])
def test_fixing_what_no_machine_can_train_is_refused(fixed: dict[str, Scalar]) -> None:
    with pytest.raises(SpaceError, match="PiSSA"):
        shipped("default", methods=("lora",), fixed=fixed)
