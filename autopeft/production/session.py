"""One process's device, and its part among other processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from autopeft.backends.hf.kernels import install_onednn_products, prefers_onednn
from autopeft.errors import DeviceError, SpecError
from autopeft.methods import refuse_spec
from autopeft.production.checkpoints import CHECKPOINTS
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe


class Session(NamedTuple):
    """This process's device and its part among the others."""

    arguments: transformers.TrainingArguments
    device: str

    @property
    def is_main(self) -> bool:
        return bool(self.arguments.process_index == 0)

    def close(self) -> None:
        """Waits for the others and parts from them; without it, a process that ends first takes the rest down."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def open_session(recipe: Recipe, out: Path, options: Options) -> Session:
    """Starts what connects the processes. A CPU study's recipe trains on the CPU, where there is a GPU too.

    Raises DeviceError or SpecError for what this machine cannot do.
    """
    if _env_says("ACCELERATE_USE_DEEPSPEED"):
        raise SpecError(
            "Several processes train by DDP or FSDP, but accelerate launch was told to use DeepSpeed, with which "
            "autopeft does not train. Use accelerate launch --multi_gpu, or --use_fsdp where a GPU has room for the "
            "base, which each of them loads whole, but not for training it."
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    on_gpu = recipe.device_kind == "cuda" and torch.cuda.is_available() and not _env_says("ACCELERATE_USE_CPU")
    if recipe.precision == "float32" and on_gpu:
        raise DeviceError(
            "On a GPU training computes in bfloat16, as the study's trials did, but the recipe says float32. Set "
            "precision: bfloat16 in training.yaml, or hide the GPU (CUDA_VISIBLE_DEVICES=) to train on the CPU."
        )
    if recipe.precision == "bfloat16" and recipe.device_kind == "cpu":
        raise DeviceError(
            "The recipe is of a study on CPUs and trains on one, in float32, but says bfloat16, which is for GPUs. Set "
            "precision: float32 in training.yaml, or search on a GPU."
        )
    if recipe.precision == "bfloat16" and not on_gpu:
        raise DeviceError(
            "The recipe computes in bfloat16, which is for GPUs, but this machine has none. Train where there is one, "
            "or set precision: float32 in training.yaml; the result will then differ a little from the study's."
        )
    rule = refuse_spec(recipe.training_spec(), "cuda" if on_gpu else "cpu")
    if rule is not None:
        raise SpecError(rule)
    if "tensorboard" in options.report_to:
        # Else its files would lie among the checkpoints.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / "runs"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulation = split_effective_batch(recipe, processes)
    arguments = transformers.TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        run_name=out.name,
        max_steps=recipe.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        bf16=recipe.precision == "bfloat16",
        use_cpu=not on_gpu,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # Every method's contract has a gradient for all that trains, so nothing has to be looked for.
        ddp_find_unused_parameters=False,
    )
    device = arguments.device
    # Without `accelerate launch`, one GPU is used: Trainer would put nn.DataParallel around the model.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cpu" and prefers_onednn():
        install_onednn_products()
    return Session(arguments, "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}")


def split_effective_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of one of so many processes. Raises SpecError where the batch cannot be divided."""
    if recipe.effective_batch % processes:
        raise SpecError(
            f"The effective batch is divided among the processes, but {recipe.effective_batch} rows are no multiple of "
            f"{processes} processes. Start another number of them, or change the batch with --batch-size."
        )
    each = recipe.effective_batch // processes
    micro = max(size for size in range(1, min(recipe.micro_batch, each) + 1) if each % size == 0)
    return micro, each // micro


def is_sharded() -> bool:
    return _env_says("ACCELERATE_USE_FSDP")


def _env_says(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def find_peak(session: Session) -> int | None:
    if not session.device.startswith("cuda"):
        return None
    own = torch.cuda.max_memory_allocated()
    if not torch.distributed.is_initialized():
        return own
    peaks: list[Any] = [None] * session.arguments.world_size
    torch.distributed.all_gather_object(peaks, own)
    return int(max(peaks))
