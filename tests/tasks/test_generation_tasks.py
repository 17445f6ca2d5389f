"""Tasks whose answers are text: their files, their rows, and how those are divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import DataError, TaskError
from autopeft.tasks.data import Example, load_splits, split_by_prompt
from autopeft.tasks.scorers import GENERATION_SCORERS, score_predictions
from autopeft.tasks.spec import TaskSpec, find_task_text, list_fields, list_tasks, parse_task

MakeTask = Callable[..., TaskSpec]
ROWS: list[dict[str, Any]] = [{"question": f"what is {i}", "hint": "", "answer": f"it is {i}"} for i in range(60)]


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    def make_task(rows: list[Any] = ROWS, **keys: Any) -> TaskSpec:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = {"name": "mine", "title": "Mine", "kind": "generation", "prompt": "{question}\n"}
        values |= {"completion": "{answer}", "files": {"train": "train.jsonl"}}
        task_file = tmp_path / "mine.yaml"
        task_file.write_text(json.dumps(values | keys), encoding="utf-8")
        return parse_task(find_task_text(str(task_file)), "mine.yaml")

    return make_task


def all_rows(task: TaskSpec, seed: int = 0) -> list[Example]:
    splits = load_splits(task, None, seed=seed)
    return [*splits.train, *splits.validation, *splits.test]


# --- rows become prompts and completions


def test_a_row_fills_prompt_and_completion(make_task: MakeTask) -> None:
    rows = all_rows(make_task())
    assert len(rows) == 60
    assert Example("what is 7\n", None, 0, "it is 7") in rows


def test_an_empty_prompt_is_plain_text(make_task: MakeTask) -> None:
    assert all(row.text == "" and row.completion for row in all_rows(make_task(prompt="")))


def test_numbers_are_written_and_braces_of_the_text_kept(make_task: MakeTask) -> None:
    rows = [{"question": i, "answer": i / 2} for i in range(60)]
    assert Example("{3}\n", None, 0, "1.5") in all_rows(make_task(rows, prompt="{{{question}}}\n"))


@pytest.mark.parametrize("hint", [{"hint": ""}, {"hint": None}, {}])
def test_a_row_without_a_column_takes_the_other_prompt(make_task: MakeTask, hint: dict[str, Any]) -> None:
    rows = [{"question": f"q{i}", "answer": "a", "hint": "h"} for i in range(40)]
    rows[7] = {"question": "q7", "answer": "a"} | hint
    task = make_task(rows, prompt="{question} ({hint})\n", prompt_without={"hint": "{question}\n"})
    texts = {row.text for row in all_rows(task)}
    assert "q7\n" in texts
    assert "q8 (h)\n" in texts


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "must be an object with 'question' and 'answer'"),
        ({"question": "q"}, "completion of the task names the column 'answer', which the row lacks"),
        ({"qestion": "q", "answer": "a"}, "'question', which the row lacks. Did you mean 'qestion'"),
        ({"question": None, "answer": "a"}, "takes text or a number from the column 'question', but it holds None"),
        ({"question": "q", "answer": ["a"]}, "'answer', but it holds"),
        ({"question": "q", "answer": True}, "'answer', but it holds True"),
        ({"question": "q", "answer": "  "}, "must have text to write"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(make_task: MakeTask, row: Any, words: str) -> None:
    task = make_task([*ROWS[:5], row, *ROWS[5:]])
    with pytest.raises(DataError, match=rf"train\.jsonl:6: .*{words}"):
        load_splits(task, None, seed=0)


def test_a_completion_without_the_answer_asked_for_is_refused(make_task: MakeTask) -> None:
    task = make_task(scorer="exact_match", answer="#### (.+)")
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*must hold an answer.*'it is 0'"):
        load_splits(task, None, seed=0)


def test_nothing_can_be_written_after_an_empty_prompt(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*only after a prompt"):
        load_splits(make_task(prompt="", scorer="exact_match"), None, seed=0)


# --- task files


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"completion": ""}, "must say which columns"),
        ({"completion": "fixed"}, "must say which columns"),
        ({"completion": "{a.b}"}, r"plain column names.*'\{a.b\}'"),
        ({"completion": "{answer!r}"}, r"plain column names.*'\{answer!r\}'"),
        ({"completion": "{answer:>9}"}, r"plain column names.*'\{answer:>9\}'"),
        ({"completion": "{}"}, "plain column names"),
        ({"prompt": "{question"}, "braces of the text itself twice"),
        ({"labels": ["a", "b"]}, "describes a generation task, in which labels would be ignored"),
        ({"text": "question"}, "in which text would be ignored"),
        ({"prompt_without": {"hint": "x"}}, "prompt: has no 'hint'"),
        ({"prompt_without": {"question": "{question}"}}, "has it in braces"),
        ({"scorer": "accuracy"}, "no scorer 'accuracy' for generation. 'accuracy' scores classes"),
        ({"scorer": "exactmatch"}, "Did you mean 'exact_match'"),
        ({"answer": "(x)"}, "sets answer, which only the scorer exact_match reads"),
        ({"max_new_tokens": 5}, "sets max_new_tokens, which only the scorer exact_match reads"),
        ({"scorer": "exact_match", "answer": "x"}, "must have one group.*has 0"),
        ({"scorer": "exact_match", "answer": "(x)(y)"}, "must have one group.*has 2"),
        ({"scorer": "exact_match", "answer": "("}, "must be a regular expression"),
        ({"max_length": 0}, "max_length of at least 1"),
        ({"kind": "generating"}, "must be one of classification, generation"),
    ],
)
def test_a_mistake_in_a_generation_task_is_refused(make_task: MakeTask, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        make_task(**keys)


def test_keys_of_generation_in_a_classification_task_are_refused() -> None:
    text = "name: x\ntitle: x\ntext: t\nlabels: [a, b]\nprompt: '{t}'"
    with pytest.raises(TaskError, match=r"prompt would be ignored\. Write kind: generation"):
        parse_task(text, "mine.yaml")
    with pytest.raises(TaskError, match="is for tasks of kind: generation"):
        parse_task("name: x\ntitle: x\ntext: t\nlabels: [a, b]\nscorer: exact_match", "mine.yaml")


def test_the_default_scorer_follows_the_kind(make_task: MakeTask) -> None:
    assert make_task().scorer == "token_accuracy"
    assert parse_task("name: x\ntitle: x\ntext: t\nlabels: [a, b]", "x").scorer == "accuracy"


@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "e2e_nlg", "tinystories"])
def test_a_shipped_generation_task_has_no_head(name: str) -> None:
    task = parse_task(list_tasks()[name].read_text(encoding="utf-8"), name)
    assert task.kind == "generation"
    assert task.num_labels is None


def test_fields_are_listed_once_and_doubled_braces_are_none() -> None:
    assert list_fields("{a} {{b}} {c} {a}", "x") == ("a", "c")


@pytest.mark.parametrize("scorer", GENERATION_SCORERS)
def test_a_generation_scorer_is_the_mean_over_examples(scorer: str) -> None:
    assert score_predictions(scorer, [0, 0, 0, 0], [1.0, 0.5, 0.0, 0.5]) == 0.5


# --- where rows come from


def write_rows(folder: Path, split: str, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"meaning": f"m{i}", "text": f"t{i}"} for i in numbers]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def e2e() -> TaskSpec:
    return parse_task(list_tasks()["e2e_nlg"].read_text(encoding="utf-8"), "e2e_nlg")


def test_without_training_rows_validation_is_learned_from_and_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "e2e_nlg", "validation", range(100))
    write_rows(tmp_path / "e2e_nlg", "test", range(100, 130))
    splits = load_splits(e2e(), str(tmp_path), seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (90, 10, 30)
    assert "no train.jsonl, so its validation.jsonl is learned from" in splits.notes[0]


def test_without_test_rows_a_part_is_set_aside_and_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "e2e_nlg", "train", range(100))
    splits = load_splits(e2e(), str(tmp_path), seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (77, 8, 15)
    assert "15% of the training rows" in splits.notes[0]


# --- how rows are divided


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=80).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.05, 0.5),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_no_prompt_is_in_both_parts(prompts: list[int], share: float, most: int, seed: int) -> None:
    examples = [Example(f"p{prompt}", None, 0, f"c{i}") for i, prompt in enumerate(prompts)]
    rest, part = split_by_prompt(examples, share=share, most=most, seed=seed)
    assert not {row.text for row in rest} & {row.text for row in part}
    assert rest
    assert 1 <= len(part) <= max(1, min(int(len(examples) * share), most))
    assert len({*rest, *part}) == len(rest) + len(part)


@given(st.integers(20, 200), st.integers(0, 3))
def test_plain_texts_are_divided_one_by_one(count: int, seed: int) -> None:
    examples = [Example("", None, 0, f"c{i}") for i in range(count)]
    rest, part = split_by_prompt(examples, share=0.1, most=1000, seed=seed)
    assert sorted([*rest, *part]) == sorted(examples)
    assert len(part) == max(1, count // 10)


def test_the_size_of_the_validation_split_can_be_limited(make_task: MakeTask) -> None:
    assert len(load_splits(make_task(max_validation=3), None, seed=0).validation) == 3


def test_rows_that_all_have_one_prompt_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match="all training rows of task 'mine' have the same"):
        load_splits(make_task([{"question": "q", "answer": f"a{i}"} for i in range(40)]), None, seed=0)


def test_the_digest_of_a_classification_task_is_what_it_was_before_there_were_completions() -> None:
    # Studies and leaderboards name their data by it. Computed by the version before.
    demo = parse_task(list_tasks()["demo"].read_text(encoding="utf-8"), "demo")
    assert load_splits(demo, None, seed=0).digest == "b5960c1b25cab3c3"
