"""`python -m data_pipeline COMMAND`: everything that happens to data before training.

    motion-shapes DIR                       write the labelled demonstration clips
    brief-events DIR                        write labelled clips of short, small events
    tempo DIR INPUT...                      write labelled clips of videos, their time changed
    pack INPUT... --output DIR              videos and images -> shards
    verify DIR | stats DIR | view DIR       check, count and look at shards
    view --why VIDEO --output FILE          why these patches: what they are ranked by
    export DIR --output DIR2                clips as mosaics, for codec LLaVA training
    features DIR --output DIR2              one vector per sample
    cluster DIR --num-centroids K --output DIR2      features -> centroids
    label DIR --centroids DIR2              nearest centroids of every sample -> DIR/labels.npy
    browse DIR --output FILE.png            what clusters hold

This module is the command line; what a command does is in commands.py.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path

from . import commands
from .stop import Stopped, stoppable

Run = Callable[[argparse.Namespace], int | None]
AddCommand = Callable[[str, str, Run], argparse.ArgumentParser]  # name, help, what it does


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, which stands for what the help text says."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; tests parse every documented command with it."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="Prepare data for pretraining."
    )
    # required: argparse would otherwise accept no command at all
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_text: str, run: Run) -> argparse.ArgumentParser:
        # an abbreviated flag would change its meaning with the next flag of that beginning
        sub = subparsers.add_parser(
            name, help=help_text, allow_abbrev=False, formatter_class=_Defaults
        )
        sub.set_defaults(run=run)
        return sub

    def folder_command(name: str, help_text: str, run: Run) -> argparse.ArgumentParser:
        sub = command(name, help_text=help_text, run=run)
        sub.add_argument("directory", type=Path)
        return sub

    _add_making(command)
    _add_packing(command)
    _add_looking(folder_command)
    _add_viewing(command)
    _add_exporting(folder_command)
    _add_labelling(folder_command)
    return parser


def _add_making(command: AddCommand) -> None:
    sub = command(
        "motion-shapes", "write labelled clips whose class is the motion", commands.motion_shapes
    )
    sub.add_argument("--difficulty", choices=("easy", "medium", "hard"), default="easy")
    _add_set(sub, num_train=1200, num_val=240)

    sub = command(
        "brief-events",
        "write labelled clips whose class is one short, small event",
        commands.brief_events,
    )
    sub.add_argument(
        "--scene", choices=("mixed", "still", "busy", "pan"), default="mixed", help="behind it"
    )
    _add_set(sub, num_train=1200, num_val=240)

    sub = command(
        "tempo", "write labelled clips of your videos, their time changed", commands.tempo
    )
    _add_set(sub, num_train=600, num_val=120)
    sub.add_argument("inputs", nargs="+", help="videos, folders, or .txt/.csv lists")
    sub.add_argument("--val", nargs="+", help="videos to validate on (split by hash)")


def _add_set(sub: argparse.ArgumentParser, num_train: int, num_val: int) -> None:
    """What the commands that write a labelled set share."""
    # output_path: a URL would become a folder of that name in the working directory
    sub.add_argument("directory", type=output_path)
    sub.add_argument("--num-train", type=int, default=num_train, help="clips to train on")
    sub.add_argument("--num-val", type=int, default=num_val, help="clips to validate on")
    sub.add_argument("--size", type=int, default=112, help="side of the picture in pixels")
    sub.add_argument("--seed", type=int, default=0, help="of every random draw")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def _add_packing(command: AddCommand) -> None:
    sub = command("pack", "turn videos and images into shards", commands.pack)
    sub.add_argument("inputs", nargs="+", help="files, folders, URLs, or .txt/.csv lists")
    sub.add_argument("--output", type=output_path, required=True, help="folder of the shards")
    _add_clip(sub)
    sub.add_argument(
        "--full-frames",
        dest="num_full_frames",
        type=int,
        default=16,
        help="whole frames stored of each clip",
    )
    _add_selecting(sub)
    _add_running(sub)


def _add_clip(sub: argparse.ArgumentParser) -> None:
    """What is read of a video, and how many patches are selected of it."""
    sub.add_argument("--model", help="registered encoder to pack for: names size and patch size")
    sub.add_argument("--size", type=int, help="working size in pixels (224)")
    sub.add_argument("--patch-size", type=int, help="side of a patch in pixels (16)")
    sub.add_argument("--num-frames", type=int, default=64, help="frames taken, at even times")
    sub.add_argument("--gop", type=int, default=16, help="frames from one I-frame to the next")
    sub.add_argument("--budget", type=int, help="patches selected of a clip (an eighth of all)")
    sub.add_argument(
        "--fit",
        choices=("crop", "area", "pad"),
        default="crop",
        help="centre square, keep the aspect, or pad to a square",
    )
    sub.add_argument(
        "--salvage", action="store_true", help="cut damaged videos before the damage, keep the rest"
    )


def _add_running(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("shards, and who packs them")
    # one destination for both, so that `pack` gets a mode and not two flags
    other = group.add_mutually_exclusive_group()
    other.add_argument(
        "--append",
        dest="mode",
        action="store_const",
        const="append",
        help="inputs that OUTPUT does not hold become shards behind the old ones",
    )
    other.add_argument(
        "--replace",
        dest="mode",
        action="store_const",
        const="replace",
        help="remove the shards of another packing from OUTPUT first",
    )
    group.add_argument(
        "--samples-per-shard", type=int, help="inputs of one shard (16 to 500, by their number)"
    )
    group.add_argument("--workers", type=int, default=os.cpu_count(), help="decoder processes")
    group.add_argument("--task-id", type=int, default=0, help="which part of the shards to pack")
    group.add_argument("--num-tasks", type=int, default=1, help="number of parts, one per job")
    group.add_argument("--executor", choices=("local", "ray"), default="local", help="who packs")
    group.add_argument("--wall-seconds", type=float, default=300.0, help="time limit of one input")


def _add_selecting(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("which patches are selected")
    group.add_argument(
        "--rule",
        choices=(
            *("i_frames_first", "published", "published_llava"),
            *("differences", "i_frames_random", "random"),
        ),
        default="i_frames_first",
        help="published: as the public tools score the source's own vectors, without I-frames; "
        "published_llava: the first frame whole, then likewise; the last three are for comparison",
    )
    group.add_argument(
        "--score",
        choices=("peak", "mean", "clipped", "bits"),
        default="peak",
        help="of a patch: its best cell, its mean, the rule before, or the residual's bits",
    )
    group.add_argument(
        "--vectors",
        choices=("canonical", "native"),
        help="canonical stream's (default), or the source's own (H.264, MPEG-4; published rules)",
    )
    group.add_argument(
        "--camera",
        choices=("none", "median", "similarity", "affine"),
        default="median",
        help="camera motion to take away",
    )
    group.add_argument(
        "--normalise",
        choices=("clip", "frame"),
        default="clip",
        help="percentiles over clip or frame",
    )
    group.add_argument("--motion-weight", type=float, default=1.0, help="of motion in the score")
    group.add_argument("--residual-weight", type=float, default=1.0, help="of the residual")
    group.add_argument("--centre-prior", type=float, default=0.0, help="bonus of the middle")
    group.add_argument(
        "--i-frame-share", type=float, default=1.0, help="patches taken of an I-frame, 0 to 1"
    )
    group.add_argument(
        "--frame-discount", type=float, default=0.0, help="against one frame that takes all (0.05)"
    )
    group.add_argument(
        "--time-discount", type=float, default=0.0, help="of patches like the next frame's, 0 to 1"
    )
    group.add_argument("--time-buckets", type=int, default=1, help="spans of time that take turns")


def _add_looking(command: AddCommand) -> None:
    sub = command(
        "verify", "check every byte of shards, labels, centroids, features", commands.verify
    )

    sub = command("stats", "count what a packed folder holds", commands.stats)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_viewing(command: AddCommand) -> None:
    sub = command("view", "draw what the encoder sees, or why", commands.view)
    # not both: a folder's patches are selected already, a video's by the flags below
    sub.add_argument("directory", type=Path, nargs="?", help="packed folder")
    sub.add_argument(
        "--output", type=output_path, required=True, help="FILE.png (sheet), FILE.gif or FILE.webp"
    )
    sub.add_argument("--samples", type=int, nargs="+", help="sample ids (four, evenly spread)")
    sub.add_argument(
        "--why",
        type=Path,
        metavar="VIDEO",
        help="instead of a folder: what the patches of this video are ranked by; all flags below "
        "are for this",
    )
    _add_clip(sub)
    _add_selecting(sub)


def _add_exporting(command: AddCommand) -> None:
    sub = command("export", "clips as mosaics with positions, for codec LLaVA", commands.export)
    sub.add_argument(
        "--output", type=output_path, required=True, help="folder of mosaics and samples.jsonl"
    )
    sub.add_argument("--image-format", choices=("png", "jpg"), default="png", help="of a mosaic")


def _add_labelling(command: AddCommand) -> None:
    sub = command("features", "one vector per sample, shard by shard", commands.features)
    sub.add_argument("--output", type=output_path, required=True, help="folder of the vectors")
    _add_feature_options(sub)
    sub.add_argument(
        "--task-id",
        type=int,
        help="part of the shards to do (under torchrun the rank, else 0)",
    )
    sub.add_argument(
        "--num-tasks", type=int, help="number of parts, one per process (torchrun's, else 1)"
    )

    sub = command("cluster", "features of all samples -> k-means centroids", commands.cluster)
    sub.add_argument("--num-centroids", type=int, required=True, help="number of classes")
    sub.add_argument("--output", type=output_path, required=True, help="folder of the centroids")
    _add_feature_options(sub)
    sub.add_argument("--features", type=output_path, help="folder of vectors (OUTPUT/features)")
    sub.add_argument("--pca", type=int, help="principal components that are kept (all directions)")
    sub.add_argument("--seed", type=int, default=0, help="of the first centroids")
    sub.add_argument(
        "--iterations", dest="num_iterations", type=int, default=25, help="rounds of k-means"
    )
    sub.add_argument("--init", type=Path, help="folder of centroids to start from")
    sub.add_argument(
        "--near-duplicates", type=float, metavar="COSINE", help="cluster one sample of each group"
    )

    sub = command("label", "nearest centroids of every sample -> labels.npy", commands.label)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--centroids", type=Path, help="folder written by cluster")
    source.add_argument(
        "--from",
        dest="given",
        type=Path,
        help="labels of your own, as words in a picture: FILE.npy, integers [N, L], or FILE.jsonl, "
        'lines of {"source": PATH, "labels": [..]}',
    )
    sub.add_argument("--num-classes", type=int, help="number of classes of --from")
    sub.add_argument("--num-labels", type=int, default=10, help="labels per sample, -1 beyond")
    sub.add_argument("--output", type=output_path, help="folder of labels.npy (the packed folder)")
    sub.add_argument(
        "--features", type=output_path, help="folder of vectors (cluster's own, if it fits)"
    )

    sub = command("browse", "draw the largest, smallest and some other clusters", commands.browse)
    sub.add_argument("--output", type=output_path, required=True, help="FILE.png")
    sub.add_argument("--labels", type=Path, help="folder of labels.npy (the packed folder)")
    sub.add_argument("--truth", type=Path, help="list of `relative path,label`: gives purities")
    sub.add_argument("--count", type=int, default=4, help="clusters of each group")


def _add_feature_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("vectors")
    group.add_argument(
        "--encoder", help="Hugging Face folder, or FAMILY:FOLDER (default: the codec descriptor)"
    )
    group.add_argument("--num-frames", type=int, default=1, help="frames seen by FAMILY:FOLDER")
    group.add_argument("--concat", action="store_true", help="frame vectors side by side")
    group.add_argument("--keep-dims", type=int, help="numbers kept of each frame vector (all)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code, 128 plus its number for a signal."""
    return run_command(parse=build_parser().parse_args, work=_run, argv=argv)


def _run(args: argparse.Namespace) -> int | None:
    try:
        with stoppable():
            return args.run(args)  # set by `command` in build_parser
    except Stopped as stop:
        # standard output may be JSON that another program reads
        print(
            f"{stop}: what is finished is kept, run the same command again to go on",
            file=sys.stderr,
        )
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
