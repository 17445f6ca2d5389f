"""Rows of a task, checked and split. Needs neither torch nor, where files are at hand, `datasets`."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from autopeft.errors import DataError, TaskError
from autopeft.tasks.demo import generate_demo
from autopeft.tasks.spec import TaskSpec

VALIDATION_SHARE = 0.1
VALIDATION_MOST = 1000
TEST_SHARE_OF_OWN = 0.15


class Example(NamedTuple):
    text: str
    text_pair: str | None
    label: int


class Splits(NamedTuple):
    """`train` is learned from, `validation` chooses, `test` is scored once at the end."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    digest: str
    """Of all rows in their order, split seed included: equal digests mean the same splits."""


def load_splits(task: TaskSpec, data_dir: str | None, *, seed: int) -> Splits:
    """Reads, checks and divides a task's rows.

    Training rows are divided into train and search-validation (10%, at most 1,000, stratified); the data set's own
    labelled split is the test. `data_dir` is searched before the hub. Raises DataError or TaskError.
    """
    train, test = _load_rows(task, data_dir)
    _check_classes(task, train)
    if test is None:
        train, test = split_stratified(train, share=TEST_SHARE_OF_OWN, most=len(train), seed=seed + 1)
    train, validation = split_stratified(train, share=VALIDATION_SHARE, most=VALIDATION_MOST, seed=seed)
    digest = hashlib.sha256()
    for split in (train, validation, test):
        for example in split:
            digest.update(json.dumps(example).encode())
        digest.update(b"\n")
    return Splits(train=train, validation=validation, test=test, digest=digest.hexdigest()[:16])


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


def _load_rows(task: TaskSpec, data_dir: str | None) -> tuple[list[Example], list[Example] | None]:
    if task.embedded:
        demo = generate_demo()
        return (
            [Example(row["text"], None, row["label"]) for row in demo.train],
            [Example(row["text"], None, row["label"]) for row in demo.test],
        )
    if task.files is not None:
        train = read_rows(task, Path(task.files.train))
        return train, read_rows(task, Path(task.files.test)) if task.files.test else None
    folder = Path(data_dir) / task.name if data_dir else None
    if folder is not None and folder.is_dir():
        return _load_folder(task, folder)
    return _load_hub(task, folder)


def _load_folder(task: TaskSpec, folder: Path) -> tuple[list[Example], list[Example]]:
    train = folder / "train.jsonl"
    if not train.is_file():
        raise DataError(f"The data folder of task '{task.name}' must hold train.jsonl, but '{folder}' does not.")
    for name in ("test.jsonl", "validation.jsonl"):
        if (folder / name).is_file():
            return read_rows(task, train), read_rows(task, folder / name)
    raise DataError(
        f"The data folder of task '{task.name}' must hold test.jsonl or validation.jsonl with labels, for the final "
        f"score, but '{folder}' has neither."
    )


def _load_hub(task: TaskSpec, folder: Path | None) -> tuple[list[Example], list[Example]]:
    looked = f"There is no folder '{folder}'" if folder else "No --data-dir was given"
    remedy = (
        f"put train.jsonl and validation.jsonl into DIR/{task.name}/ and give --data-dir DIR (or set "
        "AUTOPEFT_DATA_DIR); or try the embedded task, which needs nothing: --task demo."
    )
    if task.hub is None:
        raise DataError(
            f"The rows of task '{task.name}' are not on this machine. {looked}, and no hub has them: {remedy}"
        )
    try:
        import datasets

        # The hub's client prints a line for each of its retries; what came of them is said once, below.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        train = datasets.load_dataset(task.hub.path, task.hub.config, split=task.hub.train)
        test = datasets.load_dataset(task.hub.path, task.hub.config, split=task.hub.test)
    except Exception as exc:  # the hub's client raises a dozen unrelated types when there is no network
        raise DataError(
            f"The rows of task '{task.name}' are not on this machine. {looked}, and the hub, where they are "
            f"'{task.hub.path}', cannot be reached ({type(exc).__name__}). Connect once; or {remedy}"
        ) from exc
    return _check_rows(task, train, f"{task.hub.path} train"), _check_rows(task, test, f"{task.hub.path} test")


def read_rows(task: TaskSpec, path: Path) -> list[Example]:
    """Rows of a .jsonl, .json or .csv file. Raises DataError with file and line."""
    if not path.is_file():
        raise DataError(f"Task '{task.name}' needs the file '{path}', which does not exist.")
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


def _check_label(task: TaskSpec, row: dict[str, Any], where: str) -> int:
    value = row.get(task.label)
    if isinstance(value, str):
        if value in task.labels:
            return task.labels.index(value)
        if value.isdecimal():
            value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.labels):
        return value
    given = f"holds {value!r:.80}" if task.label in row else "has no such column"
    raise DataError(
        f"{where}: the column '{task.label}' must hold one of {', '.join(task.labels[:10])} or an index from 0 to "
        f"{len(task.labels) - 1}, but the row {given}."
    )


def _check_classes(task: TaskSpec, train: Sequence[Example]) -> None:
    seen = {example.label for example in train}
    if len(seen) < 2:
        only = task.labels[next(iter(seen))]
        raise DataError(
            f"A classifier needs at least two classes to learn from, but every training row of task '{task.name}' is "
            f"'{only}'. Check the column '{task.label}'."
        )
    if len(train) < 20:
        raise TaskError(f"A task needs at least 20 training rows to be split, but '{task.name}' has {len(train)}.")
