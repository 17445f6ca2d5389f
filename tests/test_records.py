"""Records survive JSON, and what does not fit is refused with the place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft import records
from autopeft.backends import base
from autopeft.errors import RecordError
from autopeft.records import (
    SCHEMA_VERSION,
    Outcome,
    StudyRecord,
    TrialRecord,
    TrialSpec,
    digest_json,
    from_record,
    to_record,
)

GOLDEN = Path(__file__).parent / "golden"
RECORDS = [cls for cls in vars(records).values() if dataclasses.is_dataclass(cls)]
MESSAGES = [
    cls for cls in vars(base).values() if dataclasses.is_dataclass(cls) and cls.__module__ == "autopeft.backends.base"
]
SCALARS = st.one_of(st.booleans(), st.integers(-1000, 1000), st.floats(allow_nan=False), st.text(max_size=5))

st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(dict, lambda hint: st.dictionaries(st.text(max_size=5), _values(hint), max_size=3))


def _values(hint: Any) -> st.SearchStrategy[Any]:
    return SCALARS if hint.__args__[1] == records.Scalar else st.from_type(hint.__args__[1])


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(to_record(value)))


@pytest.mark.parametrize("cls", [*RECORDS, *MESSAGES])
@given(data=st.data())
@settings(max_examples=15)
def test_every_record_survives_json(cls: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(cls))
    if cls is StudyRecord:
        record = dataclasses.replace(record, schema_version=SCHEMA_VERSION)
    assert from_record(cls, through_json(record)) == record


@given(st.from_type(Outcome))
def test_an_outcome_comes_back_as_its_own_kind(outcome: Outcome) -> None:
    back = from_record(Outcome, through_json(outcome))  # type: ignore[arg-type]
    assert type(back) is type(outcome)
    assert back == outcome


@given(st.from_type(base.Command), st.from_type(base.Event))
def test_messages_survive_the_pipe_as_one_line(command: base.Command, event: base.Event) -> None:
    for message, decode in ((command, base.decode_command), (event, base.decode_event)):
        line = base.encode_message(message)
        assert "\n" not in line
        assert decode(line) == message


@pytest.mark.parametrize("cls", [*RECORDS, *MESSAGES])
def test_every_record_is_frozen_and_keyword_only(cls: type[Any]) -> None:
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


@pytest.fixture
def spec_data(make_spec: Any) -> dict[str, Any]:
    return through_json(make_spec())


def test_an_unknown_field_gets_the_nearest_name(spec_data: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"spec has the unknown field 'learning_rat'.*Did you mean 'learning_rate'"):
        from_record(TrialSpec, spec_data | {"learning_rat": 1.0}, "spec")


NEEDED = [field.name for field in dataclasses.fields(TrialSpec) if field.default is dataclasses.MISSING]


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named(spec_data: dict[str, Any], field: str) -> None:
    del spec_data[field]
    with pytest.raises(RecordError, match=f"lacks the field '{field}'"):
        from_record(TrialSpec, spec_data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", 3), ("settings", []), ("settings", {"rank": None}), ("settings", {"rank": [8]}), ("bits", 5),
        ("bits", "4"), ("bits", True), ("bits", 4.0), ("learning_rate", "fast"), ("learning_rate", None),
        ("learning_rate", True),
        ("batch_size", 1.5), ("batch_size", True), ("schedule", "liner"), ("target_modules", 7), ("seed", "0"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_its_place(spec_data: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(RecordError, match=f"spec.{field}"):
        from_record(TrialSpec, spec_data | {field: value}, "spec")


@pytest.mark.parametrize("data", [None, 3, "text", [], [{}]])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(RecordError, match="must be an object with the fields of TrialSpec"):
        from_record(TrialSpec, data)


def test_a_wrong_value_deep_inside_is_named_by_its_path(golden: dict[str, Any]) -> None:
    golden["trials"][1]["rungs"][0]["quality"] = "good"
    with pytest.raises(RecordError, match=r"study\.trials\[1\]\.rungs\[0\]\.quality must be float, but is 'good'"):
        from_record(StudyRecord, golden, "study")


def test_an_integer_is_a_float_where_one_is_wanted(spec_data: dict[str, Any]) -> None:
    spec = from_record(TrialSpec, spec_data | {"learning_rate": 1})
    assert (spec.learning_rate, type(spec.learning_rate)) == (1.0, float)


def test_settings_keep_the_types_of_their_values(make_spec: Any) -> None:
    spec = make_spec(settings={"a": 1, "b": 1.0, "c": True, "d": "1"})
    back = from_record(TrialSpec, through_json(spec))
    assert {name: type(value) for name, value in back.settings.items()} == {
        name: type(value) for name, value in spec.settings.items()
    }


def test_a_newer_schema_is_refused(golden: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"Nothing was changed\. Install a newer autopeft"):
        from_record(StudyRecord, golden | {"schema_version": SCHEMA_VERSION + 1})


def test_a_newer_schema_is_refused_before_its_unknown_fields_are(golden: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="newer autopeft"):
        from_record(StudyRecord, {"invented": 1} | golden | {"schema_version": SCHEMA_VERSION + 1})


# --- identities


def test_the_seed_is_no_part_of_a_configurations_identity(make_spec: Any) -> None:
    assert make_spec(seed=1).key() == make_spec(seed=2).key()


@pytest.mark.parametrize(
    "changes", [{"bits": 4}, {"learning_rate": 0.5}, {"settings": {"rank": 9}}, {"batch_size": 8}, {"max_steps": 8}]
)
def test_everything_else_is(make_spec: Any, changes: dict[str, Any]) -> None:
    assert make_spec(**changes).key() != make_spec().key()


@pytest.mark.parametrize("changes", [{"learning_rate": 0.5}, {"max_steps": 8}, {"seed": 3}, {"schedule": "cosine"}])
def test_what_memory_does_not_depend_on_leaves_the_cost_key(make_spec: Any, changes: dict[str, Any]) -> None:
    assert make_spec(**changes).cost_key() == make_spec().cost_key()


@pytest.mark.parametrize("changes", [{"bits": 4}, {"settings": {"rank": 9}}, {"batch_size": 8}])
def test_what_memory_depends_on_changes_the_cost_key(make_spec: Any, changes: dict[str, Any]) -> None:
    assert make_spec(**changes).cost_key() != make_spec().cost_key()


@given(st.dictionaries(st.text(max_size=5), SCALARS))
def test_a_digest_does_not_depend_on_the_order_of_keys(data: dict[str, Any]) -> None:
    assert digest_json(data) == digest_json(dict(reversed(data.items())))


# --- golden records: one a schema version, kept for ever


@pytest.fixture
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "study-schema-1.json").read_text(encoding="utf-8"))


def test_there_is_a_golden_study_of_every_schema() -> None:
    names = {path.name for path in GOLDEN.glob("study-schema-*.json")}
    assert names == {f"study-schema-{version}.json" for version in range(1, SCHEMA_VERSION + 1)}


def test_todays_code_reads_the_golden_study_and_writes_it_back_alike(golden: dict[str, Any]) -> None:
    assert through_json(from_record(StudyRecord, golden)) == golden


def test_the_golden_study_shows_every_outcome(golden: dict[str, Any]) -> None:
    kinds = {trial.outcome.kind for trial in from_record(StudyRecord, golden).trials if trial.outcome}
    assert kinds == {"completed", "stopped", "failed", "refused"}


def test_quality_is_the_mean_over_seeds(golden: dict[str, Any]) -> None:
    trial = next(t for t in from_record(StudyRecord, golden).trials if t.confirmations)
    values = [trial.rungs[-1].quality, *(c.quality for c in trial.confirmations)]
    assert trial.quality == pytest.approx(sum(values) / 3)


def test_what_was_never_scored_has_no_quality(golden: dict[str, Any]) -> None:
    trials = [t for t in from_record(StudyRecord, golden).trials if not t.rungs]
    assert trials
    assert all(isinstance(t, TrialRecord) and t.quality is None and t.test_quality is None for t in trials)
