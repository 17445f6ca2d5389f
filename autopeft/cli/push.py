"""`autopeft push`: a finished training on the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.production.push import Upload


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from autopeft.cli.merge import add_places

    parser = subparsers.add_parser(
        "push",
        help="upload a finished training to the Hugging Face hub",
        description="Uploads a finished training, with its model card, to the Hugging Face hub: the adapter, or with "
        "--merged the plain model. The token is read from HF_TOKEN or the hub's own login, and shown nowhere.",
    )
    parser.add_argument(
        "dir", metavar="DIR", help="a folder that autopeft train has finished, or autopeft merge has written"
    )
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    parser.add_argument("--merged", action="store_true", help="merge first, and upload the plain model")
    parser.add_argument("--dtype", help="with --merged: float32, bfloat16 or float16 (default: as the base's)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, and stop")
    add_places(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from autopeft.cli.merge import merge_folder, print_merged
    from autopeft.errors import ExportError
    from autopeft.production.files import RESULT_FILE
    from autopeft.production.finished import open_finished
    from autopeft.production.push import check_repo, check_token, push

    folder = Path(args.dir)
    check_repo(args.to)
    if args.dtype and not args.merged:
        raise ExportError("--dtype says how a merged model is written, so it goes with --merged only.")
    if not args.dry_run:
        # Before the work of merging.
        check_token(args.to)
    if args.merged:
        with tempfile.TemporaryDirectory(prefix="autopeft-merged-") as name:
            finished, merged = merge_folder(args, Path(name) / "model")
            print_merged(finished, merged)
            print_upload(push(merged.folder, args.to, private=args.private, dry_run=args.dry_run))
        return 0
    finished_or_merged = (
        open_finished(folder, model=args.model, data_dir=args.data_dir) if (folder / RESULT_FILE).is_file() else None
    )
    print_upload(push(folder, args.to, private=args.private, dry_run=args.dry_run, finished=finished_or_merged))
    return 0


def print_upload(upload: Upload) -> None:
    from autopeft.report.words import format_bytes

    for name, size in upload.files.items():
        print(f"{format_bytes(size):>12}  {name}")
    kind = "private" if upload.private else "public"
    what = f"{say_count(len(upload.files), 'file')}, {format_bytes(sum(upload.files.values()))}"
    if upload.url is None:
        print(f"{what} would go to {upload.repo}, {kind}. Nothing was uploaded.")
    else:
        print(f"{what} uploaded: {upload.url} ({kind})")
