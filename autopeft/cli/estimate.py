"""`autopeft estimate`: what configurations would need, on any machine, from a model's config.json alone."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autopeft.backends.hf.cost import HfCostModel
    from autopeft.records import Estimate, Scalar, StepSettings, TrialSpec

_JSON_KEYS = """\
keys with --json: [{spec, settings, estimate, peak_bytes, device_bytes, fits}], or {method, bits, spec, refused} for one
of several that cannot be, whose spec is null where its settings are refused already
  estimate        parts in bytes; those from base_bytes to library_bytes add up to peak_bytes
  device_bytes    what a GPU must have free: the higher peak, what the allocator wastes, the driver's share
  fits            whether both peaks are within --max-vram; null without it
"""


_MOST_LABELS = 100_000
"""A configuration of transformers has a name for each."""

_STEPS = 100
"""Of the length that configurations are made for: memory does not depend on it, but AdaLoRA refuses fewer than 3."""


class _Row(NamedTuple):
    """What was asked for, and what came of it: an estimate, or the reason why there is none."""

    method: str
    bits: int
    spec: TrialSpec | None
    """None where the settings are refused already."""
    estimate: Estimate | None = None
    refused: str | None = None


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
    from autopeft.records import StepSettings
    from autopeft.search.request import parse_bytes

    _check(args)
    most = parse_bytes(args.max_vram) if args.max_vram else None
    settings = StepSettings(micro_batches=args.accumulate, checkpoint_activations=args.gradient_checkpointing)
    costs, asked = _read_study(args.study) if args.study else _read_arguments(args)
    rows = [_estimate(row, costs, settings) for row in asked]
    _check_any(rows)
    if args.json:
        print(json.dumps([_to_json(row, settings, most) for row in rows], indent=2))
    elif len(rows) == 1:
        _print_one(rows[0], settings, costs, most)
    else:
        _print_table(rows, most)
    return 0


def _estimate(row: _Row, costs: HfCostModel, settings: StepSettings) -> _Row:
    from autopeft.errors import SpecError

    if row.spec is None:
        return row
    try:
        return row._replace(estimate=costs.estimate(row.spec, settings))
    except SpecError as exc:
        return row._replace(refused=_in_one_line(exc))


def _check_any(rows: Sequence[_Row]) -> None:
    """Raises SpecError where every row is refused."""
    from autopeft.errors import SpecError

    reasons = [row.refused for row in rows if row.refused is not None]
    if len(reasons) < len(rows):
        return
    if len(set(reasons)) == 1:
        raise SpecError(reasons[0])
    refusals = " ".join(f"{_describe(row, rows)}: {row.refused}" for row in rows)
    raise SpecError(f"None of these {len(rows)} configurations is possible. {refusals}")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# What cannot go with --study or --space, because nothing would come of it.
_OWN_OF_A_STUDY = ("model", "method", "rank", "fix", "target_modules", "bits", "batch_size", "seq_len", "optimizer",
                   "num_labels", "task_kind", "device", "space", "count")  # fmt: skip
_OWN_OF_A_SPACE = ("rank", "target_modules", "bits", "optimizer")


def _check(args: argparse.Namespace) -> None:
    from autopeft.errors import SpecError

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


def _read_arguments(args: argparse.Namespace) -> tuple[HfCostModel, Sequence[_Row]]:
    device_kind, gpu = _parse_device(args.device or "cuda")
    rows = _draw_space(args, device_kind) if args.space else _make_rows(args, device_kind)
    _check_any(rows)
    # Slow to import, so only once the request is known to make sense.
    from autopeft.backends.hf.cost import HfCostModel
    from autopeft.backends.hf.cuda_rules import MODELLED_GPU, Gpu, find_gpu

    chosen = Gpu(*gpu) if gpu is not None else find_gpu() or MODELLED_GPU
    costs = HfCostModel(
        args.model,
        num_labels=None if args.task_kind == "generation" else args.num_labels or 2,
        device_kind="cuda" if device_kind == "cuda" else "cpu",
        longest_tokens=args.seq_len or 512,
        gpu=chosen,
    )
    return costs, rows


def _parse_device(name: str) -> tuple[str, tuple[str, tuple[int, int]] | None]:
    """(device kind, GPU named)."""
    from autopeft.errors import DeviceError, suggest_nearest
    from autopeft.executors.devices import KNOWN_GPUS

    if name in ("cpu", "cuda"):
        return name, None
    if name not in KNOWN_GPUS:
        raise DeviceError(f"--device knows no '{name}'. {suggest_nearest(name, ['cpu', 'cuda', *KNOWN_GPUS])}")
    return "cuda", (KNOWN_GPUS[name].title, KNOWN_GPUS[name].capability)


def _make_rows(args: argparse.Namespace, device_kind: str) -> list[_Row]:
    """One for each method and bit width."""
    from autopeft.errors import SpecError
    from autopeft.methods import find_method
    from autopeft.search.request import parse_fixed

    methods = [find_method(name.strip()) for name in (args.method or "lora").split(",")]
    widest = 16 if device_kind == "cuda" else 32
    fixed = parse_fixed(args.fix).get("bits")
    widths: list[Any] = [widest if fixed == "unquantized" else fixed]
    if args.bits:
        try:
            widths = [widest if part == "unquantized" else int(part) for part in args.bits.split(",")]
        except ValueError:
            raise SpecError(f"--bits takes 4, 8 or unquantized, but was given '{args.bits}'.") from None
    return [_make_row(args, method, bits, device_kind) for method in methods for bits in widths]


def _make_row(args: argparse.Namespace, method: Any, bits: Any, device_kind: str) -> _Row:
    from autopeft.errors import UsageError
    from autopeft.methods.faults import DEVICE_BITS

    shown = bits if isinstance(bits, int) else next(width for width in DEVICE_BITS[device_kind] if width in method.bits)
    try:
        return _row_of(_make_spec(args, method, bits, device_kind))
    except UsageError as exc:
        return _Row(method.name, shown, None, refused=_in_one_line(exc))


def _row_of(spec: TrialSpec) -> _Row:
    return _Row(spec.method, spec.bits, spec)


def _make_spec(args: argparse.Namespace, method: Any, bits: Any, device_kind: str) -> TrialSpec:
    """The method's recipe with what the arguments say otherwise."""
    from autopeft.errors import SpecError, suggest_nearest
    from autopeft.search.request import parse_fixed
    from autopeft.spaces.dimensions import check_value, default_dimensions
    from autopeft.spaces.space import check_feasible, make_spec

    dimensions = default_dimensions(method, device_kind)
    values: dict[str, Scalar] = {name: dimension.default for name, dimension in dimensions.items()}
    values |= method.recipe.settings
    given: dict[str, Scalar] = {"batch_size": 4} | parse_fixed(args.fix)
    options = {
        "rank": args.rank, "bits": bits, "optimizer": args.optimizer, "target_modules": args.target_modules,
        "batch_size": args.batch_size,
    }  # fmt: skip
    given |= {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in values:
            raise SpecError(f"{method.title} has no setting '{name}'. {suggest_nearest(name, values)}")
        check_value(dimensions[name], value, f"{name}={value}: {method.name}.{name}")
        values[name] = value
    spec = make_spec(method.name, values, max_steps=_STEPS, seed=0)
    check_feasible(spec, device_kind)
    return spec


def _draw_space(args: argparse.Namespace, device_kind: str) -> list[_Row]:
    """The space's recipes, then configurations drawn at random, always the same."""
    from dataclasses import replace

    from autopeft.methods import refuse_spec
    from autopeft.methods.kinds import read_model_kind
    from autopeft.search.request import parse_fixed
    from autopeft.spaces.load import find_space, parse_space

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
    suggester = _Random(random.Random(0))
    for _ in range(20 * count):
        if len(specs) >= count:
            break
        spec = space.suggest(suggester, max_steps=_STEPS, seed=0)
        if refuse_spec(spec, device_kind) is None:
            specs.setdefault(spec.cost_key(), spec)
    if args.batch_size is None:
        return [_row_of(spec) for spec in specs.values()]
    return [_row_of(replace(spec, batch_size=args.batch_size)) for spec in specs.values()]


class _Random:
    """Answers a space's questions."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return round(self.suggest_float(name, low, high, log=log))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(low * (high / low) ** self._rng.random()) if log else self._rng.uniform(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._rng.choice(list(choices))


def _read_study(name: str) -> tuple[HfCostModel, Sequence[_Row]]:
    from autopeft.backends import load_cost_model
    from autopeft.cli.session import STUDIES, read_local
    from autopeft.errors import StudyError
    from autopeft.search.plan import make_setup
    from autopeft.search.store import StudyStore

    store = StudyStore.open(STUDIES, name)
    if not store.trials:
        raise StudyError(f"The study '{name}' has no configurations yet. Start it with: autopeft search --name {name}")
    local = read_local(store)
    assert local["model"] is not None
    device = "cuda:0" if store.config.device_kind == "cuda" else "cpu"
    setup = make_setup(store.config, local["model"], local["data_dir"], STUDIES, 1, device)
    costs: Any = load_cost_model(setup)
    specs = {trial.spec.cost_key(): trial.spec for trial in store.trials}
    return costs, [_row_of(spec) for spec in specs.values()]


# --- how it is told


def _to_json(row: _Row, settings: StepSettings, most: int | None) -> dict[str, Any]:
    from autopeft.records import to_record

    if row.estimate is None or row.spec is None:
        spec = None if row.spec is None else to_record(row.spec)
        return {"method": row.method, "bits": row.bits, "spec": spec, "refused": row.refused}
    return {
        "spec": to_record(row.spec),
        "settings": to_record(settings),
        "estimate": to_record(row.estimate),
        "peak_bytes": row.estimate.peak_bytes,
        "device_bytes": row.estimate.device_bytes,
        "fits": None if most is None else _need(row.estimate) <= most,
    }


def _print_one(row: _Row, settings: StepSettings, costs: HfCostModel, most: int | None) -> None:
    from autopeft.report.words import describe_settings, format_bytes, format_count, title_method

    spec, estimate = row.spec, row.estimate
    assert spec is not None
    assert estimate is not None
    size = f"{spec.batch_size} x {costs.longest_tokens} tokens"
    if settings.micro_batches > 1:
        size += f", gradients of {settings.micro_batches} batches summed"
    if settings.checkpoint_activations:
        size += ", activations checkpointed"
    own = describe_settings(spec)
    print(f"{title_method(spec.method)}{', ' + own if own else ''}, {spec.bits} bits, {spec.optimizer}")
    print(f"{size}; modelled for {estimate.device}\n")
    print(f"{'base parameters':<32}{format_count(estimate.base_parameters):>10}")
    is_classifier = costs.num_labels is not None
    head = f"  and {format_count(estimate.head_parameters)} in the head" if is_classifier else ""
    print(f"{'trainable parameters':<32}{estimate.trainable_parameters:>10,}{head}\n")
    parts = {
        "base weights": estimate.base_bytes,
        "adapter and head" if is_classifier else "adapter": estimate.adapter_bytes,
        "gradients": estimate.gradient_bytes,
        "optimizer": estimate.optimizer_bytes,
        "activations at the peak": estimate.activation_bytes,
        "cuBLAS workspaces": estimate.library_bytes,
    }
    for name, num_bytes in parts.items():
        print(f"{name:<32}{format_bytes(num_bytes):>10}")
    print(f"{'peak while training':<32}{format_bytes(estimate.peak_bytes):>10}")
    print(
        f"{'peak of the evaluation pass':<32}{format_bytes(estimate.scoring_bytes):>10}"
        f"  {estimate.scoring_batch_size} examples at a time"
    )
    if most is not None:
        print(f"{_fit(estimate, most) + ' --max-vram':<32}{format_bytes(most):>10}")
    if estimate.context_bytes:
        print(f"\n{'allocator, on top':<32}{format_bytes(estimate.allocator_bytes):>10}  simulated: reserved, not used")
        print(f"{'CUDA context, on top':<32}{format_bytes(estimate.context_bytes):>10}  assumed, depends on the driver")
        print(f"{'what a GPU must have free':<32}{format_bytes(estimate.device_bytes):>10}")
    if estimate.paged_bytes:
        print(f"{'paged optimizer states':<32}{format_bytes(estimate.paged_bytes):>10}  on the GPU where there is room")
    print(f"\n{'checkpoint to resume from':<32}{format_bytes(estimate.checkpoint_bytes):>10}")
    print(f"{'exported adapter':<32}{format_bytes(estimate.exported_bytes):>10}")
    if estimate.layers_measured:
        shallow, deeper = estimate.layers_measured
        print(f"\nExtrapolated from models of {shallow} and {deeper} of its layers, which repeat.")
    if not is_classifier:
        print(_tell_writing(costs))


def _tell_writing(costs: HfCostModel) -> str:
    """Whether the evaluation counted is one in which a language model writes."""
    if costs.writing is None:
        return "The evaluation is by loss. A task scored by exact_match has texts written too: --study counts that."
    new, prompt = costs.writing.new_tokens, costs.writing.prompt_tokens
    return f"In the evaluation up to {new} tokens are written after up to {prompt}."


def _print_table(rows: Sequence[_Row], most: int | None) -> None:
    from autopeft.report.words import format_bytes, format_count

    columns = f"{'trainable':>10} {'training':>10} {'evaluation':>11} {'GPU, free':>10} {'checkpoint':>11}"
    print(f"{columns}  configuration")
    for row in rows:
        words, estimate = _describe(row, rows), row.estimate
        if estimate is None:
            print(f"{'-':>10} {'-':>10} {'-':>11} {'-':>10} {'-':>11}  {words}: {row.refused}")
            continue
        figures = [
            estimate.peak_bytes,
            estimate.scoring_bytes,
            estimate.device_bytes if estimate.context_bytes else None,
            estimate.checkpoint_bytes,
        ]
        texts = ["-" if number is None else format_bytes(number) for number in figures]
        fits = "" if most is None else f" ({_fit(estimate, most)} {format_bytes(most)})"
        print(
            f"{format_count(estimate.trainable_parameters):>10} {texts[0]:>10} {texts[1]:>11} {texts[2]:>10} "
            f"{texts[3]:>11}  {words}{fits}"
        )
    estimates = [row.estimate for row in rows if row.estimate is not None]
    if estimates:
        print(f"\nModelled for {estimates[0].device}.")


def _describe(row: _Row, rows: Sequence[_Row]) -> str:
    """By what tells it from the others."""
    from autopeft.report.words import describe_settings, title_method

    words = title_method(row.method)
    if row.spec is None:
        return f"{words}, {row.bits} bits"
    own = describe_settings(row.spec)
    words += f"{', ' + own if own else ''}, {row.bits} bits"
    if row.spec.optimizer != "adamw":
        words += f", {row.spec.optimizer}"
    if len({other.spec.batch_size for other in rows if other.spec is not None}) > 1:
        words += f", batch {row.spec.batch_size}"
    return words


def _fit(estimate: Estimate, most: int) -> str:
    return "within" if _need(estimate) <= most else "over"


def _need(estimate: Estimate) -> int:
    """As a search judges by --max-vram: what the driver and the allocator add is not in it."""
    return max(estimate.peak_bytes, estimate.scoring_bytes)
