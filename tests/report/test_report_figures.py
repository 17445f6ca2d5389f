"""The figures, as the data that plotly.js is given."""

import copy
import dataclasses
import json

import plotly.graph_objects as go
import pytest

from autopeft.report.figures import curves_figure, timeline_figure
from autopeft.report.front_figure import front_figure, list_points
from autopeft.report.palette import SHAPES, mark_methods
from autopeft.report.scores import all_trials


def marks_of(study):
    return mark_methods(trial.spec.method for trial in all_trials(study))


def all_figures(study):
    marks = marks_of(study)
    return [
        *(front_figure(study, cost, marks) for cost in ("vram", "params")),
        *(curves_figure(study, curve, marks) for curve in ("quality", "loss")),
        timeline_figure(study),
    ]


def front_line(figure):
    return next((t for t in figure["data"] if t.get("line", {}).get("shape") == "hv"), None)


def test_plotly_accepts_every_figure(study):
    for figure in all_figures(study):
        text = json.dumps(figure, allow_nan=False)
        go.Figure(
            json.loads(
                text.replace('"@ink"', '"#000"')
                .replace('"@paper"', '"#fff"')
                .replace('"@muted"', '"#777"')
                .replace('"@line"', '"#ddd"')
            )
        )


def test_building_a_figure_changes_nothing(study):
    before = copy.deepcopy(study)
    all_figures(study)
    assert study == before


@pytest.mark.parametrize("cost", ["vram", "params"])
def test_the_front_is_a_line_that_only_rises(study, cost):
    line = front_line(front_figure(study, cost, marks_of(study)))
    assert line["x"] == sorted(line["x"])
    assert line["y"] == sorted(line["y"])


def test_a_cost_that_was_no_objective_has_no_front_and_says_so(study_of):
    study = study_of(12, objectives=("quality", "params"))
    figure = front_figure(study, "vram", marks_of(study))
    assert front_line(figure) is None
    assert figure["layout"]["xaxis"]["title"]["text"].endswith("(not an objective of this study)")


def test_only_members_of_the_front_carry_error_bars(study):
    traces = [t for t in front_figure(study, "vram", marks_of(study))["data"] if "error_y" in t]
    assert sum(len(t["x"]) for t in traces) == len(study.front)


def test_every_scored_trial_with_a_cost_is_drawn_once(study):
    points = list_points(study, "vram")
    drawn = [t for t in front_figure(study, "vram", marks_of(study))["data"] if t.get("hovertext")]
    assert sum(len(t["x"]) for t in drawn) == len(points) == sum(bool(t.rungs) for t in all_trials(study))


def test_unfinished_trials_are_open_and_pale_at_their_last_score(study_of, trial_of):
    stopped = trial_of(1, "stopped", upto=2)
    study = study_of(trials=[trial_of(0), stopped], with_baseline=False)
    trace = next(
        t
        for t in front_figure(study, "vram", marks_of(study))["data"]
        if "open" in str(t.get("marker", {}).get("symbol"))
    )
    assert trace["y"] == [stopped.rungs[-1].quality]
    assert max(trace["marker"]["opacity"]) < 1


def test_what_the_user_brought_is_ringed_and_named(study):
    ring = next(t for t in front_figure(study, "vram", marks_of(study))["data"] if t["mode"] == "markers+text")
    assert ring["text"] == ["yours"]


def test_both_baselines_are_reference_lines_with_labels(study):
    labels = [a["text"] for a in front_figure(study, "vram", marks_of(study))["layout"]["annotations"]]
    assert any(label.startswith("always the most frequent label 50.9%") for label in labels)
    assert any(label.startswith("trained head alone") for label in labels)


def test_baselines_at_the_same_height_are_labelled_on_either_side_of_the_line(study):
    head = dataclasses.replace(study.baseline, rungs=(dataclasses.replace(study.baseline.rungs[-1], quality=0.5),))
    alike = dataclasses.replace(study, baseline=head, config=dataclasses.replace(study.config, majority_quality=0.5))
    labels = front_figure(alike, "vram", marks_of(alike))["layout"]["annotations"]
    sides = [label["yanchor"] for label in labels if label["text"].startswith(("always", "trained"))]
    assert sorted(sides) == ["bottom", "top"]


def test_picks_of_one_trial_share_an_arrow(study_of, trial_of):
    study = study_of(trials=[trial_of(0)])
    labels = [a["text"] for a in front_figure(study, "params", marks_of(study))["layout"]["annotations"]]
    assert "best, knee, smallest" in labels


def test_a_trial_without_parameters_is_left_off_the_logarithmic_axis(study_of, trial_of):
    study = study_of(trials=[trial_of(0, parameters=0), trial_of(1)], with_baseline=False)
    assert [p.trial.number for p in list_points(study, "params")] == [1]


def test_stopped_trials_end_with_a_cross(study):
    figure = curves_figure(study, "quality", marks_of(study))
    crosses = [t for t in figure["data"] if t["marker"]["symbol"] == "x-thin"]
    assert sum(len(t["x"]) for t in crosses) == sum(t.state == "stopped" for t in study.trials)


@pytest.mark.parametrize("state", ["stopped", "failed", "refused"])
def test_whatever_ended_below_its_full_length_ends_with_a_cross(study, state):
    first, *others = study.trials
    rest = tuple(dataclasses.replace(trial, state="complete") for trial in others)
    ended = dataclasses.replace(study, trials=(dataclasses.replace(first, state=state), *rest))
    figure = curves_figure(ended, "quality", marks_of(ended))
    assert sum(len(t["x"]) for t in figure["data"] if t["marker"]["symbol"] == "x-thin") == 1


def test_three_hundred_curves_take_few_traces(study_of):
    study = study_of(300)
    assert len(curves_figure(study, "loss", marks_of(study))["data"]) <= 3 * len(marks_of(study))


def test_the_timeline_has_a_bar_for_every_stretch(study):
    assert sum(len(t["x"]) for t in timeline_figure(study)["data"]) == len(study.segments)


def test_methods_keep_their_colour_and_shape_in_every_figure(study):
    marks = marks_of(study)
    for figure in all_figures(study)[:4]:
        for trace in figure["data"]:
            if "legendgroup" in trace and trace["mode"] != "markers+text":
                assert trace["marker"]["color"] == marks[trace["legendgroup"]].colour


def test_sixty_four_methods_are_told_apart():
    marks = mark_methods(f"method{i}" for i in range(64))
    assert len({(mark.colour, mark.symbol) for mark in marks.values()}) == 64
    assert {mark.symbol for mark in marks.values()} == set(SHAPES)
