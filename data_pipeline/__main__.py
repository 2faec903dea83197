"""`python -m data_pipeline COMMAND`: everything that happens to data before training.

    motion-shapes DIR                       write the labelled demonstration clips
    pack INPUT... --output DIR              videos and images -> shards
    verify DIR | stats DIR | view DIR       check, count and look at shards
    export DIR --output DIR2                clips as mosaics, for codec LLaVA training
    features DIR --output DIR2              one vector per sample
    cluster DIR --num-centroids K --output DIR2      features -> centroids
    label DIR --centroids DIR2              nearest centroids of every sample -> DIR/labels.npy
    browse DIR --output FILE.png            what clusters hold

Commands import what they need when they run, so `--help` is instant.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; tests parse every documented command with it."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="Prepare data for pretraining."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help_text, run):
        sub = commands.add_parser(
            name,
            help=help_text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    _add_making(command)
    _add_looking(command)
    _add_exporting(command)
    _add_labelling(command)
    return parser


def _add_making(command) -> None:
    sub = command("motion-shapes", "write labelled clips whose class is the motion", _motion_shapes)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--num-train", type=int, default=1200, help="clips to train on")
    sub.add_argument("--num-val", type=int, default=240, help="clips to validate on")
    sub.add_argument("--difficulty", choices=("easy", "medium", "hard"), default="easy")
    sub.add_argument("--size", type=int, default=112, help="side of the picture in pixels")
    sub.add_argument("--seed", type=int, default=0, help="of every random draw")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")

    sub = command("pack", "turn videos and images into shards", _pack)
    sub.add_argument("inputs", nargs="+", help="files, folders, URLs, or .txt/.csv lists")
    sub.add_argument("--output", type=Path, required=True, help="folder of the shards")
    sub.add_argument("--size", type=int, default=224, help="working size in pixels")
    sub.add_argument("--patch-size", type=int, default=16, help="side of a patch in pixels")
    sub.add_argument("--num-frames", type=int, default=64, help="frames taken, at even times")
    sub.add_argument("--gop", type=int, default=16, help="frames from one I-frame to the next")
    sub.add_argument("--budget", type=int, help="patches kept of a clip (an eighth of all)")
    sub.add_argument(
        "--fit", choices=("crop", "area"), default="crop", help="centre square, or keep the aspect"
    )
    sub.add_argument(
        "--salvage", action="store_true", help="cut damaged videos before the damage, keep the rest"
    )
    sub.add_argument("--full-frames", type=int, default=16, help="whole frames stored of each clip")
    sub.add_argument("--samples-per-shard", type=int, default=1000, help="inputs of one shard")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="decoder processes")
    sub.add_argument("--task-id", type=int, default=0, help="which part of the shards to pack")
    sub.add_argument("--num-tasks", type=int, default=1, help="number of parts, one per job")
    sub.add_argument("--executor", choices=("local", "ray"), default="local", help="who packs")
    sub.add_argument("--wall-seconds", type=float, default=300.0, help="time limit of one input")
    _add_selecting(sub)


def _add_selecting(sub) -> None:
    group = sub.add_argument_group("which patches are kept")
    group.add_argument(
        "--rule",
        choices=("i_frames_first", "published"),
        default="i_frames_first",
        help="published: no I-frame patches, percentiles per frame",
    )
    group.add_argument(
        "--vectors",
        choices=("canonical", "native"),
        default="canonical",
        help="canonical stream's, or the source's own (H.264, MPEG-4)",
    )
    group.add_argument(
        "--camera",
        choices=("none", "median", "similarity", "affine"),
        default="median",
        help="camera motion to take away",
    )
    group.add_argument(
        "--normalise", choices=("clip", "frame"), help="percentiles over clip (default) or frame"
    )
    group.add_argument("--motion-weight", type=float, default=1.0, help="of motion in the score")
    group.add_argument("--residual-weight", type=float, default=1.0, help="of the residual")
    group.add_argument("--centre-prior", type=float, default=0.0, help="bonus of the middle")
    group.add_argument("--time-buckets", type=int, default=1, help="spans of time that take turns")


def _add_looking(command) -> None:
    sub = command("verify", "check every byte of a packed folder", _verify)
    sub.add_argument("directory", type=Path)

    sub = command("stats", "count what a packed folder holds", _stats)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("view", "draw what the encoder sees", _view)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--output", type=Path, required=True, help="FILE.png (sheet) or FILE.gif")
    sub.add_argument("--samples", type=int, nargs="+", help="sample ids (four, evenly spread)")


def _add_exporting(command) -> None:
    sub = command("export", "clips as eight mosaics with positions, for codec LLaVA", _export)
    sub.add_argument("directory", type=Path)
    sub.add_argument(
        "--output", type=Path, required=True, help="folder of mosaics and samples.jsonl"
    )
    sub.add_argument("--image-format", choices=("png", "jpg"), default="png", help="of a mosaic")


def _add_labelling(command) -> None:
    sub = command("features", "one vector per sample, shard by shard", _features)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--output", type=Path, required=True, help="folder of the vectors")
    _add_feature_options(sub)
    sub.add_argument("--task-id", type=int, default=0, help="which part of the shards to do")
    sub.add_argument("--num-tasks", type=int, default=1, help="number of parts, one per process")

    sub = command("cluster", "features of all samples -> k-means centroids", _cluster)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--num-centroids", type=int, required=True, help="number of classes")
    sub.add_argument("--output", type=Path, required=True, help="folder of the centroids")
    _add_feature_options(sub)
    sub.add_argument("--features", type=Path, help="folder of vectors (OUTPUT/features)")
    sub.add_argument("--pca", type=int, help="principal components that are kept (all directions)")
    sub.add_argument("--seed", type=int, default=0, help="of the first centroids")
    sub.add_argument("--iterations", type=int, default=25, help="rounds of k-means")
    sub.add_argument("--init", type=Path, help="folder of centroids to start from")
    sub.add_argument(
        "--near-duplicates", type=float, metavar="COSINE", help="cluster one sample of each group"
    )

    sub = command("label", "nearest centroids of every sample -> labels.npy", _label)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--centroids", type=Path, required=True, help="folder written by cluster")
    sub.add_argument("--num-labels", type=int, default=10, help="labels per sample")
    sub.add_argument("--output", type=Path, help="folder of labels.npy (the packed folder)")
    sub.add_argument("--features", type=Path, help="folder of vectors (cluster's own, if it fits)")

    sub = command("browse", "draw the largest, smallest and some other clusters", _browse)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--output", type=Path, required=True, help="FILE.png")
    sub.add_argument("--labels", type=Path, help="folder of labels.npy (the packed folder)")
    sub.add_argument("--truth", type=Path, help="list of `relative path,label`: gives purities")
    sub.add_argument("--count", type=int, default=4, help="clusters of each group")


def _add_feature_options(sub) -> None:
    group = sub.add_argument_group("vectors")
    group.add_argument(
        "--encoder", help="Hugging Face folder, or FAMILY:FOLDER (default: the codec descriptor)"
    )
    group.add_argument("--num-frames", type=int, default=1, help="frames seen by FAMILY:FOLDER")
    group.add_argument("--concat", action="store_true", help="frame vectors side by side")
    group.add_argument("--keep-dims", type=int, help="numbers kept of each frame vector (all)")


def _motion_shapes(args) -> None:
    from .motion_shapes import CLASSES, write_motion_shapes

    write_motion_shapes(
        args.directory,
        args.num_train,
        args.num_val,
        args.difficulty,
        args.size,
        args.seed,
        args.workers,
    )
    print(f"{args.num_train} + {args.num_val} clips of {len(CLASSES)} classes in {args.directory}")


def _pack(args) -> None:
    from .codec.saliency import SaliencyConfig
    from .shards.inputs import list_inputs
    from .shards.pack import PackConfig, pack
    from .shards.sample_builder import SampleConfig

    sample = SampleConfig(
        size=args.size,
        patch_size=args.patch_size,
        num_frames=args.num_frames,
        gop=args.gop,
        budget=args.budget,
        num_full_frames=args.full_frames,
        fit=args.fit,
        salvage=args.salvage,
        vectors=args.vectors,
        rule=args.rule,
        time_buckets=args.time_buckets,
        saliency=SaliencyConfig(
            camera=args.camera,
            motion_weight=args.motion_weight,
            residual_weight=args.residual_weight,
            normalise=args.normalise or ("frame" if args.rule == "published" else "clip"),
            centre_prior=args.centre_prior,
        ),
    )
    config = PackConfig(sample, args.samples_per_shard, args.workers, args.wall_seconds)
    inputs = list_inputs(args.inputs)
    if args.executor == "ray":
        from .shards.ray_driver import pack_ray

        manifest = pack_ray(inputs, args.output, config)
    else:
        parts = {"task_id": args.task_id, "num_tasks": args.num_tasks}
        manifest = pack(inputs, args.output, config, **parts)
    if manifest is None:
        return
    rejected = manifest.rejected_by_reason()
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"
    print(
        f"{len(manifest)} samples in {len(manifest.shards)} shards under {args.output}; rejected: "
        f"{reasons}"
    )


def _verify(args) -> None:
    from .shards.manifest import load_manifest
    from .shards.verify import verify

    manifest = load_manifest(args.directory)
    problems = verify(manifest)
    print(
        "\n".join(problems) or f"{args.directory}: {len(manifest)} samples, every byte as written"
    )
    if problems:
        sys.exit(1)


def _stats(args) -> None:
    from .shards.manifest import load_manifest
    from .shards.statistics import statistics, statistics_table

    stats = statistics(load_manifest(args.directory))
    print(json.dumps(stats) if args.json else statistics_table(stats))


def _view(args) -> None:
    from .shards.manifest import load_manifest
    from .shards.view import save_view

    manifest = load_manifest(args.directory)
    spread = [i * len(manifest) // 4 for i in range(4)]
    save_view(manifest, args.samples or sorted(set(spread)), args.output)
    print(args.output)


def _export(args) -> None:
    from .shards.interop import export_mosaics
    from .shards.manifest import load_manifest

    count = export_mosaics(load_manifest(args.directory), args.output, args.image_format)
    print(f"{count} clips in {args.output / 'samples.jsonl'}")


def _feature_config(args):
    from .clustering.features import FeatureConfig

    return FeatureConfig(args.encoder, args.num_frames, args.concat, args.keep_dims)


def _features(args) -> None:
    from .clustering.features import extract
    from .shards.manifest import load_manifest

    parts = (args.task_id, args.num_tasks)
    if extract(load_manifest(args.directory), _feature_config(args), args.output, *parts):
        print(f"all vectors are in {args.output}")


def _cluster(args) -> None:
    from .clustering.pipeline import ClusterConfig, cluster
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    config = ClusterConfig(
        args.num_centroids,
        _feature_config(args),
        args.pca,
        args.seed,
        args.iterations,
        args.near_duplicates,
        args.init,
    )
    centroids = cluster(manifest, config, args.output, args.features, print)
    print(f"{len(centroids)} centroids of {len(manifest)} samples in {args.output}")


def _label(args) -> None:
    from .clustering.pipeline import label
    from .shards.manifest import load_manifest

    output, manifest = args.output or args.directory, load_manifest(args.directory)
    labels = label(manifest, args.centroids, args.num_labels, output, args.features, print)
    print(f"{labels.shape[1]} labels for {len(labels)} samples in {output / 'labels.npy'}")


def _browse(args) -> None:
    from .clustering.browse import overall_purity, read_truth, save_page, summarise
    from .clustering.labels import load_labels
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    labels, num_classes = load_labels(args.labels or args.directory, manifest)
    truth = None if args.truth is None else read_truth(manifest, args.truth)
    summaries = summarise(labels, num_classes, truth)
    save_page(manifest, summaries, args.output, args.count)
    sizes = [len(summary.members) for summary in summaries]
    purity = overall_purity(summaries)
    known = "" if purity is None else f", purity {purity:.1%}"
    empty = sizes.count(0)
    print(f"{num_classes} clusters of {sizes[-1]} to {sizes[0]} samples, {empty} empty{known}")
    print(args.output)


def main(argv: list[str] | None = None) -> None:
    """Run one command; a user's mistake ends with its message and exit code 1,
    not with a traceback.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
