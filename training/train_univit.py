"""Entry point of training: `torchrun --nproc_per_node N -m training.train_univit ...`.

Parses the command line, writes the configuration before anything runs, prepares the embedded data
set when no other is named, trains, and leaves exit.json with the outcome. Exit codes: 0 done, 1
user's mistake or unknown error, 4 too many bad samples, 5 non-finite loss, 6 bad checkpoint, 7
checkpoint of another configuration, 8 storage that does not answer.
"""

import json
import subprocess
import sys
from pathlib import Path

from .cli import build_config, build_parser, warn_idle


def main(argv: list[str] | None = None) -> int:
    """Run one training; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        config = build_config(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.print_config:
        print(config.to_json())
        return 0

    from .distributed import process_group

    with process_group() as ranks:
        code = _run(args, config, ranks)
        if code:
            sys.exit(code)  # from inside, so that no rank waits for a peer that still works
    return 0


def _run(args, config, ranks) -> int:
    from data_pipeline.errors import BudgetExceeded, DataTimeout

    from .checkpointer import BadCheckpoint
    from .log import setup_logging
    from .rounds import train_rounds
    from .trainer import ConfigMismatch, NonFiniteLoss

    logger = setup_logging(ranks.rank)
    output = Path(config.output)
    code, message = 0, "done"
    try:
        if ranks.is_main:
            warn_idle(args, logger)
            _write_run_record(output, config)
        train_rounds(config, _load_datasets(args, config, ranks, logger), ranks, logger)
    except (NonFiniteLoss, ValueError) as error:
        named = {BudgetExceeded: 4, NonFiniteLoss: 5, BadCheckpoint: 6, ConfigMismatch: 7}
        named |= {DataTimeout: 8}
        code, message = named.get(type(error), 1), str(error)
    except BaseException as error:
        _write_outcome(output, 1, f"{type(error).__name__}: {error}")
        raise
    if code and (ranks.is_main or code == 1):  # other codes are decisions that all ranks share
        logger.error("%s", message)
    if ranks.is_main or code:
        _write_outcome(output, code, message)
    return code


def _write_outcome(output: Path, code: int, message: str) -> None:
    if output.is_dir():
        (output / "exit.json").write_text(json.dumps({"code": code, "message": message}))


def _write_run_record(output: Path, config) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "exit.json").unlink(missing_ok=True)
    (output / "config.json").write_text(config.to_json())
    (output / "run.json").write_text(
        json.dumps({"argv": sys.argv[1:], "git_revision": _git_revision()})
    )


def _git_revision() -> str | None:
    """Commit of the running code; None outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _load_datasets(args, config, ranks, logger) -> dict:
    """Dataset of every head by name (None: synthetic);
    the embedded set is made under the output folder first.
    """
    from data_pipeline.datasets import (
        EMBEDDED,
        embedded_spec,
        prepare_embedded,
        register_dataset,
        resolve_dataset,
    )

    from .distributed import on_main

    if config.synthetic_data:
        return {head.name: None for head in config.heads}
    if any(head.dataset == EMBEDDED for head in config.heads):
        folder = Path(config.output) / "data" / EMBEDDED
        if args.list_datasets is None and args.preset is None:
            logger.info(
                "no --list_datasets given: making, packing and clustering the embedded %s set in "
                "%s, and training with the demo preset under your flags",
                EMBEDDED,
                folder,
            )
        clips = config.embedded_clips
        on_main(ranks, lambda: prepare_embedded(folder, *clips, report=logger.info))
        register_dataset(EMBEDDED, lambda: embedded_spec(folder))
    return {
        head.name: resolve_dataset(head.dataset).load(config.allow_missing_shards)
        for head in config.heads
    }


if __name__ == "__main__":
    sys.exit(main())
