"""Entry point of training: `torchrun --nproc_per_node N -m training.train_univit ...`.

Parses the command line, claims the output folder and writes the configuration there before anything
runs, prepares the embedded data set when no other is named, trains, writes report.md, and leaves
exit.json with the outcome. Exit codes: 0 done, 1 user's mistake or unknown error, 3 asked to stop
and saved, 4 too many bad samples, 5 non-finite loss, 6 bad checkpoint, 7 checkpoint of another
configuration, 8 storage, 9 another rank is gone, 10 out of memory, 11 the launcher is gone
(model_factory/command_line/command.py).
"""

import argparse
import contextlib
import dataclasses
import logging
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.command import run_command
from model_factory.command_line.quiet import quiet_libraries

from .config.cli import build_config, build_parser, warn_idle
from .log import is_first_to_say, setup_logging

if TYPE_CHECKING:  # imported where they are used, so that `--help` needs no torch
    from data_pipeline.datasets import Dataset

    from .config.schema import TrainConfig
    from .distributed import Ranks
    from .stop_signals import StopSignals


def main(argv: list[str] | None = None) -> int:
    """Run one training; returns the exit code."""
    return run_command(
        parse=build_parser().parse_args, work=_start, argv=argv, should_print=is_first_to_say
    )


def _start(args: argparse.Namespace) -> None:
    quiet_libraries()
    config = build_config(args)
    if args.print_config:
        print(config.to_json())
        return
    args.record = config.output  # presets and --set name it too

    from .distributed import process_group

    with process_group(config.collective_timeout_s) as ranks:
        code = _run(args, config=config, ranks=ranks)
        if code:
            sys.exit(code)  # from inside, so that no rank waits for a peer that still works


def _run(args: argparse.Namespace, config: "TrainConfig", ranks: "Ranks") -> int:
    """Train in a claimed folder and write how it ended; returns the exit code."""
    from .run_folder import RunFolder, outcome_of
    from .stop_signals import StopSignals

    logger = setup_logging(ranks.rank)
    signals = StopSignals()
    signals.install()
    if args.dry_run:
        # a folder of its own, which is removed, so that no run's records or commits are touched
        folder = Path(config.output) / "dry_run"
        config = dataclasses.replace(config, output=str(folder), resume="never", rounds=1)
    run = RunFolder(config, ranks)
    try:
        run.claim(sys.argv[1:])
        if ranks.is_main:
            warn_idle(args, logger)
        _train(args, config=config, ranks=ranks, signals=signals, logger=logger)
    except BaseException as error:
        # a launcher signals the ranks that are left within a tenth of a second of a lost one: the
        # record of what ended this one is still to be written
        signals.hold()
        outcome, message = outcome_of(error, written=run.path)
        trace = traceback.format_exc()
        if outcome is None:
            run.leave("error", message=f"{type(error).__name__}: {error}", trace=trace)
            raise
        # all ranks raise the other errors together, so rank 0 reports them; a StorageError comes to
        # all ranks, an OSError of the system to one
        is_own = outcome in ("error", "peer lost") or isinstance(error, OSError)
        if (ranks.is_main or is_own) and is_first_to_say(message):
            logger.error("%s", message)
        return run.leave(outcome, message=message, trace=trace)
    finally:
        if args.dry_run and ranks.is_main:
            shutil.rmtree(run.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: somebody else's, or data that was made
                run.path.parent.rmdir()
    return run.leave("done", "done") if ranks.is_main else 0


def _train(
    args: argparse.Namespace,
    config: "TrainConfig",
    ranks: "Ranks",
    signals: "StopSignals",
    logger: logging.Logger,
) -> None:
    from .record.report import write_report
    from .rounds import train_rounds
    from .trainer import Trainer

    datasets = _load_datasets(args, config=config, ranks=ranks, logger=logger)
    if args.dry_run:
        trainer = Trainer(config, datasets, ranks=ranks, signals=signals, logger=logger)
        trainer.train(last_step=1)
        logger.info("dry run: built everything and trained one step; nothing was kept")
        return
    train_rounds(config, datasets, ranks=ranks, signals=signals, logger=logger)
    if ranks.is_main:
        try:
            write_report(Path(config.output))
        except Exception as error:  # the run is done and whole, whatever a plot meets
            logger.warning("report.md could not be written: %s: %s", type(error).__name__, error)


def _load_datasets(
    args: argparse.Namespace, config: "TrainConfig", ranks: "Ranks", logger: logging.Logger
) -> "dict[str, Dataset | None]":
    """{head: its dataset}, None for synthetic patches; the embedded set is made under the output
    folder first."""
    from data_pipeline.datasets import (
        EMBEDDED,
        embedded_spec,
        prepare_embedded,
        register_dataset,
        resolve_dataset,
    )
    from data_pipeline.loading.dali_pipeline import require_dali

    from .distributed import on_main

    if config.synthetic_data:
        return {head.name: None for head in config.heads}
    require_dali()
    if any(head.dataset == EMBEDDED for head in config.heads):
        folder = Path(args.output or config.output) / "data" / EMBEDDED
        if args.list_datasets is None and args.preset is None:
            logger.info(
                "no --list_datasets given: making, packing and clustering the embedded %s set in "
                "%s, and training with the demo preset under your flags",
                EMBEDDED,
                folder,
            )
        num_train, num_val = config.embedded_clips
        on_main(
            ranks,
            lambda: prepare_embedded(
                folder, num_train=num_train, num_val=num_val, report=logger.info
            ),
        )
        register_dataset(EMBEDDED, lambda: embedded_spec(folder))
    return {
        head.name: resolve_dataset(head.dataset).load(config.allow_missing_shards)
        for head in config.heads
    }


if __name__ == "__main__":
    sys.exit(main())
