"""What methods may do beside following gradients at one rate: LoRA+'s groups, AdaLoRA's schedule, 8-bit optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_bert

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import BaseModel, digest_model, load_base
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, train_step
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import SpecError
from autopeft.methods import refuse_spec
from autopeft.methods.base import optimizers_on
from autopeft.methods.qlora import QLORA
from autopeft.records import TrialSpec
from autopeft.tasks.spec import find_task_text

pytestmark = pytest.mark.filterwarnings("default")

MakeSpec = Callable[..., TrialSpec]
STEPS = 12


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def base(tiny_bert: str) -> BaseModel:
    return load_base(tiny_bert, num_labels=2, bits=32, device="cpu")


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 20000, (8, 10)),
        "attention_mask": torch.ones(8, 10, dtype=torch.int64),
        "labels": torch.randint(0, 2, (8,)),
    }


def train(model: Any, spec: TrialSpec, num_steps: int) -> None:
    optimizer = build_optimizer(model, spec)
    batch = make_batch()
    for step in range(num_steps):
        after_step = bind_after_step(model, spec, step + 1)
        train_step(model, optimizer, batch, learning_rate=spec.learning_rate, device="cpu", after_step=after_step)


def resume(backend: HfBackend, spec: TrialSpec) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Final weights of a trial that went on after its pause, and of one that was rebuilt from its checkpoint."""

    def run(start: int, end: int, checkpoint: str | None) -> Finished:
        stretch = Stretch(
            job=1, trial=0, spec=spec, purpose="search", from_step=start, to_step=end, checkpoint=checkpoint,
            save=end < spec.max_steps,
        )  # fmt: skip
        finished = backend.run(stretch, lambda event: None)
        assert isinstance(finished, Finished)
        return finished

    def weights() -> dict[str, torch.Tensor]:
        assert backend._live is not None
        return {name: p.detach().clone() for name, p in trainable_parameters(backend._live.model).items()}

    paused = run(0, STEPS // 2, None)
    run(STEPS // 2, STEPS, None)
    went_on = weights()
    backend._drop_live()
    run(STEPS // 2, STEPS, paused.checkpoint)
    return went_on, weights()


@pytest.fixture(scope="module")
def backend(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> HfBackend:
    setup = WorkerSetup(
        backend="hf", model=tiny_bert, task=find_task_text("demo"), data_dir=None, split_seed=0,
        study_dir=str(tmp_path_factory.mktemp("study")), device="cpu", threads=1,
    )  # fmt: skip
    return HfBackend(setup)


# --- AdaLoRA


def count_ranks(model: Any) -> dict[str, int]:
    """Triplets left in each update: those whose singular value is not masked."""
    return {n: int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n}


@pytest.mark.parametrize("initial_over_rank", [1.25, 3.0])
def test_adalora_ends_with_its_average_rank(base: BaseModel, make_spec: MakeSpec, initial_over_rank: float) -> None:
    spec = make_spec("adalora", settings={"rank": 4, "initial_over_rank": initial_over_rank}, max_steps=STEPS)
    model = build_trial_model(base, spec)
    train(model, spec, STEPS)
    ranks = count_ranks(model)
    # Two layers of six projections each, an average of 4 triplets in every one.
    assert len(ranks) == 12
    assert sum(ranks.values()) == 12 * 4


def test_adalora_cuts_nothing_before_its_initial_share_is_over(base: BaseModel, make_spec: MakeSpec) -> None:
    # A quarter of 12 steps is 3.
    spec = make_spec("adalora", settings={"rank": 4, "initial_share": 0.25}, max_steps=STEPS)
    model = build_trial_model(base, spec)
    train(model, spec, 3)
    assert set(count_ranks(model).values()) == {6}


def test_adaloras_ranks_differ_between_layers_and_stay_once_cut(base: BaseModel, make_spec: MakeSpec) -> None:
    spec = make_spec("adalora", settings={"rank": 4, "final_share": 0.5}, max_steps=STEPS)
    model = build_trial_model(base, spec)
    optimizer = build_optimizer(model, spec)
    seen = []
    for step in range(STEPS):
        train_step(
            model, optimizer, make_batch(), learning_rate=1e-2, device="cpu",
            after_step=bind_after_step(model, spec, step + 1),
        )  # fmt: skip
        seen.append(count_ranks(model))
    assert len(set(seen[-1].values())) > 1
    # The final half begins after 6 of 12 steps.
    assert all(ranks == seen[5] for ranks in seen[6:])
    # Before it the budget falls from 12 x 6 to 12 x 4 with the cube of what is left of steps 2 to 6:
    # 48 + 24 x 0.8^3, 0.6^3, 0.4^3 and 0.2^3, rounded down.
    assert [sum(ranks.values()) for ranks in seen[:6]] == [72, 60, 53, 49, 48, 48]


@pytest.mark.parametrize("max_steps", [3, 4, 5, 6, 7, 11, 1000])
@pytest.mark.parametrize(("initial_share", "final_share"), [(0.0, 0.1), (0.3, 0.5)])
def test_adaloras_schedule_fits_any_length(
    base: BaseModel, make_spec: MakeSpec, max_steps: int, initial_share: float, final_share: float
) -> None:
    settings = {"initial_share": initial_share, "final_share": final_share}
    # peft refuses a schedule that leaves no step to cut ranks in.
    build_trial_model(base, make_spec("adalora", settings=settings, max_steps=max_steps))


def test_adalora_is_refused_where_there_is_no_room_for_its_schedule(make_spec: MakeSpec) -> None:
    rule = refuse_spec(make_spec("adalora", max_steps=2), "cpu")
    assert rule is not None
    assert "max_steps is 2" in rule


def test_a_resumed_adalora_ends_to_the_bit_like_one_that_went_on(backend: HfBackend, make_spec: MakeSpec) -> None:
    # The pause is at step 6 of 12, in the middle of the cut.
    spec = make_spec("adalora", settings={"rank": 2, "final_share": 0.1}, batch_size=8, max_steps=STEPS)
    went_on, resumed = resume(backend, spec)
    assert sum(int((w != 0).sum()) for name, w in resumed.items() if ".lora_E." in name) == 12 * 2
    assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)


def test_adaloras_checkpoint_holds_what_its_next_cut_depends_on(base: BaseModel, make_spec: MakeSpec) -> None:
    from autopeft.methods.adalora import ADALORA

    assert ADALORA.stepping is not None
    spec = make_spec("adalora", settings={"rank": 2, "final_share": 0.1}, max_steps=STEPS)
    model = build_trial_model(base, spec)
    train(model, spec, 6)
    state = ADALORA.stepping.state(model)
    fresh = build_trial_model(base, spec)
    ADALORA.stepping.restore(fresh, state)
    again = ADALORA.stepping.state(fresh)
    assert state["kept"] == again["kept"] is not None
    assert len(state["sensitivity"]) == 12 * 3
    for key in ("sensitivity", "uncertainty"):
        assert all(torch.equal(state[key][name], again[key][name]) for name in state[key])


# --- LoRA+


def test_lora_plus_steps_b_by_its_ratio_and_all_else_alike(base: BaseModel, make_spec: MakeSpec) -> None:
    def moved(ratio: float) -> dict[str, float]:
        spec = make_spec(settings={"lr_ratio_b": ratio}, learning_rate=1e-3)
        model = build_trial_model(base, spec)
        before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        train(model, spec, 1)
        return {n: float((p.detach() - before[n]).abs().max()) for n, p in trainable_parameters(model).items()}

    plain, plus = moved(1.0), moved(16.0)
    # Adam's first step is the learning rate wherever there is a gradient.
    assert {name for name in plain if plus[name] == pytest.approx(16 * plain[name], rel=1e-3) and plain[name] > 0} == {
        name for name in plain if ".lora_B." in name
    }
    assert all(plus[name] == plain[name] for name in plain if ".lora_B." not in name)


@pytest.mark.parametrize("method", ["lora", "lora_bottleneck"])
def test_groups_hold_every_trainable_parameter_once(base: BaseModel, make_spec: MakeSpec, method: str) -> None:
    spec = make_spec(method, settings={"lr_ratio_b": 4.0})
    model = build_trial_model(base, spec)
    groups = build_optimizer(model, spec).param_groups
    assert [group["lr_scale"] for group in groups] == [1.0, 4.0]
    in_groups = [id(p) for group in groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in trainable_parameters(model).values())


def test_a_resumed_lora_plus_ends_to_the_bit_like_one_that_went_on(backend: HfBackend, make_spec: MakeSpec) -> None:
    spec = make_spec(settings={"lr_ratio_b": 8.0, "dropout": 0.1}, batch_size=8, max_steps=STEPS)
    went_on, resumed = resume(backend, spec)
    assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)


# --- optimizers


def test_8_bit_states_are_kept_in_8_bits_and_resume_to_the_bit(backend: HfBackend, make_spec: MakeSpec) -> None:
    # Rank 64 on 64 x 64 projections: 4,096 numbers, from which bitsandbytes quantizes.
    spec = make_spec(settings={"rank": 64}, optimizer="adamw_8bit", batch_size=8, max_steps=STEPS)
    went_on, resumed = resume(backend, spec)
    assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)
    assert backend._live is not None
    types = {state["state1"].dtype for state in backend._live.optimizer.state.values()}
    assert types == {torch.uint8, torch.float32}


def test_paged_states_are_refused_on_cpu_alone(make_spec: MakeSpec) -> None:
    spec = make_spec("qlora", bits=4, optimizer="paged_adamw_8bit")
    assert refuse_spec(spec, "cuda") is None
    rule = refuse_spec(spec, "cpu")
    assert rule is not None
    assert "Use adamw or adamw_8bit" in rule


def test_qlora_pages_its_states_where_there_is_a_gpu() -> None:
    assert optimizers_on(QLORA, "cuda")[0] == "paged_adamw_8bit"
    assert optimizers_on(QLORA, "cpu") == ("adamw",)


def test_the_optimizer_is_part_of_a_key_only_where_it_is_another(make_spec: MakeSpec) -> None:
    # Written down before TrialSpec had the field: keys of stored trials stay what they were.
    spec = TrialSpec(
        method="ia3", settings={"feedforward": True}, target_modules=None, bits=32, learning_rate=0.03, batch_size=16,
        max_steps=160, warmup_ratio=0.06, schedule="linear", weight_decay=0.0, seed=0,
    )  # fmt: skip
    assert (spec.key(), spec.cost_key()) == ("2e935f9f0a2538df", "70954cee72ce580b")
    other = replace(spec, optimizer="adamw_8bit")
    assert other.key() != spec.key()
    assert other.cost_key() != spec.cost_key()


# --- where adapters and selected parameters are


def adapted(base: BaseModel, spec: TrialSpec) -> set[str]:
    """Modules of the base, by name, that hold trainable parameters; the head left out."""
    names = [name for name in trainable_parameters(build_trial_model(base, spec)) if "classifier" not in name]
    return {name.rsplit(".", 2)[0] for name in names}


@pytest.mark.parametrize(
    ("placement", "places"),
    [
        ("houlsby", {"attention.output.dense", "output.dense"}),
        ("pfeiffer", {"output.dense"}),
        ("parallel", {"output.dense"}),
    ],
)
@pytest.mark.parametrize(("layers", "kept"), [(None, (0, 1)), ("last-1", (1,))])
def test_a_bottleneck_is_where_its_placement_says(
    base: BaseModel, make_spec: MakeSpec, placement: str, places: set[str], layers: str | None, kept: tuple[int, ...]
) -> None:
    spec = make_spec("bottleneck", settings={"placement": placement}, target_modules=layers)
    assert adapted(base, spec) == {f"bert.encoder.layer.{i}.{place}" for i in kept for place in places}


def test_a_parallel_adapter_adds_its_scaled_update_of_what_enters_the_feed_forward(
    base: BaseModel, make_spec: MakeSpec
) -> None:
    spec = make_spec("bottleneck", settings={"placement": "parallel", "scale": 2.0, "activation": "relu"})
    model = build_trial_model(base, spec).eval()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.up.weight.normal_()
        input_BTD = torch.randn(2, 3, 64)
        inner_BTF = layer.intermediate(input_BTD)
        output_BTD = layer.output.dense(inner_BTF)
        adapter = layer.output.dense
        update_BTD = adapter.up(torch.relu(adapter.down(input_BTD)))
        expected_BTD = adapter.base_layer(inner_BTF) + 2.0 * update_BTD
    assert float(update_BTD.abs().max()) > 0.1
    torch.testing.assert_close(output_BTD, expected_BTD)


def test_a_scale_that_would_be_ignored_is_refused(make_spec: MakeSpec) -> None:
    rule = refuse_spec(make_spec("bottleneck", settings={"placement": "houlsby", "scale": 2.0}), "cpu")
    assert rule is not None
    assert "Use placement parallel" in rule


def test_the_combined_method_has_lora_on_attention_and_adapters_at_the_feed_forward(
    base: BaseModel, make_spec: MakeSpec
) -> None:
    names = set(trainable_parameters(build_trial_model(base, make_spec("lora_bottleneck", target_modules="last-1"))))
    attention, feed_forward = "bert.encoder.layer.1.attention.self.", "bert.encoder.layer.1.output.dense."
    assert names == {
        *(f"{attention}{role}.lora_{matrix}.default.weight" for role in ("query", "value") for matrix in "AB"),
        *(f"{feed_forward}{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")),
        "classifier.weight",
        "classifier.bias",
    }


def test_bitfit_trains_biases_alone_and_in_copies_of_its_own(base: BaseModel, make_spec: MakeSpec) -> None:
    before = digest_model(base.model)
    spec = make_spec("bitfit")
    model = build_trial_model(base, spec)
    trained = trainable_parameters(model)
    assert all(name.endswith(".bias") for name in trained if not name.startswith("classifier"))
    train(model, spec, 2)
    assert digest_model(base.model) == before
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in base.model.parameters()}
    # Everything but the biases and the head is the resident base's own storage.
    assert len(shared) == len(list(model.parameters())) - len(trained)


def test_bitfit_is_refused_on_a_model_without_biases(tmp_path: Path, make_spec: MakeSpec) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    llama = load_base(str(tmp_path), num_labels=2, bits=32, device="cpu")
    with pytest.raises(SpecError, match="this model has none"):
        build_trial_model(llama, make_spec("bitfit"))


@pytest.mark.parametrize(("layers", "num_norms"), [(None, 5), ("last-1", 2)])
def test_layernorm_tuning_trains_the_norms_alone(
    base: BaseModel, make_spec: MakeSpec, layers: str | None, num_norms: int
) -> None:
    # Two in each of BERT's layers and one on its embeddings, each with a weight and a bias.
    spec = make_spec("ln_tuning", target_modules=layers)
    names = [name for name in trainable_parameters(build_trial_model(base, spec)) if "classifier" not in name]
    assert len(names) == 2 * num_norms
    assert all("LayerNorm" in name for name in names)


# --- LoRA's ways to start


@pytest.mark.parametrize(("init", "title"), [("pissa", "PiSSA"), ("olora", "OLoRA")])
def test_a_decomposition_is_refused_above_the_weights_own_rank(
    base: BaseModel, make_spec: MakeSpec, init: str, title: str
) -> None:
    with pytest.raises(SpecError, match=f"{title} takes its start from the weights, so lora.rank may be at most 64"):
        build_trial_model(base, make_spec(settings={"init": init, "rank": 65}))


def test_olora_is_refused_where_weights_are_transposed(tmp_path: Path, make_spec: MakeSpec) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    gpt2 = load_base(str(tmp_path), num_labels=2, bits=32, device="cpu")
    with pytest.raises(SpecError, match="transposed"):
        build_trial_model(gpt2, make_spec(settings={"init": "olora"}))
    build_trial_model(gpt2, make_spec(settings={"init": "pissa"}))
