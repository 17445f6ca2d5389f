"""`autopeft estimate`: what configurations would need, on any machine, from a model's config.json alone."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autopeft.wording import in_one_line

if TYPE_CHECKING:
    from autopeft.backends.base import ModelledGpu
    from autopeft.backends.hf.cost import HfCostModel
    from autopeft.cli.estimate_display import EstimateRow
    from autopeft.methods import Method
    from autopeft.records import Scalar, StepSettings, TrialSpec
    from autopeft.search.store import Trial

_JSON_KEYS = """\
keys with --json: [{spec, settings, estimate, peak_bytes, device_bytes, measured_bytes, fits}], or
{method, bits, spec, refused} for one of several that cannot be, its spec null where its settings are refused already
  estimate        parts in bytes; those from base_bytes to library_bytes add up to peak_bytes
  device_bytes    what a GPU must have free: the higher peak, what the allocator wastes, the driver's share
  measured_bytes  the peak that a trial of --study measured on its GPU; null where none did
  fits            whether both peaks are within --max-vram; null without it
"""


_MOST_LABELS = 100_000
"""A configuration of transformers has a name for each."""

_STEPS = 100
"""Of the length that configurations are made for: memory does not depend on it, but AdaLoRA refuses fewer than 3."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="tell what configurations would need, without training or weights",
        description="Tells trainable parameters and memory of configurations, by one step of the training loop on "
        "tensors without data. No weights are loaded, none are downloaded.",
        epilog=_JSON_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="hub id, folder, or a config.json")
    parser.add_argument("--method", help="one or several: lora,ia3 (default: lora; with --space: all that it has)")
    parser.add_argument("--rank", type=int, help="short for --fix rank=N")
    parser.add_argument(
        "--fix", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method; repeatable"
    )
    parser.add_argument("--target-modules", help="attention, all-linear, ... (default: the method's recipe)")
    parser.add_argument("--bits", help="4, 8 or unquantized, or several: 4,8 (default: unquantized)")
    parser.add_argument("--batch-size", type=int, help="examples at a time (default: 4; with --space: what it draws)")
    parser.add_argument("--seq-len", type=int, help="tokens of the longest example (default: 512)")
    parser.add_argument("--optimizer", help="adamw, adamw_8bit or paged_adamw_8bit (default: the method's)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="layers run again in the backward pass")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches whose gradients are summed")
    parser.add_argument("--num-labels", type=int, help="classes of the head (default: 2)")
    parser.add_argument(
        "--task-kind",
        choices=("classification", "generation"),
        help="generation: a language model and its loss, instead of a head with classes (default: classification)",
    )
    parser.add_argument("--device", help="modelled: cuda, cpu, or a GPU such as a100 (default: cuda)")
    parser.add_argument("--space", help="recipes and drawn configurations of a search space, shipped or a file")
    parser.add_argument("--count", type=int, help="with --space: how many (default: 20)")
    parser.add_argument("--study", help="the configurations of a study, on its own model and data")
    parser.add_argument("--max-vram", metavar="SIZE", help="say what fits: 24GB")
    parser.add_argument("--json", action="store_true", help="print it as JSON, with the keys below")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from autopeft.cli.estimate_display import print_one, print_table, to_json
    from autopeft.records import StepSettings
    from autopeft.search.request import parse_bytes

    _check(args)
    most = parse_bytes(args.max_vram) if args.max_vram else None
    settings = StepSettings(micro_batches=args.accumulate, checkpoint_activations=args.gradient_checkpointing)
    costs, asked = _read_study(args.study, settings) if args.study else _read_arguments(args)
    rows = [_estimate(row, costs, settings) for row in asked]
    _check_any(rows)
    if args.json:
        print(json.dumps([to_json(row, settings, most) for row in rows], indent=2))
    elif len(rows) == 1:
        print_one(rows[0], settings, costs, most)
    else:
        print_table(rows, most)
    return 0


def _estimate(row: EstimateRow, costs: HfCostModel, settings: StepSettings) -> EstimateRow:
    from autopeft.errors import SpecError

    if row.spec is None:
        return row
    try:
        return row._replace(estimate=costs.estimate(row.spec, settings))
    except SpecError as exc:
        return row._replace(refused=in_one_line(exc))


def _check_any(rows: Sequence[EstimateRow]) -> None:
    """Raises SpecError where every row is refused."""
    from autopeft.cli.estimate_display import describe_row
    from autopeft.errors import SpecError

    reasons = [row.refused for row in rows if row.refused is not None]
    if len(reasons) < len(rows):
        return
    if len(set(reasons)) == 1:
        raise SpecError(reasons[0])
    refusals = " ".join(f"{describe_row(row, rows)}: {row.refused}" for row in rows)
    raise SpecError(f"None of these {len(rows)} configurations is possible. {refusals}")


# What cannot go with --study or --space, because nothing would come of it.
_OWN_OF_A_STUDY = ("model", "method", "rank", "fix", "target_modules", "bits", "batch_size", "seq_len", "optimizer",
                   "num_labels", "task_kind", "device", "space", "count")  # fmt: skip
_OWN_OF_A_SPACE = ("rank", "target_modules", "bits", "optimizer")
_SHORT_FOR_FIX = ("rank", "target_modules", "bits", "optimizer", "batch_size")


def _check(args: argparse.Namespace) -> None:
    from autopeft.errors import SpecError
    from autopeft.search.request import parse_fixed

    if args.study:
        _refuse_given(args, _OWN_OF_A_STUDY, "--study has its own model, data, device and configurations")
    elif not args.model:
        raise SpecError("autopeft estimate needs --model, such as a folder or a config.json, or --study.")
    elif args.task_kind == "generation" and args.num_labels is not None:
        raise SpecError("A generation task has no head, so --num-labels cannot go with --task-kind generation.")
    elif args.space:
        _refuse_given(args, _OWN_OF_A_SPACE, "--space draws them itself (keep one with --fix, as --fix bits=4)")
    elif args.count is not None:
        raise SpecError(
            "--count says how many configurations of a --space to estimate, but there is none. Add --space."
        )
    fixed = parse_fixed(args.fix)
    for name in _SHORT_FOR_FIX:
        if name in fixed and getattr(args, name) is not None:
            raise SpecError(
                f"{_option(name)} is short for --fix {name}=..., but both were given: {getattr(args, name)} and "
                f"{fixed[name]}. Leave one of them away."
            )
    for name in ("batch_size", "seq_len", "accumulate", "num_labels", "count"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SpecError(f"{_option(name)} must be at least 1, but is {getattr(args, name)}.")
    if args.num_labels is not None and args.num_labels > _MOST_LABELS:
        raise SpecError(f"--num-labels takes at most {_MOST_LABELS:,}, but was given {args.num_labels:,}.")


def _refuse_given(args: argparse.Namespace, names: Sequence[str], rule: str) -> None:
    from autopeft.errors import SpecError

    given = [_option(name) for name in names if getattr(args, name) not in (None, [])]
    if given:
        raise SpecError(f"{rule}, so {' and '.join(given)} cannot go with it. Leave {given[0]} away.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- what to estimate


def _read_arguments(args: argparse.Namespace) -> tuple[HfCostModel, Sequence[EstimateRow]]:
    device_kind, gpu = _parse_device(args.device or "cuda")
    rows = _draw_space(args, device_kind) if args.space else _make_rows(args, device_kind)
    _check_any(rows)
    # Slow to import, so only once the request is known to make sense.
    from autopeft.backends.hf.cost import HfCostModel
    from autopeft.backends.hf.cuda_rules import MODELLED_GPU, find_gpu

    costs = HfCostModel(
        args.model,
        num_labels=None if args.task_kind == "generation" else args.num_labels or 2,
        device_kind="cuda" if device_kind == "cuda" else "cpu",
        longest_tokens=args.seq_len or 512,
        gpu=gpu or find_gpu() or MODELLED_GPU,
    )
    return costs, rows


def _parse_device(name: str) -> tuple[str, ModelledGpu | None]:
    """(device kind, GPU named)."""
    from autopeft.errors import DeviceError, suggest_nearest
    from autopeft.executors.devices import KNOWN_GPUS, note_emulated

    if name in ("cpu", "cuda"):
        return name, None
    if name not in KNOWN_GPUS:
        raise DeviceError(f"--device knows no '{name}'. {suggest_nearest(name, ['cpu', 'cuda', *KNOWN_GPUS])}")
    for note in note_emulated([KNOWN_GPUS[name]]):
        print(note, file=sys.stderr)
    return "cuda", KNOWN_GPUS[name].modelled


def _make_rows(args: argparse.Namespace, device_kind: str) -> list[EstimateRow]:
    """One for each method and bit width."""
    from autopeft.errors import SpecError, suggest_nearest
    from autopeft.methods import find_method
    from autopeft.methods.full import check_trains
    from autopeft.search.request import parse_fixed
    from autopeft.spaces.dimensions import widest_bits
    from autopeft.spaces.recipes import settle_fixed

    methods = [find_method(name.strip()) for name in (args.method or "lora").split(",")]
    fixed = parse_fixed(args.fix)
    for method in methods:
        check_trains(method, args.task_kind or "classification")
    for key in fixed:
        owner, dot, _ = key.rpartition(".")
        if dot and owner not in (names := [method.name for method in methods]):
            raise SpecError(f"--fix {key}: '{owner}' is not estimated. {suggest_nearest(owner, names)}")
    options = {name: value for name in _SHORT_FOR_FIX if (value := getattr(args, name)) is not None}
    several: list[Scalar | None] = []
    if args.bits:
        try:
            several = [part if part == "unquantized" else int(part) for part in args.bits.split(",")]
        except ValueError:
            raise SpecError(f"--bits takes 4, 8 or unquantized, but was given '{args.bits}'.") from None
    widest = widest_bits(device_kind)
    rows = []
    for method in methods:
        given = {"batch_size": 4} | settle_fixed(method, fixed | options)
        own = given.pop("bits", None)
        for bits in several if several and f"{method.name}.bits" not in fixed else [own]:
            rows.append(_make_row(method, given, widest if bits == "unquantized" else bits, device_kind))
    return rows


def _make_row(method: Method, given: dict[str, Scalar], bits: Scalar | None, device_kind: str) -> EstimateRow:
    """The method's recipe with what is given otherwise."""
    from autopeft.cli.estimate_display import EstimateRow
    from autopeft.errors import UsageError
    from autopeft.methods.faults import DEVICE_BITS
    from autopeft.spaces.recipes import vary_recipe

    shown = bits if isinstance(bits, int) else next(width for width in DEVICE_BITS[device_kind] if width in method.bits)
    try:
        values = given if bits is None else {**given, "bits": bits}
        return _row_of(vary_recipe(method, values, device_kind=device_kind, max_steps=_STEPS, seed=0))
    except UsageError as exc:
        return EstimateRow(method.name, shown, None, refused=in_one_line(exc))


def _row_of(spec: TrialSpec) -> EstimateRow:
    from autopeft.cli.estimate_display import EstimateRow

    return EstimateRow(spec.method, spec.bits, spec)


def _draw_space(args: argparse.Namespace, device_kind: str) -> list[EstimateRow]:
    """The space's recipes, then configurations drawn at random, always the same."""
    from dataclasses import replace

    from autopeft.errors import SpecError
    from autopeft.methods import refuse_spec
    from autopeft.methods.kinds import read_model_kind
    from autopeft.search.request import parse_fixed
    from autopeft.spaces.load import find_space, parse_space
    from autopeft.spaces.space import RandomSuggester

    name, text = find_space(args.space)
    methods = tuple(part.strip() for part in args.method.split(",")) if args.method else None
    count = args.count or 20
    space = parse_space(
        text, name=name, device_kind=device_kind, max_steps=_STEPS, fixed=parse_fixed(args.fix),
        methods=methods, model_kind=read_model_kind(args.model), task_kind=args.task_kind or "classification",
    )  # fmt: skip
    for method, rule in space.left_out.items():
        print(f"{method} is left out of the space: {rule}", file=sys.stderr)
    specs = {spec.cost_key(): spec for spec in space.recipes[:count]}
    suggester = RandomSuggester(random.Random(0))
    for _ in range(20 * count):
        if len(specs) >= count:
            break
        try:
            spec = space.suggest(suggester, max_steps=_STEPS, seed=0)
        except SpecError:
            # Settings that do not go together: a search passes them over, too.
            continue
        if refuse_spec(spec, device_kind) is None:
            specs.setdefault(spec.cost_key(), spec)
    if args.batch_size is None:
        return [_row_of(spec) for spec in specs.values()]
    return [_row_of(replace(spec, batch_size=args.batch_size)) for spec in specs.values()]


def _read_study(name: str, settings: StepSettings) -> tuple[HfCostModel, Sequence[EstimateRow]]:
    from autopeft.backends import load_cost_model
    from autopeft.cli.session import STUDIES, read_local
    from autopeft.errors import StudyError
    from autopeft.records import StepSettings
    from autopeft.search.plan import make_setup
    from autopeft.search.store import StudyStore

    store = StudyStore.open(STUDIES, name)
    if not store.trials:
        raise StudyError(f"The study '{name}' has no configurations yet. Go on with it: autopeft resume {name}")
    local = read_local(store)
    assert local["model"] is not None
    device = "cuda:0" if store.config.device_kind == "cuda" else "cpu"
    setup = make_setup(store.config, local["model"], local["data_dir"], STUDIES, 1, device)
    costs: Any = load_cost_model(setup)
    specs = {trial.spec.cost_key(): trial.spec for trial in store.trials}
    # Trials take their steps plainly: what they measured is no measure of other ones.
    measured = _read_measured(store.trials) if settings == StepSettings() else {}
    return costs, [_row_of(spec)._replace(measured_bytes=measured.get(key)) for key, spec in specs.items()]


def _read_measured(trials: Sequence[Trial]) -> dict[str, int]:
    """Peaks by configuration; of one that ran out of memory none is known."""
    from autopeft.search.limits import ran_out

    return {
        trial.spec.cost_key(): trial.cost.peak_vram_bytes
        for trial in trials
        if trial.cost is not None and trial.cost.vram_source == "measured" and not ran_out(trial)
    }
