"""A small set of questions on images and clips.

    python -m eval_encoder.lmm.demo.question_set --output DIR

A tiny multimodal model trains on it in minutes. Every image and clip shows one shape of
data_pipeline/embedded/motion_shapes.py whose colour, outline and motion are known. Layout, in
LLaVA's formats, media relative to DIR:

    DIR/images/*.png      single frames, the shape in the middle
    DIR/clips/*.mp4       clips of 64 frames
    DIR/align.json        stage 1: one caption for every image and clip of training
    DIR/tune.json         stage 2: a dialogue on each of them; then, one for every 20 of them,
                          questions on two images (`image` is a list) and questions without an
                          image; to be shuffled by the trainer
    DIR/questions.jsonl   held out: question_id, image or video, text, category
    DIR/answers.jsonl     question_id, label, category
    DIR/settings.json     settings of another run in the same folder are an error

Answers are single lower-case words. In questions.jsonl every answer of a category is right equally
often, so that a blind model gets 1 / 6 of the colours, 1 / 3 of the shapes, 1 / 8 of the directions
and half of the yes_no questions. A sample is a pure function of (seed, index). Cost: about a minute
and 70 MB for the defaults on two cores.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.flags import add_flags, flag, from_flags
from model_factory.command_line.local_output import output_path


@dataclass(frozen=True)
class DemoSet:
    """What a set is made of, and the flags of this module."""

    output: Path = flag(help="folder of the set", parse=output_path)
    num_train: int = flag(default=2000, help="images and clips to train on")
    num_val: int = flag(default=384, help="held-out questions")
    size: int = flag(default=112, help="side of an image in pixels")
    seed: int = flag(default=0, help="of all draws")
    workers: int = flag(default=2, help="processes that render")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.demo.question_set", description=__doc__.split("\n")[0]
    )
    add_flags(parser, DemoSet)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write a set; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_write, argv=argv)


def _write(args: argparse.Namespace) -> None:
    # after the flags have been parsed, since --help needs no library
    from eval_encoder.lmm.demo.samples import write_demo_set

    config = from_flags(DemoSet, args)
    write_demo_set(config)
    print(f"{config.num_train} images and clips, {config.num_val} questions in {config.output}")


if __name__ == "__main__":
    sys.exit(main())
