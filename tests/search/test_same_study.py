"""A study goes on with the rows and the weights that it began with, and with no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.backends.base import Ready
from autopeft.errors import DataError, ModelError
from autopeft.search.plan import check_rows, complete_provenance, make_plan, make_provenance
from autopeft.search.request import Request


def write_rows(path: Path, count: int) -> None:
    rows = ({"sentence": f"row {i}", "label": i % 2} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_has_changed_is_refused_and_the_old_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    begun, changed = (Ready(device_name="x", packages={}, model_digest=digest, num_parameters=1) for digest in "ab")
    complete = complete_provenance(provenance, begun, plan.config)
    assert complete_provenance(complete, begun, plan.config) == complete
    with pytest.raises(ModelError, match=r"digest a, but those of .* have b"):
        complete_provenance(complete, changed, plan.config)
