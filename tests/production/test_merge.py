"""A merged model is plain, loads in a fresh process, and answers as it did unmerged; what cannot merge is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from finished_folders import make_finished
from fresh_process import one_process  # noqa: F401 (a fixture)
from safetensors import safe_open

from autopeft.cli.main import main
from autopeft.errors import ExportError, ModelError, RecordError, SpecError
from autopeft.methods import METHODS
from autopeft.production.files import read_recipe, write_recipe
from autopeft.production.finished import open_finished
from autopeft.production.merge import Merged, merge
from autopeft.testing.contract import claimed
from autopeft.testing.subject import width_for
from autopeft.testing.tiny_models import ARCHITECTURES, ArchitectureName, tiny_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]

EVERYDAY: dict[tuple[str, ArchitectureName], bool] = {
    ("lora", "llama"): True, ("lora", "t5"): True, ("ia3", "bert"): True, ("oft", "modernbert"): True,
    ("full", "llama"): True, ("bitfit", "bert"): True,
}  # fmt: skip
"""One a way of saving and a family of architectures; the rest runs with the slow tests."""


def keys_of(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types in the checkpoint, without reading it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def every_merging_method() -> list[Any]:
    params = []
    for name, method in METHODS.items():
        if method.merges and name != "head":
            for architecture in claimed(method, tuple(ARCHITECTURES)):
                everyday = (name, architecture) in EVERYDAY
                params.append(pytest.param(name, architecture, marks=() if everyday else pytest.mark.slow))
    return params


def check_plain(model: Path, base: Path) -> None:
    """The files are those of a plain model with the base's own names, and no word of where they come from."""
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any("adapter" in name for name in names)
    assert keys_of(model) == keys_of(base)
    config, of_base = (json.loads((folder / "config.json").read_text()) for folder in (model, base))
    assert config["architectures"] == of_base["architectures"]
    assert "quantization_config" not in config
    assert str(base) not in (model / "config.json").read_text()


@pytest.mark.parametrize(("name", "architecture"), every_merging_method())
def test_every_method_that_merges_becomes_a_plain_model(
    name: str, architecture: ArchitectureName, tmp_path: Path
) -> None:
    method = METHODS[name]
    bits = width_for(method)
    try:
        folder = make_finished(tmp_path / "done", name, architecture, bits=bits)
    except SpecError as exc:
        if not method.needs:
            raise
        pytest.skip(str(exc))
    merged = merge(open_finished(folder), tmp_path / "model")
    assert merged.difference <= 1e-4 * max(1.0, merged.largest_logit)
    assert merged.dtype == "float32"
    if bits == 32:
        assert merged.quantization_difference is None
        assert merged.written_difference <= 1e-4 * max(1.0, merged.largest_logit)
        assert merged.same_answers == 1.0
    check_plain(tmp_path / "model", Path(tiny_folder(architecture)))


def quantized() -> list[Any]:
    everyday = {("lora", 4), ("lora", 8), ("qlora", 4)}
    return [
        pytest.param(name, bits, marks=() if (name, bits) in everyday else pytest.mark.slow)
        for name, method in METHODS.items()
        for bits in (4, 8)
        if method.merges and bits in method.bits
    ]


def recorded_loss(folder: Path, num_rows: int) -> float:
    """What the training wrote down of the rows that merging asks about."""
    with np.load(folder / "scores.npz") as scores:
        losses = scores["test_losses"].astype(np.float64)
    return float(losses[np.linspace(0, len(losses) - 1, num_rows).astype(int)].mean())


@pytest.mark.parametrize(("name", "bits"), quantized())
def test_a_quantized_base_is_dequantized_and_the_loss_measured(name: str, bits: int, tmp_path: Path) -> None:
    folder = make_finished(tmp_path / "done", name, "bert", bits=bits)  # type: ignore[arg-type]
    merged = merge(open_finished(folder), tmp_path / "model")
    assert merged.difference <= 1e-4 * max(1.0, merged.largest_logit)
    assert merged.quantization_difference is not None
    # NF4 weights are multiplied in float32 as they are; int8 multiplies rounded activations too (LLM.int8).
    assert merged.quantization_difference <= (1e-4 if bits == 4 else 0.1) * max(1.0, merged.largest_logit)
    assert merged.loss == pytest.approx(recorded_loss(folder, merged.num_rows), abs=5e-4 if bits == 4 else 1e-2)
    assert merged.written_loss == pytest.approx(merged.loss, abs=1e-4 if bits == 4 else 0.1)
    check_plain(tmp_path / "model", Path(tiny_folder("bert")))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished(tmp_path_factory.mktemp("lora") / "done", "lora", "llama")


def test_a_base_in_half_precision_stays_so_and_the_rounding_is_measured(lora: Path, tmp_path: Path) -> None:
    merged = merge(open_finished(lora), tmp_path / "model", dtype="bfloat16")
    assert merged.difference <= 1e-4
    assert 1e-4 < merged.written_difference < 0.2
    assert merged.loss == pytest.approx(recorded_loss(lora, merged.num_rows), abs=5e-4)
    assert 0 < abs(merged.written_loss - merged.loss) < 0.05
    assert {dtype for _, dtype in keys_of(tmp_path / "model").values()} == {"BF16"}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


LOAD = """
import json, sys
import torch, transformers
folder = sys.argv[1]
answer = transformers.pipeline("text-classification", folder)("word1 word2 word3")
assert "autopeft" not in sys.modules
print(json.dumps(answer))
"""


def test_anybody_can_load_it_and_reads_the_labels_names(lora: Path, tmp_path: Path) -> None:
    merge(open_finished(lora), tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])[0]["label"] in ("even", "odd")


@pytest.mark.parametrize("name", ["prompt_tuning", "bottleneck", "lora_bottleneck"])
def test_what_cannot_merge_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    folder = make_finished(tmp_path / "done", name, "bert")
    loader = "PeftModel.from_pretrained" if name == "prompt_tuning" else "load_trained"
    with pytest.raises(SpecError, match=rf"cannot be folded into the base.*Serve it unmerged.*{loader}"):
        merge(open_finished(folder), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_merge_that_answers_otherwise_writes_nothing(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autopeft.production import merge as module

    def forget_the_adapter(model: Any) -> Any:
        return model.unload()

    monkeypatch.setattr(module, "merge_adapter", forget_the_adapter)
    with pytest.raises(ExportError, match=r"must answer as it did unmerged.*Nothing was written"):
        merge(open_finished(lora), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_computed_otherwise_at_loading_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU what was trained on a GPU: AdaMSS draws numbers for its frozen directions."""
    from peft.tuners.adamss import layer

    folder = make_finished(tmp_path / "done", "adamss", "bert")
    draw = layer.slice_pca
    monkeypatch.setattr(layer, "slice_pca", lambda *args, **kwargs: draw(*args, **{**kwargs, "random_seed": 7}))
    with pytest.raises(ExportError, match=r"must answer as it did when it was trained.*AdaMSS computes a part.*verify"):
        merge(open_finished(folder), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_failure_while_writing_leaves_nothing_behind(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autopeft.production import merge as module

    def fail(*arguments: Any) -> None:
        raise RecordError("no such luck")

    monkeypatch.setattr(module, "ask_fresh_process", fail)
    with pytest.raises(RecordError):
        merge(open_finished(lora), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="must be a new or empty folder"):
        merge(open_finished(lora), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- the folder


def test_a_folder_that_is_no_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is none"):
        open_finished(tmp_path / "nowhere")
    with pytest.raises(RecordError, match=r"holds training\.yaml"):
        open_finished(tmp_path)


def test_a_base_that_has_moved_is_asked_for(lora: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(lora, tmp_path / "done"))
    (folder / "local.json").unlink()
    with pytest.raises(ModelError, match=r"folder 'llama' of another machine.*--model DIR"):
        open_finished(folder)
    with contextlib.suppress(FileNotFoundError):
        (folder / "local.json").unlink()
    (folder / "local.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"does not exist.*--model DIR"):
        open_finished(folder)


# --- the command


def test_the_command_says_what_merging_changed(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from autopeft.production.card import write_card
    from autopeft.production.files import read_result

    write_card(lora, read_recipe(lora), read_result(lora), None)
    transformers.utils.logging.enable_progress_bar()
    assert main(["merge", str(lora), "--out", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    # No word of transformers: neither bars nor reports of a head that the base lacks.
    assert captured.err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert len(printed.splitlines()) <= 8
    assert "LoRA, trained on a base of 32 bits" in printed
    assert "32 rows of the test split" in printed
    assert "100% same answers" in printed
    assert re.search(r"mean loss +\d\.\d{4} nats as trained, \d\.\d{4} as written", printed)
    card = (tmp_path / "model/README.md").read_text()
    assert "library_name: transformers" in card
    assert "merged into one plain model" in card
    assert "Trial 7 of the study `tiny-study`, picked as `knee`" in card
    assert "peft" not in card.split("## Load it")[1].split("## How")[0]


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Of dequantizing, as it is before anything has asked transformers to be quiet."""
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield logger
    logger.setLevel(level)


def test_the_command_states_what_a_rounded_base_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logger: logging.Logger
) -> None:
    folder = make_finished(tmp_path / "done", "lora", "bert", bits=4)
    said: list[str] = []
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    # Else what an earlier test has heard would not be said again.
    transformers.utils.logging.warning_once.cache_clear()
    assert main(["merge", str(folder), "--out", str(tmp_path / "model")]) == 0
    printed = capsys.readouterr().out
    assert "LoRA, trained on a base of 4 bits" in printed
    assert "dequantizing moves logits by at most" in printed
    assert re.search(r"mean loss +\d\.\d{4} nats as trained, \d\.\d{4} as written", printed)
    assert said == []
    transformers.utils.logging.warning_once.cache_clear()
    logger.warning_once("heard again")  # type: ignore[attr-defined]
    assert said == ["heard again"]


def test_an_unknown_width_is_refused(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(lora), "--out", str(tmp_path / "model"), "--dtype", "bf16"]) == 2
    assert "Known: bfloat16, float16, float32" in capsys.readouterr().err


def test_a_gpus_quantized_weights_pass_through_bfloat16(tmp_path: Path) -> None:
    """Trained on a GPU, the base was rounded to bfloat16 before it was quantized; on CPU that is done again."""
    folder = make_finished(tmp_path / "done", "lora", "bert", bits=4)
    on_cpu = merge(open_finished(folder), tmp_path / "cpu")
    write_recipe(dataclasses.replace(read_recipe(folder), device_kind="cuda", precision="bfloat16"), folder)
    on_gpu = merge(open_finished(folder), tmp_path / "gpu")
    assert isinstance(on_gpu, Merged)
    assert on_gpu.difference <= 1e-4
    assert on_cpu.largest_logit == pytest.approx(on_gpu.largest_logit, rel=0.2)
    assert on_cpu.largest_logit != on_gpu.largest_logit
