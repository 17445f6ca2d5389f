"""What a configuration costs, known before anything is trained: no weights are loaded and no GPU is needed.

The trial's own code builds its model, without data, and takes one optimizer step on fake tensors. Parameters are then
exact, and memory is counted storage by storage. Where layers repeat, two shallower models are measured instead and
extrapolated exactly (`depth`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from autopeft.backends.base import CONTEXT_BYTES, ModelledGpu
from autopeft.backends.hf.base_model import BaseModel, count_positions, load_config
from autopeft.backends.hf.build import ParameterCount, build_trial_model, count_trainable
from autopeft.backends.hf.cuda_rules import MODELLED_GPU, cublas_workspace_bytes
from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.depth import Depths, Growth, is_shortened, leave_out_layers, plan_depths, read_signatures
from autopeft.backends.hf.fake_base import (
    EveryLayerAndExpert,
    OneEndOfSequence,
    build_meta_base,
    keep_function_modes,
    make_fake,
)
from autopeft.backends.hf.live_bytes import Held, Part, list_tensors, round_up_bytes
from autopeft.backends.hf.memory import Peaks, Rehearsal, find_peak, find_stacks
from autopeft.backends.hf.peft_stand_ins import shapes_without_values
from autopeft.backends.hf.saved import count_saved_bytes
from autopeft.backends.hf.steps import checkpoint_activations
from autopeft.backends.hf.traceable import building_without_values, stepping_without_values
from autopeft.errors import SpecError
from autopeft.methods import check_spec, find_method, refuse_spec
from autopeft.records import Bits, Cost, Estimate, StepSettings, TrialSpec, digest_json

_NOT_FOR_FAKES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
_ONE_STEP = StepSettings()


class Writing(NamedTuple):
    """What a model writes when it is scored by exact_match."""

    prompt_tokens: int
    """Of the longest prompt."""
    new_tokens: int


class _Built(NamedTuple):
    """A trial's model on the meta device, and what its tensors are for."""

    model: Any
    parts: list[Part]
    parameters: ParameterCount
    base_parameters: int
    saved_bytes: int


class HfCostModel:
    """Costs of configurations of one model on one kind of device; remembers what it has computed."""

    def __init__(
        self,
        model: str,
        *,
        num_labels: int | None,
        device_kind: Literal["cpu", "cuda"],
        longest_tokens: int,
        scoring_tokens: int | None = None,
        writing: Writing | None = None,
        gpu: ModelledGpu = MODELLED_GPU,
    ) -> None:
        """`num_labels` is None for a language model. `longest_tokens` is the longest sequence to train on,
        `scoring_tokens` to score (by default the same), `writing` what it writes meanwhile, if it does.

        Raises ModelError where the model cannot be had.
        """
        self.device_kind = device_kind
        self.gpu = gpu
        self.longest_tokens = self._pad(longest_tokens)
        self.scoring_tokens = self._pad(longest_tokens if scoring_tokens is None else scoring_tokens)
        self.num_labels = num_labels
        self.writing = writing
        self._model = model
        self._config = load_config(model, num_labels)
        self._bases: dict[tuple[Bits, int], BaseModel] = {}
        self._depths: dict[str, Depths | None] = {}
        self._estimates: dict[tuple[str, StepSettings, bool], Estimate] = {}

    def cost(self, spec: TrialSpec) -> Cost:
        """Raises SpecError where the model, the method or the device cannot take the configuration."""
        estimate = self.estimate(spec)
        return Cost(
            trainable_parameters=estimate.trainable_parameters,
            head_parameters=estimate.head_parameters,
            peak_vram_bytes=estimate.peak_bytes,
            vram_source="estimated",
            scoring_vram_bytes=estimate.scoring_bytes,
            scoring_batch_size=estimate.scoring_batch_size,
            adapter_bytes=estimate.exported_bytes,
        )

    def estimate(self, spec: TrialSpec, settings: StepSettings = _ONE_STEP, *, every_layer: bool = False) -> Estimate:
        """Where the memory goes; by running all layers where `every_layer`. Raises SpecError as `cost` does."""
        key = (spec.cost_key(), settings, every_layer)
        if key not in self._estimates:
            check_spec(spec)
            rule = refuse_spec(spec, self.device_kind)
            if rule is not None:
                raise SpecError(rule)
            self._estimates[key] = self._compute(spec, settings, every_layer)
        return self._estimates[key]

    # --- one configuration

    def _compute(self, spec: TrialSpec, settings: StepSettings, every_layer: bool) -> Estimate:
        shallow = None if every_layer else self._build_shallow(spec)
        models = shallow.models if shallow else (self._build(spec, 0),)
        self._check_positions(spec, models[0].model)
        with running_on_fakes([built.model for built in models]), self._explain(spec):
            rehearsals = [self._rehearse(spec, settings, built) for built in models]

            def peak_of(peaks: Sequence[Peaks]) -> Held:
                return find_peak(peaks[0] if shallow is None else shallow.growth.peaks(*peaks))

            def number_of(numbers: Sequence[int]) -> int:
                return numbers[0] if shallow is None else shallow.growth.number(*numbers)

            # With more micro-batches than two no more is held: the second is there with the first one's gradients.
            micro_batches = min(settings.micro_batches, 2)
            training = None
            if rehearsals[0].trains:
                batch = self._batch(spec.batch_size * micro_batches, self.longest_tokens)
                training = peak_of([r.train(batch, micro_batches=micro_batches) for r in rehearsals])
            for scoring_size in scoring_sizes(spec.batch_size):
                batch = self._batch(scoring_size, self.scoring_tokens)
                scoring = peak_of([r.score(batch) for r in rehearsals])
                if self.writing is not None:
                    # Soft prompts are positions like any other, whose keys and values are kept too.
                    prompt_tokens = _count_prompt(models[0].model) + self.writing.prompt_tokens
                    written = [r.write(scoring_size, prompt_tokens, self.writing.new_tokens) for r in rehearsals]
                    passes = [peak_of(peaks) for peaks in zip(*written, strict=True)]
                    scoring = max(scoring, *passes, key=lambda held: held.total)
                if training is None or scoring.total <= training.total:
                    break
            # An untrained base needs what scoring it needs.
            training = training or scoring
            # Gaps come from the largest temporaries, not from the number of layers: 0.9 to 1.1 GiB of a 3B Llama's 20
            # at 4 layers as at 28, whatever the method (the runs of benchmarks/vram_published.py).
            wasted_bytes = rehearsals[-1].wasted_bytes
            state_bytes = number_of([r.state_bytes for r in rehearsals])
            paged_bytes = number_of([r.paged_bytes for r in rehearsals])
            trained_bytes = number_of([r.trained_bytes for r in rehearsals])
        counts = [number_of([count(built) for built in models]) for count in _COUNTS[:3]]
        on_gpu = self.device_kind == "cuda"
        library_bytes = cublas_workspace_bytes(self.gpu) if on_gpu else 0
        return Estimate(
            device=f"CUDA, as on {self.gpu.name}" if on_gpu else "CPU",
            trainable_parameters=counts[0],
            head_parameters=counts[1],
            base_parameters=counts[2],
            base_bytes=training.base,
            adapter_bytes=training.adapter,
            gradient_bytes=training.gradients,
            optimizer_bytes=training.optimizer,
            activation_bytes=training.activations,
            library_bytes=library_bytes,
            scoring_bytes=scoring.total + library_bytes,
            scoring_batch_size=scoring_size,
            allocator_bytes=wasted_bytes if on_gpu else 0,
            context_bytes=CONTEXT_BYTES if on_gpu else 0,
            paged_bytes=paged_bytes,
            checkpoint_bytes=trained_bytes + state_bytes,
            exported_bytes=number_of([built.saved_bytes for built in models]),
            layers_measured=None if shallow is None else (shallow.growth.sizes[0][0], shallow.growth.sizes[1][0]),
        )

    def _build(self, spec: TrialSpec, layers_left_out: int) -> _Built:
        base = self._base(spec.bits, layers_left_out)
        # Building seeds the generator, which may belong to a training in this process.
        with (
            shapes_without_values(),
            building_without_values(),
            torch.device("meta"),
            torch.random.fork_rng(devices=[]),
        ):
            model = build_trial_model(base, _without_decomposition(spec))
            saved_bytes = count_saved_bytes(model, spec)
        return _Built(
            model=model,
            parts=_sort_tensors(model, base, spec),
            parameters=count_trainable(model, base.head),
            base_parameters=_count_parameters(base),
            saved_bytes=saved_bytes,
        )

    def _build_shallow(self, spec: TrialSpec) -> _Shallow | None:
        """None where the layers do not repeat often enough, or not as the shallower configurations have them."""
        # What is searched on a scale changes sizes alone, so the layers repeat as they did at another value.
        structure = spec.method, spec.bits, spec.target_modules
        choices = {name: value for name, value in spec.settings.items() if isinstance(value, bool | str)}
        key = digest_json([*structure, choices])
        if key not in self._depths:
            self._depths[key] = self._find_depths(spec)
        depths = self._depths[key]
        return None if depths is None else self._build_two(spec, depths)

    def _find_depths(self, spec: TrialSpec) -> Depths | None:
        """Which two models tell of the full one, found out by building all three."""
        full = self._build(spec, 0)
        depths = plan_depths(full.model)
        if depths is None or leave_out_layers(self._config, depths.more) is None:
            return None
        two = self._build_two(spec, depths)
        if two is None or not is_shortened(read_signatures(full.model), read_signatures(two.models[1].model), depths):
            return None
        grown = [two.growth.number(*(count(built) for built in two.models)) for count in _COUNTS]
        # What is there all the time can be checked against the full model.
        return depths if grown == [count(full) for count in _COUNTS] else None

    def _build_two(self, spec: TrialSpec, depths: Depths) -> _Shallow | None:
        try:
            shallower, deeper = (self._build(spec, count) for count in (depths.more, depths.fewer))
        except SpecError:
            # Targets may be named by layers that are left out.
            return None
        if not is_shortened(read_signatures(deeper.model), read_signatures(shallower.model), depths):
            return None
        sizes = [tuple(len(stack) for stack in find_stacks(built.model)) for built in (shallower, deeper)]
        return _Shallow((shallower, deeper), Growth(depths, (sizes[0], sizes[1])))

    def _rehearse(self, spec: TrialSpec, settings: StepSettings, built: _Built) -> Rehearsal:
        if settings.checkpoint_activations:
            checkpoint_activations(built.model, keep_function_modes)
        known = list(zip(list_tensors(built.model), built.parts, strict=True))
        fakes = make_fake(built.model)
        parts = {fakes[id(t)].untyped_storage()._cdata: part for t, part in known if id(t) in fakes}
        return Rehearsal(built.model, spec, on_gpu=self.device_kind == "cuda", parts=parts)

    def _check_positions(self, spec: TrialSpec, model: Any) -> None:
        """Raises SpecError where prompt and text, or what is written after it, are longer than the model can be; on
        fakes no look-up would fail."""
        positions = count_positions(model)
        written = sum(self.writing) if self.writing is not None else 0
        tokens = max(self.longest_tokens, self.scoring_tokens, written)
        prompt = _count_prompt(model)
        if positions is None or prompt + tokens <= positions:
            return
        mine = f"{find_method(spec.method).title} puts {prompt} in front of {tokens} tokens" if prompt else ""
        ways = "fewer virtual tokens, " if prompt else ""
        settings = "max_length or max_new_tokens" if self.writing is not None else "max_length"
        raise SpecError(
            f"A sequence must fit into the positions that a model has learned, of which '{self._model}' has "
            f"{positions:,}, but {mine or f'the longest has {tokens:,} tokens'}. Use {ways}sequences of at most "
            f"{max(positions - prompt, 0):,} tokens ({settings} in a task, --seq-len in an estimate), or another model."
        )

    @contextlib.contextmanager
    def _explain(self, spec: TrialSpec) -> Iterator[None]:
        try:
            yield
        except _NOT_FOR_FAKES:
            # Nothing is wrong with the configuration: this estimator does not know one of its operators.
            raise
        except SpecError:
            raise
        except (ValueError, RuntimeError) as exc:
            raise SpecError(
                f"{spec.method} must be able to train the model '{self._model}' on {self.longest_tokens} tokens, "
                f"but its step fails: {exc}. Use another method, shorter sequences (max_length) or another model."
            ) from exc

    # --- what it works on

    def _base(self, bits: Bits, layers_left_out: int) -> BaseModel:
        key = (bits, layers_left_out)
        if key not in self._bases:
            config = leave_out_layers(self._config, layers_left_out) if layers_left_out else self._config
            self._bases[key] = build_meta_base(config, bits=bits, device_kind=self.device_kind)
        return self._bases[key]

    def _pad(self, tokens: int) -> int:
        """Batches are padded to multiples of 8 on GPUs (TaskData.collate)."""
        return -(-tokens // 8) * 8 if self.device_kind == "cuda" else tokens

    def _batch(self, batch_size: int, tokens: int) -> Batch:
        return make_batch(self._config, batch_size, tokens, for_language_model=self.num_labels is None)


class _Shallow(NamedTuple):
    models: tuple[_Built, _Built]
    """The shallower first."""
    growth: Growth


def make_batch(config: Any, batch_size: int, tokens: int, *, for_language_model: bool) -> Batch:
    """A batch of the shape that `TaskData.collate` gives, whose values mean nothing."""
    names = ["input_ids", "attention_mask"]
    # Where there is a choice of segments, the tokenizer says which one each token is in.
    if not for_language_model and (getattr(config, "type_vocab_size", None) or 0) > 1:
        names.append("token_type_ids")
    batch = {name: torch.ones(batch_size, tokens, dtype=torch.int64) for name in names}
    # Logits of a prompt's tokens take as much memory as those that count.
    shape = (batch_size, tokens) if for_language_model else (batch_size,)
    batch["labels"] = torch.zeros(shape, dtype=torch.int64)
    return batch


def scoring_sizes(batch_size: int) -> list[int]:
    """Examples at a time to score, largest first: without a backward pass, twice the training batch often fits."""
    sizes = [2 * batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _count_prompt(model: Any) -> int:
    """Positions that peft puts in front of each sequence, as embeddings or as keys and values."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def _without_decomposition(spec: TrialSpec) -> TrialSpec:
    """Singular values and QR would be slow to fake; after them, shapes and types are those of any LoRA."""
    if spec.settings.get("init") not in ("pissa", "olora"):
        return spec
    return dataclasses.replace(spec, settings={**spec.settings, "init": "default"})


def _sort_tensors(model: nn.Module, base: BaseModel, spec: TrialSpec) -> list[Part]:
    """What each of `list_tensors(model)` is for."""
    resident = {tensor.untyped_storage()._cdata for tensor in list_tensors(base.model)}
    # A copy of all weights, some of which may be changed when it is built, is the base in this trial.
    owns_base = find_method(spec.method).writes_base(spec)
    parts: list[Part] = []
    for parameter in model.parameters():
        in_base = owns_base or parameter.untyped_storage()._cdata in resident
        parts.append("base" if in_base and not parameter.requires_grad else "adapter")
    # Buffers are copied with the tree of modules, and adapters put names in front.
    buffers = tuple(name for name, _ in base.model.named_buffers())
    parts += ["base" if owns_base or name.endswith(buffers) else "adapter" for name, _ in model.named_buffers()]
    # The rest are quantization states.
    return parts + ["base"] * (sum(1 for _ in list_tensors(model)) - len(parts))


def _count_parameters(base: BaseModel) -> int:
    """Of the base without its head, quantized ones by their number before."""
    total = 0
    for name, parameter in base.model.named_parameters():
        if name.split(".")[0] not in base.head:
            state = getattr(parameter, "quant_state", None)
            total += parameter.numel() if state is None else state.shape.numel()
    return total


def _static_bytes(built: _Built) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in list_tensors(built.model)}
    return sum(round_up_bytes(tensor.untyped_storage().nbytes()) for tensor in storages.values())


def _count_adapter(built: _Built) -> int:
    return built.parameters.adapter


def _count_head(built: _Built) -> int:
    return built.parameters.head


def _count_base(built: _Built) -> int:
    return built.base_parameters


_COUNTS = (_count_adapter, _count_head, _count_base, _static_bytes)


def count_peak_bytes(model: nn.Module, spec: TrialSpec, batch: Batch, device_kind: str) -> int:
    """Peak of live bytes over one training step whose optimizer state exists already, on fake or real CPU tensors."""
    return find_peak(Rehearsal(model, spec, on_gpu=device_kind == "cuda").train(batch)).total


@contextlib.contextmanager
def running_on_fakes(models: Iterable[nn.Module]) -> Iterator[None]:
    """In which the models are made fake and run, whatever they would like to know of values."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(shapes_without_values())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(OneEndOfSequence())
        stack.enter_context(EveryLayerAndExpert())
        if find_spec("bitsandbytes") is not None:
            from autopeft.backends.hf.fake_quantized import fake_state_codes

            stack.enter_context(fake_state_codes())
        stack.enter_context(_quiet_fakes())
        for model in models:
            stack.enter_context(stepping_without_values(model))
        yield


@contextlib.contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Silences what no user could act on: PyTorch prints the traceback of every error that it also raises, bitsandbytes
    a line for every cast, and that fake GPU tensors are on a CPU, where nothing is paged, and transformers that
    checkpointed layers keep no cache."""
    names = ("torch._subclasses.fake_tensor", "bitsandbytes.autograd._functions", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
