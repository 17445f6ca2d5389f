"""`autopeft resume`: go on with a study that was interrupted or whose budget is raised."""

from __future__ import annotations

import argparse
from dataclasses import replace


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("resume", help="go on with a study", description="Goes on with a study.")
    parser.add_argument("study", help="the study's name")
    parser.add_argument("--budget", help="a new total, of the same kind; what was spent counts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from autopeft.cli.session import STUDIES, check_outputs, read_local, run_study
    from autopeft.executors.local import LocalExecutor
    from autopeft.hub import fetch_model, is_cached, is_hub_id
    from autopeft.search.plan import (
        check_rows,
        make_setup,
        restore_devices,
        restore_space,
        seconds_until,
        with_budget,
    )
    from autopeft.search.store import StudyStore

    check_outputs()
    store = StudyStore.open(STUDIES, args.study)
    local = read_local(store)
    assert local["model"] is not None
    check_rows(store.config, store.provenance, local["data_dir"])
    # What the cache has is what the study began with; the hub may have something newer by now.
    if is_hub_id(local["model"]) and not is_cached(local["model"]):
        fetch_model(local["model"], print)
    # Anew, because that takes time, in which another process may have gone on with it.
    store = StudyStore.open(STUDIES, args.study)
    changed = store.config
    if args.budget:
        changed = with_budget(changed, args.budget)
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
    setup = make_setup(config, local["model"], local["data_dir"], STUDIES, restored.threads, restored.devices[0])
    executor = LocalExecutor(setup, restored.devices)
    return run_study(store, executor, restore_space(config), seconds_until(config))
