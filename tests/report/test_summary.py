"""What the terminal says at the end of a study."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
from recipe_specs import make_recipe_spec

from autopeft.cli.main import build_parser
from autopeft.cli.session import print_summary
from autopeft.records import StudyRecord
from autopeft.tasks.spec import find_task_text


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("lora", "autopeft export {} --pick knee --to peft --out {}-knee"),
        ("bottleneck", "autopeft train {} --pick knee"),
    ],
)
def test_the_knee_is_taken_home_by_a_command_that_works_for_it(
    study: StudyRecord, capsys: pytest.CaptureFixture[str], method: str, command: str
) -> None:
    knee = next(pick.number for pick in study.picks if pick.name == "knee")
    spec = make_recipe_spec(method, batch_size=16)
    trials = [dataclasses.replace(trial, spec=spec) if trial.number == knee else trial for trial in study.trials]
    config = dataclasses.replace(study.config, task=find_task_text("sst2"))
    print_summary(dataclasses.replace(study, config=config, trials=tuple(trials)))
    name = study.config.name
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("take it home with: "))
    assert line == "take it home with: " + command.format(name, name)
    assert build_parser().parse_args(shlex.split(line.partition(": autopeft ")[2])).pick == "knee"
