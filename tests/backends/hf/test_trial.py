"""A trial's life on a tiny, random BERT: what is built, that it learns, resumes to the bit and leaves no trace."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_bert

from autopeft.backends.base import Ended, Event, Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import BaseModel, digest_model, lend_model, load_base
from autopeft.backends.hf.build import build_trial_model, count_trainable, trainable_parameters
from autopeft.backends.hf.data import plan_batches, scoring_batches
from autopeft.backends.hf.paged import build_paged_adamw
from autopeft.backends.hf.steps import learning_rate_at, restore_optimizer
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import StudyError
from autopeft.methods import METHODS, refuse_spec
from autopeft.records import TrialSpec
from autopeft.tasks.spec import find_task_text

pytestmark = pytest.mark.filterwarnings("default")

BITS = (4, 8, 32)
LimitFiles = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def bases(tiny_bert: str) -> dict[int, BaseModel]:
    return {bits: load_base(tiny_bert, num_labels=2, bits=bits, device="cpu") for bits in BITS}  # type: ignore[arg-type]


def make_spec(method: str, *, bits: int = 32, **settings: object) -> TrialSpec:
    recipe = METHODS[method].recipe
    return TrialSpec(
        method=method,
        settings={**recipe.settings, **settings},  # type: ignore[dict-item]
        target_modules=recipe.target_modules,
        bits=bits,  # type: ignore[arg-type]
        learning_rate=recipe.learning_rate,
        batch_size=8,
        max_steps=12,
        warmup_ratio=0.1,
        schedule="linear",
        weight_decay=0.0,
        seed=3,
    )


# Every method's recipe is held to these laws by tests/methods/test_contract.py; here are what recipes leave out, and
# one method of each way to be built.
_CHANGES: tuple[tuple[str, dict[str, object]], ...] = (
    ("lora", {}),
    ("lora", {"dora": True}),
    ("lora", {"rslora": True}),
    ("lora", {"init": "pissa"}),
    ("lora", {"init": "olora"}),
    ("lora", {"lr_ratio_b": 16.0, "dropout": 0.1}),
    ("adalora", {"rank": 2, "dropout": 0.1}),
    ("bottleneck", {}),
    ("bottleneck", {"placement": "pfeiffer"}),
    ("bottleneck", {"placement": "parallel", "activation": "relu"}),
    ("lora_bottleneck", {}),
    ("prefix_tuning", {}),
    ("ia3", {}),
    ("bitfit", {}),
    ("full", {}),
    ("head", {}),
)
SPECS = [
    spec
    for bits in BITS
    for method, changes in _CHANGES
    if bits in METHODS[method].bits
    for spec in [make_spec(method, bits=bits, **changes)]
    if refuse_spec(spec, "cpu") is None
]


def name_spec(spec: TrialSpec) -> str:
    recipe = METHODS[spec.method].recipe.settings
    changes = [f"{name}={value}" for name, value in spec.settings.items() if value != recipe[name]]
    return "-".join([spec.method, *changes, str(spec.bits)])


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 20000, (8, 10)),
        "attention_mask": torch.ones(8, 10, dtype=torch.int64),
        "labels": torch.randint(0, 2, (8,)),
    }


@pytest.mark.parametrize("spec", SPECS, ids=name_spec)
def test_a_trial_leaves_its_base_untouched(spec: TrialSpec, bases: dict[int, BaseModel]) -> None:
    base = bases[spec.bits]
    before = digest_model(base.model)
    model = build_trial_model(base, spec)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=spec.learning_rate)
    for _ in range(2):
        model(**make_batch()).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(**make_batch())
    del model
    assert digest_model(base.model) == before


@pytest.mark.parametrize("spec", SPECS, ids=name_spec)
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(
    spec: TrialSpec, bases: dict[int, BaseModel]
) -> None:
    model = build_trial_model(bases[spec.bits], spec)
    # Two steps, because LoRA's A gets its first gradient once B has left zero.
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**make_batch()).loss.backward()
        optimizer.step()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == set(trainable_parameters(model))


@pytest.mark.parametrize("spec", [s for s in SPECS if METHODS[s.method].starts_as_base], ids=name_spec)
def test_the_adapted_model_starts_as_the_base(spec: TrialSpec, bases: dict[int, BaseModel]) -> None:
    base = bases[spec.bits]
    adapted = build_trial_model(base, spec).eval()
    alone = build_trial_model(base, make_spec("head", bits=spec.bits)).eval()
    with torch.no_grad():
        difference = (adapted(**make_batch()).logits - alone(**make_batch()).logits).abs().max()
    assert difference < (2e-3 if spec.bits < 16 else 1e-5)


def test_the_head_is_counted_apart_from_the_adapter(bases: dict[int, BaseModel]) -> None:
    # BERT's classifier: 64 x 2 weights and 2 biases. LoRA r8 on 2 layers: query, key, value, attention output
    # 4 x 8 x (64 + 64), feed-forward 2 x 8 x (64 + 128).
    count = count_trainable(build_trial_model(bases[32], make_spec("lora")), bases[32].head)
    assert count == (2 * (4 * 8 * 128 + 2 * 8 * 192), 130)


def test_another_seed_draws_another_head(bases: dict[int, BaseModel]) -> None:
    spec = make_spec("lora")
    heads = [
        build_trial_model(bases[32], replace(spec, seed=seed)).base_model.model.classifier.modules_to_save["default"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)


@pytest.fixture(scope="module")
def backend(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> HfBackend:
    return HfBackend(
        WorkerSetup(
            backend="hf",
            model=tiny_bert,
            task=find_task_text("demo"),
            data_dir=None,
            split_seed=0,
            study_dir=str(tmp_path_factory.mktemp("study")),
            device="cpu",
            threads=1,
        )
    )


def run(backend: HfBackend, spec: TrialSpec, start: int, end: int, checkpoint: str | None = None) -> Finished | Ended:
    events: list[Event] = []
    return backend.run(
        Stretch(
            job=1,
            trial=0,
            spec=spec,
            purpose="search",
            from_step=start,
            to_step=end,
            checkpoint=checkpoint,
            save=end < spec.max_steps,
        ),
        events.append,
    )


@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits != 8 or s.method == "lora"], ids=name_spec)
def test_a_trial_resumed_from_its_checkpoint_ends_to_the_bit_like_one_that_went_on(
    spec: TrialSpec, backend: HfBackend
) -> None:
    def final_weights() -> dict[str, torch.Tensor]:
        assert backend._live is not None
        return {name: p.detach().clone() for name, p in trainable_parameters(backend._live.model).items()}

    first = run(backend, spec, 0, 6)
    assert isinstance(first, Finished)
    went_on = run(backend, spec, 6, 12)
    weights = final_weights()
    backend._drop_live()
    resumed = run(backend, spec, 6, 12, first.checkpoint)
    assert isinstance(went_on, Finished)
    assert isinstance(resumed, Finished)
    assert went_on.validation == resumed.validation
    again = final_weights()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_trial_whose_loss_is_not_finite_has_diverged_and_the_worker_goes_on(backend: HfBackend) -> None:
    ended = run(backend, replace(make_spec("full"), learning_rate=1e30), 0, 12)
    assert isinstance(ended, Ended)
    assert ended.reason == "diverged"
    assert isinstance(run(backend, make_spec("ia3"), 0, 12), Finished)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        # Outside of PyTorch's allocator: a kernel that is loaded, and cuBLAS.
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: not enough memory: you tried to ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:129] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
    ],
    ids=["allocator", "kernel", "cuBLAS", "CPU on Windows", "CPU"],
)
def test_running_out_of_memory_is_an_outcome_and_leaves_nothing_behind(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    models: list[weakref.ref[Any]] = []
    is_held: list[bool] = []

    def run_out(model: Any, *args: object, **kwargs: object) -> None:
        models.append(weakref.ref(model))
        raise type(error)(str(error))

    def drop() -> None:
        HfBackend._drop_live(backend)
        gc.collect()
        is_held.extend(model() is not None for model in models)

    with monkeypatch.context() as patch:
        patch.setattr("autopeft.backends.hf.trial.train_step", run_out)
        patch.setattr(backend, "_drop_live", drop)
        ended = run(backend, make_spec("ia3"), 0, 12)
    assert isinstance(ended, Ended)
    assert ended.reason == "out_of_memory"
    # What a traceback still held could not be given back to the GPU.
    assert is_held == [False]
    assert isinstance(run(backend, make_spec("ia3"), 0, 12), Finished)


@pytest.mark.parametrize(("largest", "unwritten"), [(100, "scores"), (4096, "checkpoints")])
def test_a_disk_without_room_is_told_with_what_to_do_and_leaves_no_part(
    backend: HfBackend, limit_files: LimitFiles, largest: int, unwritten: str
) -> None:
    with limit_files(largest), pytest.raises(StudyError) as info:
        run(backend, make_spec("lora", rank=64), 0, 6)
    folder = Path(backend.setup.study_dir)
    assert str(folder / unwritten) in str(info.value)
    assert "File too large. Make room, then go on with: autopeft resume " + folder.name in str(info.value)
    assert not list(folder.rglob("*.part"))
    assert isinstance(run(backend, make_spec("lora", rank=64), 0, 6), Finished)


def test_another_error_of_a_step_ends_the_worker(backend: HfBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr("autopeft.backends.hf.trial.train_step", fail)
        with pytest.raises(RuntimeError, match="illegal"):
            run(backend, make_spec("ia3"), 0, 12)


def test_weights_of_ones_own_are_made_where_they_are_needed(backend: HfBackend) -> None:
    base = backend._base(32)
    lent = lend_model(base, own_weights=True, device="meta")
    tensors = [*lent.parameters(), *lent.buffers()]
    assert {tensor.device.type for tensor in tensors if tensor.is_floating_point()} == {"meta"}
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cpu"}


def test_every_epoch_sees_each_row_at_most_once_and_batches_are_full() -> None:
    lengths = [i % 17 + 3 for i in range(101)]
    batches = plan_batches(lengths, batch_size=8, num_steps=24, seed=1)
    assert all(len(batch) == 8 for batch in batches)
    for epoch in (batches[:12], batches[12:24]):
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows))


def test_batches_of_a_longer_run_begin_with_those_of_a_shorter_one() -> None:
    lengths = [i % 17 + 3 for i in range(101)]
    assert plan_batches(lengths, batch_size=8, num_steps=40, seed=1)[:7] == plan_batches(
        lengths, batch_size=8, num_steps=7, seed=1
    )


def test_bucketing_pads_little() -> None:
    lengths = [(i * 7919) % 50 + 3 for i in range(5000)]
    batches = plan_batches(lengths, batch_size=16, num_steps=300, seed=0)
    padded = sum(16 * max(lengths[i] for i in batch) for batch in batches)
    assert padded / sum(lengths[i] for batch in batches for i in batch) < 1.15


def test_scoring_sees_every_row_once() -> None:
    assert sorted(row for batch in scoring_batches([5, 3, 9, 1, 7], 2) for row in batch) == [0, 1, 2, 3, 4]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    spec = replace(make_spec("lora"), max_steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate_at(step, spec) for step in range(100)]
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_worker_says_where_target_groups_do_not_mean_what_their_names_say(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.ready().notes == ()
    base = backend._base(32)
    unknown = tuple(name.replace("dense", "frobnicate").replace(".self.", ".") for name in base.linear_names)
    unknown = tuple(name.replace("query", "a").replace("key", "b").replace("value", "c") for name in unknown)
    monkeypatch.setitem(backend._bases, 32, replace(base, linear_names=unknown))
    notes = backend.ready().notes
    assert len(notes) == 3
    assert all("architecture is not known" in note for note in notes)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_states_are_paged_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    before, after = (bitsandbytes.optim.AdamW8bit([parameter], is_paged=True) for _ in range(2))
    parameter.grad = torch.linspace(1, 2, 8192)
    before.step()

    paged = []

    def get_state_buffer(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # In place of CUDA's unified memory, which a CPU does not have.
        paged.append(torch.zeros_like(p, dtype=dtype))
        return paged[-1]

    monkeypatch.setattr(after, "get_state_buffer", get_state_buffer)
    restore_optimizer(after, before.state_dict())
    kept = after.state[parameter]
    assert {id(kept["state1"]), id(kept["state2"])} == {id(tensor) for tensor in paged}
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(kept[name], before.state[parameter][name])
    assert kept["state1"].any()
    assert kept["step"] == 1


def test_pages_of_an_optimizer_that_is_gone_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    pages = []

    def get_state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        # In place of CUDA's unified memory, which a CPU does not have; nobody frees it.
        pages.append(torch.zeros_like(p, dtype=dtype))
        pages[-1].is_paged, pages[-1].page_deviceid = True, 0
        return pages[-1]

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "prefetch_state", lambda self, p: None)
    shapes = ((64, 128), (128, 64), (8192,))
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(shape))
        optimizer: Any = build_paged_adamw([{"params": [parameter]}], lr=1e-3)
        parameter.grad = torch.linspace(1, 2, 8192).view(shape)
        optimizer.step()
        state = optimizer.state[parameter]
        assert state["state1"].shape == shape
        assert state["state1"].is_paged
        # The states of one parameter never share a page.
        assert len({state[name].data_ptr() for name in ("state1", "state2")}) == 2
        first = {name: state[name].flatten().clone() for name in ("state1", "state2")}
        if shape == shapes[0]:
            expected = first
        assert all(torch.equal(first[name], expected[name]) for name in first)
        del optimizer, state
        gc.collect()
    assert len(pages) == 2
