"""A study goes on with the rows that it began with, and with no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.errors import DataError
from autopeft.search.plan import check_rows, make_plan, make_provenance
from autopeft.search.request import Request


def write_rows(path: Path, count: int) -> None:
    rows = ({"sentence": f"row {i}", "label": i % 2} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_changed_rows_are_refused_and_the_old_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    data = tmp_path / "data/sst2"
    data.mkdir(parents=True)
    write_rows(data / "train.jsonl", 100)
    write_rows(data / "validation.jsonl", 20)
    request = Request(task="sst2", budget="3trials", model=str(model), data_dir=str(data.parent))
    plan = make_plan(request, studies=tmp_path / "studies")
    provenance = make_provenance(plan)
    check_rows(plan.config, provenance, plan.data_dir)
    write_rows(data / "train.jsonl", 101)
    with pytest.raises(DataError, match=r"those of task 'sst2' have changed .* --warm-start sst2-model"):
        check_rows(plan.config, provenance, plan.data_dir)
