"""What a training step and a scoring pass hold at their fullest, and in which moment of which layer that is.

A moment is a stretch of the step between two marks: a layer's forward pass, its backward pass, the loss, clipping, the
update. Peaks are kept for each moment, because only so can they be extrapolated to deeper models (see `depth`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.utils._pytree import tree_leaves

from autopeft.backends.hf.cuda_rules import GpuRules, OnGpu, cuda_workspaces
from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.live_bytes import Held, LiveBytes, Part, cpu_workspaces, list_loose_tensors, list_tensors
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, score_batch, train_step
from autopeft.errors import SpecError
from autopeft.methods import find_method
from autopeft.records import TrialSpec

# bitsandbytes' Optimizer8bit.get_state_buffer pages no smaller states.
_FEWEST_PAGED_NUMBERS = 100_000


class Moment(NamedTuple):
    """A stretch of a pass in one layer; `after` is what follows the layer's own forward pass."""

    phase: Literal["forward", "backward"]
    stack: int
    layer: int
    after: bool = False


Peaks = dict[Hashable, Held]
"""By moment: a `Moment`, or the name of a stretch outside the layers."""


def find_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers: one in an encoder or decoder, two where there are both. Lists inside of layers are not."""
    stacks: list[nn.ModuleList] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(layer) for layer in child}) == 1:
                stacks.append(child)
            else:
                search(child)

    search(model)
    return stacks


def find_peak(peaks: Peaks) -> Held:
    return max(peaks.values(), key=lambda held: held.total)


class Rehearsal:
    """A model and its optimizer as after a first step, on fake or real CPU tensors, whose passes can be measured.

    Learning rates are zero, so that real weights stay as they are. For a GPU the tensors must be fake.
    """

    def __init__(
        self, model: nn.Module, spec: TrialSpec, *, on_gpu: bool, parts: Mapping[int, Part] | None = None
    ) -> None:
        """`parts` says by their storages what tensors are for; by default what trains is the adapter."""
        self.model = model
        self.wasted_bytes = 0
        """What the caching allocator reserves for a step beyond its peak."""
        self._on_gpu = on_gpu
        self._runner = self._put_on_device(model)
        self._workspaces = cuda_workspaces() if on_gpu else cpu_workspaces()
        self._parts = parts
        self._optimizer = None
        self._after_step = bind_after_step(model, spec, 1)
        states: list[torch.Tensor] = []
        if any(parameter.requires_grad for parameter in model.parameters()):
            self._optimizer = build_optimizer(model, spec)
            _allocate_state(self._optimizer, self._after_step)
            states = _list_state(model, spec, self._optimizer)
        self._paged = _list_paged(spec, states)
        paged = {id(tensor) for tensor in self._paged}
        self._states = [tensor for tensor in states if id(tensor) not in paged]

    @property
    def trains(self) -> bool:
        """False for an untrained base, which can be scored alone."""
        return self._optimizer is not None

    @property
    def paged_bytes(self) -> int:
        """Optimizer states in unified memory, which the allocator does not see and a full GPU pages out."""
        return sum(tensor.nbytes for tensor in self._paged)

    @property
    def trained_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer and of the method's own schedule, paged or not."""
        return self.paged_bytes + sum(tensor.nbytes for tensor in self._states)

    def train(self, batch: Batch, *, micro_batches: int = 1) -> Peaks:
        """The peaks of one step of the training loop; afterwards `wasted_bytes` is known."""
        live = self._count(batch)
        with self._rules(), _marks(self.model, self._optimizer, live), live:
            self.step(batch, micro_batches=micro_batches)
        self.wasted_bytes = live.wasted_bytes
        return live.peaks

    def step(self, batch: Batch, *, micro_batches: int = 1) -> None:
        """The training loop's step, not counted."""
        assert self._optimizer is not None
        train_step(
            self._runner,
            self._optimizer,
            batch,
            learning_rate=0.0,
            device="cpu",
            after_step=self._after_step,
            micro_batches=micro_batches,
        )

    def count_held(self, batch: Batch) -> int:
        """Bytes that are there before a step: model, states and batch."""
        return self._count(batch).live_bytes

    def score(self, batch: Batch) -> Peaks:
        """The peaks of one batch's evaluation, the optimizer's states being there as in a search."""
        live = self._count(batch)
        self.model.eval()
        with self._rules(), _marks(self.model, self._optimizer, live), live:
            score_batch(self._runner, dict(batch), device="cpu")
        self.model.train()
        return live.peaks

    def write(self, rows: int, tokens: int, new_tokens: int) -> list[Peaks]:
        """The peaks of writing `new_tokens` after `tokens` in each of `rows`, as `write_completions` does: of reading
        the prompts, and of the last token, before which the keys and values of all others are kept."""
        # Without peft's wrapper, which puts soft prompts in front: `tokens` has them.
        writer = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if "past_key_values" not in inspect.signature(writer.forward).parameters:
            raise SpecError(
                "The memory of writing texts is known for models that keep keys and values, but "
                f"{type(writer).__name__} keeps something else. Score the task by token_accuracy instead."
            )
        self.model.eval()
        with torch.no_grad():
            reading = self._count_writing(writer, _make_prompt(writer, rows, tokens), None)
            with self._rules():
                kept = _make_prompt(writer, rows, tokens + new_tokens - 1)
                cache = self._put_on_device(writer)(**kept, use_cache=True).past_key_values
                _let_go_of_what_windows_left(cache)
            last = _make_prompt(writer, rows, tokens + new_tokens)
            last |= {name: last[name][:, -1:].clone() for name in last.keys() - {"attention_mask"}}
            writing = self._count_writing(writer, last, cache)
        self.model.train()
        return [reading, writing]

    def _count_writing(self, writer: Any, batch: Batch, cache: Any) -> Peaks:
        live = self._count(batch)
        for tensor in _list_cached(cache):
            live.add(tensor)
        # As transformers' `generate` does where the model can.
        kept = {"logits_to_keep": 1} if writer._supports_logits_to_keep() else {}
        with self._rules(), _marks(writer, None, live), live:
            output = self._put_on_device(writer)(**batch, past_key_values=cache, use_cache=True, **kept)
            # The next token is chosen from a copy in float32 (GenerationMixin._sample).
            output.logits[:, -1].to(copy=True, dtype=torch.float32).argmax(-1)
        return live.peaks

    def _put_on_device(self, model: nn.Module) -> nn.Module:
        return OnGpu(model) if self._on_gpu else model

    def _part_of(self, tensor: torch.Tensor) -> Part:
        if self._parts is None:
            return "adapter" if tensor.requires_grad else "base"
        # What was not there when the model was built is part of a quantization state.
        return self._parts.get(tensor.untyped_storage()._cdata, "base")

    def _rules(self) -> contextlib.AbstractContextManager[Any]:
        return GpuRules() if self._on_gpu else contextlib.nullcontext()

    def _count(self, batch: Batch) -> LiveBytes:
        live = LiveBytes(self._workspaces)
        live.mark("begin")
        for tensor in list_tensors(self.model):
            live.add(tensor, self._part_of(tensor))
        for tensor in list_loose_tensors(self.model):
            live.add(tensor, "adapter")
        for tensor in self._states:
            live.add(tensor, "optimizer")
        for tensor in batch.values():
            live.add(tensor)
        return live


def _make_prompt(writer: Any, rows: int, tokens: int) -> Batch:
    """What `generate` gives the model: a position for each token of each row, too, where it takes them."""
    names = ["input_ids", "attention_mask"]
    if "position_ids" in inspect.signature(writer.forward).parameters:
        names.append("position_ids")
    return {name: torch.ones(rows, tokens, dtype=torch.int64) for name in names}


def _let_go_of_what_windows_left(cache: Any) -> None:
    """A sliding window is a view into all that was read at once. Where tokens came one by one, that is long gone."""
    for layer in cache.layers:
        for name, value in list(vars(layer).items()):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                setattr(layer, name, value.clone())


def _list_cached(cache: Any) -> Iterator[torch.Tensor]:
    """Keys, values and other states of each layer of transformers' caches; nothing where there is none yet."""
    for layer in getattr(cache, "layers", ()):
        yield from (leaf for leaf in tree_leaves(list(vars(layer).values())) if isinstance(leaf, torch.Tensor))


def _list_paged(spec: TrialSpec, states: list[torch.Tensor]) -> list[torch.Tensor]:
    if spec.optimizer != "paged_adamw_8bit":
        return []
    return [tensor for tensor in states if tensor.dtype == torch.uint8 and tensor.numel() >= _FEWEST_PAGED_NUMBERS]


def _allocate_state(optimizer: torch.optim.Optimizer, after_step: Callable[[], None] | None) -> None:
    """As after a first step: AdamW makes its moments when it first sees gradients."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if after_step is not None:
        after_step()
    optimizer.zero_grad(set_to_none=True)


def _list_state(model: nn.Module, spec: TrialSpec, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the optimizer keeps of each parameter, and what the method itself keeps between steps."""
    stepping = find_method(spec.method).stepping
    kept = [*optimizer.state.values(), stepping.state(model) if stepping else None]
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _marks(model: nn.Module, optimizer: torch.optim.Optimizer | None, live: LiveBytes) -> Iterator[None]:
    """Hooks that tell `live` of each layer's begin, forward and backward, of finished gradients and of the update."""
    handles: list[Any] = []
    backward = False

    def enter(moment: Moment) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            # Under activation checkpointing layers run forward a second time, inside of their backward pass.
            if not backward:
                live.mark(moment)

        return before

    def leave(moment: Moment) -> Callable[..., None]:
        def begin_backward(_: torch.Tensor) -> None:
            nonlocal backward
            backward = True
            live.mark(moment._replace(phase="backward", after=False))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if backward:
                return
            live.mark(moment)
            first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
            if first is not None and first.requires_grad:
                handles.append(first.register_hook(begin_backward))

        return after

    def begin_forward(*_: Any) -> None:
        nonlocal backward
        backward = False
        live.mark("begin")

    def end_forward(*_: Any) -> None:
        # From here on caches of keys and the like are gone, so that less grows with the layers than before.
        live.mark("loss")

    def begin_update(*_: Any) -> None:
        live.mark("update")

    def take_gradient(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            live.move(parameter.grad, "gradients")

    handles.append(model.register_forward_pre_hook(begin_forward))
    handles.append(model.register_forward_hook(end_forward))
    for stack, layers in enumerate(find_stacks(model)):
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(enter(Moment("forward", stack, index))))
            handles.append(layer.register_forward_hook(leave(Moment("forward", stack, index, after=True))))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(take_gradient))
    if optimizer is not None:
        handles.append(optimizer.register_step_pre_hook(begin_update))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
