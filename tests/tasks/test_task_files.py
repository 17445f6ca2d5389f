"""Tasks of one's own: every documented form of a task and its rows, what is refused, and how rows are divided."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import DataError, TaskError
from autopeft.tasks.data import (
    Example,
    Splits,
    load_splits,
    majority_predictions,
    read_rows,
    split_stratified,
)
from autopeft.tasks.scorers import SCORERS, estimate_example_sd, resample_scores, score_predictions
from autopeft.tasks.spec import TaskSpec, find_task_text, list_tasks, parse_task

MakeTask = Callable[..., TaskSpec]
ROWS = [{"text": f"row {i}", "label": i % 3 % 2} for i in range(60)]


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    def make_task(rows: list[Any] | str = ROWS, *, name: str = "train.jsonl", **keys: Any) -> TaskSpec:
        """A task file in a folder of its own, beside its rows."""
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        values = {"name": "mine", "title": "Mine", "text": "text", "labels": ["bad", "good"]}
        task_file = tmp_path / "mine.yaml"
        task_file.write_text(json.dumps(values | {"files": {"train": name}} | keys), encoding="utf-8")
        return parse_task(find_task_text(str(task_file)), "mine.yaml")

    return make_task


def rows_of(splits: Splits) -> Counter[Example]:
    return Counter([*splits.train, *splits.validation, *splits.test])


# --- forms


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_rows_are_read_from_every_documented_format(make_task: MakeTask, name: str) -> None:
    splits = load_splits(make_task(name=name), None, seed=0)
    assert rows_of(splits) == Counter(Example(row["text"], None, row["label"]) for row in ROWS)


def test_labels_may_be_names(make_task: MakeTask) -> None:
    task = make_task([row | {"label": ["bad", "good"][row["label"]]} for row in ROWS])
    assert rows_of(load_splits(task, None, seed=0)) == rows_of(load_splits(make_task(), None, seed=0))


def test_columns_may_have_other_names_and_come_in_pairs(make_task: MakeTask) -> None:
    rows = [{"q": f"question {i}", "a": f"answer {i}", "right": i % 2} for i in range(40)]
    task = make_task(rows, text="q", text_pair="a", label="right")
    assert set(rows_of(load_splits(task, None, seed=0))) == {Example(row["q"], row["a"], row["right"]) for row in rows}


def test_files_are_found_beside_the_task_file(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    monkeypatch.chdir("/")
    assert len(load_splits(task, None, seed=0).train) > 0


def test_a_test_file_of_ones_own_is_the_test_split(make_task: MakeTask, tmp_path: Path) -> None:
    rows = [{"text": f"held out {i}", "label": i % 2} for i in range(7)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_splits(make_task(files={"train": "train.jsonl", "test": "test.jsonl"}), None, seed=0)
    assert [example.text for example in splits.test] == [row["text"] for row in rows]
    assert len(splits.train) + len(splits.validation) == len(ROWS)


def test_a_data_folder_is_searched_before_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("validation", 10)):
        rows = ({"sentence": f"{name} {i}", "label": i % 2} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = parse_task(find_task_text("sst2"), "sst2")
    splits = load_splits(task, str(tmp_path / "data"), seed=0)
    assert {example.text.split()[0] for example in splits.test} == {"validation"}
    assert len(splits.train) + len(splits.validation) == 40


def write_rows(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": f"{path.stem} {i}", "label": i % 2} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sources_of(splits: Splits) -> list[set[str]]:
    """Of train, validation and test: the files that their rows are from."""
    return [{example.text.split()[0] for example in split} for split in splits[:3]]


def test_validation_rows_of_ones_own_are_those_that_trials_are_compared_on(make_task: MakeTask, tmp_path: Path) -> None:
    write_rows(tmp_path / "dev.jsonl", 9)
    files = {"train": "train.jsonl", "validation": "dev.jsonl"}
    splits = load_splits(make_task(files=files), None, seed=0)
    assert sources_of(splits) == [{"row"}, {"dev"}, {"row"}]
    assert len(splits.validation) == 9
    assert "compared on 9 rows of its own validation split" in splits.notes[0]
    few = load_splits(make_task(files=files, max_validation=4), None, seed=0)
    assert 2 <= len(few.validation) <= 4
    assert f"{len(few.validation)} of the 9 (max_validation) rows" in few.notes[0]
    assert splits.digest != few.digest


def test_a_data_folder_may_have_all_three_splits(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("validation", 10), ("test", 12)):
        write_rows(tmp_path / "mine" / f"{name}.jsonl", count)
    task = parse_task("{name: mine, title: Mine, text: text, labels: [bad, good]}", "mine.yaml")
    splits = load_splits(task, str(tmp_path), seed=0)
    assert sources_of(splits) == [{"train"}, {"validation"}, {"test"}]
    assert [len(split) for split in splits[:3]] == [40, 10, 12]


@pytest.mark.parametrize("values", [[1, 3, 2], ["1", "3", "2"]])
def test_names_that_are_numbers_are_meant_however_they_are_written(make_task: MakeTask, values: list[Any]) -> None:
    rows = [{"text": f"row {i}", "label": values[i % 3]} for i in range(60)]
    splits = load_splits(make_task(rows, labels=["3", "2", "1"]), None, seed=0)
    assert all(example.label == [2, 0, 1][int(example.text.split()[1]) % 3] for example in rows_of(splits))


def test_no_index_stands_for_a_name_that_is_a_number(make_task: MakeTask) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(60)]
    with pytest.raises(DataError, match=r"must hold one of 1, 2, but the row holds 0"):
        load_splits(make_task(rows, labels=["1", "2"]), None, seed=0)


def test_a_csv_field_may_be_a_long_document(make_task: MakeTask) -> None:
    text = "text,label\n" + "".join(f"{'word ' * 30_000}{i},{i % 2}\n" for i in range(20))
    assert len(rows_of(load_splits(make_task(text, name="train.csv"), None, seed=0))) == 20


@pytest.mark.parametrize("name", sorted(list_tasks()))
def test_every_shipped_task_is_valid(name: str) -> None:
    task = parse_task(find_task_text(name), name)
    assert task.name == name


def test_a_byte_order_mark_as_spreadsheets_write_it_is_skipped(make_task: MakeTask) -> None:
    text = "\ufefftext,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40))
    assert len(rows_of(load_splits(make_task(text, name="train.csv"), None, seed=0))) == 40


def test_line_separators_inside_strings_do_not_break_rows(make_task: MakeTask) -> None:
    rows = [{"text": f"one\u2028two {i}", "label": i % 2} for i in range(40)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert "one\u2028two 3" in {example.text for example in rows_of(load_splits(make_task(text), None, seed=0))}


# --- what is refused


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"txt": "x", "label": 0}, "column 'text', but has the columns txt, label"),
        ({"text": None, "label": 0}, "column 'text', but holds None"),
        ({"text": "x"}, "'label' must hold one of bad, good.*no such column"),
        ({"text": "x", "label": -1}, "holds -1"),
        ({"text": "x", "label": 2}, "holds 2"),
        ({"text": "x", "label": True}, "holds True"),
        ({"text": "x", "label": 1.0}, "holds 1.0"),
        ({"text": "x", "label": "ugly"}, "holds 'ugly'"),
        ("text", "must be an object"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(make_task: MakeTask, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl:6: .*{words}"):
        load_splits(make_task([*ROWS[:5], row, *ROWS[5:]]), None, seed=0)


def test_a_bad_row_of_a_csv_file_is_refused_with_its_line(make_task: MakeTask) -> None:
    text = "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)) + "late,5\n"
    with pytest.raises(DataError, match=r"train\.csv:42: "):
        load_splits(make_task(text, name="train.csv"), None, seed=0)


def test_lines_of_a_csv_file_are_counted_where_texts_hold_line_breaks(make_task: MakeTask) -> None:
    text = 'text,label\n"two\nlines",1\nlate,5\n'
    with pytest.raises(DataError, match=r"train\.csv:4: "):
        load_splits(make_task(text, name="train.csv"), None, seed=0)


def test_a_line_that_is_no_json_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: every line must hold one JSON object"):
        load_splits(make_task('{"text": "x", "label": 0}\n{oops\n'), None, seed=0)


def test_an_empty_line_between_rows_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*empty"):
        load_splits(make_task('{"text": "x", "label": 0}\n\n{"text": "y", "label": 1}\n'), None, seed=0)


def test_empty_lines_at_the_end_are_none_of_the_rows(make_task: MakeTask) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS) + "\n\n"
    assert len(rows_of(load_splits(make_task(text), None, seed=0))) == len(ROWS)


@pytest.mark.parametrize(("name", "text"), [("train.json", "{"), ("train.json", "{}"), ("train.json", "[]")])
def test_a_json_file_must_hold_a_list_of_rows(make_task: MakeTask, name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"train\.json"):
        load_splits(make_task(text, name=name), None, seed=0)


def test_an_empty_file_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match="has none"):
        load_splits(make_task(""), None, seed=0)


def test_a_file_that_is_no_text_is_refused(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="UTF-8"):
        load_splits(task, None, seed=0)


def test_a_missing_file_is_refused_with_its_name(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl.*does not exist"):
        load_splits(task, None, seed=0)


@pytest.mark.parametrize("name", ["train.parquet", "train.tsv", "train.XLSX"])
def test_a_file_of_another_format_is_refused(make_task: MakeTask, name: str) -> None:
    with pytest.raises(DataError, match=r"read from \.jsonl, \.json or \.csv, but .*pandas"):
        load_splits(make_task("x", name=name), None, seed=0)


def test_one_class_data_is_refused_with_the_class(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"at least two classes.*'good'"):
        load_splits(make_task([row | {"label": 1} for row in ROWS]), None, seed=0)


def test_too_few_rows_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(TaskError, match=r"at least 20 training rows.*19"):
        load_splits(make_task(ROWS[:19]), None, seed=0)


def test_without_a_hub_and_a_folder_a_task_says_what_to_do(tmp_path: Path) -> None:
    task = TaskSpec(name="mine", title="Mine", text="text", labels=("a", "b"))
    with pytest.raises(DataError, match=r"No --data-dir was given, and no hub has them.*--data-dir.*--task demo"):
        load_splits(task, None, seed=0)
    with pytest.raises(DataError, match="There is no folder"):
        load_splits(task, str(tmp_path), seed=0)
    with pytest.raises(DataError, match=r"folder '.*typo', by --data-dir or AUTOPEFT_DATA_DIR.*does not exist"):
        load_splits(task, str(tmp_path / "typo"), seed=0)


def test_a_data_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    task = parse_task(find_task_text("sst2"), "sst2")
    with pytest.raises(DataError, match=r"must hold train\.jsonl"):
        load_splits(task, str(tmp_path), seed=0)
    (tmp_path / "sst2" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"test\.jsonl or validation\.jsonl"):
        load_splits(task, str(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "must be YAML"),
        ("- a", "must hold keys and values"),
        ("name: x\ntitle: x\ntext: t\nlabels: [a, b]\nlables: 1", "'lables'.*Did you mean 'labels'"),
        ("name: x\ntitle: x\nlabels: [a, b]", "lacks the field 'text'"),
        ("name: x\ntitle: x\ntext: t\nlabels: [a]", "at least two labels"),
        ("name: x\ntitle: x\ntext: t\nlabels: [a, a]", "named twice"),
        ("name: x\ntitle: x\ntext: t\nlabels: [0, 1]", r"in quotes.*is 0"),
        ("name: x\ntitle: x\ntext: t\nlabels: [yes, no]", r"in quotes.*is True"),
        ("name: x\ntitle: x\ntext: t\nlabels: [a, b]\nscorer: acuracy", "'acuracy'.*Did you mean 'accuracy'"),
        ("name: x\ntitle: x\ntext: t\nlabels: [a, b]\nhub: {pth: x}", "'pth'.*Did you mean 'path'"),
    ],
)
def test_a_mistake_in_a_task_file_is_refused(text: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        parse_task(text, "mine.yaml")


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(TaskError, match="Did you mean 'sst2'"):
        find_task_text("sst-2")


# --- splits

LABELS = st.lists(st.integers(0, 3), min_size=2, max_size=200)


@given(LABELS, st.floats(0.05, 0.5), st.integers(1, 1000), st.integers(0, 5))
def test_splits_are_disjoint_and_lose_nothing(labels: list[int], share: float, most: int, seed: int) -> None:
    examples = [Example(str(i), None, label) for i, label in enumerate(labels)]
    rest, part = split_stratified(examples, share=share, most=most, seed=seed)
    assert sorted([*rest, *part]) == sorted(examples)


@given(LABELS, st.floats(0.05, 0.5), st.integers(10, 1000), st.integers(0, 5))
def test_splits_are_stratified(labels: list[int], share: float, most: int, seed: int) -> None:
    examples = [Example(str(i), None, label) for i, label in enumerate(labels)]
    _, part = split_stratified(examples, share=share, most=most, seed=seed)
    share = min(share, most / len(labels))
    taken, counts = Counter(e.label for e in part), Counter(labels)
    for label, count in counts.items():
        assert abs(taken[label] - count * share) <= 1
    assert len(part) <= max(most, len(counts))


def test_every_class_of_two_or_more_is_in_both_parts() -> None:
    examples = [Example(str(i), None, 0) for i in range(50)] + [Example("a", None, 1), Example("b", None, 1)]
    rest, part = split_stratified(examples, share=0.1, most=1000, seed=0)
    assert {e.label for e in rest} == {e.label for e in part} == {0, 1}


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_split_is_a_function_of_its_seed(one: int, other: int) -> None:
    examples = [Example(str(i), None, i % 2) for i in range(100)]
    same = split_stratified(examples, share=0.2, most=99, seed=one) == split_stratified(
        examples, share=0.2, most=99, seed=other
    )
    assert same == (one == other)


def test_validation_has_at_most_a_thousand_rows(make_task: MakeTask) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(13_000)]
    splits = load_splits(make_task(rows), None, seed=0)
    assert 990 <= len(splits.validation) <= 1000


def test_no_row_is_in_two_splits(make_task: MakeTask) -> None:
    splits = load_splits(make_task(), None, seed=0)
    sets = [set(split) for split in splits[:3]]
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(ROWS)


def test_equal_seeds_give_equal_digests_and_others_do_not(make_task: MakeTask) -> None:
    task = make_task()
    digests = [load_splits(task, None, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("change", [{"text": "another"}, {"label": 1}])
def test_the_digest_changes_with_any_row(make_task: MakeTask, change: dict[str, Any]) -> None:
    before = load_splits(make_task(), None, seed=0).digest
    assert load_splits(make_task([ROWS[0] | change, *ROWS[1:]]), None, seed=0).digest != before


# --- baselines and scorers


def test_the_majority_class_is_the_most_frequent_training_label() -> None:
    train = [Example("x", None, label) for label in (0, 1, 1, 2)]
    assert majority_predictions(train, 3) == [1, 1, 1]


def test_of_tied_classes_the_smallest_is_the_majority() -> None:
    assert majority_predictions([Example("x", None, label) for label in (2, 1, 1, 2)], 1) == [1]


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_perfect_answers_score_one(scorer: str) -> None:
    assert score_predictions(scorer, [0, 1, 1, 0], [0, 1, 1, 0]) == pytest.approx(1.0)


def test_scorers_agree_with_their_formulas() -> None:
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative.
    labels, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert score_predictions("accuracy", labels, predictions) == pytest.approx(3 / 5)
    assert score_predictions("f1_binary", labels, predictions) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert score_predictions("matthews_correlation", labels, predictions) == pytest.approx((2 * 1 - 1 * 1) / 36**0.5)


def test_the_spread_of_a_share_is_the_binomials() -> None:
    labels = np.array([1] * 60 + [0] * 40)
    predictions = np.array([1] * 50 + [0] * 50)
    assert estimate_example_sd("accuracy", labels, predictions) == pytest.approx((0.9 * 0.1) ** 0.5, rel=0.01)


@pytest.mark.parametrize("scorer", ["matthews_correlation", "f1_binary", "f1_macro"])
def test_the_spread_of_any_score_is_what_resampled_examples_show(scorer: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    rows = rng.integers(0, 400, (1000, 400))
    resampled = [score_predictions(scorer, labels[chosen], predictions[chosen]) for chosen in rows]
    spread = estimate_example_sd(scorer, labels, predictions) / 400**0.5
    assert spread == pytest.approx(float(np.std(resampled)), rel=0.1)


@pytest.mark.parametrize("scorer", ["accuracy", "matthews_correlation", "f1_binary", "f1_macro"])
def test_resampled_scores_of_a_hub_metric_are_nearly_those_of_the_examples_drawn(
    scorer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(references: list[int], predictions: list[int]) -> dict[str, float]:
        return {"it": score_predictions(scorer, references, predictions)}

    monkeypatch.setattr("autopeft.tasks.scorers._load_hub_metric", lambda name: SimpleNamespace(compute=compute))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    rows = rng.integers(0, 400, (200, 400))
    exact = np.array([score_predictions(scorer, labels[chosen], predictions[chosen]) for chosen in rows])
    quick = resample_scores("hub:it", labels, predictions, rows)
    # What is left of higher orders is a small part of what resampling shows.
    assert float(np.std(quick - exact)) < (1e-12 if scorer == "accuracy" else 0.1 * float(np.std(exact)))
    assert float(np.mean(quick)) == pytest.approx(float(np.mean(exact)), abs=0.1 * float(np.std(exact)))


@pytest.mark.parametrize(("value", "quality"), [(math.nan, 0.0), (0.25, 0.25)])
def test_a_hub_metric_that_is_undefined_for_one_answer_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch, value: float, quality: float
) -> None:
    metric = SimpleNamespace(compute=lambda **arguments: {"it": value})
    monkeypatch.setattr("autopeft.tasks.scorers._load_hub_metric", lambda name: metric)
    assert score_predictions("hub:it", [0, 1], [0, 0]) == quality


def test_a_hub_metric_without_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = SimpleNamespace(compute=lambda **arguments: {"it": math.inf})
    monkeypatch.setattr("autopeft.tasks.scorers._load_hub_metric", lambda name: metric)
    with pytest.raises(TaskError, match="finite number, but 'hub:it' makes inf"):
        score_predictions("hub:it", [0, 1], [0, 0])


def test_resampled_scores_of_text_are_means() -> None:
    scores = np.array([0.0, 0.5, 1.0])
    rows = np.array([[0, 0, 1], [2, 2, 2]])
    assert resample_scores("token_accuracy", np.zeros(3, int), scores, rows) == pytest.approx([1 / 6, 1.0])


def test_one_answer_for_all_has_no_spread() -> None:
    assert estimate_example_sd("matthews_correlation", np.array([0, 0, 1, 1]), np.array([1, 1, 1, 1])) == 0.0
    assert estimate_example_sd("matthews_correlation", np.array([0]), np.array([1])) == 0.0


def test_read_rows_names_the_task_of_a_missing_file(tmp_path: Path) -> None:
    task = TaskSpec(name="mine", title="Mine", text="text", labels=("a", "b"))
    with pytest.raises(DataError, match="Task 'mine' needs the file"):
        read_rows(task, tmp_path / "none.jsonl")


@given(st.data())
@pytest.mark.parametrize("scorer", [*SCORERS, "token_accuracy"])
def test_resamples_scored_together_are_as_they_are_one_by_one(scorer: str, data: st.DataObject) -> None:
    classes = st.integers(0, 1 if scorer == "f1_binary" else 4)
    pairs = data.draw(st.lists(st.tuples(classes, classes), min_size=1, max_size=12))
    places = st.integers(0, len(pairs) - 1)
    resamples = st.lists(st.lists(places, min_size=7, max_size=7), min_size=1, max_size=4)
    labels, predictions, rows = *np.array(pairs).T, np.array(data.draw(resamples))
    if scorer == "token_accuracy":
        predictions = predictions / 4
    with warnings.catch_warnings():
        # scikit-learn says that a single class is odd.
        warnings.simplefilter("ignore")
        alone = [score_predictions(scorer, labels[chosen], predictions[chosen]) for chosen in rows]
    assert resample_scores(scorer, labels, predictions, rows) == pytest.approx(alone, abs=1e-12)


def test_resamples_of_many_classes_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, (2, 40))
    rows = rng.integers(0, 40, (9, 40))
    whole = resample_scores("f1_macro", labels, predictions, rows)
    monkeypatch.setattr("autopeft.tasks.scorers._MOST_COUNTS", 50)
    assert (resample_scores("f1_macro", labels, predictions, rows) == whole).all()
