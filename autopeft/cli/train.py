"""`autopeft train`: full training of a chosen configuration."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from autopeft.wording import in_one_line

if TYPE_CHECKING:
    from autopeft.production.files import LocalPlaces
    from autopeft.production.options import Options
    from autopeft.production.recipe import Recipe
    from autopeft.records import StudyRecord

TRAINED = Path("trained")
_SECONDS_TO_SPEAK = 5.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a chosen configuration at full length",
        description="Trains a chosen configuration on the training rows, keeps the best checkpoint by the "
        "search-validation rows (--all-rows trains on those too), goes on where it was interrupted, and scores it on "
        "the test split beside what the study predicted.",
        epilog="On several GPUs: accelerate launch -m autopeft train STUDY --pick knee",
    )
    parser.add_argument("source", help="a study's name, or a folder with training.yaml")
    parser.add_argument("--pick", help="with a study: best, knee, smallest, a trial's number, or conditions")
    parser.add_argument("--out", metavar="DIR", help="where to (default: trained/STUDY-PICK, or DIR/trained)")
    parser.add_argument("--model", help="where the base model is here, if the recipe's was a folder elsewhere")
    parser.add_argument("--data-dir", help="searched before the hub, as in search (or set AUTOPEFT_DATA_DIR)")
    parser.add_argument("--epochs", type=float, help="default: 3, but no fewer steps than the trial took")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    parser.add_argument(
        "--batch-size", type=int, help="effective batch (default: the trial's); moves the learning rate"
    )
    parser.add_argument("--micro-batch", type=int, help="rows at a time on a device; gradients are accumulated")
    parser.add_argument(
        "--schedule",
        choices=("linear", "cosine", "constant", "cosine_with_restarts"),
        help="of the learning rate, after warm-up (default: the trial's)",
    )
    parser.add_argument("--cycles", type=int, help="with cosine_with_restarts: how many")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="layers run again in the backward pass")
    parser.add_argument("--seed", type=int, help="default: the trial's")
    parser.add_argument(
        "--all-rows", action="store_true", help="train on the search-validation rows too; keep the last"
    )
    parser.add_argument(
        "--patience",
        type=int,
        help="stop after so many evaluations without a better one; 0 never (default: 10)",
    )
    parser.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="default: a twentieth, or what a quarter of the time pays for"
    )
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="default: as --eval-every, or a twentieth")
    parser.add_argument(
        "--report-to", metavar="TRACKER", help="tensorboard, wandb, mlflow, trackio; several by commas; none"
    )
    parser.add_argument("--stage", choices=("task", "pretrain"), default="task", help="pretrain: on --text first")
    parser.add_argument("--text", metavar="FILE", help="with --stage pretrain: text, or .jsonl with a column text")
    parser.add_argument("--from", dest="start", metavar="DIR", help="start from a finished --stage pretrain")
    parser.set_defaults(run=run)


class _Source(NamedTuple):
    recipe: Recipe
    places: LocalPlaces
    folder: Path | None
    """Where the recipe was read from; None for a study."""
    name: str
    record: StudyRecord | None = None
    """Of the study; None for a recipe that was read from a folder."""


def run(args: argparse.Namespace) -> int:
    from autopeft.errors import AutopeftError

    try:
        code = _run(args)
    except AutopeftError as exc:
        if is_main_process():
            raise
        # What befalls all of them the first one says; a launcher ends all when one has ended, so let it speak first.
        time.sleep(_SECONDS_TO_SPEAK)
        # It has not ended, so this befell here alone: the longest rows are the last process's.
        print(f"autopeft: process {os.environ['RANK']}: {in_one_line(exc)}", file=sys.stderr, flush=True)
        return exc.exit_code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(code)
    return code


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Raises TrainingError where another process trains into the folder: each would delete the other's checkpoints."""
    from autopeft.errors import TrainingError
    from autopeft.locks import lock_file

    if not is_main_process():
        yield
        return
    path = out.resolve().parent / f".{out.resolve().name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_file(stack.enter_context(path.open("ab")).fileno())
            # While it is still held.
            stack.callback(path.unlink, missing_ok=True)
        except BlockingIOError:
            raise TrainingError(
                f"One process at a time trains into a folder, and another one trains into '{out}'. Wait for it, or "
                "stop it and give the same command again, which goes on from the last checkpoint."
            ) from None
        except OSError:
            # A folder beside which nothing may be written, or a cluster's file system: there nobody can tell.
            pass
        yield


def _leave(code: int) -> NoReturn:
    """Ends one of several processes whose training is done, without taking the interpreter apart.

    There gloo's threads abort the process now and then (PyTorch 2.13, in three of some fifty launches on busy cores),
    and a launcher takes the whole training for failed and ends the others.
    """
    # Trackers finish there.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that accelerate or torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from autopeft.cli.training_display import Display
    from autopeft.production.card import CARD_FILE, write_card
    from autopeft.production.files import read_result
    from autopeft.production.places import (
        check_folder,
        find_model,
        find_task,
        is_training_folder,
        keep_folder,
        list_asked_folders,
        list_data_folders,
    )
    from autopeft.tasks.spec import parse_task

    _check_stage(args)
    source = _read_source(args)
    data_dir = args.data_dir or os.environ.get("AUTOPEFT_DATA_DIR") or keep_folder(source.places.data_dir)
    text, name = source.recipe.task, source.recipe.task_name
    folders = [*([source.folder] if source.folder else []), *list_data_folders(data_dir, name)]
    asked = list_asked_folders(args.data_dir, text, name)
    task_text = find_task(text, name, source.places.files, folders, asked=asked)
    task = parse_task(task_text, name)
    model = find_model(source.recipe, source.places, args.model)
    places = _places(source, task_text, model, data_dir)
    if args.start:
        from autopeft.production.start import read_start

        start = read_start(Path(args.start), _seeded(source.recipe, args))
        source = source._replace(recipe=replace(source.recipe, pretrained=start.digest))
    goes_on = source.folder is not None and is_training_folder(source.folder)
    recipe, notes = _change(source, args, task, data_dir)
    default = source.folder if goes_on else source.folder / "trained" if source.folder else TRAINED / source.name
    assert default is not None
    out = Path(args.out) if args.out else default
    check_folder(recipe, out)
    display = Display(out, stage=args.stage, quiet=not is_main_process())
    if args.stage == "pretrain":
        display.plan(recipe, notes)
        return _pretrain(recipe, task, places, model, out, args, display)
    if (out / "result.json").is_file():
        finished = read_result(out)
        if not (out / CARD_FILE).is_file():
            # It was killed in between.
            write_card(out, recipe, finished, source.record)
        display.finish(recipe, finished, already=True)
        return 0
    display.plan(recipe, notes)
    from autopeft.production.run import train

    with _hold(out), display:
        result = train(
            recipe, task, places, model=model, out=out, options=_options(args, out), listener=display,
            pretrained=Path(args.start) if args.start else None,
        )  # fmt: skip
    if result is not None:
        write_card(out, recipe, result, source.record)
        display.finish(recipe, result)
    return 0


def _pretrain(  # type: ignore[no-untyped-def]
    recipe: Recipe, task, places: LocalPlaces, model: str, out: Path, args: argparse.Namespace, display
) -> int:
    from autopeft.production.pretrain import pretrain

    with _hold(out), display:
        result = pretrain(
            recipe, task, places, model=model, text=Path(args.text), out=out, options=_options(args, out),
            listener=display, epochs=args.epochs, steps=args.steps,
        )  # fmt: skip
    if result is not None:
        display.finish_pretraining(args.source, args.pick, result)
    return 0


def _options(args: argparse.Namespace, out: Path) -> Options:
    """What is asked for; where nothing is, what an interrupted training in the folder was."""
    from dataclasses import replace

    from autopeft.errors import SpecError
    from autopeft.production.checkpoints import find_newest
    from autopeft.production.options import Options

    newest = find_newest(out)
    before = newest.options if newest is not None else None
    # Those of one are not for the other, which is refused to go on with it.
    options = before if before is not None and before.all_rows == args.all_rows else Options(all_rows=args.all_rows)
    if args.patience is not None:
        options = replace(options, patience=args.patience or None)
    if args.eval_every is not None:
        options = replace(options, evaluate_every=args.eval_every)
    if args.save_every is not None:
        options = replace(options, save_every=args.save_every)
    if args.report_to:
        names = tuple(part.strip() for part in args.report_to.split(","))
        if "none" in names and len(names) > 1:
            raise SpecError(f"--report-to takes none alone, but was given '{args.report_to}'.")
        options = replace(options, report_to=() if names == ("none",) else names)
    return options


def _check_stage(args: argparse.Namespace) -> None:
    from autopeft.errors import SpecError

    if args.stage == "pretrain" and not args.text:
        raise SpecError("--stage pretrain needs the text to learn from: --text FILE.")
    if args.stage == "pretrain" and (args.start or not args.out):
        raise SpecError("--stage pretrain writes a new adapter: give it --out DIR, and no --from.")
    if args.stage == "task" and args.text:
        raise SpecError("--text is read by --stage pretrain alone. Add it, or leave --text away.")
    if args.epochs is not None and args.steps is not None:
        raise SpecError("A training's length is given by --epochs or by --steps, but was given by both.")
    if args.all_rows and args.patience is not None:
        raise SpecError(
            "--all-rows trains on the search-validation rows too, so there are no evaluations for --patience to count. "
            "Leave one of them away."
        )


def _read_source(args: argparse.Namespace) -> _Source:
    from autopeft.cli.session import STUDIES, name_study
    from autopeft.errors import SpecError
    from autopeft.production.files import RECIPE_FILE, read_local, read_recipe

    folder = Path(args.source)
    if (folder / RECIPE_FILE).is_file() or (folder.is_dir() and not (STUDIES / name_study(args.source)).is_dir()):
        if args.pick:
            raise SpecError(
                f"--pick chooses among a study's trials, but '{folder}' is a recipe already. Leave it away."
            )
        return _Source(read_recipe(folder), read_local(folder), folder, folder.name)
    return _read_study(args)


def _read_study(args: argparse.Namespace) -> _Source:
    from autopeft.cli import session
    from autopeft.errors import SpecError
    from autopeft.export import find_trial
    from autopeft.production.files import LocalPlaces
    from autopeft.production.recipe import find_task_files, make_recipe
    from autopeft.search.results import build_record

    if not args.pick:
        raise SpecError(f"Which trial of the study '{args.source}' to train must be said, such as --pick knee.")
    store = session.open_study(args.source)
    record = build_record(store)
    local = session.read_local(store)
    trial = find_trial(record, args.pick)
    model = local["model"]
    if model is not None and model != record.config.model and Path(model).name == record.config.model:
        # A folder, which may have moved: records name it by its last part, wherever it was.
        model = f"local:{record.config.model}"
    recipe = make_recipe(record, trial, pick=args.pick, num_train=record.provenance.num_train, model=model)
    places = LocalPlaces(model=local["model"], data_dir=local["data_dir"], files=find_task_files(record.config.task))
    # Conditions such as vram<24GB make no name for a folder.
    name = re.sub(r"[^\w.-]+", "-", f"{record.config.name}-{args.pick}")
    return _Source(recipe, places, None, name, record)


def _places(source: _Source, task_text: str, model: str, data_dir: str | None) -> LocalPlaces:
    from autopeft.production.files import LocalPlaces
    from autopeft.production.recipe import find_task_files

    found = dict(zip(find_task_files(source.recipe.task), find_task_files(task_text).values(), strict=True))
    here = str(Path(model).resolve()) if Path(model).is_dir() else model
    return LocalPlaces(model=here, data_dir=str(Path(data_dir).resolve()) if data_dir else None, files=found)


def _seeded(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    from dataclasses import replace

    return recipe if args.seed is None else replace(recipe, seed=args.seed)


def _change(source: _Source, args: argparse.Namespace, task, data_dir: str | None):  # type: ignore[no-untyped-def]
    """(the recipe with what the command line asks, sentences on what follows from it)."""
    from dataclasses import replace

    from autopeft.errors import SpecError
    from autopeft.executors.devices import find_gpus
    from autopeft.production.recipe import check_recipe, lay_out, with_batch
    from autopeft.report.words import format_learning_rate
    from autopeft.tasks.data import load_splits

    recipe, notes = source.recipe, []
    if recipe.device_kind == "cpu" and find_gpus():
        notes.append("The study was made on CPUs, so training takes the CPU too. To train on the GPU, search on it.")
    recipe = _seeded(recipe, args)
    if args.gradient_checkpointing:
        recipe = replace(recipe, checkpoint_activations=True)
    if args.schedule:
        recipe = replace(recipe, schedule=args.schedule, num_cycles=args.cycles or 1)
    elif args.cycles:
        recipe = replace(recipe, num_cycles=args.cycles)
    if args.patience is not None and args.patience < 0:
        raise SpecError(f"--patience counts evaluations, 0 for never, but is {args.patience}.")
    if args.batch_size is not None or args.micro_batch is not None:
        before = recipe
        recipe = with_batch(recipe, effective=args.batch_size, micro=args.micro_batch)
        if recipe.learning_rate != before.learning_rate:
            notes.append(
                f"The effective batch goes from {before.effective_batch} to {recipe.effective_batch}, so the learning "
                f"rate goes from {format_learning_rate(before.learning_rate)} to "
                f"{format_learning_rate(recipe.learning_rate)}, with its square root (arXiv:2205.10287)."
            )
    splits = load_splits(task, data_dir, seed=recipe.split_seed)
    num_train = len(splits.train) + (len(splits.validation) if args.all_rows else 0)
    if args.stage == "task" and (args.epochs is not None or args.steps is not None):
        recipe = lay_out(recipe, num_train=num_train, epochs=args.epochs, steps=args.steps)
    elif source.folder is None:
        recipe = lay_out(recipe, num_train=num_train)
    elif num_train != recipe.num_train or args.batch_size is not None:
        # The length that its file says.
        recipe = lay_out(recipe, num_train=num_train, epochs=recipe.epochs)
    check_recipe(recipe, "the recipe")
    return recipe, notes
