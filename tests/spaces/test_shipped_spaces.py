"""What the shipped search spaces promise, kept on a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopeft.backends.hf.base_model import BaseModel, load_base
from autopeft.backends.hf.build import build_trial_model, count_trainable
from autopeft.cli.main import main
from autopeft.records import Scalar
from autopeft.spaces.load import find_space, list_spaces, parse_space
from autopeft.spaces.space import MethodSpace, is_open, make_spec

SHIPPED = sorted(list_spaces())
TINY = parse_space(find_space("tiny")[1], name="tiny", device_kind="cpu", max_steps=160)


@pytest.fixture(scope="module")
def minilm() -> BaseModel:
    return load_base("minilm", num_labels=2, bits=32, device="cpu")


def largest_setting(space: MethodSpace) -> dict[str, Scalar]:
    """Ranges of whole numbers at their upper end, choices at their last; none of the others adds parameters."""
    values = dict(space.fixed)
    for dimension in space.dimensions:
        values[dimension.name] = dimension.default
        if is_open(dimension, values):
            if dimension.kind == "int":
                values[dimension.name] = int(dimension.high or 0)
            elif dimension.kind == "choice":
                values[dimension.name] = dimension.choices[-1]
    return values


@pytest.mark.parametrize("method", TINY.methods)
def test_the_tiny_spaces_largest_setting_is_below_a_thousandth_of_the_base(method: str, minilm: BaseModel) -> None:
    spec = make_spec(method, largest_setting(TINY.methods[method]), max_steps=160, seed=0)
    adapter = count_trainable(build_trial_model(minilm, spec), minilm.head).adapter
    assert 0 < adapter < 0.001 * sum(parameter.numel() for parameter in minilm.model.parameters())


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_shipped_space_can_be_planned_with(
    name: str, device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A process with torch computes the costs; the slow test below waits for it.
    monkeypatch.setattr("autopeft.cli.search._print_costs", lambda plan: None)
    arguments = ["search", "--task", "demo", "--model", "minilm", "--space", name, "--max-steps", "160", "--dry-run"]
    arguments += ["--budget", "20trials"] if device == "cpu" else ["--budget", "2gpu-h", "--plan-for", device]
    assert main(arguments) == 0
    space = parse_space(find_space(name)[1], name=name, device_kind="cpu", max_steps=160, model_kind="encoder")
    assert f"{name}: {', '.join(space.methods)} (" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_trials_of_a_shipped_space_have_their_costs(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "--task", "demo", "--model", "minilm", "--space", name, "--budget", "20trials", "--dry-run"]
    assert main(arguments) == 0
    *rows, verdict = capsys.readouterr().out.partition("tried first\n")[2].splitlines()
    space = parse_space(find_space(name)[1], name=name, device_kind="cpu", max_steps=160, model_kind="encoder")
    assert len(rows) == len(space.recipes) > 0
    assert all("MiB" in row for row in rows)
    assert verdict == f"{len(rows)} of {len(rows)} fit"
