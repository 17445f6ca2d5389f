"""What trains. The table of backends; each is imported only where it is used."""

from __future__ import annotations

from typing import Any

from autopeft.backends.base import Backend, CostModel, WorkerSetup
from autopeft.errors import SpecError, suggest_nearest

_BACKENDS = ("fake", "hf")


def load_backend(setup: WorkerSetup) -> Backend:
    _check(setup.backend)
    if setup.backend == "fake":
        from autopeft.backends.fake import FakeBackend

        return FakeBackend(setup)
    from autopeft.backends.hf.trial import HfBackend

    return HfBackend(setup)


def load_cost_model(setup: WorkerSetup) -> CostModel:
    _check(setup.backend)
    if setup.backend == "fake":
        from autopeft.backends.fake import FakeCostModel

        return FakeCostModel()
    from autopeft.backends.hf.cost import HfCostModel, Writing
    from autopeft.backends.hf.cuda_rules import MODELLED_GPU, find_gpu
    from autopeft.backends.hf.data import TaskData
    from autopeft.tasks.spec import parse_task

    task = parse_task(setup.task, "task")
    data: Any = TaskData(task, model=setup.model, data_dir=setup.data_dir, split_seed=setup.split_seed)
    # Of the test rows, lengths alone: what is retrained must have room to be scored on them at the end.
    scored = (data.validation, data.test)
    writing = None
    if task.scorer == "exact_match":
        prompts = (split.prompt_ids(i) for split in scored for i in range(len(split.features)))
        writing = Writing(max(map(len, prompts)), task.max_new_tokens)
    on_gpu = setup.device.startswith("cuda")
    gpu = setup.planned_gpu
    if gpu is None and on_gpu:
        # Its number is the driver's, which is nvidia-smi's.
        gpu = find_gpu(setup.device.removeprefix("cuda:"))
    return HfCostModel(
        setup.model,
        num_labels=task.num_labels,
        device_kind="cuda" if on_gpu else "cpu",
        longest_tokens=data.longest_tokens,
        scoring_tokens=max(max(split.lengths()) for split in scored),
        writing=writing,
        gpu=gpu or MODELLED_GPU,
    )


def _check(name: str) -> None:
    if name not in _BACKENDS:
        raise SpecError(f"There is no backend '{name}'. {suggest_nearest(name, _BACKENDS)}")
