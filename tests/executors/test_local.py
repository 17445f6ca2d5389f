"""Worker processes: they answer, die without harm, and never outlive their driver."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.backends.base import Broken, CostReply, Finished, Pack, Ready, Stretch, WorkerSetup
from autopeft.errors import ModelError, WorkerError
from autopeft.executors.local import LocalExecutor
from autopeft.methods import METHODS
from autopeft.records import TrialSpec


def make_setup(folder: Path, backend: str = "fake", model: str = "") -> WorkerSetup:
    return WorkerSetup(
        backend=backend,
        model=model,
        task="name: demo\ntitle: Demo\ntext: text\nlabels: [a, b]\nembedded: true\n",
        data_dir=None,
        split_seed=0,
        study_dir=str(folder),
        device="cpu",
        threads=1,
    )


def make_pack(job: int, method: str = "ia3", **settings: int) -> Pack:
    spec = TrialSpec(
        method=method,
        settings=settings or dict(METHODS[method].recipe.settings),
        target_modules=None,
        bits=32,
        learning_rate=0.01,
        batch_size=16,
        max_steps=40,
        warmup_ratio=0.06,
        schedule="linear",
        weight_decay=0.0,
        seed=0,
    )
    return Pack(stretches=(Stretch(job=job, trial=0, spec=spec, purpose="search", from_step=0, to_step=40),))


@pytest.fixture
def executor(tmp_path: Path):
    executor = LocalExecutor(make_setup(tmp_path), ["cpu", "cpu"])
    executor.start()
    yield executor
    executor.close()


def test_two_workers_answer_what_they_were_asked(executor: LocalExecutor) -> None:
    executor.assign(0, make_pack(1))
    executor.assign(1, make_pack(2))
    events = []
    while len(events) < 2:
        events += executor.wait(10.0)
    answered = {(event.worker, event.event.job) for event in events if isinstance(event.event, Finished)}
    assert answered == {(0, 1), (1, 2)}


def test_the_cost_process_answers_beside_the_workers(executor: LocalExecutor) -> None:
    reply = executor.cost(make_pack(1).stretches[0].spec)
    assert reply.cost is not None
    assert reply.cost.trainable_parameters > 0


def check_successor(executor: LocalExecutor) -> None:
    """That the first worker's next process trains, and nothing more is heard of the one before."""
    executor.restart(0)
    executor.assign(0, make_pack(7))
    answers = []
    while not any(isinstance(event.event, Finished) for event in answers):
        answers += executor.wait(10.0)
    assert not any(event.event is None for event in answers)


def test_a_killed_worker_is_reported_once_and_its_successor_works(executor: LocalExecutor) -> None:
    executor._processes[0].process.send_signal(signal.SIGKILL)
    events = executor.wait(10.0)
    assert [(event.worker, event.event) for event in events] == [(0, None)]
    assert "-9" in events[0].detail
    check_successor(executor)


@pytest.fixture
def hung(executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> LocalExecutor:
    """Its first worker hangs, and may be silent for a second."""
    monkeypatch.setattr("autopeft.executors.local._LOOK_SECONDS", 0.1)
    monkeypatch.setattr("autopeft.executors.local._SILENT_SECONDS", 1.0)
    executor._processes[0].process.send_signal(signal.SIGSTOP)
    return executor


def test_a_worker_that_hangs_is_ended_and_its_successor_works(
    hung: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than a busy one may be silent: what has nothing to do has nothing to tell.
    assert hung.wait(1.5) == []
    hung.assign(0, make_pack(1))
    (death,) = hung.wait(20.0)
    assert (death.worker, death.event) == (0, None)
    assert re.search(r"exit status -9 after \d s without a sign of life", death.detail)
    assert hung._processes[1].process.poll() is None
    # Its successor hangs before it is ready, with something to do already.
    hung.restart(0)
    hung._processes[0].process.send_signal(signal.SIGSTOP)
    hung.assign(0, make_pack(2))
    (again,) = hung.wait(20.0)
    assert "without a sign of life" in again.detail
    monkeypatch.setattr("autopeft.executors.local._SILENT_SECONDS", 60.0)
    check_successor(hung)


def test_a_driver_that_was_stopped_itself_ends_no_worker(hung: LocalExecutor) -> None:
    hung.assign(0, make_pack(1))
    # Neither looked nor waited, as where a shell has stopped all of them.
    time.sleep(1.5)
    assert hung.wait(0.1) == []
    hung._processes[0].process.send_signal(signal.SIGCONT)
    (event,) = hung.wait(20.0)
    assert isinstance(event.event, Finished)


def test_a_worker_that_breaks_is_reported_once_and_its_successor_works(executor: LocalExecutor) -> None:
    # A configuration without the rank that the backend looks for.
    executor.assign(0, make_pack(1, "lora", alpha_over_rank=2))
    (broken,) = executor.wait(10.0)
    assert isinstance(broken.event, Broken)
    assert "KeyError: 'rank'" in broken.event.detail
    executor._processes[0].process.wait(10.0)
    executor._processes[0]._reader.join(10.0)
    check_successor(executor)


def test_what_a_study_folder_lacks_ends_the_study_and_what_a_trial_lacks_does_not(
    patched: Callable[[str], LocalExecutor],
) -> None:
    executor = patched("""
        from autopeft import errors
        from autopeft.backends import fake

        def run(self, stretch, emit):
            raise {1: errors.StudyError, 2: errors.SpecError, 3: OSError}[stretch.job]("no room\\nand more")

        fake.FakeBackend.run = run
    """)
    executor.start()
    told = []
    for job in (1, 2, 3):
        executor.assign(0, make_pack(job))
        (event,) = executor.wait(20.0)
        assert isinstance(event.event, Broken)
        told.append((event.event.ends_study, event.event.usage))
        executor.restart(0)
        assert isinstance(executor.wait(20.0)[0].event, Ready)
    assert told == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize("afterwards", ["exit 7", "echo; exec sleep 60"])
def test_a_worker_whose_line_cannot_be_read_is_reported_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, afterwards: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"""#!/bin/sh\nread setup\nprintf '{{"kind": "finis'\n{afterwards}\n""")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    executor = LocalExecutor(make_setup(tmp_path), ["cpu"])
    executor._spawn(0)
    events = executor.wait(10.0)
    executor.close()
    assert [(event.worker, event.event) for event in events] == [(0, None)]
    assert "a line that is no event" in events[0].detail


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LocalExecutor]]:
    """An executor whose processes, all that are started from here on, run the given lines before anything else."""
    executor = LocalExecutor(make_setup(tmp_path), ["cpu"])

    def patch(lines: str) -> LocalExecutor:
        (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(lines))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *map(str, sys.path)]))
        monkeypatch.setenv("ONCE", str(tmp_path / "once"))
        return executor

    yield patch
    executor.close()


PATCHED_COSTS = """
    import os, pathlib, time
    from autopeft.backends import fake

    once, cost = pathlib.Path(os.environ["ONCE"]), fake.FakeCostModel.cost

    def die():
        os.kill(os.getpid(), 9)

    def cost_or_not(self, spec):
        if spec.max_steps == 41:
            raise RuntimeError("no kernel for this\\nand a page of advice")
        if spec.max_steps == 42:
            die()
        if spec.max_steps in (43, 44) and not once.exists():
            once.touch()
            die() if spec.max_steps == 43 else time.sleep(60)
        return cost(self, spec)

    fake.FakeCostModel.cost = cost_or_not
"""


def make_spec(max_steps: int) -> TrialSpec:
    return replace(make_pack(1).stretches[0].spec, max_steps=max_steps)


@pytest.mark.parametrize(
    ("max_steps", "rule"),
    [
        (41, "its cost cannot be computed: RuntimeError: no kernel for this"),
        (42, "its cost cannot be computed, tried twice: exit status -9."),
    ],
)
def test_what_no_cost_can_be_computed_of_is_refused_and_others_are_answered(
    patched: Callable[[str], LocalExecutor], max_steps: int, rule: str
) -> None:
    executor = patched(PATCHED_COSTS)
    assert executor.cost(make_spec(max_steps)) == CostReply(cost=None, refused=rule)
    assert executor.cost(make_spec(40)).cost is not None


@pytest.mark.parametrize("max_steps", [43, 44])
def test_a_cost_process_that_dies_or_hangs_once_is_asked_again(
    patched: Callable[[str], LocalExecutor], monkeypatch: pytest.MonkeyPatch, max_steps: int
) -> None:
    monkeypatch.setattr("autopeft.executors.local._COST_SECONDS", 1.0)
    executor = patched(PATCHED_COSTS)
    assert executor.cost(make_spec(max_steps)).cost is not None


def test_a_cost_process_that_cannot_start_ends_the_search(patched: Callable[[str], LocalExecutor]) -> None:
    executor = patched("""
        import os
        from autopeft import backends

        backends.load_cost_model = lambda setup: os.kill(os.getpid(), 9)
    """)
    with pytest.raises(WorkerError, match="died: exit status -9"):
        executor.cost(make_spec(40))


def test_a_worker_that_cannot_start_says_why_in_a_line_and_all_of_it_below_a_traceback(
    patched: Callable[[str], LocalExecutor],
) -> None:
    executor = patched("""
        from autopeft.backends import fake

        def ready(self):
            raise RuntimeError("CUDA error: out of luck\\nFor debugging consider a page of advice")

        fake.FakeBackend.ready = ready
    """)
    with pytest.raises(WorkerError) as failure:
        executor.start()
    assert str(failure.value) == "A worker broke: RuntimeError: CUDA error: out of luck"
    (words,) = failure.value.__notes__
    assert "Traceback" in words
    assert "a page of advice" in words


def test_a_worker_that_cannot_have_its_model_says_so_in_a_paragraph(tmp_path: Path) -> None:
    # Without it a worker breaks before it looks for the model.
    pytest.importorskip("torch")
    executor = LocalExecutor(make_setup(tmp_path, "hf", str(tmp_path / "nowhere")), ["cpu"])
    with pytest.raises(ModelError, match=r"neither a folder .* nor a model of the hub"):
        executor.start()
    executor.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # A zombie has ended; nobody here reaps what another process started.
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_driver_that_was_killed(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_local import LocalExecutor, make_pack, make_setup
        executor = LocalExecutor(make_setup(Path({str(tmp_path)!r})), ["cpu", "cpu"])
        executor.start()
        executor.cost(make_pack(1).stretches[0].spec)
        print(*(p.process.pid for p in executor._processes.values()), flush=True)
        time.sleep(60)
    """
    driver = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    with driver.stdout:
        workers = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(workers) == 3
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)


def test_a_worker_gets_the_gpu_that_nvidia_smi_numbers_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: dict[int, dict[str, str]] = {}

    def start(number: int, setup: WorkerSetup, environment: dict[str, str], events: object) -> None:
        environments[number] = environment

    monkeypatch.setattr("autopeft.executors.local._Process", start)
    LocalExecutor(make_setup(tmp_path), ["cuda:3"])._spawn(0)
    # CUDA's own numbers begin with the fastest GPU.
    assert environments[0]["CUDA_VISIBLE_DEVICES"] == "3"
    assert environments[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_gpu_that_torch_cannot_use_is_told_in_a_paragraph(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU that is here")
    executor = LocalExecutor(make_setup(tmp_path, "hf"), ["cuda:0"])
    with pytest.raises(ModelError, match=rf"torch {re.escape(torch.__version__)}, .*autopeft doctor") as failure:
        executor.start()
    executor.close()
    assert "\n" not in str(failure.value)
