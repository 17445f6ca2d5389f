"""`autopeft merge`: a finished training as one plain model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from autopeft.wording import say_count

if TYPE_CHECKING:
    from pathlib import Path

    from autopeft.production.finished import Finished
    from autopeft.production.merge import Merged


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="fold a trained adapter into its base: a plain model",
        description="Folds a trained adapter into its base and writes a plain model, which transformers, vLLM and "
        "llama.cpp's converter load. Its answers on rows of the test split are compared with the unmerged model's; a "
        "base of 4 or 8 bits is dequantized first.",
    )
    parser.add_argument("dir", metavar="DIR", help="a folder that autopeft train has finished")
    parser.add_argument("--out", required=True, metavar="MODEL", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as in the base's own checkpoint)")
    add_places(parser)
    parser.set_defaults(run=run)


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where things lie on this machine, for folders that come from another."""
    parser.add_argument(
        "--model", metavar="BASE", help="the base, where it is not where the training found it: hub id or folder"
    )
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="the rows, where they are not where the training found them"
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    finished, merged = merge_folder(args, Path(args.out))
    print_merged(finished, merged)
    print(f"merged model {merged.folder}")
    return 0


def merge_folder(args: argparse.Namespace, out: Path) -> tuple[Finished, Merged]:
    """Merges `args.dir` into the new folder `out`, with its card."""
    from pathlib import Path

    from autopeft.production.card import carry_card
    from autopeft.production.finished import open_finished
    from autopeft.production.merge import merge, parse_dtype

    dtype = parse_dtype(args.dtype) if args.dtype else None
    finished = open_finished(Path(args.dir), model=args.model, data_dir=args.data_dir)
    merged = merge(finished, out, dtype=dtype)
    carry_card(finished.folder, finished.recipe, finished.result, merged)
    return finished, merged


def print_merged(finished: Finished, merged: Merged) -> None:
    """How far the merged model's answers are from the unmerged one's."""
    from autopeft.methods import find_method

    recipe = finished.recipe
    rows = f"{say_count(merged.num_rows, 'row')} of the test split, logits up to {merged.largest_logit:.3g}"
    print(f"method       {find_method(recipe.spec.method).title}, trained on a base of {recipe.bits} bits")
    print(f"compared     on {rows}")
    print(f"merging      moves logits by at most {merged.difference:.1e} in float32")
    if merged.quantization_difference is not None:
        print(
            f"dequantizing moves logits by at most {merged.quantization_difference:.1e}: against the model as it was "
            "trained, on the quantized base"
        )
    print(
        f"as written   in {merged.dtype}, loaded by a fresh process: at most {merged.written_difference:.1e}, "
        f"{merged.same_answers:.0%} same answers"
    )
    print(f"mean loss    {merged.loss:.4f} nats as trained, {merged.written_loss:.4f} as written")
