"""What comes from a hub: models, rows and metrics, from one that runs in this test, and without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stub import Hub, serve_hub

import autopeft
from autopeft.testing.tiny_models import tiny_folder

BEYOND = ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx")
"""Files of repositories that transformers does not load."""
METRIC = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model, a data set and a metric."""
    model = tmp_path / "hub/models/acme/tiny"
    shutil.copytree(tiny_folder("bert"), model)
    for name in BEYOND:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    rows = tmp_path / "hub/datasets/acme/signs"
    rows.mkdir(parents=True)
    for split, count in (("train", 400), ("validation", 100)):
        signs = [{"text": f"{'good' if i % 2 else 'bad'} number {i}", "label": i % 2} for i in range(count)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in signs))
    metric = tmp_path / "hub/spaces/evaluate-metric/share"
    metric.mkdir(parents=True)
    (metric / "share.py").write_text(METRIC)
    return tmp_path / "hub"


@pytest.fixture
def hub(root: Path) -> Iterator[Hub]:
    with serve_hub(root) as served:
        yield served


def run_python(tmp_path: Path, endpoint: str, *arguments: str) -> Any:
    """In a process of its own, which asks a hub at that address and has a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(autopeft.__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )


FETCH = """
import sys
from autopeft.errors import ModelError
from autopeft.hub import fetch_description, fetch_model, find_cached, is_cached
for step in sys.argv[2:]:
    try:
        print(fetch_description(sys.argv[1]) if step == "description" else fetch_model(sys.argv[1], print))
    except ModelError as exc:
        print("refused:", exc)
    folder = find_cached(sys.argv[1])
    print(is_cached(sys.argv[1]), sorted(path.name for path in folder.rglob("*")) if folder else None)
assert "torch" not in sys.modules
"""


def fetch(tmp_path: Path, endpoint: str, model: str, *steps: str) -> list[str]:
    done = run_python(tmp_path, endpoint, "-c", FETCH, model, *steps)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(done.stdout.splitlines())


def test_a_plan_fetches_little_and_a_study_what_is_loaded(hub: Hub, root: Path, tmp_path: Path) -> None:
    weights = (root / "models/acme/tiny/model.safetensors").stat().st_size
    small = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    lines = fetch(tmp_path, hub.url, "acme/tiny", "description", "model", "model")
    whole = sorted([*small, "model.safetensors"])
    said = f"fetching acme/tiny from the hub, {weights / 1e9:.2f} GB"
    assert lines == [str(weights), f"False {small}", said, "None", f"True {whole}", "None", f"True {whole}"]


def test_what_is_cached_needs_no_hub(hub: Hub, root: Path, tmp_path: Path) -> None:
    weights = (root / "models/acme/tiny/model.safetensors").stat().st_size
    fetch(tmp_path, hub.url, "acme/tiny", "model")
    lines = fetch(tmp_path, "http://127.0.0.1:9", "acme/tiny", "description", "model")
    assert [line.split()[0] for line in lines] == [str(weights), "True", "None", "True"]


def test_a_plan_leaves_what_is_cached_as_a_study_began_with_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path, hub.url, "acme/tiny", "model")
    monkeypatch.setattr("hub_stub.COMMIT", "b" * 40)
    assert fetch(tmp_path, hub.url, "acme/tiny", "description")[-1].startswith("True")
    assert fetch(tmp_path, hub.url, "acme/tiny", "model")[-1].startswith("True")
    assert {path.name for path in (tmp_path / "home").rglob("snapshots/*")} == {"a" * 40, "b" * 40}


def test_a_description_alone_is_no_model(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, hub.url, "acme/tiny", "description")
    refusal, _ = fetch(tmp_path, "http://127.0.0.1:9", "acme/tiny", "model")
    assert re.match(r"refused: .* not all in the cache, and the hub cannot be reached\. Name another", refusal)


def test_a_download_that_was_cut_short_is_no_model(hub: Hub, root: Path, tmp_path: Path) -> None:
    folder = root / "models/acme/tiny"
    first = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    second = shutil.copy(first, folder / "model-00002-of-00002.safetensors")
    assert fetch(tmp_path, hub.url, "acme/tiny", "model")[-1].startswith("True")
    (cached,) = (tmp_path / "home").rglob(f"snapshots/*/{second.name}")
    cached.unlink()
    refusal, found = fetch(tmp_path, "http://127.0.0.1:9", "acme/tiny", "model")
    assert "are not all in the cache" in refusal
    assert found.startswith("False")
    assert fetch(tmp_path, hub.url, "acme/tiny", "model")[-1].startswith("True")


def test_of_weights_that_are_there_whole_and_in_parts_the_whole_alone_is_fetched(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    whole = root / "models/acme/tiny/model.safetensors"
    for number in (1, 2):
        shutil.copy(whole, whole.with_name(f"model-{number:05}-of-00002.safetensors"))
    (found,) = (line for line in fetch(tmp_path, hub.url, "acme/tiny", "description") if line.isdigit())
    assert int(found) == whole.stat().st_size
    assert fetch(tmp_path, hub.url, "acme/tiny", "model")[-1].startswith("True")
    assert [path.name for path in (tmp_path / "home").rglob("snapshots/*/*.safetensors")] == [whole.name]


def test_what_cannot_be_fetched_says_why(hub: Hub, root: Path, tmp_path: Path) -> None:
    (root / "models/acme/empty").mkdir()
    shutil.copy(root / "models/acme/tiny/config.json", root / "models/acme/empty")
    hub.gated.add("acme/tiny")
    for model, endpoint, why in (
        ("acme/tiny", hub.url, "accepted its terms.*hf auth login"),
        ("acme/other", hub.url, "Check the name; for a private one"),
        ("acme/wrong name", hub.url, "Check the name"),
        ("acme/busy", hub.url, r"cannot be fetched \(HTTP 503\)"),
        ("acme/empty", hub.url, "those of 'acme/empty' are not on the hub"),
        ("acme/tiny", "http://127.0.0.1:9", r"\(127.0.0.1 does not answer: Connection refused\).* --model minilm"),
    ):
        (line,) = (line for line in fetch(tmp_path, endpoint, model, "model") if line.startswith("refused"))
        assert re.search(why, line), line


TASK = """
name: signs
title: Signs
text: text
labels: [bad, good]
scorer: hub:share
hub: {path: acme/signs, test: validation}
"""


@pytest.mark.slow
def test_a_search_takes_all_it_needs_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "signs.yaml").write_text(TASK)
    search = ("-m", "autopeft", "search", "--task", "signs.yaml", "--model", "acme/tiny", "--max-steps", "8")
    search += ("--methods", "ln_tuning", "--workers", "1", "--name", "all")
    done = run_python(tmp_path, hub.url, *search, "--budget", "2trials")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "fetching acme/tiny from the hub" in done.stdout
    assert "scored by hub:share, 360 train / 40 search-validation / 100 test rows" in done.stdout
    # Once a process at most: whoever scores a resample would ask hundreds of times.
    assert sum("share.py" in request for request in hub.requests) <= 4
    # The weights went over the wire once, for driver and workers together.
    assert sum(request == "GET /acme/tiny/resolve/" + "a" * 40 + "/model.safetensors" for request in hub.requests) == 1
    resumed = run_python(tmp_path, "http://127.0.0.1:9", "-m", "autopeft", "resume", "all", "--budget", "3trials")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "trial   2 complete" in resumed.stdout


@pytest.mark.parametrize("scorer", ["hub:nonsense", pytest.param("hub:share", marks=pytest.mark.slow)])
def test_a_metric_that_cannot_be_had_is_named(hub: Hub, root: Path, scorer: str, tmp_path: Path) -> None:
    (root / "spaces/evaluate-metric/share/share.py").write_text(METRIC.replace('{"share": sum', '{"share": missing'))
    (tmp_path / "signs.yaml").write_text(TASK.replace("hub:share", scorer))
    search = ("-m", "autopeft", "search", "--task", "signs.yaml", "--model", "acme/tiny", "--budget", "2trials")
    done = run_python(tmp_path, hub.url, *search)
    assert done.returncode == 2
    assert re.match(rf"autopeft: .*'{scorer}'.* such as accuracy", done.stderr), done.stderr


PLAN = """
import sys
from pathlib import Path
from autopeft.search.plan import make_plan
from autopeft.search.request import Request
plan = make_plan(Request(task="signs.yaml", budget="8cpu-h", model="acme/tiny"), studies=Path("studies"))
print(plan.seconds_per_step, plan.config.model_kind)
"""


def test_a_plan_knows_a_hub_models_kind_and_size(hub: Hub, root: Path, tmp_path: Path) -> None:
    (tmp_path / "signs.yaml").write_text(TASK.replace("hub:share", "accuracy"))
    small, kind = run_python(tmp_path, hub.url, "-c", PLAN).stdout.split()
    # A gigabyte that is never fetched, nor written.
    with (root / "models/acme/tiny/model.safetensors").open("r+b") as file:
        file.truncate(10**9)
    large, _ = run_python(tmp_path, hub.url, "-c", PLAN).stdout.split()
    assert kind == "encoder"
    assert float(large) > 10 * float(small)


DIGESTS = """
from pathlib import Path
from autopeft.backends.hf.trial import digest_weights
print(digest_weights("acme/tiny"))
(snapshot,) = Path("home/hub/models--acme--tiny/snapshots").iterdir()
snapshot = snapshot.rename(snapshot.with_name("b" * 40))
(snapshot.parents[1] / "refs/main").write_text("b" * 40)
print(digest_weights("acme/tiny"))
(snapshot / "model.safetensors").unlink()
(snapshot / "model.safetensors").write_bytes(b"other weights")
print(digest_weights("acme/tiny"))
"""


def test_weights_are_known_by_what_they_hold_and_not_by_a_commit(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, hub.url, "acme/tiny", "model")
    known, of_another_commit, of_others = run_python(tmp_path, hub.url, "-c", DIGESTS).stdout.split()
    assert len(known) == 16
    assert of_another_commit == known
    assert of_others != known
