"""Rows of a task, checked and split. Needs neither torch nor, where files are at hand, `datasets`."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from autopeft.errors import DataError, TaskError, suggest_nearest
from autopeft.hub import look_for_hub
from autopeft.tasks.demo import generate_demo
from autopeft.tasks.spec import TaskSpec, list_fields
from autopeft.wording import first_line

_OTHER_FORMATS = (".arrow", ".feather", ".gz", ".parquet", ".pickle", ".pkl", ".tsv", ".xls", ".xlsx", ".zip", ".zst")
"""What is no text, or not ours. Files of any other name are read as JSON Lines."""
_LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; Python's own limit of 128 Ki is shorter than some documents."""
VALIDATION_SHARE = 0.1
TEST_SHARE_OF_OWN = 0.15


class Example(NamedTuple):
    text: str
    """The text to classify, or the prompt."""
    text_pair: str | None
    label: int
    """Class index; 0 in a generation task."""
    completion: str | None = None
    """What is to be written; None in a classification task."""


class _Rows(NamedTuple):
    train: list[Example]
    test: list[Example] | None
    """None where a part of `train` is to be set aside."""
    notes: Sequence[str] = ()
    validation: list[Example] | None = None
    """The search-validation split; None where it is to be set aside, too."""


class Splits(NamedTuple):
    """`train` is learned from, `validation` chooses, `test` is scored once at the end."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    digest: str
    """Of all rows in their order, split seed included: equal digests mean the same splits."""
    notes: tuple[str, ...] = ()
    """What a reader must know of where the splits come from."""


def load_splits(task: TaskSpec, data_dir: str | None, *, seed: int) -> Splits:
    """Reads, checks and divides a task's rows.

    The data set's own splits are taken where it has them. Otherwise training rows are divided into train and
    search-validation (10%, at most `max_validation`): by class, or for generation by prompt, so that no prompt is in
    both. `data_dir` is searched before the hub. Raises DataError or TaskError.
    """
    train, test, notes, validation = _load_rows(task, data_dir)
    _check_train(task, train)
    divide = split_stratified if task.kind == "classification" else split_by_prompt
    if test is None:
        most = len(train) if task.kind == "classification" else task.max_validation
        train, test = divide(train, share=TEST_SHARE_OF_OWN, most=most, seed=seed + 1)
    if validation is None:
        train, validation = divide(train, share=VALIDATION_SHARE, most=task.max_validation, seed=seed)
    else:
        count = len(validation)
        if count > task.max_validation:
            _, validation = divide(validation, share=1.0, most=task.max_validation, seed=seed)
        notes = [*notes, _note_validation(task, len(validation), count)]
    digest = hashlib.sha256()
    for split in (train, validation, test):
        for example in split:
            digest.update(json.dumps(_identify(example)).encode())
        digest.update(b"\n")
    return Splits(train=train, validation=validation, test=test, digest=digest.hexdigest()[:16], notes=tuple(notes))


def _note_validation(task: TaskSpec, taken_count: int, count: int) -> str:
    taken = f"{count:,}" if taken_count == count else f"{taken_count:,} of the {count:,} (max_validation)"
    return f"Trials of task '{task.name}' are compared on {taken} rows of its own validation split."


def _identify(example: Example) -> tuple[object, ...]:
    # Without the completion where there is none: digests of studies from before there were any stay theirs.
    return tuple(example) if example.completion is not None else tuple(example)[:3]


def majority_predictions(train: Sequence[Example], num_examples: int) -> list[int]:
    """Answers of the majority-class baseline: the most frequent training label, the smallest where tied."""
    counts = Counter(example.label for example in train)
    majority = min(counts, key=lambda label: (-counts[label], label))
    return [majority] * num_examples


def split_stratified(
    examples: Sequence[Example], *, share: float, most: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(rest, part): `part` takes about `share` of every class, at most `most` in all and at least one of each class.

    A class with a single example stays in `rest`. Both come shuffled.
    """
    order = list(range(len(examples)))
    rng = random.Random(seed)
    rng.shuffle(order)
    share = min(share, most / max(len(examples), 1))
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_class[examples[index].label].append(index)
    part: set[int] = set()
    for indices in by_class.values():
        if len(indices) > 1:
            part.update(indices[: max(1, int(len(indices) * share))])
    return [examples[i] for i in order if i not in part], [examples[i] for i in order if i in part]


def split_by_prompt(
    examples: Sequence[Example], *, share: float, most: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(rest, part): `part` takes about `share` of the rows, at most `most` and at least one.

    Rows with the same prompt stay together: where a prompt has several right completions, those in `part` would
    otherwise have been learned. Both come shuffled.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    groups: dict[object, list[int]] = defaultdict(list)
    for index in order:
        groups[examples[index].text or index].append(index)
    wanted = max(1, min(int(len(examples) * share), most))
    part: list[int] = []
    for group in groups.values():
        if len(part) + len(group) <= wanted:
            part += group
    whole = part or min(groups.values(), key=len)
    # Where every prompt has more rows than are wanted: some rows of one, and the others in neither.
    taken, kept = set(whole), set(whole[:wanted])
    return [examples[i] for i in order if i not in taken], [examples[i] for i in order if i in kept]


def _load_rows(task: TaskSpec, data_dir: str | None) -> _Rows:
    if task.embedded:
        demo = generate_demo()
        return _Rows(
            [Example(row["text"], None, row["label"]) for row in demo.train],
            [Example(row["text"], None, row["label"]) for row in demo.test],
        )
    if task.files is not None:
        train, test, validation = (
            read_rows(task, Path(file)) if file else None
            for file in (task.files.train, task.files.test, task.files.validation)
        )
        assert train is not None
        return _Rows(train, test, validation=validation)
    if data_dir and not Path(data_dir).is_dir():
        raise DataError(
            f"Rows of task '{task.name}' are searched in the folder '{data_dir}', by --data-dir or AUTOPEFT_DATA_DIR, "
            f"but it does not exist. Name the one that holds {task.name}/train.jsonl"
            f"{', or leave it away for the rows of the hub' if task.hub is not None else ''}."
        )
    folder = Path(data_dir) / task.name if data_dir else None
    if folder is not None and folder.is_dir():
        return _load_folder(task, folder)
    rows = _load_hub(task, folder)
    if folder is not None:
        rows = rows._replace(notes=[*rows.notes, f"There is no folder '{folder}', so the rows are the hub's."])
    return rows


def _load_folder(task: TaskSpec, folder: Path) -> _Rows:
    train, validation, test = (folder / f"{split}.jsonl" for split in ("train", "validation", "test"))
    if not train.is_file():
        if validation.is_file() and test.is_file():
            note = f"The data folder of task '{task.name}' has no train.jsonl, so its validation.jsonl is learned from."
            return _Rows(read_rows(task, validation), read_rows(task, test), [note])
        raise DataError(f"The data folder of task '{task.name}' must hold train.jsonl, but '{folder}' does not.")
    if test.is_file():
        own = read_rows(task, validation) if validation.is_file() else None
        return _Rows(read_rows(task, train), read_rows(task, test), validation=own)
    if validation.is_file():
        return _Rows(read_rows(task, train), read_rows(task, validation))
    if task.kind == "generation":
        note = (
            f"The data folder of task '{task.name}' has no test.jsonl, so {TEST_SHARE_OF_OWN:.0%} of the training "
            f"rows, at most {task.max_validation:,}, are set aside for the test."
        )
        return _Rows(read_rows(task, train), None, [note])
    raise DataError(
        f"The data folder of task '{task.name}' must hold test.jsonl or validation.jsonl with labels, for the final "
        f"score, but '{folder}' has neither."
    )


def _load_hub(task: TaskSpec, folder: Path | None) -> _Rows:
    looked = f"There is no folder '{folder}'" if folder else "No --data-dir was given"
    remedy = (
        f"put train.jsonl and validation.jsonl into DIR/{task.name}/ and give --data-dir DIR (or set "
        "AUTOPEFT_DATA_DIR); or try the embedded task, which needs nothing: --task demo."
    )
    if task.hub is None:
        raise DataError(
            f"The rows of task '{task.name}' are not on this machine. {looked}, and no hub has them: {remedy}"
        )
    look_for_hub()
    try:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        # The hub's client prints a line for each of its retries; what came of them is said once, below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        train, test, validation = (
            datasets.load_dataset(task.hub.path, task.hub.config, split=split) if split else None
            for split in (task.hub.train, task.hub.test, task.hub.validation)
        )
    except Exception as exc:  # the hub's client raises a dozen unrelated types when there is no network
        said = first_line(exc).rstrip(".")
        raise DataError(
            f"The rows of task '{task.name}' are not on this machine. {looked}, and from the hub, where they are "
            f"'{task.hub.path}', they cannot be loaded ({type(exc).__name__}: {said}). Connect once; or {remedy}"
        ) from exc
    checked = [
        None if rows is None else _check_rows(task, rows, f"{task.hub.path} {name}")
        for name, rows in (("train", train), ("test", test), ("validation", validation))
    ]
    assert checked[0] is not None
    return _Rows(checked[0], checked[1], validation=checked[2])


def read_rows(task: TaskSpec, path: Path) -> list[Example]:
    """Rows of a .jsonl, .json or .csv file. Raises DataError with file and line."""
    if not path.is_file():
        raise DataError(f"Task '{task.name}' needs the file '{path}', which does not exist.")
    if path.suffix.lower() in _OTHER_FORMATS:
        raise DataError(
            f"Rows are read from .jsonl, .json or .csv, but task '{task.name}' names '{path}'. Write it anew, for "
            "instance with pandas: "
            "pandas.read_parquet(FILE).to_json('rows.jsonl', orient='records', lines=True)."
        )
    try:
        if path.suffix == ".csv":
            return _read_csv(task, path)
        # With or without the byte order mark that spreadsheets and some editors write.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"The data file '{path}' must be readable UTF-8, but is not: {exc}.") from exc
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as exc:
            raise DataError(f"{path}:{exc.lineno}: must be JSON, but is not: {exc.msg}.") from exc
        if not isinstance(rows, list):
            raise DataError(f"The data file '{path}' must hold a list of rows, but holds {type(rows).__name__}.")
        return _check_rows(task, rows, str(path))
    return _check_rows(task, _parse_lines(text, path), str(path))


def _read_csv(task: TaskSpec, path: Path) -> list[Example]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        # The reader counts lines, which are more than rows where texts hold line breaks.
        examples = [_check_row(task, row, f"{path}:{reader.line_num}") for row in reader]
    if not examples:
        raise DataError(f"A split must have rows, but '{path}' has none.")
    return examples


def _parse_lines(text: str, path: Path) -> Iterable[Any]:
    # Not splitlines(): rows may hold U+2028 and its like inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            if text.split("\n", number)[-1].strip():
                raise DataError(f"{path}:{number}: every line must hold one JSON object, but this one is empty.")
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"{path}:{number}: every line must hold one JSON object, but: {exc.msg}.") from exc


def _check_rows(task: TaskSpec, rows: Iterable[Any], where: str) -> list[Example]:
    examples = [_check_row(task, row, f"{where}:{line}") for line, row in enumerate(rows, start=1)]
    if not examples:
        raise DataError(f"A split must have rows, but '{where}' has none.")
    return examples


def _check_row(task: TaskSpec, row: Any, where: str) -> Example:
    if task.kind == "generation":
        return _check_generation_row(task, row, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with '{task.text}' and '{task.label}', but is {row!r:.80}.")
    texts: list[str | None] = []
    for column in (task.text, task.text_pair):
        if column is None:
            texts.append(None)
            continue
        value = row.get(column)
        if not isinstance(value, str):
            raise DataError(
                f"{where}: a row must have text in the column '{column}', but "
                f"{'has the columns ' + ', '.join(map(str, row)) if column not in row else f'holds {value!r:.80}'}."
            )
        texts.append(value)
    text, text_pair = texts
    assert text is not None
    return Example(text, text_pair, _check_label(task, row, where))


def _check_generation_row(task: TaskSpec, row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        columns = " and ".join(f"'{name}'" for name in list_fields(task.prompt + task.completion, where))
        raise DataError(f"{where}: a row must be an object with {columns}, but is {row!r:.80}.")
    missing = [column for column in task.prompt_without if row.get(column) in (None, "")]
    name = f"prompt_without.{missing[0]}" if missing else "prompt"
    prompt = _fill(task.prompt_without[missing[0]] if missing else task.prompt, row, f"{where}: {name} of the task")
    if task.scorer == "exact_match" and not prompt.strip():
        raise DataError(
            f"{where}: a model can write by itself only after a prompt, but the prompt of this row comes out empty. "
            "Give the task a prompt:, or score it by token_accuracy."
        )
    completion = _fill(task.completion, row, f"{where}: completion of the task")
    if not completion.strip():
        raise DataError(
            f"{where}: a row must have text to write, but its completion '{task.completion}' comes out empty. Remove "
            "the row, or name another column in completion:."
        )
    if task.answer is not None and re.search(task.answer, completion) is None:
        raise DataError(
            f"{where}: a completion must hold an answer for exact_match, but nothing in {completion!r:.80} fits "
            f"answer: {task.answer}"
        )
    return Example(prompt, None, 0, completion)


def _fill(template: str, row: dict[str, Any], where: str) -> str:
    """The template with the row's values for its columns."""
    values = {}
    for column in list_fields(template, where):
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            if column in row:
                raise DataError(
                    f"{where} takes text or a number from the column '{column}', but it holds {value!r:.80}."
                )
            raise DataError(f"{where} names the column '{column}', which the row lacks. {suggest_nearest(column, row)}")
        values[column] = str(value)
    return template.format_map(values)


def _check_label(task: TaskSpec, row: dict[str, Any], where: str) -> int:
    value = row.get(task.label)
    # Files differ in whether they write numbers as text, so a name that is a number is meant by either.
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if name in task.labels:
        return task.labels.index(name)
    names_are_numbers = any(label.isdecimal() for label in task.labels)
    if name.isdecimal() and int(name) < len(task.labels) and not names_are_numbers:
        return int(name)
    given = f"holds {value!r:.80}" if task.label in row else "has no such column"
    index = "" if names_are_numbers else f" or an index from 0 to {len(task.labels) - 1}"
    raise DataError(
        f"{where}: the column '{task.label}' must hold one of {', '.join(task.labels[:10])}{index}, but the row "
        f"{given}."
    )


def _check_train(task: TaskSpec, train: Sequence[Example]) -> None:
    seen = {example.label for example in train}
    if task.kind == "classification" and len(seen) < 2:
        only = task.labels[next(iter(seen))]
        raise DataError(
            f"A classifier needs at least two classes to learn from, but every training row of task '{task.name}' is "
            f"'{only}'. Check the column '{task.label}'."
        )
    if len(train) < 20:
        raise TaskError(f"A task needs at least 20 training rows to be split, but '{task.name}' has {len(train)}.")
    if task.kind == "generation" and task.prompt and len({example.text for example in train}) < 2:
        raise DataError(
            f"Rows are divided by their prompts, so that none is both learned and scored, but all training rows of "
            f"task '{task.name}' have the same. Write prompt: \"\" where it says nothing, or put a column into it."
        )
