"""From studies and leaderboards to sources of a warm start."""

import dataclasses
import json

import pytest

from autopeft.errors import RecordError, SpecError, StudyError
from autopeft.methods import fill_settings
from autopeft.report.leaderboard import update_leaderboard
from autopeft.report.priors import encode_priors, list_study_sources, read_sources
from autopeft.search.warm_start import decode_sources


@pytest.fixture
def board(study, tmp_path):
    return update_leaderboard(study, tmp_path).with_suffix(".json")


def test_a_leaderboard_says_what_its_study_says(study, board, tmp_path):
    (of_study,) = list_study_sources(study)
    (of_board,) = read_sources([str(board)], tmp_path)
    # The board knows configurations by all of their settings, also those that came later.
    filled = [dataclasses.replace(item, spec=fill_settings(item.spec)) for item in of_study.trained]
    assert sorted(of_board.trained, key=repr) == sorted(filled, key=repr)
    assert of_board.majority_quality == study.config.majority_quality


def test_a_source_holds_full_lengths_alone_and_no_baseline(study):
    (source,) = list_study_sources(study)
    complete = [trial for trial in study.trials if trial.state == "complete"]
    assert {item.spec.key() for item in source.trained} == {trial.spec.key() for trial in complete}
    assert "head" not in {item.spec.method for item in source.trained}


def test_confirmed_configurations_count_with_all_their_seeds(study):
    (source,) = list_study_sources(study)
    confirmed = next(trial for trial in study.trials if trial.confirmations)
    found = next(item for item in source.trained if item.spec.key() == confirmed.spec.key())
    assert found.num_seeds == 1 + len(confirmed.confirmations)
    assert found.quality == pytest.approx(confirmed.quality)


def test_other_data_make_a_source_of_their_own(study_of, tmp_path):
    ours = study_of(8)
    theirs = study_of(8, uid="other")
    theirs = dataclasses.replace(theirs, provenance=dataclasses.replace(theirs.provenance, task_digest="f" * 16))
    update_leaderboard(ours, tmp_path)
    board = update_leaderboard(theirs, tmp_path).with_suffix(".json")
    assert len(read_sources([str(board)], tmp_path)) == 2


def test_priors_are_read_back_as_they_were_written(study):
    sources = list_study_sources(study)
    assert decode_sources(json.loads(encode_priors(sources)), "priors") == sources


def test_without_a_name_the_shipped_ones_are_meant(tmp_path):
    assert read_sources([], tmp_path)


def test_a_name_that_is_none_gets_the_nearest(tmp_path):
    (tmp_path / "monday").mkdir()
    (tmp_path / "monday" / "study.db").touch()
    with pytest.raises(StudyError, match="Did you mean 'monday'"):
        read_sources(["mondy"], tmp_path)


def test_a_file_that_is_no_leaderboard_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RecordError, match="schema_version"):
        read_sources([str(tmp_path / "x.json")], tmp_path)


def test_a_leaderboard_of_baselines_alone_is_refused(study_of, tmp_path):
    board = update_leaderboard(study_of(trials=[]), tmp_path).with_suffix(".json")
    with pytest.raises(SpecError, match="holds no such configuration"):
        read_sources([str(board)], tmp_path)


def test_a_prior_with_an_unknown_field_is_refused():
    with pytest.raises(RecordError, match="unknown field"):
        decode_sources([{"titel": "x"}], "priors")
