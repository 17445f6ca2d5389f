"""A worker's life on a pretended GPU; `tests/test_pretended_cuda.py` has pytest run these in a process that has one.

A tiny BERT's training makes a few MiB; cuBLAS's workspace, which stays, is most of what is allocated.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_folders import make_recipe, write_rows
from listeners import Silent
from safetensors.torch import load_file
from tiny_models import make_tiny_bert

from autopeft.backends.base import Ended, Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import BaseModel, digest_model
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.health import examine_bitsandbytes, examine_torch
from autopeft.backends.hf.latency import measure_latencies
from autopeft.backends.hf.scoring import score_split
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, checkpoint_activations, score_batch, train_step
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import ModelError, SpecError
from autopeft.methods import METHODS, refuse_spec
from autopeft.methods.faults import make_recipe_spec
from autopeft.production import plain, pretrain
from autopeft.production.files import LocalPlaces, TrainingResult
from autopeft.production.finished import open_finished
from autopeft.production.job import Progress
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe, find_task_files
from autopeft.production.run import Listener, train
from autopeft.production.session import Session
from autopeft.production.verify import verify
from autopeft.records import TrialSpec
from autopeft.tasks.spec import TaskSpec, find_task_text, parse_task
from autopeft.testing.tiny_models import tiny_folder

pytestmark = pytest.mark.filterwarnings("default")
pretended_gpus = sys.modules["pretended_gpus"]
"""PyTorch brought it, where the pretence is on."""


def make_spec(method: str, *, bits: int = 16, **settings: Any) -> TrialSpec:
    spec = make_recipe_spec(METHODS[method], device_kind="cuda", bits=bits)  # type: ignore[arg-type]
    return replace(spec, settings={**spec.settings, **settings}, batch_size=8, max_steps=6, seed=3)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def backend(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> HfBackend:
    return make_backend(tiny_bert, tmp_path_factory.mktemp("study"))


def make_backend(model: str, folder: Path, *, latency: bool = False) -> HfBackend:
    backend = HfBackend(
        WorkerSetup(
            backend="hf", model=model, task=find_task_text("demo"), data_dir=None, split_seed=0,
            study_dir=str(folder), device="cuda:0", threads=1, latency=latency,
        )
    )  # fmt: skip
    # Most of a short trial's time would be scoring.
    split = backend.data.validation
    backend.data.validation = split._replace(features=split.features[:40], labels=split.labels[:40])
    return backend


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves the GPU so many bytes free beyond what is allocated."""

    def crowd(free_bytes: int) -> None:
        gpu = pretended_gpus._gpu
        monkeypatch.setattr(gpu, "used_bytes", gpu.total_bytes - gpu.live_bytes - free_bytes)

    return crowd


def run(
    backend: HfBackend, spec: TrialSpec, from_step: int, to_step: int, checkpoint: str | None = None, **asked: Any
) -> Finished | Ended:
    stretch = Stretch(
        job=1, trial=7, spec=spec, purpose="search", from_step=from_step, to_step=to_step, checkpoint=checkpoint,
        save=True, **asked,
    )  # fmt: skip
    return backend.run(stretch, lambda event: None)


def final_weights(backend: HfBackend) -> dict[str, torch.Tensor]:
    assert backend._live is not None
    return {name: p.detach().clone() for name, p in trainable_parameters(backend._live.model).items()}


def find_places(model: Any) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


# --- the pretence


def test_what_cuda_refuses_is_refused() -> None:
    on_gpu, on_cpu = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    assert (on_gpu @ on_gpu.to("cuda:0")).device == torch.device("cuda", 0)
    assert (on_gpu.cpu() @ on_cpu).device == torch.device("cpu")
    assert (on_gpu * torch.tensor(2.0)).is_cuda
    assert not on_cpu.copy_(on_gpu).is_cuda
    for fail in (
        lambda: on_gpu @ on_cpu,
        lambda: on_cpu.add_(on_gpu),
        lambda: torch.cat([on_cpu, on_gpu]),
        lambda: on_cpu[torch.zeros(1, dtype=torch.int64, device="cuda")],
        lambda: torch.randperm(4, generator=torch.Generator(), device="cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"device|cpu"):
            fail()
    with pytest.raises(TypeError, match="numpy"):
        on_gpu.numpy()


def test_gradients_and_optimizer_states_lie_where_their_parameters_do() -> None:
    layer = torch.nn.Linear(4, 4).to("cuda")
    layer(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert optimizer.state[layer.weight]["exp_avg"].is_cuda


def test_bytes_are_counted_until_they_are_given_back() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = torch.zeros(1000, device="cuda")
    del held
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 4096


def test_each_device_draws_from_a_state_of_its_own() -> None:
    state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = torch.randn(4, device="cuda")
    assert torch.equal(torch.get_rng_state(), state)
    torch.cuda.set_rng_state(cuda_state)
    assert torch.equal(torch.randn(4, device="cuda"), first)


# --- a worker


def test_a_worker_tells_the_gpu_that_it_has(backend: HfBackend) -> None:
    ready = backend.ready()
    assert ready.device_name == "Pretended GPU"
    assert examine_torch().has_cuda
    assert examine_bitsandbytes("cuda") is None


def test_a_trial_on_a_gpu_measures_its_peak_and_one_that_goes_on_keeps_it(backend: HfBackend) -> None:
    first = run(backend, make_spec("lora", dropout=0.1), 0, 3)
    assert isinstance(first, Finished)
    assert first.peak_vram_bytes is not None
    assert first.reserved_vram_bytes is not None
    assert first.reserved_vram_bytes >= first.peak_vram_bytes > 0
    assert backend._live is not None
    assert find_places(backend._live.model) == {"cuda"}
    went_on = run(backend, make_spec("lora", dropout=0.1), 3, 6)
    assert isinstance(went_on, Finished)
    assert went_on.peak_vram_bytes is None


def test_a_peak_is_measured_with_padding_though_all_rows_were_cut_to_one_length(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = backend.data.train
    cut = [{name: (ids * 16)[:16] for name, ids in feature.items()} for feature in split.features]
    monkeypatch.setattr(backend.data, "train", split._replace(features=cut))
    padded: list[int] = []

    def step(model: Any, optimizer: Any, batch: dict[str, torch.Tensor], **how: Any) -> torch.Tensor:
        padded.append(int((batch["attention_mask"] == 0).sum()))
        return train_step(model, optimizer, batch, **how)

    monkeypatch.setattr("autopeft.backends.hf.trial.train_step", step)
    assert isinstance(run(backend, make_spec("lora"), 0, 2), Finished)
    # Three steps of the probe, two of training.
    assert padded == [1, 1, 1, 0, 0]


def test_loading_a_base_that_is_not_held_is_timed(backend: HfBackend) -> None:
    loads = []
    for bits in (16, 4, 4):
        finished = run(backend, make_spec("ia3", bits=bits), 0, 1)
        assert isinstance(finished, Finished)
        loads.append(finished.load_seconds)
    assert [seconds > 0 for seconds in loads[1:]] == [True, False]


@pytest.mark.parametrize(
    "spec",
    [
        make_spec("lora", dropout=0.1),
        pytest.param(
            replace(make_spec("adalora", bits=4, rank=2, dropout=0.1), optimizer="adamw_8bit"), marks=pytest.mark.slow
        ),
        pytest.param(make_spec("lora", bits=8, dropout=0.1), marks=pytest.mark.slow),
        pytest.param(make_spec("lora", init="pissa"), marks=pytest.mark.slow),
        pytest.param(make_spec("lora", init="eva"), marks=pytest.mark.slow),
        pytest.param(make_spec("full"), marks=pytest.mark.slow),
    ],
    ids=lambda spec: f"{spec.method}-{spec.bits}-{spec.optimizer}-{spec.settings.get('init')}",
)
def test_a_trial_resumes_to_the_bit_with_the_gpus_random_numbers(backend: HfBackend, spec: TrialSpec) -> None:
    first = run(backend, spec, 0, 3)
    assert isinstance(first, Finished)
    went_on = run(backend, spec, 3, 6)
    weights = final_weights(backend)
    backend._drop_live()
    torch.manual_seed(99)
    resumed = run(backend, spec, 3, 6, first.checkpoint)
    assert isinstance(went_on, Finished)
    assert isinstance(resumed, Finished)
    assert went_on.validation == resumed.validation
    again = final_weights(backend)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
def test_a_checkpoint_of_a_gpu_loads_where_there_is_none(backend: HfBackend) -> None:
    first = run(backend, make_spec("lora"), 0, 3)
    assert isinstance(first, Finished)
    path = Path(backend.setup.study_dir) / str(first.checkpoint)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == first.checkpoint_digest
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert not any(tensor.is_cuda for tensor in state["trainable"].values())


@pytest.mark.parametrize(
    "function",
    ["_train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("_probe", "start_from_rows", "_score"))],
)
def test_running_out_of_memory_anywhere_ends_the_trial_and_not_the_worker(
    backend: HfBackend, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(run(backend, make_spec("ia3"), 0, 2), Finished)
    live = torch.cuda.memory_allocated()
    with monkeypatch.context() as patch:
        patch.setattr(pretended_gpus, "_failure", pretended_gpus._Failure(function, 5))
        patch.setattr(pretended_gpus, "_allocations_there", 0)
        ended = run(backend, make_spec("lora", init="eva" if function == "start_from_rows" else "default"), 0, 6)
    assert isinstance(ended, Ended)
    assert ended.reason == "out_of_memory"
    assert "CUDA out of memory" in ended.detail
    assert ended.peak_vram_bytes is not None
    assert ended.peak_vram_bytes > live / 2
    # All of the trial was given back.
    assert torch.cuda.memory_allocated() <= live
    assert isinstance(run(backend, make_spec("ia3"), 0, 2), Finished)


def test_running_out_of_memory_while_a_base_is_quantized_ends_the_trial(
    backend: HfBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers swallows it, and raises an error that does not say so."""
    backend._bases.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pretended_gpus, "_failure", pretended_gpus._Failure("quantize_4bit", 3))
        patch.setattr(pretended_gpus, "_allocations_there", 0)
        ended = run(backend, make_spec("lora", bits=4), 0, 2)
    assert isinstance(ended, Ended)
    assert ended.reason == "out_of_memory"
    assert "CUDA out of memory" in ended.detail
    assert isinstance(run(backend, make_spec("lora", bits=4), 0, 2), Finished)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_noticed_though_it_is_not_read_at_every_step(backend: HfBackend) -> None:
    ended = run(backend, replace(make_spec("full"), learning_rate=1e30), 0, 6)
    assert isinstance(ended, Ended)
    assert ended.reason == "diverged"


def test_a_trial_too_large_for_a_crowded_gpu_runs_out_of_memory_and_a_smaller_one_goes_on(
    backend: HfBackend, crowded: Callable[[int], None]
) -> None:
    assert isinstance(run(backend, make_spec("ia3"), 0, 2), Finished)
    crowded(8 * 2**20)
    ended = run(backend, replace(make_spec("full"), batch_size=64), 0, 2)
    assert isinstance(ended, Ended)
    assert ended.reason == "out_of_memory"
    assert isinstance(run(backend, make_spec("ia3"), 0, 2), Finished)


def test_a_base_too_large_for_the_gpu_is_no_reason_to_give_up_before_it_is_quantized(
    tiny_bert: str, tmp_path: Path, crowded: Callable[[int], None]
) -> None:
    crowded(2**20)
    ready = make_backend(tiny_bert, tmp_path).ready()
    assert ready.num_parameters > 1e6
    assert ready.latency is None
    with pytest.raises(ModelError, match="Leave latency out of --objectives"):
        make_backend(tiny_bert, tmp_path, latency=True).ready()


@pytest.mark.slow
def test_the_resident_base_is_aside_while_a_trial_trains_weights_of_its_own(backend: HfBackend) -> None:
    assert isinstance(run(backend, make_spec("lora"), 0, 2), Finished)
    before = digest_model(backend._bases[16].model)
    assert isinstance(run(backend, make_spec("full"), 0, 2), Finished)
    base = backend._bases[16].model
    assert find_places(base) == {"cpu"}
    assert digest_model(base) == before
    assert isinstance(run(backend, make_spec("lora"), 0, 2), Finished)
    assert find_places(base) == {"cuda"}


@pytest.mark.slow
def test_a_configuration_is_timed_beside_its_base(backend: HfBackend) -> None:
    backend.ready()
    finished = run(backend, make_spec("bottleneck", bits=4), 0, 2, measure_inference=True)
    assert isinstance(finished, Finished)
    assert finished.inference is not None
    assert finished.inference.device == "Pretended GPU"
    assert finished.inference.base is not None


# --- a training, and what is asked of it when it is finished


def make_training(folder: Path, spec: TrialSpec, model: str, **changes: Any) -> tuple[Recipe, TaskSpec, LocalPlaces]:
    """A recipe of 6 steps on a GPU, whose task has made-up rows."""
    text = write_rows(folder / "rows")
    task = parse_task(text, "tiny")
    recipe = make_recipe(spec, text, model=f"local:{Path(model).name}", num_test=96)
    recipe = replace(recipe, **{"device_kind": "cuda", "precision": "bfloat16", "steps": spec.max_steps} | changes)
    places = LocalPlaces(model=model, files=dict(find_task_files(text)))
    return recipe, task, places


def train_to_end(
    folder: Path, spec: TrialSpec, model: str, listener: Listener | None = None, **changes: Any
) -> TrainingResult:
    recipe, task, places = make_training(folder, spec, model, **changes)
    options = Options(patience=None, evaluate_every=3)
    result = train(
        recipe, task, places, model=model, out=folder / "out", options=options, listener=listener or Silent()
    )
    assert result is not None
    return result


def test_an_adapter_that_took_a_part_of_its_base_on_a_gpu_and_learned_nothing_adds_nothing(
    tiny_bert: str, tmp_path: Path
) -> None:
    """PiSSA draws numbers on the device that it is built on."""
    train_to_end(tmp_path, make_spec("lora", init="pissa", rank=4), tiny_bert, learning_rate=1e-12)
    saved = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    added = [saved[name.replace("lora_A", "lora_B")] @ saved[name] for name in saved if "lora_A" in name]
    assert added
    assert max(float(delta.abs().max()) for delta in added) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base_that_is_to_answer_on_the_cpu_is_loaded_there(tiny_bert: str, bits: int) -> None:
    job = {"device": "cpu", "dtype": "float32", "bits": bits, "num_labels": 2, "head": ["classifier"]}
    assert find_places(plain.load_base({**job, "pad_token_id": 0}, tiny_bert)) == {"cpu"}


def test_a_model_is_scored_and_timed_without_what_turns_its_logits_into_float32(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"scored": set(), "timed": set()}

    @torch.no_grad()
    def look(what: str, model: Any, batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            seen[what].add(model(**batch).logits.dtype)

    def score(model: Any, data: Any, split: Any, **how: Any) -> Any:
        look("scored", model, data.collate(split, [0], "cuda:0"))
        return score_split(model, data, split, **how)

    def measure(models: list[Any], rows: Any, **how: Any) -> Any:
        for model in models:
            look("timed", model, rows.collate([0]))
        return measure_latencies(models, rows, **how)

    monkeypatch.setattr("autopeft.production.scores.score_split", score)
    monkeypatch.setattr("autopeft.production.latency.measure_latencies", measure)
    train_to_end(tmp_path, make_spec("lora"), tiny_bert)
    assert seen == {"scored": {torch.bfloat16}, "timed": {torch.bfloat16}}


@pytest.mark.slow
def test_a_quantized_base_of_a_study_on_cpus_is_trained_on_the_cpu(tiny_bert: str, tmp_path: Path) -> None:
    result = train_to_end(
        tmp_path, make_spec("lora", bits=4), tiny_bert, device_kind="cpu", precision="float32", optimizer="adamw"
    )
    assert "GPU" not in result.device
    assert result.peak_bytes is None
    found = verify(open_finished(tmp_path / "out"))
    assert found.device == "cpu"
    assert found.num_changed == 0


@pytest.mark.slow
def test_pre_training_holds_one_base_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model gets weights of its own, the base is aside before it is built."""
    beside: list[set[str]] = []

    def build(base: BaseModel, spec: TrialSpec, **where: Any) -> Any:
        beside.append(find_places(base.model))
        return build_trial_model(base, spec, **where)

    for module in ("run", "pretrain"):
        monkeypatch.setattr(f"autopeft.production.{module}.build_trial_model", build, raising=False)
    llama = tiny_folder("llama")
    recipe, task, _ = make_training(tmp_path, make_spec("lora", init="pissa", rank=4), llama)
    trained = pretrain._build(recipe, task, llama, Session(None, "cuda:0"))  # type: ignore[arg-type]
    assert beside == [{"cpu"}, {"cpu"}]
    assert find_places(trained) == {"cuda"}


class KillAfterSaving(Silent):
    def progress(self, progress: Progress) -> None:
        if progress.saved:
            raise KeyboardInterrupt


def test_a_killed_training_on_a_gpu_ends_with_the_weights_of_an_unbroken_one(tiny_bert: str, tmp_path: Path) -> None:
    """AdaLoRA keeps tensors beside what trains, and checkpoints are read on the CPU."""
    spec = make_spec("adalora", rank=2, dropout=0.1)
    train_to_end(tmp_path / "unbroken", spec, tiny_bert)
    with pytest.raises(KeyboardInterrupt):
        train_to_end(tmp_path / "killed", spec, tiny_bert, KillAfterSaving())
    train_to_end(tmp_path / "killed", spec, tiny_bert)
    unbroken, killed = (
        load_file(tmp_path / name / "out/adapter/adapter_model.safetensors") for name in ("unbroken", "killed")
    )
    assert unbroken.keys() == killed.keys()
    assert all(torch.equal(unbroken[name], killed[name]) for name in unbroken)


# --- every method


SPECS = [
    make_spec(method.name, bits=bits)
    for method in METHODS.values()
    for bits in (16, 8, 4)
    if bits in method.bits and "encoder" in method.models
]
CHANGED = [
    make_spec(method.name, **{dimension.name: value})
    for method in METHODS.values()
    if "encoder" in method.models and 16 in method.bits
    for dimension in method.dimensions
    for value in dimension.choices or ()
    if value != method.recipe.settings[dimension.name]
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [spec for spec in (*SPECS, *CHANGED) if refuse_spec(spec, "cuda") is None],
    ids=lambda spec: "-".join([
        spec.method, str(spec.bits),
        *(f"{n}={v}" for n, v in spec.settings.items() if METHODS[spec.method].recipe.settings[n] != v),
    ]),
)  # fmt: skip
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_every_method_trains_and_answers_on_a_gpu(backend: HfBackend, spec: TrialSpec, checkpointed: bool) -> None:
    writes = METHODS[spec.method].writes_base(spec)
    base = backend._base(spec.bits, aside=writes)
    try:
        model = build_trial_model(base, spec, device="cuda:0")
    except SpecError as exc:
        pytest.skip(str(exc))
    if checkpointed:
        if spec.method in ("prefix_tuning", "p_tuning_v2", "cartridge"):
            pytest.skip("keeps what it trains in cached keys, which checkpointed layers go without")
        checkpoint_activations(model)
    optimizer = build_optimizer(model, spec)
    rows = list(range(8))
    for step in (1, 2):
        batch = backend.data.collate(backend.data.train, rows, "cuda:0")
        after_step = bind_after_step(model, spec, step)
        loss = train_step(model, optimizer, batch, learning_rate=1e-3, device="cuda:0", after_step=after_step)
    assert loss.is_cuda
    assert torch.isfinite(loss)
    model.eval()
    losses, _ = score_batch(model, backend.data.collate(backend.data.validation, rows, "cuda:0"), device="cuda:0")
    assert losses.dtype == torch.float32
    # On an unquantized base, peft keeps BOFT's permutations on the CPU and takes a layer's along where it needs them.
    assert find_places(model) - ({"cpu"} if spec.method == "boft" else set()) == {"cuda"}
