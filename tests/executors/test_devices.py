"""GPUs as nvidia-smi tells them, also where it cannot tell all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.backends.base import ModelledGpu
from autopeft.backends.hf.cuda_rules import find_gpu
from autopeft.cli.session import run_study
from autopeft.errors import DeviceError, StudyError
from autopeft.executors.devices import (
    Gpu,
    check_visible,
    count_cores,
    find_gpus,
    find_known,
    find_memory,
    plan_cpu_workers,
)
from autopeft.search.plan import Plan, make_plan, restore_devices
from autopeft.search.request import Request
from autopeft.spaces.space import SearchSpace

LINES = (
    "0, GPU-aaaa, NVIDIA H100, 81559, 80000\n",
    "1, GPU-bbbb, NVIDIA A100, 40960, 1024\n",
)


@pytest.fixture
def tell(monkeypatch):
    """Puts a nvidia-smi in place that prints what it is given."""

    def put(output: str) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
        monkeypatch.setattr("subprocess.run", lambda *arguments, **options: CompletedProcess([], 0, stdout=output))

    return put


def test_gpus_come_with_their_memory(tell):
    tell("".join(LINES))
    assert find_gpus() == [
        Gpu("0", "NVIDIA H100", 81559 * 2**20, 80000 * 2**20),
        Gpu("1", "NVIDIA A100", 40960 * 2**20, 1024 * 2**20),
    ]


@pytest.mark.parametrize(("visible", "numbers"), [("1", ["1"]), ("GPU-aa", ["0"]), ("", [])])
def test_hidden_gpus_are_left_out(tell, monkeypatch, visible, numbers):
    tell("".join(LINES))
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.number for gpu in find_gpus()] == numbers


def test_numbers_of_gpus_that_differ_are_refused_where_cuda_counts_them_by_speed(tell, monkeypatch):
    tell("".join(LINES))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(DeviceError, match=r"by number \(1\).*NVIDIA A100, NVIDIA H100.*CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        check_visible()
    # Who needs no GPU may still look what there is.
    assert len(find_gpus()) == 1


@pytest.mark.parametrize(
    ("second", "visible"), [("NVIDIA H100", "1"), ("NVIDIA A100", "1,0"), ("NVIDIA A100", "GPU-bb")]
)
def test_numbers_are_taken_where_no_order_changes_them(tell, monkeypatch, second, visible):
    tell(LINES[0] + LINES[1].replace("NVIDIA A100", second))
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_visible()
    assert "1" in [gpu.number for gpu in find_gpus()]


@pytest.mark.parametrize("unknown", ["[N/A]", "N/A", "[Not Supported]"])
def test_a_gpu_without_memory_of_its_own_has_the_machines(tell, unknown):
    tell(f"0, GPU-cccc, NVIDIA GB10, {unknown}, {unknown}\n")
    (gpu,) = find_gpus()
    memory = find_memory()
    assert memory is not None
    assert gpu.total_bytes == memory[0]
    assert 0 < gpu.free_bytes < gpu.total_bytes


def test_a_gpu_that_cannot_be_read_is_left_out_and_the_others_stay(tell):
    broken = "1, GPU-dddd, NVIDIA A100, [Unknown Error], [Unknown Error]\n"
    lost = "Unable to determine the device handle for GPU0000:02:00.0: GPU is lost.\n"
    tell(LINES[0] + broken + lost)
    assert [gpu.number for gpu in find_gpus()] == ["0"]


def plan_on(workers: int | None, budget: str = "1gpu-h") -> Plan:
    request = Request(task="demo", budget=budget, model="minilm", workers=workers)
    return make_plan(request, studies=Path("nowhere"), dry_run=True)


def test_a_plan_names_the_gpus_that_it_uses_and_the_one_that_holds_the_others_back(tell):
    tell("".join(LINES))
    plan = plan_on(None)
    assert plan.device_title == "1 x NVIDIA H100, 1 x NVIDIA A100"
    (note,) = plan.notes
    assert "GPU 1 has 1.0 of 40.0 GiB free" in note
    assert "--workers 1" in note


def test_a_plan_for_the_emptiest_gpu_alone_says_nothing_of_the_others(tell):
    tell("0, GPU-aaaa, NVIDIA H100, 81559, 1024\n1, GPU-bbbb, NVIDIA L4, 24576, 24000\n")
    plan = plan_on(1)
    assert plan.devices == ("cuda:1",)
    assert plan.device_title == "1 x NVIDIA L4"
    assert plan.device_name == "NVIDIA L4"
    assert plan.notes == ()
    assert plan.planned_gpu is None


def test_the_modelled_gpu_is_the_one_that_trains(monkeypatch):
    def answer(query: list[str], **options: object) -> CompletedProcess[str]:
        lines = {"--id=1": "NVIDIA A100, 8.0\n"}
        return CompletedProcess([], 0, stdout=lines.get(query[-1], "NVIDIA H100, 9.0\nNVIDIA A100, 8.0\n"))

    monkeypatch.setattr("subprocess.run", answer)
    assert find_gpu() == ModelledGpu(name="NVIDIA H100", capability=(9, 0))
    assert find_gpu("1") == ModelledGpu(name="NVIDIA A100", capability=(8, 0))


def test_a_study_that_is_resumed_on_fewer_gpus_is_limited_by_what_those_have_free(tell, monkeypatch):
    tell(LINES[0])
    known = []

    def search(*arguments: object, free_bytes: int | None, **options: object) -> None:
        known.append(free_bytes)
        raise StudyError("far enough")

    monkeypatch.setattr("autopeft.search.study.Search", search)
    store: Any = SimpleNamespace(config=SimpleNamespace(device_kind="cuda", workers=2), lock=nullcontext, reread=list)
    executor: Any = SimpleNamespace(num_workers=1)
    with pytest.raises(StudyError, match="far enough"):
        run_study(store, executor, SearchSpace(name="", device_kind="cuda", methods={}, recipes=()), 1.0)
    assert known == [80000 * 2**20]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 80GB"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA of next year", "A100 80GB"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name, title):
    assert find_known(name).title == title


@pytest.mark.parametrize(
    ("began_with", "count", "told"),
    [
        ("NVIDIA H100", 2, []),
        ("NVIDIA A100", 2, []),
        ("NVIDIA H100 80GB", 2, []),
        ("NVIDIA H100", 1, ["1 x NVIDIA H100", "2 x NVIDIA H100"]),
        ("NVIDIA L4", 2, ["2 x NVIDIA L4", "2 x NVIDIA H100"]),
    ],
    ids=["the first", "the second", "by another name", "fewer", "another"],
)
def test_going_on_with_other_gpus_is_told(tell, began_with, count, told):
    tell("".join(LINES))
    config, provenance = (
        SimpleNamespace(name="mine", device_kind="cuda", workers=2),
        SimpleNamespace(device=began_with, device_count=count, threads=1),
    )
    note = restore_devices(config, provenance).note
    assert bool(note) == bool(told)
    assert all(words in note for words in told)


def test_going_on_with_a_gpu_without_bfloat16_is_told(tell):
    tell("0, GPU-aaaa, Tesla T4, 15360, 15000\n")
    config = SimpleNamespace(name="mine", device_kind="cuda", workers=1)
    note = restore_devices(config, SimpleNamespace(device="NVIDIA A100", device_count=1, threads=1)).note
    assert "1 x Tesla T4" in note
    assert "a T4 has no units" in note


def test_a_plan_for_a_gpu_without_bfloat16_says_so(tell):
    tell("0, GPU-aaaa, Tesla T4, 15360, 15000\n")
    (note,) = plan_on(None).notes
    assert "a T4 has no units" in note
    tell(LINES[0])
    assert plan_on(None).notes == ()


def test_a_part_of_a_gpu_is_no_device_and_no_reason_to_take_the_cpu(tell, monkeypatch):
    tell("".join(LINES))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234-5678")
    with pytest.raises(DeviceError, match=r"a part of one \(MIG\)"):
        plan_on(1, "5trials")
    assert plan_on(1, "5cpu-min").config.device_kind == "cpu"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
    ids=["two", "one and a half", "a fifth", "unlimited", "more than there are", "v1", "v1, unlimited", "no cgroups"],
)
def test_a_containers_limit_counts_where_affinity_knows_of_all_cores(tmp_path, monkeypatch, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("autopeft.executors.devices._CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert count_cores() == cores
    assert plan_cpu_workers(None) == (min(cores, 4), cores // min(cores, 4))
