"""`autopeft search`: a study from a task and a budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.records import WarmStart
    from autopeft.search.plan import Plan
    from autopeft.search.request import Request


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "search",
        help="search configurations for a task inside a budget",
        description="Searches PEFT configurations for a task inside a budget; writes a report and a leaderboard.",
    )
    parser.add_argument("--task", required=True, help="a shipped task (autopeft tasks), or a task file: mine.yaml")
    parser.add_argument(
        "--budget", required=True, help="8gpu-h, 30gpu-min, 20cpu-min, 2h, 50trials, or two: 2h,50trials"
    )
    parser.add_argument("--model", default="auto", help="hub id, folder, or minilm; auto picks by device (default)")
    parser.add_argument("--space", default="default", help="a shipped search space (autopeft spaces), or a file")
    parser.add_argument("--methods", help="only these methods of the space: lora,ia3")
    parser.add_argument(
        "--fix", action="append", default=[], metavar="NAME=VALUE", help="bits=4, lora.rank=8; repeatable"
    )
    parser.add_argument(
        "--objectives",
        default="quality,vram,params",
        help="of quality,vram,params,size,latency (default: the first three)",
    )
    parser.add_argument("--max-vram", metavar="SIZE", help="never start what needs more: 24GB")
    parser.add_argument("--max-params", metavar="COUNT", help="never start what trains more: 10M")
    parser.add_argument("--max-steps", type=int, help="steps of the full length (default: from budget and data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="default: one a GPU, or one a CPU core up to 4")
    parser.add_argument("--name", help="the study's name (default: from task and model)")
    parser.add_argument("--data-dir", help="searched before the hub: DIR/TASK/train.jsonl (or set AUTOPEFT_DATA_DIR)")
    parser.add_argument(
        "--include", action="append", default=[], metavar="FILE", help="a configuration of your own to race; repeatable"
    )
    parser.add_argument(
        "--warm-start",
        nargs="*",
        metavar="STUDY",
        help="try first what did well before: in these studies or leaderboard files, or with none named in the shipped "
        "ones",
    )
    parser.add_argument(
        "--stop-when-gain-below",
        metavar="SHARE",
        help="end once the rest of the budget is expected to improve the front by less, such as 0.5%% of its "
        "hypervolume (default: never)",
    )
    parser.add_argument("--until", metavar="HH:MM", help="end by this time of day")
    parser.add_argument("--price", metavar="AMOUNT", help="for the report: 2.5/gpu-h")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument(
        "--plan-for", metavar="GPU", help="with --dry-run: plan for a GPU that is not here, such as h100"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from autopeft.cli.session import STUDIES, run_new_study
    from autopeft.search.plan import make_plan

    sources = None
    if args.warm_start is not None:
        from autopeft.report.priors import read_sources

        sources = read_sources(args.warm_start, STUDIES)
    plan = make_plan(_request(args), studies=STUDIES, dry_run=args.dry_run, sources=sources)
    print_plan(plan)
    if args.dry_run:
        _print_costs(plan)
        return 0
    return run_new_study(plan)


def _request(args: argparse.Namespace) -> Request:
    from dataclasses import fields

    from autopeft.search.request import Request

    return Request(**{field.name: getattr(args, field.name) for field in fields(Request)})


def print_plan(plan: Plan) -> None:
    """What will be run, in a few lines."""
    config = plan.config
    lines = {
        "study": config.name,
        "task": f"{plan.task.title}{_describe_kind(plan)}, scored by {config.scorer}" + _describe_splits(plan),
        "base model": config.model,
        "devices": plan.device_title,
        "budget": f"{config.budget}" + (f", until {config.until}" if config.until else "")
        + (f", or until the rest promises less than {config.least_gain:.2%}" if config.least_gain else "")
        + _describe_confirmation(plan),
        "space": f"{config.space_name}: {', '.join(plan.space.methods)} ({plan.space.count_dimensions()} dimensions)",
        "warm start": _describe_warm_start(config.warm_start),
        "objectives": ", ".join(config.objectives),
        "full length": f"{config.rungs[-1]} steps, compared at {', '.join(map(str, config.rungs))}",
        "estimate": _describe_estimate(plan),
    }  # fmt: skip
    for note in plan.notes:
        print(f"note: {note}")
    for key, value in lines.items():
        if value:
            print(f"{key:<12} {value}")


def _describe_confirmation(plan: Plan) -> str:
    if plan.is_clocked:
        return f", {plan.config.confirm_share:.0%} kept for confirmation"
    return f", and {say_count(plan.num_confirmations, 'confirmation')} at most beyond it"


def _describe_warm_start(warm_start: WarmStart | None) -> str:
    if warm_start is None:
        return ""
    return f"{say_count(len(warm_start.first), 'configuration')} first, by {', '.join(warm_start.sources)}"


def _describe_kind(plan: Plan) -> str:
    if plan.task.kind == "classification":
        return ""
    return " (text after a prompt)" if plan.task.prompt else " (plain text)"


def _describe_splits(plan: Plan) -> str:
    if plan.splits is None:
        return ", rows not on this machine"
    train, validation, test = plan.splits.train, plan.splits.validation, plan.splits.test
    return f", {len(train)} train / {len(validation)} search-validation / {len(test)} test rows"


def _describe_estimate(plan: Plan) -> str:
    import math

    from autopeft.report.words import format_seconds

    steps = plan.config.rungs[-1]
    each = plan.seconds_per_step * steps
    lengths = plan.full_lengths()
    if not plan.is_clocked:
        trials = plan.budget.trials or 0
        # The baseline is one more.
        total = (trials + 1 + plan.num_confirmations) * plan.seconds_per_length / len(plan.devices)
        return f"{say_count(trials, 'trial')}, at most {format_seconds(total)} for all if none were stopped (rough)"
    # With halving rungs a trial costs on average between its first rung and its full length.
    first = plan.config.rungs[0] / steps
    most = min(lengths / first, plan.budget.trials or math.inf)
    few = min(lengths, most)
    if round(few) == round(most):
        text = f"{say_count(round(most), 'trial')}; {format_seconds(each)} a full length (rough)"
    else:
        text = (
            f"{few:.0f} to {most:.0f} trials, the fewer the later they are stopped; "
            f"{format_seconds(each)} a full length (rough)"
        )
    if lengths < 3:
        text += ". The budget is too small for anything useful: it buys fewer than three full lengths"
    return text


def _print_costs(plan: Plan) -> None:
    """Peak VRAM and parameters of every recipe, computed without training."""
    from autopeft.cli.session import STUDIES
    from autopeft.errors import AutopeftError
    from autopeft.executors.devices import find_free_bytes
    from autopeft.executors.local import LocalExecutor
    from autopeft.hub import find_cached, is_hub_id
    from autopeft.report.words import describe_spec, format_bytes, format_count
    from autopeft.search.limits import Limits
    from autopeft.search.sampler import first_specs
    from autopeft.search.store import Trial

    if plan.splits is None or (is_hub_id(plan.model_argument) and find_cached(plan.model_argument) is None):
        # A note of the plan has said what is lacking.
        return
    executor = LocalExecutor(plan.setup(STUDIES), list(plan.devices))
    free = plan.planned_gpu.total_bytes if plan.planned_gpu is not None else None
    if free is None and plan.config.device_kind == "cuda":
        free = find_free_bytes(plan.config.workers)
    limits = Limits(plan.config, [], free)
    fitting = total = 0
    try:
        print(f"\n{'peak VRAM, estimated':>20}  {'trainable':>10}  tried first")
        for _, spec in first_specs(plan.config, plan.space):
            reply = executor.cost(spec)
            if reply.cost is None:
                print(f"{'-':>20}  {'-':>10}  {describe_spec(spec)}: {reply.refused}")
                continue
            rule = limits.judge(Trial(number=-1, spec=spec, source="recipe", cost=reply.cost)).rule
            total, fitting = total + 1, fitting + (rule is None)
            why_not = f" (does not fit: {rule})" if rule else ""
            size = format_bytes(reply.cost.peak_vram_bytes)
            print(f"{size:>20}  {format_count(reply.cost.trainable_parameters):>10}  {describe_spec(spec)}{why_not}")
        print(f"{fitting} of {total} fit")
    except AutopeftError as exc:
        print(f"The costs of single configurations are not known: {exc}")
    finally:
        executor.close()
