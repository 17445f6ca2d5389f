"""EVA's start: A holds the directions in which a layer's inputs vary most on training rows, B is zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.data import Rows
from autopeft.backends.hf.row_start import NUM_BATCHES, plan_start, start_from_rows
from autopeft.errors import SpecError
from autopeft.methods import METHODS
from autopeft.methods.eva import begin_with_activations
from autopeft.records import TrialSpec
from autopeft.testing.subject import Case
from autopeft.testing.tiny_models import tiny_base, tiny_batch

pytestmark = pytest.mark.filterwarnings("ignore")

MakeSpec = Callable[..., TrialSpec]


def spec_of(architecture: Any = "bert", **settings: Any) -> TrialSpec:
    changes = tuple({"init": "eva", "rank": 4, **settings}.items())
    return Case(METHODS["lora"], architecture, 32, changes).spec()


def directions_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Of other rows each; the last row of each is padded."""
    batches = []
    for seed in range(count):
        batch = {name: tensor.clone() for name, tensor in tiny_batch().items() if name != "labels"}
        generator = torch.Generator().manual_seed(seed)
        words = batch["input_ids"] > 3
        drawn = torch.randint(4, 96, batch["input_ids"].shape, generator=generator)
        batch["input_ids"] = torch.where(words, drawn, batch["input_ids"])
        batches.append(batch)
    return batches


def collect_inputs(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Centred inputs (R, D) of each adapted layer, padding left out, by the name of its A."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            seen[f"{name}.lora_A.default.weight"] = kept = []
            handles.append(module.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0])))
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    rows = {name: torch.cat([x[m] for x, m in zip(kept, masks, strict=True)]) for name, kept in seen.items()}
    return {name: states_RD - states_RD.mean(0) for name, states_RD in rows.items()}


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5", "modernbert"])
def test_they_hold_as_much_of_the_inputs_variance_as_pefts_own(architecture: Any) -> None:
    batches = make_batches(6)
    ours, theirs = (build_trial_model(tiny_base(architecture, 32), spec_of(architecture)).eval() for _ in range(2))
    inputs = collect_inputs(ours, batches)
    begin_with_activations(ours, spec_of(architecture), batches * 4)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    expected = directions_of(theirs)
    assert len(expected) >= 8
    for name, found_RD in directions_of(ours).items():
        held, held_by_peft = (
            float((inputs[name] @ directions_RD.T).square().sum()) for directions_RD in (found_RD, expected[name])
        )
        torch.testing.assert_close(found_RD @ found_RD.T, torch.eye(4), rtol=0, atol=1e-3)
        # What random weights make of random words varies nearly alike in all directions, so that four are a choice.
        assert held > 0.95 * held_by_peft, name


def test_they_are_the_principal_components_of_what_is_no_padding() -> None:
    model = build_trial_model(tiny_base("bert", 32), spec_of()).eval()
    (batch,) = make_batches(1)
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = model.base_model.model.get_submodule(name)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    states_RD = seen[0][batch["attention_mask"].bool()]
    # Of a few components a random start of subspace iterations is exact to some digits.
    expected = torch.linalg.svd(states_RD - states_RD.mean(0)).Vh[:4]
    begin_with_activations(model, spec_of(), [batch])
    found = layer.lora_A["default"].weight.detach()
    assert float(torch.nn.functional.cosine_similarity(found, expected).abs().min()) > 0.99


def test_no_number_of_the_start_is_drawn_from_the_trials_random_state() -> None:
    model = build_trial_model(tiny_base("bert", 32), spec_of())
    before = torch.get_rng_state()
    batch = tiny_batch()
    shown = []

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        shown.append(rows)
        return {name: tensor[rows] for name, tensor in batch.items()}

    drawn = {name: tensor.clone() for name, tensor in directions_of(model).items()}
    start_from_rows(model, spec_of(), Rows([12] * 8, collate, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert 2 <= len(shown) <= NUM_BATCHES
    assert model.training
    assert all(not torch.equal(tensor, drawn[name]) for name, tensor in directions_of(model).items())


def test_other_starts_read_no_row() -> None:
    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        raise AssertionError("a row was read")

    for spec in (spec_of(init="default"), dataclasses.replace(spec_of(), method="ia3", settings={})):
        model = build_trial_model(tiny_base("bert", 32), spec_of(init="default"))
        start_from_rows(model, spec, Rows([12] * 8, collate, "cpu"))


def test_a_batch_has_the_rows_of_a_step_or_more_where_those_have_too_few_tokens() -> None:
    lengths = [3, 5, 4, 6]
    steps = list(plan_start(lengths, batch_size=2, fewest_tokens=1, seed=0))
    assert len(steps) == NUM_BATCHES
    assert {len(rows) for rows in steps} == {2}
    assert sorted(steps[0] + steps[1]) == [0, 1, 2, 3]
    for rows in plan_start(lengths, batch_size=2, fewest_tokens=30, seed=0):
        assert sum(lengths[row] for row in rows) >= 30
    assert list(plan_start(lengths, batch_size=2, fewest_tokens=1, seed=1)) != steps


def test_a_batch_that_is_read_is_bounded_by_those_to_train_on_and_there_are_more_instead() -> None:
    lengths = [3, 5, 4, 6, 30]
    steps = list(plan_start(lengths, batch_size=2, fewest_tokens=300, seed=0))
    # 4 times the 2 rows of a step, were all of them as long as the longest.
    assert all(len(rows) * max(lengths[row] for row in rows) <= 4 * 2 * 30 for rows in steps)
    assert len(steps) > NUM_BATCHES
    assert sum(lengths[row] for rows in steps for row in rows) >= NUM_BATCHES * 300
    # However little fits, EVA has a token for each direction.
    for rows in plan_start([3, 5, 4], batch_size=1, fewest_tokens=400, seed=0):
        assert sum([3, 5, 4][row] for row in rows) >= 50


def test_small_micro_batches_bound_what_is_read() -> None:
    lengths = [13, 14, 15, 30] * 8
    for micro_batch, most in ((1, 4 * 30), (4, 4 * 4 * 30), (16, 4 * 16 * 30)):
        steps = list(plan_start(lengths, batch_size=16, micro_batch=micro_batch, fewest_tokens=400, seed=0))
        assert all(len(rows) * max(lengths[row] for row in rows) <= most for rows in steps)
        assert sum(lengths[row] for rows in steps for row in rows) >= NUM_BATCHES * 400
    whole = list(plan_start(lengths, batch_size=16, fewest_tokens=1, seed=0))
    assert whole == list(plan_start(lengths, batch_size=16, micro_batch=16, fewest_tokens=1, seed=0))
    small = list(plan_start(lengths, batch_size=16, micro_batch=1, fewest_tokens=1, seed=0))
    assert {len(rows) for rows in small} == {4}
    assert sum(map(len, small)) == sum(map(len, whole))


def test_more_directions_than_inputs_are_refused(make_spec: MakeSpec) -> None:
    # Half of its layers have 64 inputs.
    with pytest.raises(SpecError, match=r"EVA finds.*at most 64 on .*but is 65"):
        build_trial_model(tiny_base("bert", 32), make_spec(settings={"init": "eva", "rank": 65}))
