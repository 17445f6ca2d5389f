"""Leaderboards: merging, ranking, and the three files."""

import csv
import dataclasses
import json
import multiprocessing
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import RecordError
from autopeft.methods import fill_settings
from autopeft.records import FailedConfirmation, Inference, Latency
from autopeft.report.entries import fill_entry, list_entries, merge_entries
from autopeft.report.files import hold_lock
from autopeft.report.leaderboard import read_leaderboard, update_leaderboard
from autopeft.report.priors import list_study_sources
from autopeft.report.standings import rank_entries
from autopeft.report.tables import escape_markdown, render_csv, render_markdown


def read_all(root):
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_three_files_are_written_under_task_and_model(study, tmp_path):
    path = update_leaderboard(study, tmp_path)
    assert path == tmp_path / "sst2" / "minilm.md"
    assert set(read_all(tmp_path)) == {"sst2/minilm.md", "sst2/minilm.csv", "sst2/minilm.json"}


def test_writing_a_study_twice_changes_nothing(study, tmp_path):
    update_leaderboard(study, tmp_path)
    once = read_all(tmp_path)
    update_leaderboard(study, tmp_path)
    assert read_all(tmp_path) == once


def test_studies_may_come_in_any_order(study_of, tmp_path):
    studies = [
        study_of(14, uid=f"uid{i}", name=f"study-{i}", created_at=f"2026-05-0{i + 1}T10:00:00") for i in range(3)
    ]
    for root, order in (("a", studies), ("b", studies[::-1])):
        for study in order:
            update_leaderboard(study, tmp_path / root)
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")


@given(data=st.data())
def test_merging_is_idempotent_and_knows_no_order(study_of, data):
    entries = [
        entry
        for i in range(3)
        for entry in list_entries(study_of(10, uid=f"uid{i}", created_at=f"2026-05-0{i + 1}T10:00:00"))
    ]
    shuffled = data.draw(st.permutations(entries))
    merged = merge_entries(shuffled)
    assert merged == merge_entries(entries)
    assert merge_entries([*merged, *shuffled]) == merged


def test_a_trial_that_grew_replaces_what_was_written_of_it(study_of, trial_of, tmp_path):
    update_leaderboard(study_of(trials=[trial_of(0)], with_picks=False), tmp_path)
    update_leaderboard(study_of(trials=[trial_of(0, confirmed=2)], with_picks=False), tmp_path)
    assert "(3 seeds)" in (tmp_path / "sst2" / "minilm.md").read_text()


def test_two_studies_that_trained_the_same_configuration_share_a_row(study_of, trial_of, spec_of):
    ours = study_of(trials=[trial_of(0, spec=spec_of(seed=1))], name="ours", uid="a", with_picks=False)
    theirs = study_of(trials=[trial_of(4, spec=spec_of(seed=2))], name="theirs", uid="b", with_picks=False)
    ranked = rank_entries(merge_entries([*list_entries(ours), *list_entries(theirs)]))
    (row,) = [standing for standing in ranked if standing.entry.kind == "trial"]
    assert (row.num_seeds, row.studies) == (2, ["ours", "theirs"])


def test_what_was_scored_otherwise_is_ranked_apart(study_of, trial_of, tmp_path):
    ours = study_of(trials=[trial_of(0)], uid="a", with_picks=False)
    theirs = study_of(trials=[trial_of(0)], uid="b", with_picks=False)
    theirs = dataclasses.replace(theirs, config=dataclasses.replace(theirs.config, scorer="f1_macro"))
    ranked = rank_entries(merge_entries([*list_entries(ours), *list_entries(theirs)]))
    rows = [standing for standing in ranked if standing.entry.kind == "trial"]
    assert {(row.entry.scorer, row.rank, len(row.entry.runs)) for row in rows} == {
        ("accuracy", 1, 1),
        ("f1_macro", 1, 1),
    }
    for study in (ours, theirs):
        update_leaderboard(study, tmp_path)
    written = (tmp_path / "sst2" / "minilm.md").read_text()
    assert len([line for line in written.splitlines() if line.startswith("## Data")]) == 2


def test_what_was_cut_or_asked_otherwise_is_ranked_apart(study_of, trial_of, tmp_path):
    ours, theirs = (study_of(trials=[trial_of(0)], uid=uid, with_picks=False) for uid in "ab")
    longer = theirs.config.task + "\nmax_length: 512\n"
    theirs = dataclasses.replace(theirs, config=dataclasses.replace(theirs.config, task=longer))
    for study in (ours, theirs):
        update_leaderboard(study, tmp_path)
    rows = [standing for standing in rank_entries(read_leaderboard(tmp_path / "sst2" / "minilm.json").entries)]
    trials = [row for row in rows if row.entry.kind == "trial"]
    assert {(row.entry.scoring, row.rank, len(row.entry.runs)) for row in trials} == {
        ("max_length 128", 1, 1),
        ("max_length 512", 1, 1),
    }
    written = (tmp_path / "sst2" / "minilm.md").read_text()
    assert "max_length 512" in written
    assert len({source.title for source in list_study_sources(ours)}) == 1


def test_a_studys_rows_of_before_make_room_for_those_of_now(study_of, trial_of, tmp_path):
    study = study_of(trials=[trial_of(0), trial_of(1)], uid="a", with_picks=False)
    update_leaderboard(study, tmp_path)
    path = tmp_path / "sst2" / "minilm.json"
    # As an earlier version wrote them: how rows were scored was not told, and what diverged was among them.
    content = json.loads(path.read_text())
    for entry in content["entries"]:
        del entry["scoring"]
    path.write_text(json.dumps(content))
    diverged = FailedConfirmation(seed=1, reason="diverged", detail="the training loss is nan")
    trials = (study.trials[0], dataclasses.replace(study.trials[1], failed_confirmations=(diverged,)))
    update_leaderboard(dataclasses.replace(study, trials=trials), tmp_path)
    rows = [entry for entry in read_leaderboard(path).entries if entry.kind == "trial"]
    assert [(len(row.runs), row.runs[0].trial, row.scoring) for row in rows] == [(1, 0, "max_length 128")]


def test_rows_from_before_scorers_counted_are_the_same(study_of, trial_of):
    entries = list_entries(study_of(trials=[trial_of(0)], with_picks=False))
    stored = [dataclasses.replace(entry, key=f"of before {place}") for place, entry in enumerate(entries)]
    assert fill_entry(dataclasses.replace(entries[0], scoring=None)).key != entries[0].key
    assert {entry.kind for entry in entries} > {"trial"}
    assert len(merge_entries([*stored, *entries])) == len(entries)


def test_a_row_from_before_its_method_had_a_setting_is_the_same_configuration(study_of, trial_of, spec_of):
    before = study_of(trials=[trial_of(0, spec=spec_of())], uid="a", with_picks=False)
    since = study_of(trials=[trial_of(0, spec=fill_settings(spec_of(seed=2)))], uid="b", with_picks=False)
    assert before.trials[0].spec.key() != since.trials[0].spec.key()
    entries = merge_entries([*list_entries(before), *list_entries(since)])
    (entry,) = [entry for entry in entries if entry.kind == "trial"]
    assert len(entry.runs) == 2
    assert merge_entries(entries) == entries


def test_a_seed_run_twice_counts_once(study_of, trial_of):
    studies = [study_of(trials=[trial_of(0)], uid=uid, with_picks=False) for uid in "ab"]
    ranked = rank_entries(merge_entries(entry for study in studies for entry in list_entries(study)))
    (row,) = [standing for standing in ranked if standing.entry.kind == "trial"]
    assert (len(row.entry.runs), row.num_seeds, row.quality_sd) == (2, 1, None)


def test_device_time_is_of_the_device_that_was_used_last(study_of, trial_of):
    entries = []
    for i, (device, seconds) in enumerate([("a CPU", 600.0), ("a GPU", 30.0), ("a GPU", 50.0)]):
        trial = trial_of(0)
        rungs = [dataclasses.replace(score, device_seconds=seconds / len(trial.rungs)) for score in trial.rungs]
        scored = [dataclasses.replace(trial, rungs=tuple(rungs))]
        study = study_of(trials=scored, with_baseline=False, with_picks=False, uid=f"uid{i}")
        provenance = dataclasses.replace(study.provenance, device=device, created_at=f"2026-01-0{1 + i}T00:00:00+00:00")
        entries += list_entries(dataclasses.replace(study, provenance=provenance))
    (row,) = [standing for standing in rank_entries(merge_entries(entries)) if standing.entry.kind == "trial"]
    assert row.device_seconds == pytest.approx(40.0)


def test_only_full_length_trials_and_the_two_baselines_enter(study):
    entries = list_entries(study)
    assert sum(entry.kind == "trial" for entry in entries) == sum(trial.state == "complete" for trial in study.trials)
    assert sorted(entry.kind for entry in entries if entry.kind != "trial") == ["head", "majority"]


def test_rows_are_ranked_by_validation_and_never_by_test(study_of, trial_of):
    worse_on_test = trial_of(0, final=0.9, confirmed=1)
    low = dataclasses.replace(worse_on_test.confirmations[0], test_quality=0.1)
    worse_on_test = dataclasses.replace(worse_on_test, confirmations=(low,))
    study = study_of(trials=[worse_on_test, trial_of(1, final=0.8, confirmed=1)], with_picks=False)
    trials = [standing for standing in rank_entries(list_entries(study)) if standing.rank is not None]
    assert [standing.rank for standing in trials] == [1, 2]
    assert [standing.test_quality == 0.1 for standing in trials] == [True, False]


def test_baselines_stand_in_the_order_without_a_rank(study):
    ranked = rank_entries(list_entries(study))
    assert [s.quality for s in ranked] == sorted((s.quality for s in ranked), reverse=True)
    assert {s.entry.kind for s in ranked if s.rank is None} == {"head", "majority"}
    assert not any(s.on_front for s in ranked if s.rank is None)


def test_the_front_is_worked_out_over_all_studies(study_of, trial_of, spec_of):
    ours = study_of(trials=[trial_of(0, spec=spec_of(), final=0.92)], uid="a")
    better = study_of(trials=[trial_of(0, spec=spec_of(batch_size=8), final=0.95)], uid="b")
    alone = [s for s in rank_entries(list_entries(ours)) if s.on_front]
    together = [s for s in rank_entries(merge_entries([*list_entries(ours), *list_entries(better)])) if s.on_front]
    assert [s.entry.spec.batch_size for s in alone] == [16]
    assert [s.entry.spec.batch_size for s in together] == [8]


def test_other_data_is_ranked_apart(study_of, trial_of):
    ours = study_of(trials=[trial_of(0)], uid="a")
    provenance = dataclasses.replace(ours.provenance, task_digest="f" * 16, created_at="2027-01-01T00:00:00")
    newer = dataclasses.replace(ours, uid="b", provenance=provenance)
    ranked = rank_entries(merge_entries([*list_entries(ours), *list_entries(newer)]))
    assert [s.rank for s in ranked if s.rank] == [1, 1]
    assert ranked[0].entry.task_digest == "f" * 16
    assert render_markdown("t", "m", ranked).count("\n## Data ") == 2


def test_a_measurement_is_preferred_to_an_estimate(study_of, trial_of):
    estimated = study_of(trials=[trial_of(0, vram_bytes=900, vram_source="estimated")], uid="a")
    measured = study_of(trials=[trial_of(0, vram_bytes=700, vram_source="measured")], uid="b")
    for pair in ([estimated, measured], [measured, estimated]):
        ranked = rank_entries(merge_entries(entry for study in pair for entry in list_entries(study)))
        (row,) = [standing for standing in ranked if standing.entry.kind == "trial"]
        assert (row.cost.peak_vram_bytes, row.cost.vram_source) == (700, "measured")


def test_markdown_says_whether_memory_was_estimated(study_of, tmp_path):
    update_leaderboard(study_of(20), tmp_path)
    assert "| Peak VRAM, estimated |" in (tmp_path / "sst2" / "minilm.md").read_text()
    update_leaderboard(study_of(8, uid="other", vram_source="measured"), tmp_path)
    text = (tmp_path / "sst2" / "minilm.md").read_text()
    assert "| Peak VRAM |" in text
    assert re.search(r"MiB \(estimated\).*MiB \(measured\)|MiB \(measured\).*MiB \(estimated\)", text, re.DOTALL)


def test_csv_holds_every_row_with_full_precision(study, tmp_path):
    path = update_leaderboard(study, tmp_path).with_suffix(".csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    entries = {entry.key: entry for entry in merge_entries(list_entries(study))}
    assert {row["key"] for row in rows} == set(entries)
    for row in rows:
        if (spec := entries[row["key"]].spec) is not None:
            assert float(row["learning_rate"]) == spec.learning_rate


# --- what serving costs


def serving(trial, *, size=None, latency=None):
    return dataclasses.replace(trial, cost=dataclasses.replace(trial.cost, adapter_bytes=size, latency_seconds=latency))


def confirmed_at(trial, *, unmerged, merged):
    def timed(seconds):
        return Latency(single_seconds=seconds, batch_seconds=seconds / 5, batch_size=32, num_batches=31)

    inference = Inference(
        unmerged=timed(unmerged), merged=timed(merged), base=timed(merged), adapter_bytes=1, device="a CPU"
    )
    confirmations = tuple(dataclasses.replace(c, inference=inference) for c in trial.confirmations)
    return dataclasses.replace(trial, confirmations=confirmations)


def read_cells(path, title):
    """One column of the Markdown, without the header."""
    table = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line[:1] == "|"]
    return [cells[table[0].index(title)] for cells in table[2:]]


def test_a_study_that_knew_no_size_and_no_latency_has_no_columns_for_them(study_of, trial_of, tmp_path):
    path = update_leaderboard(study_of(trials=[trial_of(0)]), tmp_path)
    assert not re.search(r"\| (Saved|Latency)", path.read_text())
    (row, *_) = csv.DictReader(path.with_suffix(".csv").read_text().splitlines())
    assert (row["adapter_bytes"], row["latency_seconds"], row["latency_device"]) == ("", "", "")


def test_size_and_latency_have_columns_where_a_study_knew_them(study_of, trial_of, tmp_path):
    trials = [serving(trial_of(0, final=0.9), size=3 * 2**20, latency=0.0123), trial_of(1, final=0.8)]
    study = study_of(trials=trials, with_picks=False, with_baseline=False)
    path = update_leaderboard(study, tmp_path)
    device = study.provenance.device
    assert read_cells(path, "Saved") == ["3 MiB", "\u2013", "\u2013"]
    assert read_cells(path, f"Latency, {device}") == ["12.3 ms", "\u2013", "\u2013"]
    (row, *_) = csv.DictReader(path.with_suffix(".csv").read_text().splitlines())
    assert (row["adapter_bytes"], row["latency_seconds"], row["latency_device"]) == (str(3 * 2**20), "0.0123", device)


def test_the_latency_of_a_confirmation_counts_where_it_was_no_objective(study_of, trial_of):
    trial = confirmed_at(trial_of(0, confirmed=2), unmerged=0.02, merged=0.01)
    (row,) = [s for s in rank_entries(list_entries(study_of(trials=[trial], with_picks=False))) if s.rank]
    assert row.latency_seconds == 0.01


def test_latencies_of_several_machines_say_which_each_is_of(study_of, trial_of, tmp_path):
    for i, device in enumerate(["a CPU", "a GPU"]):
        study = study_of(trials=[serving(trial_of(i, final=0.9 - i / 10), latency=0.01 * (i + 1))], uid=f"uid{i}")
        provenance = dataclasses.replace(study.provenance, device=device)
        path = update_leaderboard(dataclasses.replace(study, provenance=provenance), tmp_path)
    assert [text for text in read_cells(path, "Latency") if text != "\u2013"] == ["10 ms (a CPU)", "20 ms (a GPU)"]


def test_a_leaderboard_from_before_sizes_were_known_takes_them_on(study_of, trial_of, tmp_path):
    def forget(value):
        if isinstance(value, list):
            return [forget(item) for item in value]
        if isinstance(value, dict):
            return {
                k: forget(v)
                for k, v in value.items()
                if k not in ("adapter_bytes", "latency_seconds", "latency_device")
            }
        return value

    # The shipped one as it was then stands for those that users have.
    shipped = (Path(__file__).parents[2] / "leaderboards" / "sst2" / "minilm.json").read_text(encoding="utf-8")
    before = tmp_path / "minilm.json"
    before.write_text(json.dumps(forget(json.loads(shipped))), encoding="utf-8")
    assert "latency" in shipped
    assert "latency" not in before.read_text(encoding="utf-8")
    known = read_leaderboard(before).entries
    new = list_entries(study_of(trials=[serving(trial_of(0), size=1000, latency=0.01)], with_baseline=False))
    merged = rank_entries(merge_entries([*known, *new]))
    assert len(merged) == len(known) + len(new)
    assert [standing.latency_seconds for standing in merged if standing.latency_seconds is not None] == [0.01]


# --- two writers


def write_slowly(root, study):
    """In a process of its own; the sleep falls between reading and writing, where a second writer does the harm."""
    from autopeft.report import leaderboard

    merge = leaderboard.merge_entries

    def merge_slowly(entries):
        merged = merge(entries)
        time.sleep(0.3)
        return merged

    leaderboard.merge_entries = merge_slowly
    update_leaderboard(study, root)


def test_studies_that_end_together_are_all_kept(study_of, trial_of, tmp_path):
    studies = [study_of(trials=[trial_of(i)], uid=f"uid{i}", name=f"study-{i}", with_picks=False) for i in range(3)]
    writers = [
        multiprocessing.get_context("spawn").Process(target=write_slowly, args=(tmp_path, study)) for study in studies
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    board = read_leaderboard(tmp_path / "sst2" / "minilm.json")
    assert {run.study for entry in board.entries for run in entry.runs} == {"study-0", "study-1", "study-2"}
    assert set(read_all(tmp_path)) == {"sst2/minilm.md", "sst2/minilm.csv", "sst2/minilm.json"}


def test_a_lock_that_another_holds_too_long_is_told_and_nothing_is_changed(tmp_path):
    path = tmp_path / ".board.lock"
    with (
        hold_lock(path),
        pytest.raises(RecordError, match=r"held \.board\.lock there for 0\.1 seconds. Nothing was changed"),
        hold_lock(path, patience_seconds=0.1),
    ):
        raise AssertionError("two hold it")
    with hold_lock(path, patience_seconds=0.0):
        assert path.exists()
    assert not path.exists()


def test_a_lock_file_that_a_killed_process_left_is_free(tmp_path):
    path = tmp_path / ".board.lock"
    path.touch()
    with hold_lock(path, patience_seconds=0.0):
        pass


# --- what a table is made of


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_name_breaks_the_markdown_table(study_of, name):
    study = study_of(1, name=name, with_picks=False)
    table = [
        line for line in render_markdown("t", "m", rank_entries(list_entries(study))).splitlines() if line[:1] == "|"
    ]
    assert len(table) == 2 + 3
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table} == {16}


def test_markdown_in_a_name_is_shown_and_not_obeyed():
    assert escape_markdown("a|b\n<i> *x* `y` my_name _z_") == r"a\|b &lt;i&gt; \*x\* \`y\` my_name \_z\_"


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "/abs", "a/../../b", "C:\\x", "", ".hidden", "nul\0"])
def test_a_hostile_name_cannot_leave_the_folder(study_of, trial_of, tmp_path, name):
    root = tmp_path / "boards"
    path = update_leaderboard(study_of(trials=[trial_of(0)], task_name=name, model=name), root)
    assert path.resolve().parent.parent == root.resolve()
    assert {p.name for p in tmp_path.iterdir()} == {"boards"}


def test_a_newer_schema_is_refused_and_left_alone(study, tmp_path):
    path = update_leaderboard(study, tmp_path).with_suffix(".json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 99}))
    before = read_all(tmp_path)
    with pytest.raises(RecordError, match=r"schema 99.*Install a newer autopeft"):
        update_leaderboard(study, tmp_path)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"schema_version": 1}', '{"entries": []}', '{"schema_version": "1", "entries": []}']
)
def test_a_file_that_is_no_leaderboard_is_refused_and_left_alone(study, tmp_path, text):
    path = tmp_path / "sst2" / "minilm.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RecordError, match="Nothing was changed"):
        update_leaderboard(study, tmp_path)
    assert read_all(tmp_path) == {"sst2/minilm.json": text}


def test_an_entry_with_an_unknown_field_is_refused(study, tmp_path):
    path = update_leaderboard(study, tmp_path).with_suffix(".json")
    content = json.loads(path.read_text())
    content["entries"][0]["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match="unknown field 'colour'"):
        update_leaderboard(study, tmp_path)


def test_a_leaderboard_of_another_model_is_not_mixed_in(study, tmp_path):
    path = update_leaderboard(study, tmp_path).with_suffix(".json")
    path.write_text(path.read_text().replace('"model": "minilm"', '"model": "other"'))
    with pytest.raises(RecordError, match="belongs to one task and model"):
        update_leaderboard(study, tmp_path)


def test_a_study_without_a_complete_trial_leaves_only_baselines(study_of, tmp_path):
    text = update_leaderboard(study_of(trials=[]), tmp_path).read_text()
    assert "baseline: trained head" in text
    assert "| 1 |" not in text


def test_csv_of_nothing_is_a_header():
    assert render_csv([]).count("\n") == 1


def rank_of(study_of, trial_of, *finals, **changes):
    trials = [dataclasses.replace(trial_of(n), rungs=trial_of(n, final=0.8).rungs) for n in range(len(finals))]
    for n, final in enumerate(finals):
        last = dataclasses.replace(trials[n].rungs[-1], quality=final, num_examples=changes.get("num_examples", 500))
        trials[n] = dataclasses.replace(trials[n], rungs=(*trials[n].rungs[:-1], last))
    study = study_of(trials=trials, with_picks=False, with_baseline=False)
    return [(s.rank, s.places) for s in rank_entries(list_entries(study)) if s.rank is not None]


def test_ranks_within_two_standard_errors_may_be_exchanged(study_of, trial_of):
    # 500 examples: a standard error of 1.6 points each, so differences are clear from 4.6 points on.
    assert rank_of(study_of, trial_of, 0.85, 0.84, 0.70) == [(1, (1, 2)), (2, (1, 2)), (3, (3, 3))]


def test_ranks_go_by_the_spread_over_examples_where_it_is_known(study_of, trial_of):
    def rank(**changes):
        trials = []
        for number, quality in enumerate((0.85, 0.84)):
            trial = trial_of(number, final=quality)
            rungs = tuple(dataclasses.replace(rung, **changes) for rung in trial.rungs)
            trials.append(dataclasses.replace(trial, rungs=rungs, confirmations=()))
        ranked = rank_entries(list_entries(study_of(trials=trials, with_picks=False)))
        return [(standing.rank, standing.places) for standing in ranked if standing.rank is not None]

    # A standard error of 0.1 points instead of 1.6.
    assert rank(quality_sd=0.02) == [(1, (1, 1)), (2, (2, 2))]
    assert rank(quality_sd=None) == [(1, (1, 2)), (2, (1, 2))]


def test_where_the_error_is_not_known_no_rank_is_settled(study_of, trial_of):
    study = study_of(trials=[trial_of(0, final=0.85), trial_of(1, final=0.4)], with_picks=False)
    entries = [dataclasses.replace(entry, scorer="hub:perplexity") for entry in list_entries(study)]
    above_one = [
        dataclasses.replace(entry, runs=tuple(dataclasses.replace(run, quality=9 + run.quality) for run in entry.runs))
        for entry in entries
    ]
    ranked = [standing for standing in rank_entries(above_one) if standing.rank is not None]
    assert [standing.places for standing in ranked] == [(1, 2), (1, 2)]


def test_two_seeds_that_came_out_level_are_no_surer_than_others(study_of, trial_of):
    (first, *_) = [entry for entry in list_entries(study_of(trials=[trial_of(0)])) if entry.kind == "trial"]
    run = first.runs[0]

    def entry(place, *qualities):
        runs = tuple(dataclasses.replace(run, seed=seed, quality=q, trial=place) for seed, q in enumerate(qualities))
        spec = dataclasses.replace(first.spec, learning_rate=1e-3 * (place + 1))
        return fill_entry(dataclasses.replace(first, spec=spec, runs=runs))

    many = dataclasses.replace(run, num_examples=10**9)
    entries = [entry(0, 0.85, 0.85), entry(1, 0.84, 0.84), entry(2, 0.70, 0.78)]
    entries = [
        dataclasses.replace(e, runs=tuple(dataclasses.replace(r, num_examples=many.num_examples) for r in e.runs))
        for e in entries
    ]
    places = [standing.places for standing in rank_entries(entries)]
    assert places[:2] == [(1, 2), (1, 2)]


def test_more_examples_tell_apart_what_few_cannot(study_of, trial_of):
    assert rank_of(study_of, trial_of, 0.85, 0.84, num_examples=50_000) == [(1, (1, 1)), (2, (2, 2))]


def test_places_hold_the_rank_and_never_cross(study_of):
    ranked = [s for s in rank_entries(list_entries(study_of(40))) if s.rank is not None]
    assert all(s.places[0] <= s.rank <= s.places[1] for s in ranked)


def test_open_ranks_are_written_out_and_settled_ones_stand_alone(study_of, trial_of):
    ranked = rank_entries(list_entries(study_of(trials=[trial_of(0, final=0.85), trial_of(1, final=0.84)])))
    table = render_markdown("t", "m", ranked)
    assert "| 1 (1\u20132) |" in table
    (alone,) = [s for s in rank_entries(list_entries(study_of(trials=[trial_of(0)]))) if s.rank]
    assert "| 1 |" in render_markdown("t", "m", [alone])
