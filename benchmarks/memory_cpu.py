"""Estimates for CPU against real steps: every method on an encoder, a decoder, an encoder-decoder and a ModernBERT.

Models are tiny, random and made on the spot; each configuration is estimated from the model's config.json alone, then
built with real weights and stepped once. Three things are told of each:

- trainable parameters against peft's own count of the real model (`get_nb_trainable_parameters`; what peft lacks is
  counted by `requires_grad`);
- peaks of a training step and of a scoring pass against live storages counted in real ones;
- the training peak against the CPU allocator's own events (torch.profiler), which include what kernels allocate
  inside themselves.

    python benchmarks/memory_cpu.py --out memory-cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import transformers
from machine import describe_machine

from autopeft.errors import SpecError
from autopeft.methods import METHODS
from autopeft.methods.faults import DEVICE_BITS
from autopeft.records import StepSettings
from autopeft.testing.contract import choice_variants, claimed
from autopeft.testing.memory import SAME_BYTES, allocated_peak_bytes
from autopeft.testing.subject import Case, Subject, width_for
from autopeft.testing.tiny_models import ARCHITECTURES, tiny_folder

RESULTS = Path(__file__).parent / "results"
PLAIN = StepSettings()
OTHER_STEPS = (StepSettings(checkpoint_activations=True), StepSettings(micro_batches=3))
OTHER_STEPS_OF = ("lora", "full", "bottleneck", "ia3")
"""Methods whose steps are also taken with activations checkpointed and with gradients accumulated."""


class Row(NamedTuple):
    architecture: str
    kind: str
    method: str
    changed: str
    """Settings other than the recipe's, and how the step is taken."""
    bits: int
    trainable: int
    """Estimated, the head included."""
    trainable_built: int
    training_estimated: int
    training_counted: int
    scoring_estimated: int
    scoring_counted: int
    allocated: int
    """0 where the step is not a plain one."""

    @property
    def worst(self) -> float:
        """The larger error of the two passes, as a share."""
        return max(
            abs(self.training_estimated / self.training_counted - 1),
            abs(self.scoring_estimated / self.scoring_counted - 1),
        )

    @property
    def allocator_error(self) -> float:
        return self.training_estimated / self.allocated - 1


def list_cases(methods: Sequence[str], *, choices: bool) -> Iterator[tuple[Case, StepSettings]]:
    """Recipes at every width, other ways to step, and with `choices` every other choice of every setting."""
    for name in methods:
        method = METHODS[name]
        for architecture in claimed(method, tuple(ARCHITECTURES)):
            for bits in DEVICE_BITS["cpu"]:
                if bits in method.bits:
                    yield Case(method, architecture, bits), PLAIN
            widest = Case(method, architecture, width_for(method))
            for changed in choice_variants(method) if choices else ():
                yield widest._replace(settings=tuple(changed.items())), PLAIN
            if name in OTHER_STEPS_OF:
                for settings in OTHER_STEPS:
                    yield widest, settings


def describe_changes(case: Case, settings: StepSettings) -> str:
    words = [f"{name} {value}" for name, value in case.settings]
    if settings.checkpoint_activations:
        words.append("checkpointed")
    if settings.micro_batches > 1:
        words.append(f"{settings.micro_batches} micro-batches")
    return ", ".join(words)


def compare(case: Case, settings: StepSettings) -> Row:
    """Raises SpecError where the model or the machine cannot take the configuration."""
    subject = Subject(case)
    estimate = subject.estimate(settings)
    agreement = subject.compare_memory(settings)
    model = subject.build()
    in_peft = subject.count_by_peft()
    if in_peft is None:
        built = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    else:
        built = in_peft
    allocated = 0
    if settings == PLAIN:
        allocated = allocated_peak_bytes(model, subject.spec, subject.batch())
    subject.close()
    return Row(
        case.architecture, ARCHITECTURES[case.architecture].kind, case.method.name, describe_changes(case, settings),
        case.bits, estimate.trainable_parameters + estimate.head_parameters, built, *agreement, allocated,
    )  # fmt: skip


def share(rows: Iterable[Row], tolerance: float) -> str:
    errors = [abs(row.allocator_error) for row in rows if row.allocated]
    return f"{sum(error <= tolerance for error in errors)} of {len(errors)}"


def render(rows: Sequence[Row], refused: Sequence[str]) -> str:
    """The table as Markdown: totals by architecture and width, then each configuration."""
    machine = describe_machine()
    exact = sum(row.worst == 0 for row in rows)
    allocator = [row.allocator_error for row in rows if row.allocated]
    num_methods = len({row.method for row in rows})
    lines = [
        "# Estimates for CPU, and real steps",
        "",
        f"`python benchmarks/memory_cpu.py`: {len(rows)} configurations of {num_methods} methods, "
        f"8 rows of 12 tokens. torch {machine['torch']}, transformers {machine['transformers']}, peft "
        f"{machine['peft']}, bitsandbytes {machine['bitsandbytes']}; {machine['processor']}.",
        "",
        f"- Trainable parameters equal the built model's: {sum(r.trainable == r.trainable_built for r in rows)} of "
        f"{len(rows)}",
        f"- peaks of training and scoring equal the bytes counted in real steps: to the byte {exact}, within "
        f"{SAME_BYTES:.0%} {sum(row.worst <= SAME_BYTES for row in rows)}, worst {max(r.worst for r in rows):.2%}",
        f"- training peak against the CPU allocator's events: within 1% {share(rows, 0.01)}, within 5% "
        f"{share(rows, 0.05)}, median {statistics.median(allocator):+.2%}, from {min(allocator):+.2%} to "
        f"{max(allocator):+.2%}",
        f"- refused as not for this model: {len(refused)}",
        "",
        "| model | kind | bits | configurations | to the byte | worst |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row.architecture for row in rows):
        for bits in DEVICE_BITS["cpu"]:
            group = [row for row in rows if (row.architecture, row.bits) == (name, bits)]
            if group:
                lines.append(
                    f"| {name} | {group[0].kind} | {bits} | {len(group)} | {sum(row.worst == 0 for row in group)} | "
                    f"{max(row.worst for row in group):.2%} |"
                )
    lines += [
        "",
        "| configuration | model | bits | trainable | training, estimated | counted | scoring, estimated | counted | "
        "allocator |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = f"{row.method}{', ' + row.changed if row.changed else ''}"
        allocated = f"{row.allocator_error:+.2%}" if row.allocated else ""
        lines.append(
            f"| {name} | {row.architecture} | {row.bits} | {row.trainable:,} | {row.training_estimated:,} | "
            f"{row.training_counted:,} | {row.scoring_estimated:,} | {row.scoring_counted:,} | {allocated} |"
        )
    return "\n".join([*lines, "", "Refused:", "", *(f"- {line}" for line in refused)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="only these")
    parser.add_argument("--choices", action="store_true", help="every other choice of every setting besides")
    parser.add_argument("--out", default="", help="name under results/; without it the table is printed alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    rows: list[Row] = []
    refused: list[str] = []
    failed: list[str] = []
    for case, settings in list_cases(args.methods, choices=args.choices):
        name = f"{case.name()} {case.bits} bits {describe_changes(case, settings)}".strip()
        try:
            row = compare(case, settings)
        except SpecError as exc:
            refused.append(f"{name}: {str(exc).replace(tiny_folder(case.architecture), case.architecture)}")
            continue
        except Exception as exc:
            # The others are compared all the same; this one makes the run fail at its end.
            failed.append(f"{name}: {type(exc).__name__}: {exc}")
            print(failed[-1], flush=True)
            continue
        rows.append(row)
        if row.worst > 0 or row.trainable != row.trainable_built:
            print(f"{name}: {row.worst:+.2%} parameters {row.trainable} {row.trainable_built}", flush=True)
    text = render(rows, refused)
    print(text)
    if args.out:
        (RESULTS / f"{args.out}.md").write_text(text, encoding="utf-8")
        lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
        (RESULTS / f"{args.out}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"{len(failed)} configurations failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
