"""`autopeft resume`: go on with a study that was interrupted or whose budget is raised."""

from __future__ import annotations

import argparse
from dataclasses import replace


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("resume", help="go on with a study", description="Goes on with a study.")
    parser.add_argument("study", help="the study's name")
    parser.add_argument("--budget", help="a new total, of the same kind; what was spent counts")
    parser.add_argument("--model", help="where the base model is, if it has moved since the study began")
    parser.add_argument("--data-dir", help="folder with the task's rows, if they have moved since the study began")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from autopeft.cli.session import STUDIES, check_outputs, find_places, keep_places, open_study, run_study
    from autopeft.executors.local import LocalExecutor
    from autopeft.hub import fetch_model, is_cached, is_hub_id
    from autopeft.search.plan import (
        check_rows,
        make_setup,
        raise_budget,
        restore_devices,
        restore_space,
        seconds_until,
    )

    check_outputs()
    store = open_study(args.study)
    places = find_places(store, model=args.model, data_dir=args.data_dir)
    check_rows(replace(store.config, task=places.task), store.provenance, places.data_dir)
    # What the cache has is what the study began with; the hub may have something newer by now.
    if is_hub_id(places.model) and not is_cached(places.model):
        fetch_model(places.model, print)
    # Anew, because that takes time, in which another process may have gone on with it.
    store = open_study(args.study)
    changed = replace(store.config, task=places.task)
    if args.budget:
        changed = replace(changed, budget=raise_budget(store, args.budget))
    elif store.finished and changed.least_gain is not None:
        # It may have ended early; whoever resumes it all the same wants the rest.
        changed = replace(changed, least_gain=None)
    if changed != store.config:
        # Not while another process runs it by the settings that it read.
        with store.lock():
            store.save_config(changed)
    config = store.config
    restored = restore_devices(config, store.provenance)
    if restored.note:
        print(restored.note)
    setup = make_setup(config, places.model, places.data_dir, STUDIES, restored.threads, restored.devices[0])
    executor = LocalExecutor(setup, restored.devices)
    code = run_study(store, executor, restore_space(config), seconds_until(config))
    # Only now is it known that the weights there are the study's.
    keep_places(store, places.model, places.data_dir)
    return code
