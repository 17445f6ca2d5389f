"""Every row of the table of methods keeps the contract's laws, and a method that breaks a law fails that law."""

from __future__ import annotations

import dataclasses
import os
import zlib
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.errors import SpecError
from autopeft.methods import METHODS, Method
from autopeft.methods.base import BuildContext, PeftCall, Recipe, choice
from autopeft.records import TrialSpec
from autopeft.testing import MethodContract
from autopeft.testing.contract import choice_variants, claimed
from autopeft.testing.subject import Case, Subject, find_differences, registered, width_for
from autopeft.testing.tiny_models import ARCHITECTURES, ArchitectureName

pytest_plugins = ["pytester"]


def rotated_architectures(method: Method) -> list[ArchitectureName]:
    """Those that it claims, begun at one that the name's checksum picks, so that a new row moves no other."""
    names = claimed(method, tuple(ARCHITECTURES))
    start = zlib.crc32(method.name.encode()) % len(names)
    return [*names[start:], *names[:start]]


TOO_WIDE: dict[str, list[dict[str, Any]]] = {
    "oft": [{"block_size": 128}],
    "c3a": [{"block_size": 128}, {"block_size": 256}],
}
"""Choices that divide no width of the tiny models; test_orthogonal trains them on a wider one."""


def cases_of(method: Method) -> list[Any]:
    """Its recipe on the first model that takes it; marked slow, on all, and every other choice of every setting."""
    recipes = [Case(method, name, width_for(method)) for name in rotated_architectures(method)]
    variants = [
        [case._replace(settings=tuple(changed.items())) for case in recipes]
        for changed in choice_variants(method)
        if changed not in TOO_WIDE.get(method.name, ())
    ]
    return [recipes, *(pytest.param(case, marks=pytest.mark.slow) for case in [*recipes, *variants])]


class TestEveryMethod(MethodContract):
    @classmethod
    def cases(cls) -> list[Any]:
        return [case for method in METHODS.values() for case in cases_of(method)]

    def same_bytes(self, subject: Subject) -> float:
        # From its forward to its backward pass oneDNN's LSTM keeps a workspace, which on fakes has no size: 0.3 MB of
        # the 11.5 of a tiny model. It grows with the virtual tokens alone.
        return 0.04 if ("encoder", "lstm") in subject.case.settings else super().same_bytes(subject)


def test_an_everyday_run_tries_every_architecture() -> None:
    assert {rotated_architectures(method)[0] for method in METHODS.values()} == set(ARCHITECTURES)


# --- a method as a third party would write it


class Gate(nn.Module):
    """h -> (1 + gate) h, with h the wrapped layer's output."""

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gate = nn.Parameter(torch.zeros(width, device=next(base_layer.parameters()).device))

    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD: torch.Tensor = (1 + self.gate) * self.base_layer(input_BTD)
        return output_BTD


def put_gates(model: nn.Module, context: BuildContext, gate: type[Gate]) -> nn.Module:
    for name in context.roles["attention-out"]:
        model.set_submodule(name, gate(model.get_submodule(name), context.sizes[name][1]))
    return model


def make_toy(gate: type[Gate] = Gate, **changes: Any) -> Method:
    return dataclasses.replace(
        Method(
            name="toy",
            title="Toy gates",
            paper="toys.example.org/gates",
            family="scaling",
            dimensions=(),
            layer_choice=True,
            learning_rate=(1e-3, 1e-1),
            bits=(4, 16, 32),
            recipe=Recipe(settings={}, target_modules=None, learning_rate=1e-2, source="tried on a tiny BERT"),
            build=lambda model, spec, context: put_gates(model, context, gate),
            why_not_peft="peft has no toys.",
        ),
        **changes,
    )


TOY = make_toy()


class TestToy(MethodContract):
    method = TOY
    architectures = ("bert", "t5")


# --- the same with one fault each


class CountedOtherwise(Gate):
    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer, width)
        if not self.gate.is_meta:
            self.gate = nn.Parameter(torch.zeros(width + 1))

    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        # The last one is in use, so that nothing but the count is wrong.
        return self.base_layer(input_BTD) * (1 + self.gate[: self.base_layer.out_features] + self.gate[-1])


class Hoards(Gate):
    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer, width)
        if not self.gate.is_meta:
            self.register_buffer("hoard", torch.zeros(10_000), persistent=False)


class AsksForAValue(Gate):
    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        return super().forward(input_BTD) if self.gate[0] < 1e6 else input_BTD


class StartsElsewhere(Gate):
    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer, width)
        nn.init.constant_(self.gate, 0.5)


class Ascends(Gate):
    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        # The right value with the wrong sign on its gradient.
        return self.base_layer(input_BTD) * (1 + 2 * self.gate.detach() - self.gate)


class Unreached(Gate):
    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer, width)
        self.idle = nn.Parameter(torch.zeros_like(self.gate))


class Thaws(Gate):
    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        self.base_layer.requires_grad_(self.training)
        return super().forward(input_BTD)


class DrawnAnew(Gate):
    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer, width)
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
        self.register_buffer("direction", torch.randn(width, generator=generator), persistent=False)

    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        return self.base_layer(input_BTD) * (1 + self.gate * self.direction)


class Remembers(Gate):
    """Counts its training steps where no checkpoint sees them."""

    steps = 0

    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        return super().forward(input_BTD) * (1 + 0.01 * self.steps * self.training)


class ReadsPadding(Gate):
    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD = self.base_layer(input_BTD)
        return output_BTD + self.gate * output_BTD.mean(1, keepdim=True)


class NeedsPlainWeights(Gate):
    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input_BTD, self.base_layer.weight * (1 + self.gate)[:, None], self.base_layer.bias)


def write_base(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    # The embedding of padding, which no logit depends on: only the digest sees it.
    model.get_input_embeddings().weight.data[0] += 1  # type: ignore[operator]
    return put_gates(model, context, Gate)


def forget_gates(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    class Forgetful(type(put_gates(model, context, Gate))):  # type: ignore[misc]
        def merge_and_unload(self) -> nn.Module:
            for name, module in list(self.named_modules()):
                if isinstance(module, Gate):
                    self.set_submodule(name, module.base_layer)
            self.__class__ = type(self).__mro__[1]
            return self

    model.__class__ = Forgetful
    return model


def ignore_layers(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    for name in context.sizes:
        if name.endswith("attention.output.dense"):
            model.set_submodule(name, Gate(model.get_submodule(name), context.sizes[name][1]))
    return model


def raise_value_error(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    raise ValueError("no toys today")


def refuse_model(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    raise SpecError("Toys need a model of wood.")


# Constants, because a fresh process imports a method by its name.
HAS_NO_TITLE = make_toy(title="")
COUNTED_OTHERWISE = make_toy(CountedOtherwise)
HOARDS = make_toy(Hoards)
ASKS_FOR_A_VALUE = make_toy(AsksForAValue)
STARTS_ELSEWHERE = make_toy(StartsElsewhere)
DENIES_ITS_START = make_toy(starts_as_base=False)
ASCENDS = make_toy(Ascends, bits=(16, 32))
UNREACHED = make_toy(Unreached, bits=(16, 32))
THAWS = make_toy(Thaws, bits=(16, 32))
DRAWN_ANEW = make_toy(DrawnAnew)
REMEMBERS = make_toy(Remembers)
READS_PADDING = make_toy(ReadsPadding)
NEEDS_PLAIN_WEIGHTS = make_toy(NeedsPlainWeights)
WRITES_BASE = make_toy(build=write_base, bits=(16, 32))
CANNOT_MERGE = make_toy(merges=True)
FORGETS_IN_MERGING = make_toy(build=forget_gates, merges=True)
IGNORES_LAYERS = make_toy(build=ignore_layers)
DOES_NOT_BUILD = make_toy(build=raise_value_error)
REFUSES = make_toy(build=refuse_model)

LAWS = sorted(name for name in dir(MethodContract) if name.startswith("test_"))
SOUND = "test_its_row_is_sound"
BUILDS = "test_it_builds_and_trains"
COUNTED = "test_its_parameters_are_counted_without_weights"
MEMORY = "test_its_memory_is_estimated_without_weights"
STARTS = "test_it_starts_as_the_base_exactly_if_it_says_so"
LEARNS = "test_ten_steps_lower_the_loss"
GRADIENTS = "test_gradients_reach_every_trainable_parameter_and_no_frozen_one"
LAYERS = "test_the_last_layers_alone_can_be_chosen"
PADDED = "test_its_answers_do_not_depend_on_padding"
LOADS = "test_a_fresh_process_loads_what_was_saved"
MERGES = "test_merging_keeps_the_logits_and_leaves_a_plain_model"
QUANTIZED = "test_a_quantized_base_trains_and_stays_as_it_was"
RESUMES = "test_a_resumed_trial_ends_to_the_bit_like_one_that_went_on"
UNTOUCHED = "test_its_base_is_untouched_once_it_is_gone"


_WIDTHS = {QUANTIZED: (4,), MEMORY: (32,)}
"""Of the laws that are tried at several widths."""


def find_broken_laws(method: Method, architecture: ArchitectureName = "bert") -> dict[str, str]:
    """Each law that the method breaks on a tiny model, with the message that its author gets."""
    broken: dict[str, str] = {}
    with registered(method):
        subject = Subject(Case(method, architecture, 32))
        for law in LAWS:
            try:
                getattr(MethodContract(), law)(subject, *_WIDTHS.get(law, ()))
            except pytest.skip.Exception:
                continue
            except pytest.fail.Exception as exc:
                broken[law] = str(exc)
        subject.close()
    return broken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "laws"),
    [
        (TOY, {}),
        (HAS_NO_TITLE, {SOUND: "title must not be empty"}),
        (COUNTED_OTHERWISE, {COUNTED: "counts 128 and trains 130"}),
        (HOARDS, {MEMORY: "must hold as many bytes as are estimated"}),
        (ASKS_FOR_A_VALUE, {COUNTED: "neither may ask for a value.*in forward\n.*self.gate.0. < 1e6"}),
        (STARTS_ELSEWHERE, {STARTS: "`starts_as_base` is true, but they differ by"}),
        (DENIES_ITS_START, {STARTS: "but `starts_as_base` is false"}),
        (ASCENDS, {LEARNS: "at 0.01 it goes from"}),
        (UNREACHED, {GRADIENTS: r"none ever reaches bert.encoder.layer.0.attention.output.dense.idle"}),
        (THAWS, {GRADIENTS: r"trainable parameters alone, but bert.*base_layer.weight"}),
        (DRAWN_ANEW, {LOADS: "saved and loaded by a fresh process with autopeft, but they differ", RESUMES: "differs"}),
        (REMEMBERS, {RESUMES: r"but trainable\.bert.*gate.* differs\. A checkpoint holds"}),
        (READS_PADDING, {PADDED: "however far its batch is padded, but they differ by"}),
        (NEEDS_PLAIN_WEIGHTS, {QUANTIZED: "of 4 bits must build and train, because `bits` claims the width, but"}),
        (WRITES_BASE, {UNTOUCHED: "must leave the resident base as it was"}),
        (CANNOT_MERGE, {MERGES: r"must be a plain transformers model after merging.*dense.base_layer"}),
        (FORGETS_IN_MERGING, {MERGES: "must have the same logits after merging"}),
        (IGNORES_LAYERS, {LAYERS: r"'last-1', because `layer_choice` is true, but trains bert\.encoder\.layer\.0"}),
        (DOES_NOT_BUILD, {BUILDS: "no toys today"}),
        (REFUSES, {BUILDS: "Toys need a model of wood. Narrow `models`"}),
    ],
    ids=lambda value: next((name.lower() for name, it in globals().items() if it is value), "laws"),
)
def test_a_method_with_a_fault_breaks_the_law_about_it_and_no_other(method: Method, laws: dict[str, str]) -> None:
    broken = find_broken_laws(method)
    assert sorted(broken) == sorted(laws), broken
    for law, words in laws.items():
        with pytest.raises(pytest.fail.Exception, match=f"(?s)'toy'.*{words}"):
            pytest.fail(broken[law])


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_stays_frozen_is_told() -> None:
    # peft alone unfreezes heads named `classifier` and `score`; ModernBERT's has two parts.
    lora = METHODS["lora"].peft
    assert lora is not None

    def forget_head(spec: TrialSpec, context: BuildContext) -> PeftCall:
        call = lora(spec, context)
        return call._replace(arguments={k: v for k, v in call.arguments.items() if k != "modules_to_save"})

    broken = find_broken_laws(dataclasses.replace(METHODS["lora"], peft=forget_head), "modernbert")
    assert "must train the whole task head" in broken[COUNTED]


def test_the_laws_of_these_tests_are_all_there_are() -> None:
    assert {
        SOUND,
        BUILDS,
        COUNTED,
        MEMORY,
        STARTS,
        LEARNS,
        GRADIENTS,
        LAYERS,
        PADDED,
        LOADS,
        MERGES,
        QUANTIZED,
        RESUMES,
        UNTOUCHED,
    } == set(LAWS)


def test_a_failing_law_prints_its_message_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from autopeft.testing import MethodContract
        from test_contract import DENIES_ITS_START, REFUSES
        from autopeft.testing.subject import Case
        import dataclasses

        class TestMine(MethodContract):
            method = DENIES_ITS_START
            architectures = ("llama",)

        PICKY = dataclasses.replace(REFUSES, needs="a model of wood")

        class TestPicky(MethodContract):
            method = PICKY
            architectures = ("llama",)

        class TestNowhere(MethodContract):
            @classmethod
            def cases(cls):
                return [[Case(PICKY, "llama", 32), Case(PICKY, "bert", 32)]]
        """
    )
    result = pytester.runpytest_inprocess("-k", "starts_as_the_base", "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, skipped=1, errors=1)
    result.stdout.fnmatch_lines(["'toy' on a tiny Llama of 32 bits has the base's logits before its first step*"])
    result.stdout.fnmatch_lines(["A method must be trained by some model, but 'toy' on a tiny Llama*is refused*"])
    result.stdout.fnmatch_lines(["SKIPPED*is refused: Toys need a model of wood."])
    result.stdout.no_fnmatch_line("*contract.py:*: Failed")


# --- what the suite itself is made of


def test_what_is_too_wide_for_the_tiny_models_is_refused_by_all_of_them() -> None:
    for name, changes in TOO_WIDE.items():
        method = METHODS[name]
        for changed in changes:
            assert changed in choice_variants(method)
            for architecture in claimed(method, tuple(ARCHITECTURES)):
                case = Case(method, architecture, 32, tuple(changed.items()))
                assert "must divide the width of every target" in str(Subject(case).refusal())


def test_every_other_choice_of_a_setting_is_a_variant() -> None:
    dimensions = (choice("on", (False, True), False, "a switch"), choice("how", ("a", "b", "c"), "a", "a choice"))
    recipe = dataclasses.replace(TOY.recipe, settings={"on": False, "how": "b"})
    method = make_toy(dimensions=dimensions, recipe=recipe)
    assert choice_variants(method) == [{"on": True}, {"how": "a"}, {"how": "c"}]


def test_checkpoints_are_compared_to_the_last_bit() -> None:
    state = {"step": 3, "trainable": {"a": torch.tensor([1.0])}, "optimizer": [{"lr": 0.1}, None]}
    other = {"step": 3, "trainable": {"a": torch.tensor([1.0000001])}, "optimizer": [{"lr": 0.2}, None]}
    assert find_differences(state, state) == []
    assert find_differences(state, other) == ["trainable.a", "optimizer.0.lr"]
    assert find_differences({"a": 1}, {"b": 1}, "top") == ["top"]
