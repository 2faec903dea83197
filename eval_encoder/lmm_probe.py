"""Entry point of the two-stage multimodal probe, one stage per call:

    torchrun eval_encoder/lmm_probe.py --recipe llava15 --stage 1 --model_name_or_path LLM \
        --vision_tower RUN --data_path align.json --image_folder images --output_dir OUT
    deepspeed eval_encoder/lmm_probe.py --deepspeed shells/zero2.json ...

Flags are in lmm/config.py, the stage itself in lmm/stage.py. The list is read and checked first: a
wrong path ends before any weights are loaded. Run by path, so this file holds no definition that
another module needs.
"""

import argparse
import sys
from collections.abc import Sequence

from eval_encoder.lmm.config import build_parser, parse_arguments
from eval_encoder.lmm.data.conversation import stage_samples
from model_factory.command_line.command import run_command
from model_factory.command_line.launcher_watch import watched_launcher
from model_factory.command_line.quiet import quiet_libraries
from training.log import is_first_to_say


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code."""
    return run_command(parse=_parse, work=_stage, argv=argv, should_print=is_first_to_say)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`arguments` of ours, `others` of transformers', and `output_dir` of these, which run_command
    asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser().parse_args(["--help"])
    arguments, others = parse_arguments(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--output_dir")
    known, _ = first.parse_known_args(others)
    return argparse.Namespace(arguments=arguments, others=others, output_dir=known.output_dir)


@watched_launcher()
def _stage(parsed: argparse.Namespace) -> None:
    quiet_libraries(uses_deepspeed=any(flag.startswith("--deepspeed") for flag in parsed.others))
    samples = stage_samples(parsed.arguments)
    # after the list has been checked, since torch and transformers take seconds to import
    from eval_encoder.lmm.stage import run_stage
    from training.distributed import naming_peers

    with naming_peers():
        run_stage(parsed.arguments, others=parsed.others, samples=samples)


if __name__ == "__main__":
    sys.exit(main())
