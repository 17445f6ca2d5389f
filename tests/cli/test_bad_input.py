"""Bad input, in process: one helpful paragraph, exit code 2, nothing left behind and nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from autopeft.cli.main import main
from autopeft.records import SCHEMA_VERSION

ROWS = [{"text": f"a good film {i}" if i % 2 else f"a bad film {i}", "label": i % 2} for i in range(60)]
TASK = "name: mine\ntitle: Mine\ntext: text\nlabels: [bad, good]\nfiles: {train: train.jsonl}\n"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a task of one's own and a model's folder. No GPU is on this machine."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(TASK)
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Refusal:
    """Runs a command that must be refused, and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self._capsys = capsys
        self._folder = folder

    def __call__(self, *arguments: str) -> str:
        before = files_below(self._folder)
        code = main(list(arguments))
        said = self._capsys.readouterr().err
        assert code == 2, said
        assert files_below(self._folder) == before
        assert said.startswith("autopeft: ")
        assert said.count("\n") == 1, "one paragraph"
        assert "Traceback" not in said
        return said


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], folder: Path) -> Refusal:
    return Refusal(capsys, folder)


def search(*changes: str, task: str = "demo", budget: str = "3trials") -> list[str]:
    return ["search", "--task", task, "--budget", budget, "--model", "model", *changes]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (search(task="ssst2"), ["'ssst2'", "Did you mean 'sst2'?"]),
        (search(task="nowhere.yaml"), ["nowhere.yaml", "does not exist"]),
        (search("--methods", "lorra"), ["'lorra'", "Did you mean 'lora'?"]),
        (search("--methods", "lora,ia4"), ["'ia4'", "Did you mean 'ia3'?"]),
        (search("--space", "defualt"), ["'defualt'", "Did you mean 'default'?"]),
        (search("--space", "my-space.yaml"), ["the file 'my-space.yaml', which does not exist", "everything"]),
        (search("--fix", "lora.rnk=8"), ["rnk", "Did you mean 'rank'?"]),
        (search("--fix", "loora.rank=8"), ["loora", "Did you mean 'lora'?"]),
        (search("--fix", "bitz=4"), ["bitz", "Did you mean 'bits'?"]),
        (search("--fix", "lora.rank=9999"), ["lora.rank=9999", "1 to 256"]),
        (search("--fix", "lora.rank=many"), ["1 to 256"]),
        (search("--fix", "lora.rank"), ["NAME=VALUE"]),
        # What YAML cannot read is taken as it is.
        (search("--fix", "batch_size=[1"), ["batch_size=[1", "1 to 4096"]),
        (search("--fix", "lora.rank=2026-13-01"), ["lora.rank=2026-13-01", "1 to 256"]),
        (search("--fix", "lora.rank=!!python/name:os.system"), ["1 to 256"]),
        (search("--fix", "bits=16"), ["16", "GPU"]),
        (search("--methods", "full", "--fix", "bits=4"), ["Nothing is left to search"]),
        (search(budget="soon"), ["'soon'", "8gpu-h"]),
        (search(budget="0trials"), ["above zero"]),
        (search(budget="0h"), ["above zero"]),
        (search(budget=""), ["8gpu-h"]),
        (search(budget="1.5trials"), ["whole"]),
        (search(budget="1h,2h"), ["twice"]),
        (search(budget="8gpu-h"), ["no GPU", "cpu-min"]),
        (search("--objectives", "quality,vrram"), ["'vrram'", "Did you mean 'vram'?"]),
        (search("--objectives", "vram"), ["must contain quality"]),
        (search("--max-vram", "lots"), ["24GB"]),
        (search("--max-vram", "0GB"), ["above zero"]),
        (search("--max-vram", "nanGB"), ["--max-vram"]),
        (search("--max-vram", "infGB"), ["--max-vram"]),
        (search("--max-steps", "3"), ["takes 4 to 1,000,000", "given 3"]),
        (search("--dry-run", "--plan-for", "h100", "--workers", "-3"), ["--workers takes 1 to 1,024", "given -3"]),
        (search("--dry-run", "--plan-for", "h100", "--workers", "0"), ["--workers takes 1 to 1,024", "given 0"]),
        (search("--max-steps", "0"), ["takes 4"]),
        (search("--max-steps", "-8"), ["takes 4"]),
        (search("--max-steps", "99999999999"), ["takes 4 to 1,000,000", "99,999,999,999"]),
        (search("--seed", "-1"), ["--seed"]),
        (search("--seed", "9999999999"), ["--seed takes 0 to 2147483647"]),
        (search("--workers", "0"), ["--workers"]),
        (search("--workers", "9999"), ["--workers"]),
        (search("--until", "25:00"), ["18:00"]),
        (search("--warm-start", "yesterday"), ["no study 'yesterday'"]),
        (search("--warm-start", "leaderboards/sst2/minilm.json"), ["leaderboards/sst2/minilm.json", "readable"]),
        (search("--warm-start", "train.jsonl.json"), ["leaderboard"]),
        (search("--warm-start", "model/config.json"), ["schema_version", "model/config.json"]),
        (search("--methods", "shira", "--space", "everything", "--warm-start"), ["space shira", "name other studies"]),
        (search("--stop-when-gain-below", "little"), ["such as 0.5%", "'little'"]),
        (search("--stop-when-gain-below", "100%"), ["below 100%"]),
        (search("--stop-when-gain-below", "0"), ["above 0%"]),
        (search("--price", "cheap"), ["2.5/gpu-h"]),
        (search("--name", "../escape"), ["'../escape'", "--name"]),
        (search("--name", "a/b"), ["--name"]),
        (search("--name", ".hidden"), ["--name"]),
        (search("--include", "missing.yaml"), ["--include", "missing.yaml"]),
        (search("--plan-for", "h100"), ["--dry-run"]),
        (search("--plan-for", "h1000", "--dry-run"), ["Did you mean 'h100'?"]),
        (search("--plan-for", "h100", "--dry-run", budget="40cpu-min"), ["--plan-for", "'40cpu-min' is in core time"]),
        (search("--fix", "lora.rank=8", "--fix", "lora.rank=16"), ["lora.rank both 8 and 16"]),
        (search("--methods", "lora,full", "--fix", "bits=4"), ["leaves nothing of full", "--fix bits=4"]),
        (search("--model", "./nowhere"), ["./nowhere", "does not exist"]),
        (search("--data-dir", "nowhere", task="sst2"), ["nowhere", "sst2/train.jsonl", "--data-dir", "does not exist"]),
        (search("--data-dir", "model", task="mine.yaml"), ["--data-dir", "its files:"]),
        (search("--data-dir", "model"), ["--data-dir", "made, not read"]),
        (search(task="sst2"), ["No --data-dir", "AUTOPEFT_DATA_DIR", "--task demo"]),
        (["resume", "nothing"], ["'nothing'", "none yet"]),
        (["report", "nothing"], ["'nothing'"]),
        (["resume", "../escape"], ["../escape"]),
        (["export", "nothing", "--pick", "best", "--out", "x"], ["'nothing'"]),
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused(refuse: Refusal, arguments: list[str], words: list[str]) -> None:
    said = refuse(*arguments)
    assert [word for word in words if word not in said] == [], said


def test_a_model_folder_without_a_config_is_refused(refuse: Refusal, folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "config.json" in refuse(*search("--model", "empty"))


# --- files of one's own


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ["train.jsonl:31", "JSON"]),
        ('{"txt": "hello", "label": 1}', ["train.jsonl:31", "'text'", "txt"]),
        ('{"text": "hello"}', ["train.jsonl:31", "'label'", "no such column"]),
        ('{"text": "hello", "label": null}', ["train.jsonl:31", "'label'"]),
        ('{"text": "hello", "label": 2}', ["train.jsonl:31", "bad, good", "0 to 1"]),
        ('{"text": "hello", "label": "ugly"}', ["train.jsonl:31", "'ugly'"]),
        ('{"text": 5, "label": 1}', ["train.jsonl:31", "'text'", "5"]),
        ("[1, 2]", ["train.jsonl:31", "object"]),
        ("", ["train.jsonl:31", "empty"]),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(refuse: Refusal, folder: Path, line: str, words: list[str]) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(30, line)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    said = refuse(*search(task="mine.yaml"))
    assert [word for word in words if word not in said] == [], said


def test_one_class_data_is_refused(refuse: Refusal, folder: Path) -> None:
    write_rows(folder / "train.jsonl", [row | {"label": 1} for row in ROWS])
    assert "every training row of task 'mine' is 'good'" in refuse(*search(task="mine.yaml"))


def test_a_missing_data_file_is_refused(refuse: Refusal, folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    said = refuse(*search(task="mine.yaml"))
    assert "train.jsonl" in said
    assert "does not exist" in said


def test_too_few_rows_are_refused(refuse: Refusal, folder: Path) -> None:
    write_rows(folder / "train.jsonl", ROWS[:10])
    assert "at least 20" in refuse(*search(task="mine.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["mine.yaml", "YAML"]),
        ("just words", ["mine.yaml"]),
        (TASK + "lables: [a, b]\n", ["'lables'", "Did you mean 'labels'?"]),
        (TASK.replace("[bad, good]", "[bad]"), ["at least two labels"]),
        (TASK.replace("text: text\n", ""), ["lacks", "'text'"]),
        (TASK + "scorer: accurracy\n", ["'accurracy'", "Did you mean 'accuracy'?"]),
    ],
)
def test_a_bad_task_file_is_refused(refuse: Refusal, folder: Path, text: str, words: list[str]) -> None:
    (folder / "mine.yaml").write_text(text)
    said = refuse(*search(task="mine.yaml"))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: [", ["bad.yaml".removesuffix(".yaml"), "YAML"]),
        ("methods: {}", ["must name methods"]),
        ("methods: {lorra: {}}", ["'lorra'", "Did you mean 'lora'?"]),
        ("method: {lora: {}}\nmethods: {lora: {}}", ["'method'", "Did you mean 'methods'?"]),
        ("methods: {lora: {rnk: [8]}}", ["'rnk'", "Did you mean 'rank'?"]),
        ("methods: {lora: {rank: {low: 64, high: 8}}}", ["lora.rank", "low to high"]),
        ("methods: {lora: {rank: {low: 1, high: 9999}}}", ["lora.rank", "1 to 256"]),
        ("methods: {lora: {bits: [16]}}", ["lora.bits", "unquantized"]),
        ("methods: {lora: {bits: [5]}}", ["lora.bits", "unquantized"]),
    ],
)
def test_a_bad_search_space_is_refused(refuse: Refusal, folder: Path, text: str, words: list[str]) -> None:
    (folder / "bad.yaml").write_text(text)
    said = refuse(*search("--space", "bad.yaml"))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 8", ["must name its method"]),
        ("- lora", ["must name its method"]),
        ("method: [", ["cannot be read"]),
        ("method: lorra", ["'lorra'", "Did you mean 'lora'?"]),
        ("method: lora\nrnk: 8", ["'rnk'", "Did you mean 'rank'?"]),
        ("method: lora\nrank: 9999", ["1 to 256"]),
        ("method: lora\nrank: many", ["1 to 256"]),
        ("method: lora\nbits: 16", ["16", "32"]),
        ("method: lora\nbits: 5", ["bits"]),
        ("method: lora\nbits: 4\ninit: pissa", ["PiSSA"]),
        ("method: lora\nlearning_rate: fast", ["learning_rate"]),
        ("method: lora\nlearning_rate: [1, 2]", ["learning_rate"]),
        ("method: lora\nlearning_rate: -1", ["learning_rate"]),
        ("method: lora\nlearning_rate: .nan", ["learning_rate"]),
        ("method: lora\nbatch_size: big", ["batch_size"]),
        ("method: lora\nbatch_size: 0", ["batch_size"]),
        ("method: lora\nschedule: liner", ["schedule"]),
        ("method: lora\nwarmup_ratio: 7", ["warmup_ratio"]),
        ("method: lora\nweight_decay: -1", ["weight_decay"]),
        ("method: lora\ntarget_modules: atention", ["'atention'", "Did you mean 'attention'?"]),
        ("method: lora\ntarget_modules: 're:('", ["regular expression"]),
        ("method: head", ["head"]),
    ],
)
def test_a_bad_included_configuration_is_refused(refuse: Refusal, folder: Path, text: str, words: list[str]) -> None:
    (folder / "mine-lora.yaml").write_text(text)
    said = refuse(*search("--include", "mine-lora.yaml"))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("text", "fixed", "words"),
    [
        (
            "method: lora\nbits: 8",
            "bits=4",
            ["mine-lora.yaml sets bits to 8", "--fix bits=4", "Leave one"],
        ),
        ("method: lora\nbits: unquantized", "bits=4", ["sets bits to unquantized"]),
        ("method: lora\nrank: 8", "lora.rank=4", ["sets rank to 8", "--fix lora.rank=4"]),
        ("method: full", "bits=4", ["mine-lora.yaml: ", "trains on a base of 16, 32 bits, but bits is 4"]),
    ],
)
def test_an_included_configuration_that_contradicts_what_is_fixed_is_refused(
    refuse: Refusal, folder: Path, text: str, fixed: str, words: list[str]
) -> None:
    (folder / "mine-lora.yaml").write_text(text)
    said = refuse(*search("--include", "mine-lora.yaml", "--fix", fixed))
    assert [word for word in words if word not in said] == [], said


# --- studies and outputs


@pytest.fixture
def study(folder: Path) -> str:
    """The name of a study that was created and never run."""
    from autopeft.search.plan import make_plan, make_provenance
    from autopeft.search.request import Request
    from autopeft.search.store import StudyStore

    plan = make_plan(Request(task="demo", budget="3trials", model="model", name="mine"), studies=Path("studies"))
    StudyStore.create(Path("studies"), plan.config, make_provenance(plan), np.zeros(300, dtype=np.int64))
    for name in ("reports", "leaderboards"):
        (folder / name).mkdir()
    return "mine"


def test_a_study_name_that_exists_offers_to_resume(refuse: Refusal, study: str) -> None:
    assert "autopeft resume mine" in refuse(*search("--name", study))


def test_an_unknown_study_gets_the_nearest_name(refuse: Refusal, study: str) -> None:
    assert "Did you mean 'mine'?" in refuse("resume", "mnie")


def test_a_study_may_be_named_by_its_folder(refuse: Refusal, study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"studies/{study}"]) == 0
    assert "reports/mine.html" in capsys.readouterr().out
    assert "has no 'knee' yet" in refuse("train", f"studies/{study}/", "--pick", "knee")
    assert "no study 'elsewhere/mine'" in refuse("resume", "elsewhere/mine")


def test_rows_that_have_moved_are_looked_for_in_the_data_folder(
    refuse: Refusal, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autopeft.search.plan import make_plan, make_provenance
    from autopeft.search.request import Request
    from autopeft.search.store import StudyStore

    plan = make_plan(Request(task="mine.yaml", budget="3trials", model="model", name="own"), studies=Path("studies"))
    StudyStore.create(Path("studies"), plan.config, make_provenance(plan), np.zeros(3, dtype=np.int64))
    for name in ("reports", "leaderboards", "moved"):
        (folder / name).mkdir()
    (folder / "train.jsonl").rename(folder / "moved" / "train.jsonl")
    assert "train.jsonl" in (said := refuse("resume", "own"))
    assert "--data-dir" in said
    resumed = []
    monkeypatch.setattr("autopeft.cli.session.run_study", lambda store, *args: resumed.append(store) or 0)
    assert main(["resume", "own", "--data-dir", "moved"]) == 0
    assert str(folder / "moved" / "train.jsonl") in resumed[0].config.task
    # From here on they are known.
    assert main(["resume", "own"]) == 0
    # Rows that are named are taken, though those of before are still there.
    (folder / "again").mkdir()
    write_rows(folder / "again" / "train.jsonl", ROWS)
    assert main(["resume", "own", "--data-dir", "again"]) == 0
    assert str(folder / "again" / "train.jsonl") in resumed[-1].config.task
    assert main(["resume", "own", "--data-dir", "moved"]) == 0
    write_rows(folder / "moved" / "train.jsonl", ROWS[::-1])
    assert "have changed since 'own' began" in refuse("resume", "own")


def test_a_model_that_is_not_the_studys_is_not_remembered(
    study: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autopeft.cli.session import find_places, open_study
    from autopeft.errors import ModelError

    def refuse(*args: object) -> int:
        raise ModelError("other weights")

    monkeypatch.setattr("autopeft.cli.session.run_study", refuse)
    (folder / "other").mkdir()
    assert main(["resume", study, "--model", "other"]) == 2
    assert find_places(open_study(study)).model == str(folder / "model")
    monkeypatch.setattr("autopeft.cli.session.run_study", lambda *args: 0)
    assert main(["resume", study, "--model", "other"]) == 0
    assert find_places(open_study(study)).model == str(folder / "other")


def test_a_data_folder_of_before_that_is_gone_is_in_nobodys_way(study: str) -> None:
    from autopeft.cli.session import find_places, open_study

    Path(f"studies/{study}/local.json").write_text(json.dumps({"model": "model", "data_dir": "/gone"}))
    assert find_places(open_study(study)).data_dir is None


def test_a_model_that_has_moved_is_named_as_the_study_names_it(study: str) -> None:
    from argparse import Namespace

    from autopeft.cli.session import open_study
    from autopeft.cli.train import _read_study
    from autopeft.search.plan import restore_space

    store = open_study(study)
    space = restore_space(store.config)
    store.add(space.recipes[0], "recipe", space)
    name = store.config.model
    Path(f"studies/{study}/local.json").write_text(json.dumps({"model": f"/home/of/somebody/{name}"}))
    source = _read_study(Namespace(source=study, pick="0"))
    assert source.recipe.model == f"local:{name}"


def test_places_that_cannot_be_read_are_told_with_what_to_name(refuse: Refusal, study: str) -> None:
    Path(f"studies/{study}/local.json").write_text("")
    assert f"autopeft resume {study} --model MODEL --data-dir DIR" in refuse("resume", study)


def test_a_binary_score_of_three_labels_is_refused_for_a_new_study(refuse: Refusal, folder: Path) -> None:
    (folder / "mine.yaml").write_text(TASK.replace("[bad, good]", "[bad, good, fair]") + "scorer: f1_binary\n")
    assert "of two labels" in (said := refuse(*search(task="mine.yaml")))
    assert "f1_macro" in said


def test_a_task_whose_name_is_no_file_name_is_refused_before_anything_is_fetched(refuse: Refusal, folder: Path) -> None:
    (folder / "mine.yaml").write_text(TASK.replace("name: mine", "name: my own"))
    assert "--name" in refuse(*search("--dry-run", task="mine.yaml"))


def test_a_study_of_a_newer_schema_is_refused(refuse: Refusal, study: str) -> None:
    with sqlite3.connect(f"studies/{study}/study.db") as database:
        database.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = 'schema_version'", [str(SCHEMA_VERSION + 1)]
        )
    database.close()
    for command in (["resume", study], ["report", study], ["export", study, "--pick", "best", "--out", "x"]):
        assert "newer autopeft" in refuse(*command)


def test_a_budget_of_another_kind_is_refused_on_resume(refuse: Refusal, study: str) -> None:
    assert "keeps its kind of budget" in refuse("resume", study, "--budget", "2h")


def test_a_study_that_another_process_runs_keeps_its_budget(refuse: Refusal, study: str) -> None:
    from autopeft.search.store import StudyStore

    with StudyStore.open(Path("studies"), study).lock():
        assert "is being run by another process" in refuse("resume", study, "--budget", "9trials")
    assert StudyStore.open(Path("studies"), study).config.budget == "3trials"


def test_a_study_that_another_process_went_on_with_is_resumed_as_it_is_then(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autopeft.search.plan import restore_space
    from autopeft.search.store import StudyStore

    def go_on(*args: object) -> None:
        other = StudyStore.open(Path("studies"), study)
        space = restore_space(other.config)
        other.add(space.recipes[0], "recipe", space)

    resumed = []
    monkeypatch.setattr("autopeft.search.plan.check_rows", go_on)
    monkeypatch.setattr("autopeft.cli.session.run_study", lambda store, *args: resumed.append(store) or 0)
    assert main(["resume", study]) == 0
    assert len(resumed[0].trials) == 1


def test_going_on_with_other_cores_is_told(
    study: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("autopeft.cli.session.run_study", lambda *args: 0)
    assert main(["resume", study]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("autopeft.search.plan.plan_cpu_workers", lambda workers: (1, 7))
    assert main(["resume", study]) == 0
    said = capsys.readouterr().out
    assert f"The study '{study}' began with " in said
    assert "and goes on with 1 worker x 7 cores of " in said


def test_what_the_system_refuses_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "studies/mine/scores.npz")

    monkeypatch.setattr("autopeft.cli.listings.list_tasks", fail)
    assert main(["tasks"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left on device: 'studies/mine/scores.npz'" in told
    with pytest.raises(OSError, match="No space"):
        main(["--debug", "tasks"])


def test_a_defect_is_told_in_a_paragraph_and_with_its_traceback_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise KeyError("rank")

    monkeypatch.setattr("autopeft.cli.listings.list_tasks", fail)
    assert main(["tasks"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("autopeft: This is a defect of autopeft: KeyError: 'rank'. ")
    assert told.count("\n") == 1
    with pytest.raises(KeyError):
        main(["--debug", "tasks"])


@pytest.mark.parametrize("name", ["studies", "reports", "leaderboards"])
def test_a_file_where_outputs_go_is_refused_before_anything_starts(refuse: Refusal, folder: Path, name: str) -> None:
    (folder / name).write_text("in the way")
    assert f"'{name}'" in refuse(*search())


def test_a_damaged_study_is_refused(refuse: Refusal, study: str, folder: Path) -> None:
    (folder / "studies" / study / "study.db").write_text("not a database")
    assert "cannot be read" in refuse("resume", study)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pick", "best", "--out", "new"], ["no 'best' yet", "autopeft resume mine"]),
        (["--pick", "kne", "--out", "new"], ["'kne'", "Did you mean 'knee'?"]),
        (["--pick", "99", "--out", "new"], ["99"]),
        (["--pick", "vram<24GB", "--out", "new"], ["full length", "autopeft resume mine"]),
        (["--pick", "vram<lots", "--out", "new"], ["'lots'", "24GB"]),
    ],
)
def test_a_bad_export_is_refused(refuse: Refusal, study: str, arguments: list[str], words: list[str]) -> None:
    said = refuse("export", study, *arguments)
    assert [word for word in words if word not in said] == [], said


def test_a_study_can_be_moved_away_after_a_refusal(refuse: Refusal, study: str, folder: Path) -> None:
    refuse(*search("--name", study))
    shutil.move(str(folder / "studies" / study), str(folder / "away"))
