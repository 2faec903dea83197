"""Entry point of the probe: `torchrun eval_encoder/attentive_probe.py --dataset NAME ...`.

Flags are in probe/config.py, the probe itself in probe/run.py. Run by path, so this file holds no
definition that another module needs.
"""

import argparse
import sys

from eval_encoder.probe.config import build_config, build_parser, idle_flags
from model_factory.command_line.command import run_command
from model_factory.command_line.quiet import quiet_libraries
from training.log import is_first_to_say


def main(argv: list[str] | None = None) -> int:
    """Run one probe; returns the exit code."""
    return run_command(
        parse=build_parser().parse_args, work=_probe, argv=argv, should_print=is_first_to_say
    )


def _probe(args: argparse.Namespace) -> None:
    quiet_libraries()
    config = build_config(args)
    # after the flags have been checked, since torch takes seconds to import
    from eval_encoder.probe.run import run_probe

    run_probe(config, ignored=idle_flags(args))


if __name__ == "__main__":
    sys.exit(main())
