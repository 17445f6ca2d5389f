"""A PyTorch without CUDA that passes for one with it, so that what is written for GPUs runs where there is none.

Put this folder on PYTHONPATH, its `bin` on PATH, and name the GPUs in PRETENDED_GPUS: "TOTAL[:USED[:TAKEN]],...", in
MiB, where other processes hold USED as nvidia-smi tells it, and took TAKEN more after it was asked. Every tensor stays
an ordinary one on the CPU; those that were made for or moved to "cuda" are marked by storage, and whatever comes of
them is marked too. What this shows:

- an operation on marked and unmarked tensors, a generator of the wrong device, `.numpy()` of a marked tensor: errors,
  as CUDA has them (numbers of no dimension may be mixed, and indices may lie on the CPU);
- two random states, so that forgetting CUDA's when a trial resumes changes its numbers;
- what autocast computes in float32 on CUDA;
- bytes of live marked storages in units of 512, a peak, and torch.OutOfMemoryError beyond the GPU's memory;
- files whose tensors were on a GPU, which load where there is one or where `map_location` is given.

What it cannot show: CUDA's own kernels, their numbers, temporaries and speed; anything asynchronous; more than one GPU
in a process; paged memory. Peaks are those of the CPU's kernels, but for dropout and attention, which keep what CUDA's
keep; attention drops nothing out. Python functions of torch that torch functions call run as on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "Pretended GPU"
CAPABILITY = (8, 9)
_CUBLAS_BYTES = 8320 * 1024
"""`:4096:2:16:8`, which PyTorch gives cuBLAS before Hopper."""


class _Gpu:
    """The one GPU that this process sees: its memory and its random state."""

    def __init__(self, total_bytes: int, used_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = used_bytes
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.cublas_handles: set[bool] = set()
        self.random = torch.Generator().manual_seed(1).get_state()

    def holds(self, tensor: torch.Tensor) -> bool:
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self.storages

    def take(self, tensor: torch.Tensor) -> None:
        if tensor.layout == torch.sparse_coo:
            self.take(tensor._indices())
        storage = _storage(tensor)
        if storage is not None:
            self.take_storage(storage)

    def take_storage(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self.storages:
            return
        num_bytes = -(-storage.nbytes() // 512) * 512
        self.allocate(num_bytes)

        def forget(_: object) -> None:
            del self.storages[address]
            self.live_bytes -= num_bytes

        self.storages[address] = weakref.ref(storage, forget)

    def allocate(self, num_bytes: int) -> None:
        free = self.total_bytes - self.used_bytes - self.live_bytes
        if num_bytes > free or _fails_here():
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.total_bytes / 2**30:.2f} GiB of which {free / 2**20:.2f} MiB is free."
            )
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def count_cublas(self) -> None:
        """Autograd computes its products in a thread of its own, which has a handle of its own."""
        is_backward = getattr(_place, "is_backward", False)
        if is_backward not in self.cublas_handles:
            self.cublas_handles.add(is_backward)
            self.allocate(_CUBLAS_BYTES)

    @contextlib.contextmanager
    def own_random(self) -> Iterator[None]:
        cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(self.random)
        try:
            yield
        finally:
            self.random = torch.default_generator.get_state()
            torch.default_generator.set_state(cpu)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return None
    return (tensor._values() if tensor.layout == torch.sparse_coo else tensor).untyped_storage()


_gpus: list[tuple[int, int]] = []
_gpu: _Gpu
_is_hidden = False
_place = threading.local()
"""`.on_gpu` is where what is made right now belongs; None or absent: where what it is made of is. `.is_backward`."""


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Without GPUs, for as long as it lasts."""
    global _is_hidden
    _is_hidden = True
    try:
        yield
    finally:
        _is_hidden = False


@contextlib.contextmanager
def _placed(on_gpu: bool | None) -> Iterator[None]:
    before = getattr(_place, "on_gpu", None)
    _place.on_gpu = on_gpu
    try:
        yield
    finally:
        _place.on_gpu = before


class _Failure(NamedTuple):
    function: str
    at: int


_failure: _Failure | None = None
"""Set by tests: the allocation within a function that fails, counted from one."""
_allocations_there = 0


def _fails_here() -> bool:
    global _allocations_there
    if _failure is None or _allocations_there >= _failure.at:
        return False
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != _failure.function:
        frame = frame.f_back
    _allocations_there += frame is not None
    return _allocations_there == _failure.at


# --- operators

_MAY_MIX = {
    *("copy_", "_to_copy", "_foreach_copy_", "set_", "resize_", "is_same_size", "_has_compatible_shallow_copy_type"),
    *("lift_fresh", "lift_fresh_copy", "detach", "alias"),
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv"}


class _Operators(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name = func._schema.name.partition("::")[2]
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            place = getattr(_place, "on_gpu", None)
            on_gpu = [_gpu.holds(tensor) for tensor in tensors]
            if place is None:
                _check_places(name, args, tensors, on_gpu)
                place = any(on_gpu)
            if place and name in _PRODUCTS:
                _gpu.count_cublas()
            if place and torch.Tag.nondeterministic_seeded in func.tags:
                with _gpu.own_random():
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
            # What is copied into stays where it is.
            if place and name not in ("copy_", "_foreach_copy_"):
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor):
                        _gpu.take(leaf)
            return result


def _check_places(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor], on_gpu: list[bool]) -> None:
    if not any(on_gpu) or all(on_gpu) or name in _MAY_MIX:
        return
    if name in _INDEXED:
        if not on_gpu[0]:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        values = args[2] if len(args) > 2 and isinstance(args[2], torch.Tensor) else None
        if values is None or values.dim() == 0 or _gpu.holds(values):
            return
    elif all(there or tensor.dim() == 0 for tensor, there in zip(tensors, on_gpu, strict=True)):
        return
    shapes = ", ".join(
        f"{'cuda:0' if there else 'cpu'} {tuple(tensor.shape)}" for tensor, there in zip(tensors, on_gpu, strict=True)
    )
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"({name}: {shapes})"
    )


# --- functions

_CUDA = torch.device("cuda", 0)
_Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _is_cuda(device: Any) -> bool | None:
    """None of no device."""
    if device is None:
        return None
    if isinstance(device, int):
        return True
    kind = torch.device(device).type
    return True if kind == "cuda" else False if kind == "cpu" else None


def _get_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _CUDA if _gpu.holds(args[0]) else func(*args)


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return func(*args, **kwargs)
    other = next((value for value in (*rest, kwargs.get("other")) if isinstance(value, torch.Tensor)), None)
    device = kwargs.get("device")
    dtype = kwargs.get("dtype")
    flags = []
    for value in rest:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            flags.append(value)
        elif isinstance(value, str | torch.device | int):
            device = value
    if other is not None:
        wanted, dtype = _gpu.holds(other), other.dtype
    elif device is None:
        wanted = _gpu.holds(tensor)
    elif _is_cuda(device) is None:
        return func(*args, **kwargs)
    else:
        wanted = bool(_is_cuda(device))
    # What comes by place is non_blocking, then copy.
    copy = kwargs.get("copy", False) or (len(flags) > 1 and flags[1])
    return _place_tensor(tensor, wanted, dtype, copy=copy, memory_format=kwargs.get("memory_format"))


def _place_tensor(
    tensor: Any, wanted: bool, dtype: Any = None, *, copy: bool = False, memory_format: Any = None
) -> Any:
    dtype = dtype or tensor.dtype
    if wanted == _gpu.holds(tensor):
        return torch.Tensor.to(tensor, dtype, copy=copy, memory_format=memory_format)
    with _placed(wanted):
        return torch.Tensor.to(tensor, dtype, copy=True, memory_format=memory_format)


def _to_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _place_tensor(args[0], False)


def _to_cuda(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _place_tensor(args[0], True)


def _refuse_numpy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _gpu.holds(args[0]):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )
    return func(*args, **kwargs)


def _copy_deeply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    was_there = _gpu.holds(args[0])
    result = func(*args, **kwargs)
    if was_there:
        _gpu.take(result)
        if result.grad is not None:
            _gpu.take(result.grad)
    return result


def _keep_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _gpu.holds(args[0]):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return args[0]


def _make_new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = kwargs.pop("device", None)
    with _placed(_gpu.holds(args[0]) if device is None else _is_cuda(device)):
        return func(*args, **kwargs)


def _drop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """CUDA's fused kernel keeps a mask of one byte a number, a CPU all the noise."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    rate = given.get("p", 0.5)
    if not _gpu.holds(given["input"]) or not given.get("training", True) or not 0 < rate < 1:
        return func(*args, **kwargs)
    return torch.native_dropout(given["input"], rate, True)[0]


def _attend(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """CUDA's fused kernels drop out without keeping attention weights, so here nothing is dropped."""
    if _gpu.holds(args[0]) and "dropout_p" in kwargs:
        kwargs["dropout_p"] = 0.0
    return func(*args, **kwargs)


def _take_over(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """as_tensor and asarray, which keep what is already where it is wanted."""
    wanted = _is_cuda(kwargs.pop("device", None))
    if not isinstance(args[0], torch.Tensor):
        with _placed(wanted):
            return func(*args, **kwargs)
    taken = func(*args, **kwargs)
    return taken if wanted is None else _place_tensor(taken, wanted)


_HANDLERS: dict[Any, _Handler] = {
    torch.Tensor.device.__get__: _get_device,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda func, args, kwargs: _gpu.holds(args[0]),  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda func, args, kwargs: not _gpu.holds(args[0]) and func(*args),  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda func, args, kwargs: 0 if _gpu.holds(args[0]) else func(*args),
    torch.Tensor.to: _move,
    torch.Tensor.cpu: _to_cpu,
    torch.Tensor.cuda: _to_cuda,
    torch.Tensor.numpy: _refuse_numpy,
    torch.Tensor.__array__: _refuse_numpy,
    torch.Tensor.__deepcopy__: _copy_deeply,
    torch.Tensor.pin_memory: _keep_pinned,
    torch.Tensor.is_pinned: lambda func, args, kwargs: False,
    torch.Tensor.record_stream: lambda func, args, kwargs: None,
    torch.Tensor.new_tensor: _make_new,
    F.dropout: _drop,
    F.scaled_dot_product_attention: _attend,
    torch.as_tensor: _take_over,
    torch.asarray: _take_over,
}


_IN_FLOAT32 = frozenset({
    "__pow__", "__rpow__", "__rtruediv__", "__rdiv__", "binary_cross_entropy_with_logits", "cosine_similarity",
    "cross_entropy", "cumprod", "cumsum", "exp", "group_norm", "l1_loss", "layer_norm", "log", "log_softmax",
    "mse_loss", "nll_loss", "norm", "pow", "prod", "reciprocal", "rsqrt", "softmax", "softplus", "sum",
})  # fmt: skip
"""What CUDA's autocast computes in float32 and the CPU's does not, where models have it
(docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32)."""


def _to_float32(value: Any) -> Any:
    is_low = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 and _gpu.holds(value)
    return value.float() if is_low else value


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs)
        if kwargs.pop("pin_memory", False) and _is_cuda(kwargs.get("device")):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        wanted = _is_cuda(kwargs.get("device"))
        generator = kwargs.get("generator")
        if generator is not None:
            on_gpu = wanted if wanted is not None else any(isinstance(a, torch.Tensor) and _gpu.holds(a) for a in args)
            if bool(on_gpu) != (generator.device.type == "cuda"):
                expected = "cuda" if on_gpu else "cpu"
                raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{generator.device}'")
        if getattr(func, "__name__", "") in _IN_FLOAT32 and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        if wanted is None:
            return func(*args, **kwargs)
        # Not left away: what is like a tensor on the meta device would be there too.
        kwargs["device"] = torch.device("cpu")
        with _placed(wanted):
            return func(*args, **kwargs)


class _Generator(torch.Generator):
    """One for CUDA is a CPU's that says otherwise."""

    _says_cuda = False

    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls, "cpu" if _is_cuda(device) else device)
        self._says_cuda = bool(_is_cuda(device))
        return self

    @property
    def device(self) -> torch.device:
        return _CUDA if self._says_cuda else torch.device("cpu")


# --- torch.cuda


def _count_devices() -> int:
    return 0 if _is_hidden else len(_gpus)


def _seed(seed: int) -> None:
    # Another stream than the CPU's of the same seed.
    _gpu.random = torch.Generator().manual_seed((seed + 0x9E3779B9) % 2**63).get_state()


def _set_random(state: torch.Tensor, device: Any = None) -> None:
    if _gpu.holds(state):
        raise TypeError("RNG state must be a torch.ByteTensor")
    _gpu.random = state.clone()


def _reset_peak(device: Any = None) -> None:
    _gpu.peak_bytes = _gpu.live_bytes


def _reserved(num_bytes: int) -> int:
    return -(-num_bytes // 2**21) * 2**21


class _Properties(NamedTuple):
    name: str = NAME
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    total_memory: int = 0
    multi_processor_count: int = 128


class _Stream:
    """Of nothing: everything is done when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = _CUDA

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make_nothing()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def _make_nothing() -> Callable[..., None]:
    """A new one each time: torch._dynamo has rules by function."""
    return lambda *args, **kwargs: None


def _read_gpus() -> list[tuple[int, int]]:
    """(total, used) bytes of those that CUDA_VISIBLE_DEVICES leaves."""
    gpus = []
    for gpu in os.environ.get("PRETENDED_GPUS", "24576,24576").split(","):
        total, *used = (int(part) * 2**20 for part in gpu.split(":"))
        gpus.append((total, sum(used)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    return [gpus[int(number)] for number in visible.split(",") if number.strip()]


def install() -> None:
    """From now on, in this process and its threads; without an effect where CUDA_VISIBLE_DEVICES leaves no GPU."""
    global _gpu
    _gpus[:] = _read_gpus()
    if not _gpus:
        return
    _gpu = _Gpu(*_gpus[0])
    _patch_cuda()
    _patch_autocast()
    _patch_backward()
    torch.version.cuda = "12.8"
    torch.Generator = _Generator  # type: ignore[misc]
    torch.serialization.register_package(5, _tag, _bring_back)
    _Operators().__enter__()
    _Functions().__enter__()
    run = threading.Thread.run

    def run_inside(self: threading.Thread) -> None:
        with _Operators(), _Functions():
            run(self)

    threading.Thread.run = run_inside  # type: ignore[method-assign]


def _tag(storage: Any) -> str | None:
    return "cuda:0" if storage._cdata in _gpu.storages else None


def _bring_back(storage: Any, location: str) -> Any:
    if not location.startswith("cuda"):
        return None
    _gpu.take_storage(storage)
    return storage


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    for name in (
        "_lazy_init", "init", "synchronize", "empty_cache", "set_device", "ipc_collect", "set_stream",
        "set_per_process_memory_fraction", "reset_accumulated_memory_stats",
    ):  # fmt: skip
        setattr(cuda, name, _make_nothing())
    cuda.is_available = lambda: _count_devices() > 0
    cuda.is_initialized = lambda: True
    cuda._is_in_bad_fork = lambda: False
    cuda.device_count = _count_devices
    cuda.current_device = lambda: 0
    for name in ("device", "stream", "Stream", "Event", "current_stream", "default_stream"):
        setattr(cuda, name, type(name, (_Stream,), {}))
    cuda.get_device_name = lambda device=None: NAME
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: _Properties(total_memory=_gpu.total_bytes)
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.mem_get_info = lambda device=None: (
        _gpu.total_bytes - _gpu.used_bytes - _reserved(_gpu.live_bytes), _gpu.total_bytes
    )  # fmt: skip
    cuda.memory_allocated = lambda device=None: _gpu.live_bytes
    cuda.max_memory_allocated = lambda device=None: _gpu.peak_bytes
    cuda.memory_reserved = lambda device=None: _reserved(_gpu.live_bytes)
    cuda.max_memory_reserved = lambda device=None: _reserved(_gpu.peak_bytes)
    cuda.reset_peak_memory_stats = _reset_peak
    cuda.get_rng_state = lambda device=None: _gpu.random.clone()
    cuda.get_rng_state_all = lambda: [_gpu.random.clone()]
    cuda.set_rng_state = _set_random
    cuda.set_rng_state_all = lambda states: _set_random(states[0])
    cuda.manual_seed = lambda seed: _seed(seed)
    cuda.manual_seed_all = lambda seed: _seed(seed)
    for module in (cuda.memory, cuda.random):
        for name in module.__all__:
            if hasattr(cuda, name):
                setattr(module, name, getattr(cuda, name))
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: _count_devices() > 0
    accelerator.current_accelerator = lambda check_available=False: torch.device("cuda") if _count_devices() else None
    accelerator.device_count = _count_devices
    accelerator.current_device_index = lambda: 0
    for name in ("synchronize", "empty_cache", "set_device_index"):
        setattr(accelerator, name, _make_nothing())
    accelerator.current_stream = type("current_stream", (_Stream,), {})


def _patch_autocast() -> None:
    begin = torch.amp.autocast_mode.autocast.__init__

    def begin_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.amp.autocast_mode.autocast.__init__ = begin_on_cpu  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        setattr(torch, name, lambda device="cuda", real=real: real("cpu" if device == "cuda" else device))


def _patch_backward() -> None:
    """Functions of torch run without the mode that handled them; what backward passes compute again needs it, and so
    does what compares it with the first time."""
    graph: Any = torch.autograd.graph
    run = graph._engine_run_backward

    def run_inside(*args: Any, **kwargs: Any) -> Any:
        _place.is_backward = True
        try:
            with _Functions():
                return run(*args, **kwargs)
        finally:
            _place.is_backward = False

    graph._engine_run_backward = run_inside
    torch.autograd._engine_run_backward = run_inside  # type: ignore[attr-defined]
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    describe = checks["default"]

    def describe_inside(tensor: torch.Tensor) -> Any:
        with _Functions():
            return describe(tensor)

    checks["default"] = describe_inside
