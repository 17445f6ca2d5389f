"""The page: what it says, that it says it safely, and that it needs no network."""

import dataclasses
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from autopeft.records import Failed, Refused
from autopeft.report.cards import Way
from autopeft.report.page import build_page, write_page
from autopeft.report.verdict import write_verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "'\" onload=x",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "{{ 7 * 7 }}",
]
hostile_text = st.one_of(
    st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
)


class Document(HTMLParser):
    """Start tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self._skipping = [], [], False
        self.feed(page.replace(get_plotlyjs(), ""))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skipping = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skipping = False

    def handle_data(self, data):
        if not self._skipping:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_figures(page):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def page(study):
    return build_page(study)


def test_three_hundred_trials_stay_below_six_megabytes(study_of):
    assert len(build_page(study_of(300)).encode()) < 6_000_000


def test_the_same_study_gives_the_same_bytes(study, page):
    assert build_page(study) == page


def test_plotly_is_inlined_once_and_cannot_end_its_script(page):
    assert page.count(get_plotlyjs()) == 1
    assert "</script" not in get_plotlyjs().lower()


def test_nothing_is_loaded_from_a_network(page):
    document = Document(page)
    loading = [
        (tag, name) for tag, attrs in document.tags for name in attrs if name in ("src", "srcset", "action", "data")
    ]
    assert loading == []
    assert "link" not in {tag for tag, _ in document.tags}
    assert all(attrs["href"].startswith("#") for _, attrs in document.tags if "href" in attrs)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_every_pick_is_shown_with_the_command_that_exports_it(study_of, trial_of):
    text = Document(build_page(study_of(trials=[trial_of(0)]))).text
    for pick in ("best", "knee", "smallest"):
        assert f"autopeft export sst2-evening --pick {pick} --to peft --out sst2-evening-{pick}" in text


def test_a_name_that_a_shell_would_split_is_quoted_in_the_command(study_of, trial_of):
    text = Document(build_page(study_of(trials=[trial_of(0)], name="my study"))).text
    assert "autopeft export 'my study' --pick best --to peft --out 'my study-best'" in text


def test_a_method_that_peft_cannot_express_says_why_and_how_else(study_of, trial_of, spec_of):
    text = Document(build_page(study_of(trials=[trial_of(0, spec=spec_of("full"))]))).text
    assert "--to peft is not possible for this method. Full fine-tuning trains the base weights" in text
    assert "autopeft export" not in text
    assert "autopeft train sst2-evening --pick best" in text


def test_the_caller_may_say_how_a_pick_is_taken_home(study_of, trial_of):
    page = build_page(
        study_of(trials=[trial_of(0)]), find_way=lambda trial: Way("trainer", f"No {trial.number} today.")
    )
    text = Document(page).text
    assert "No 0 today." in text
    assert "autopeft export sst2-evening --pick knee --to trainer --out sst2-evening-knee" in text


def test_what_stands_between_backticks_is_code_and_nothing_is_markup(study_of, trial_of):
    page = build_page(
        study_of(trials=[trial_of(0)]), find_way=lambda trial: Way("trainer", "Use `--to <x>`, or <b>not</b>, it`s so.")
    )
    assert "Use <code>--to &lt;x&gt;</code>, or &lt;b&gt;not&lt;/b&gt;, it`s so." in page


def test_estimated_memory_is_called_so_wherever_it_appears(page):
    document = Document(page)
    headers = re.findall(r"<th .*?</th>", page, re.DOTALL)
    assert any("Peak VRAM, estimated" in header for header in headers)
    assert "measured" not in document.text.split("How to read this")[0]
    assert len(re.findall(r"Peak VRAM \d+ MiB estimated", document.text)) == 3  # the cards
    content = read_figures(page)
    assert content["figures"]["front"]["vram"]["layout"]["xaxis"]["title"]["text"] == "Peak VRAM, estimated, GiB"
    assert all("(estimated)" in text for text in content["texts"] if "peak VRAM" in text)


def test_mixed_memory_is_labelled_in_every_row(study_of, trial_of):
    trials = [trial_of(0, vram_source="measured"), trial_of(1, vram_source="estimated")]
    page = build_page(study_of(trials=trials, with_baseline=False))
    assert page.count('420 MiB<span class="note">measured</span>') == 1
    assert page.count('420 MiB<span class="note">estimated</span>') == 1


def test_a_correlation_is_never_a_percentage(study_of):
    page = build_page(study_of(scorer="matthews_correlation"))
    body = Document(page).text.split("Where the budget went")[0]
    assert re.search(r"0\.\d{3} ± 0\.\d{3} Matthews correlation", body)
    assert read_figures(page)["figures"]["front"]["vram"]["layout"]["yaxis"]["tickformat"] == ".3~f"


def test_failed_and_refused_trials_are_listed_with_their_reasons(study_of, trial_of):
    failed = trial_of(0, "failed", outcome=Failed(reason="out_of_memory", detail="asked for 9.1 GiB, 8 GiB free"))
    refused = trial_of(1, "refused", outcome=Refused(rule="PiSSA needs an unquantized base, but bits is 4."))
    text = Document(build_page(study_of(trials=[failed, refused]))).text
    assert "Out of memory: asked for 9.1 GiB, 8 GiB free" in text
    assert "PiSSA needs an unquantized base, but bits is 4." in text


def test_the_table_has_a_row_for_every_trial_and_the_baseline(study, page):
    body = re.search(r'<table id="trials">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    assert body.count("<tr ") == len(study.trials) + 1


def test_every_header_of_the_trials_is_a_button_and_one_says_how_it_is_sorted(page):
    head = re.search(r'<table id="trials">.*?<thead>(.*?)</thead>', page, re.DOTALL)[1]
    assert head.count("<th ") == head.count("<button") == 15
    assert head.count("aria-sort=") == 1


def test_the_price_appears_only_where_one_was_given(study_of, trial_of):
    assert "Price" not in build_page(study_of(trials=[trial_of(0)])).replace(get_plotlyjs(), "")
    text = Document(build_page(study_of(trials=[trial_of(0)], price_per_device_hour=2.0))).text
    # 1180 + 520 + 41 + 22 = 1763 s at 2.00 an hour
    assert "total 29.4 min 100% 0.98" in text


def test_an_overrun_is_spelled_out(study_of, trial_of):
    text = Document(build_page(study_of(trials=[trial_of(0)], budget="29cpu-min"))).text
    assert "29.4 min of 29 min device time (101%): 23 s over" in text


def test_notes_and_interruptions_stand_at_the_top(study_of):
    text = Document(build_page(study_of(3, notes=("The budget was too small.",), finished=False))).text
    top = text.split("Picks")[0]
    assert "The budget was too small." in top
    assert "autopeft resume sst2-evening" in top


def test_a_best_no_better_than_the_trained_head_is_called_so(study_of, trial_of):
    text = Document(build_page(study_of(trials=[trial_of(0, final=0.80)]))).text
    assert "The best is not clearly above the trained head" in text


def test_a_best_behind_the_trained_head_is_called_so(study_of, trial_of):
    text = write_verdict(study_of(trials=[trial_of(0, final=0.60)]))
    assert "The trained head alone is clearly better" in text
    assert "cannot tell them apart" not in text


def test_what_the_study_has_compared_on_the_same_examples_decides_over_standard_errors(study_of, trial_of):
    near = study_of(trials=[trial_of(0, final=0.80)])
    assert "cannot tell them apart" not in write_verdict(dataclasses.replace(near, beats_baseline=True))
    far = study_of(trials=[trial_of(0, final=0.95)])
    assert "cannot tell them apart" not in write_verdict(far)
    assert "cannot tell them apart" in write_verdict(dataclasses.replace(far, beats_baseline=False))


def test_a_best_no_better_than_the_majority_class_is_called_so(study_of, trial_of):
    text = Document(build_page(study_of(trials=[trial_of(0, final=0.51)]))).text
    assert "Nothing is clearly better than that" in text


def test_a_best_that_gives_everything_one_class_is_called_so(study_of, trial_of):
    trial = trial_of(0, final=0.0)
    silent = dataclasses.replace(trial, rungs=tuple(dataclasses.replace(rung, quality_sd=0.0) for rung in trial.rungs))
    study = study_of(trials=[silent])
    config = dataclasses.replace(study.config, scorer="matthews_correlation", majority_quality=0.0)
    assert "Nothing is clearly better than that" in write_verdict(dataclasses.replace(study, config=config))


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": [], "with_baseline": False, "finished": False},
        {"trials": []},
        {"num_trials": 1, "with_picks": False},
        {"num_trials": 12, "with_baseline": False, "objectives": ("quality", "params")},
        {"num_trials": 12, "majority_quality": math.nan, "majority_test_quality": math.nan},
        {"num_trials": 12, "budget": "9parsecs", "rungs": (450,)},
    ],
    ids=["nothing", "baseline only", "no picks", "no baseline", "no majority class", "unknown budget"],
)
def test_a_page_is_written_for_every_kind_of_study(study_of, changes, tmp_path):
    path = tmp_path / "reports" / "study.html"
    write_page(study_of(**changes), path)
    assert "How to read this" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("state", ["waiting", "running", "paused", "stopped", "failed", "refused"])
def test_a_study_without_a_complete_trial_recommends_nothing(study_of, trial_of, state):
    page = build_page(study_of(trials=[trial_of(0, state, upto=1 if state == "stopped" else 0)]))
    assert f"nothing to recommend (1 {state})" in Document(page).text


def test_a_trial_whose_costs_and_scores_are_unknown_or_not_finite_is_still_listed(study_of, trial_of):
    bare = dataclasses.replace(trial_of(0, "running"), cost=None)
    lost = trial_of(1, "stopped", upto=1)
    lost = dataclasses.replace(lost, rungs=(dataclasses.replace(lost.rungs[0], quality=math.nan, loss=math.inf),))
    page = build_page(study_of(trials=[bare, lost]))
    assert "3 rows" in Document(page).text  # the baseline is the third


@settings(max_examples=25, deadline=None)
@given(name=hostile_text, words=hostile_text)
def test_no_name_can_become_markup(study_of, trial_of, spec_of, name, words):
    def study_named(name, words):
        spec = spec_of(words, settings={words: words}, target_modules=words)
        trials = [trial_of(0, spec=spec), trial_of(1, "failed", upto=1)]
        study = study_of(trials=trials, name=name, task_name=words, model=words, notes=(words,), scorer="accuracy")
        picks = tuple(dataclasses.replace(pick, why=words) for pick in study.picks)
        return dataclasses.replace(study, picks=picks)

    page = build_page(study_named(name, words))
    plain = Document(build_page(study_named("plain", "plain")))
    hostile = Document(page)
    # spans are one a word of the command, and a name may hold several words
    tags = [[(tag, sorted(attrs)) for tag, attrs in d.tags if tag != "span"] for d in (hostile, plain)]
    assert tags[0] == tags[1]
    for text in read_figures(page)["texts"]:
        assert "<" not in re.sub(r"</?b>|<br>", "", text)
    for figure in (f for views in read_figures(page)["figures"].values() for f in views.values()):
        for label in figure["layout"].get("annotations", []):
            assert "<" not in label["text"]


def test_a_hostile_name_is_read_as_it_was_written(study_of, trial_of):
    page = build_page(study_of(trials=[trial_of(0)], name=HOSTILE[0]))
    assert f"<h1>{html.escape(HOSTILE[0])}</h1>" in page
