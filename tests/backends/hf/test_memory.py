"""Estimates for CPU against bytes counted in real steps, and the parts that they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from recipe_specs import make_recipe_spec

from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.data import Rows, longest_batch
from autopeft.backends.hf.language import IGNORED
from autopeft.backends.hf.live_bytes import LiveBytes
from autopeft.backends.hf.memory import Rehearsal, find_peak
from autopeft.backends.hf.steps import build_optimizer, checkpoint_activations, score_batch, train_step
from autopeft.errors import SpecError
from autopeft.records import Bits, StepSettings, TrialSpec
from autopeft.testing.tiny_models import ArchitectureName, tiny_base, tiny_folder

BATCH_SIZE, TOKENS = 4, 24
PLAIN = StepSettings()
CHECKPOINTED = StepSettings(checkpoint_activations=True)
ACCUMULATED = StepSettings(micro_batches=3)

CONFIGURATIONS: tuple[tuple[str, Bits, Mapping[str, Any], StepSettings], ...] = (
    ("lora", 32, {}, PLAIN),
    ("lora", 8, {}, PLAIN),
    ("lora", 4, {}, PLAIN),
    ("lora", 32, {"dropout": 0.1}, PLAIN),
    ("lora", 32, {}, CHECKPOINTED),
    ("lora", 4, {}, CHECKPOINTED),
    ("lora", 32, {"dora": True}, CHECKPOINTED),
    ("full", 32, {}, CHECKPOINTED),
    ("ia3", 32, {}, CHECKPOINTED),
    ("ia3", 8, {}, CHECKPOINTED),
    ("lora", 32, {}, ACCUMULATED),
    ("full", 32, {}, PLAIN),
    ("full", 32, {}, ACCUMULATED),
    ("ia3", 8, {}, PLAIN),
    ("bottleneck", 32, {}, PLAIN),
    ("bottleneck", 4, {}, PLAIN),
    ("prompt_tuning", 32, {}, PLAIN),
)
"""Times four architectures, but for one: 67."""


def spec_of(method: str, bits: Bits = 32, **changed: Any) -> TrialSpec:
    return make_recipe_spec(method, bits, batch_size=BATCH_SIZE, **changed)


def real_batch(architecture: ArchitectureName, rows: int) -> dict[str, torch.Tensor]:
    """One row is padded, or transformers would drop the mask; each ends with the end-of-sequence token."""
    ids_BT = torch.full((rows, TOKENS), 7)
    ids_BT[:, -1] = 1
    mask_BT = torch.ones(rows, TOKENS, dtype=torch.int64)
    # Every fourth, so that each part of an accumulated batch has one.
    mask_BT[::4, : TOKENS // 2] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.zeros(rows, dtype=torch.int64)}
    if architecture == "bert":
        batch["token_type_ids"] = torch.zeros(rows, TOKENS, dtype=torch.int64)
    return batch


def rehearse(architecture: ArchitectureName, spec: TrialSpec, settings: StepSettings) -> Rehearsal:
    """On the real, random weights of a tiny model."""
    model = build_trial_model(tiny_base(architecture, spec.bits), spec)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    return Rehearsal(model, spec, on_gpu=False)


@pytest.fixture(scope="module")
def costs() -> dict[str, HfCostModel]:
    return {
        name: HfCostModel(tiny_folder(name), num_labels=2, device_kind="cpu", longest_tokens=TOKENS)
        for name in ("bert", "llama", "t5", "modernbert")
    }


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5", "modernbert"))]
)
def test_estimates_equal_the_bytes_of_a_real_step_within_1_percent(costs, architecture):
    errors = {}
    # T5's classifier takes no embeddings, which is what prompt tuning puts in.
    configurations = [c for c in CONFIGURATIONS if architecture != "t5" or c[0] != "prompt_tuning"]
    for method, bits, changed, settings in configurations:
        spec = spec_of(method, bits, **changed)
        estimate = costs[architecture].estimate(spec, settings)
        # Two parts hold what three do.
        parts = min(settings.micro_batches, 2)
        rehearsal = rehearse(architecture, spec, settings)
        trained = find_peak(rehearsal.train(real_batch(architecture, BATCH_SIZE * parts), micro_batches=parts))
        scored = find_peak(rehearsal.score(real_batch(architecture, estimate.scoring_batch_size)))
        errors[f"{method} {bits} {changed} {settings}"] = (
            estimate.peak_bytes / trained.total - 1,
            estimate.scoring_bytes / scored.total - 1,
        )
    assert len(errors) == len(configurations)
    assert {name: both for name, both in errors.items() if max(map(abs, both)) > 0.01} == {}


def cut_rows(architecture: ArchitectureName, labels: torch.Tensor) -> Rows:
    """Four that were all cut to one length."""
    batch = real_batch(architecture, 4)
    batch |= {"attention_mask": torch.ones_like(batch["attention_mask"]), "labels": labels}
    return Rows([TOKENS] * 4, lambda indices: {name: tensor[indices] for name, tensor in batch.items()}, "cpu")


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_longest_rows_need_what_is_estimated_though_they_were_all_cut_to_one_length(costs, architecture):
    spec = spec_of("lora")
    batch = longest_batch(cut_rows(architecture, torch.zeros(4, dtype=torch.int64)), BATCH_SIZE)
    trained = find_peak(rehearse(architecture, spec, PLAIN).train(batch))
    assert costs[architecture].estimate(spec).peak_bytes == pytest.approx(trained.total, rel=0.01)


def test_of_the_longest_rows_what_is_made_padding_does_not_count():
    batch = longest_batch(cut_rows("llama", torch.ones(4, TOKENS, dtype=torch.int64)), 2)
    assert batch["attention_mask"].shape == (2, TOKENS)
    for name, padded in (("attention_mask", 0), ("labels", IGNORED)):
        assert (batch[name] == padded).nonzero().tolist() == [[1, TOKENS - 1]]


def test_the_parts_add_up_to_the_peak(costs):
    for method in ("lora", "full", "head"):
        estimate = costs["bert"].estimate(spec_of(method))
        parts = dataclasses.asdict(estimate)
        names = ("base", "adapter", "gradient", "optimizer", "activation", "library")
        assert sum(parts[f"{name}_bytes"] for name in names) == estimate.peak_bytes


def test_the_parts_that_are_weights_follow_from_counts(costs):
    # Full fine-tuning: everything trains in float32, so there is no frozen base but buffers, and twice that in moments.
    estimate = costs["llama"].estimate(spec_of("full"))
    trained = 4 * (estimate.trainable_parameters + estimate.head_parameters)
    # Every storage is rounded up to 512 bytes, of which tiny weights have many.
    assert estimate.adapter_bytes == pytest.approx(trained, rel=0.05)
    assert estimate.optimizer_bytes == pytest.approx(2 * trained, rel=0.1)
    assert estimate.base_bytes < 0.01 * trained
    assert estimate.exported_bytes == trained


def test_a_checkpoint_is_as_large_as_its_tensors(costs, tmp_path):
    from autopeft.backends.hf.trial import LiveTrial

    spec = spec_of("lora")
    live = LiveTrial(build_trial_model(tiny_base("bert", 32), spec), spec)
    train_step(live.model, live.optimizer, real_batch("bert", 4), learning_rate=0.0, device="cpu")
    torch.save(live.state(), tmp_path / "checkpoint.pt")
    # The file has names, the random state (5 kB) and a zip archive's headers besides.
    surplus = (tmp_path / "checkpoint.pt").stat().st_size - costs["bert"].estimate(spec).checkpoint_bytes
    assert 0 < surplus < 40_000


def test_checkpointed_activations_need_less_and_accumulated_gradients_more(costs):
    plain, checkpointed, accumulated = (
        costs["llama"].estimate(spec_of("full"), settings) for settings in (PLAIN, CHECKPOINTED, ACCUMULATED)
    )
    assert checkpointed.peak_bytes < plain.peak_bytes < accumulated.peak_bytes
    assert accumulated.gradient_bytes >= plain.gradient_bytes


def test_accumulated_gradients_are_those_of_the_whole_batch():
    gradients = []
    batch = real_batch("bert", 4)
    for micro_batches in (1, 2):
        spec = spec_of("lora", dropout=0.0)
        model = build_trial_model(tiny_base("bert", 32), spec)
        # Dropout draws anew for each part.
        model.eval()
        optimizer = build_optimizer(model, spec)
        taken: list[torch.Tensor] = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(
            lambda *_, p=parameters, t=taken: t.extend(q.grad.clone() for q in p if q.grad is not None)
        )
        loss = train_step(model, optimizer, batch, learning_rate=0.0, device="cpu", micro_batches=micro_batches)
        gradients.append([*taken, loss])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2", "cartridge"])
def test_a_prefix_cannot_be_kept_under_activation_checkpointing(costs, method):
    with pytest.raises(SpecError, match=f"without cached keys.* {method}"):
        costs["llama"].estimate(spec_of(method), CHECKPOINTED)


# --- scoring


def test_scoring_never_needs_more_than_training(costs):
    # A head alone keeps no activations, so twice its batch would not fit where training did.
    for method in ("head", "lora", "full"):
        estimate = costs["bert"].estimate(spec_of(method))
        assert estimate.scoring_bytes <= estimate.peak_bytes
    assert costs["bert"].estimate(spec_of("lora")).scoring_batch_size == 2 * BATCH_SIZE
    assert costs["bert"].estimate(spec_of("head")).scoring_batch_size <= BATCH_SIZE


def test_longer_sequences_to_score_are_scored_fewer_at_a_time():
    costs = HfCostModel(
        tiny_folder("bert"), num_labels=2, device_kind="cpu", longest_tokens=TOKENS, scoring_tokens=20 * TOKENS
    )
    estimate = costs.estimate(spec_of("lora"))
    assert estimate.scoring_batch_size < BATCH_SIZE


def test_losses_of_a_scored_batch_are_those_of_training():
    base = tiny_base("bert", 32)
    model = build_trial_model(base, spec_of("lora")).eval()
    batch = real_batch("bert", 4)
    losses_B, predictions_B = score_batch(model, dict(batch), device="cpu")
    assert losses_B.mean().item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert predictions_B.shape == (4,)


# --- the counter


def test_each_moment_has_a_peak_of_its_own():
    live = LiveBytes()
    with live:
        live.mark("first")
        large = torch.empty(4096, dtype=torch.uint8)
        del large
        live.mark("second")
        small = torch.empty(512, dtype=torch.uint8)
    assert (live.peaks["first"].total, live.peaks["second"].total) == (4096, 512)
    assert live.peak_bytes == 4096
    assert small.numel() == 512


def test_a_storage_that_becomes_a_gradient_is_no_activation_any_more():
    with LiveBytes() as live:
        live.mark("before")
        tensor = torch.empty(512, dtype=torch.uint8)
        live.move(tensor, "gradients")
        live.mark("after")
    assert live.peaks["before"].activations == 512
    assert (live.peaks["after"].activations, live.peaks["after"].gradients) == (0, 512)
