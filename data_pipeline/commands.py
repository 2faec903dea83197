"""What each command of `python -m data_pipeline` does: parsed arguments -> one call, a last line.

Functions import what they need when they run, so `--help` is instant.
"""

import json
import os

from model_factory.command_line.launcher_watch import watched_launcher
from model_factory.command_line.plain_text import show

DEFAULT_SIZE = 224
DEFAULT_PATCH_SIZE = 16


def motion_shapes(args) -> None:
    """Write the labelled demonstration clips."""
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
    show(f"{args.num_train} + {args.num_val} clips of {len(CLASSES)} classes in {args.directory}")


def pack(args) -> None:
    """Turn videos and images into shards; exits when nothing could be finished."""
    from .clustering.labels import stale_labels
    from .shards.inputs import list_inputs
    from .shards.pack import PackConfig, pack

    config = PackConfig(
        sample=_sample_config(args),
        samples_per_shard=args.samples_per_shard,
        workers=args.workers,
        wall_seconds=args.wall_seconds,
    )
    inputs = list_inputs(args.inputs)
    mode = args.mode or "refuse"
    if args.executor == "ray":
        from .shards.pack import pack_ray

        manifest = pack_ray(inputs, args.output, config, mode=mode)
    else:
        manifest = pack(
            inputs,
            args.output,
            config,
            task_id=args.task_id,
            num_tasks=args.num_tasks,
            mode=mode,
        )
    if manifest is None:
        return
    rejected = manifest.rejected_by_reason()
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"
    show(
        f"{len(manifest)} samples in {len(manifest.shards)} shards under {args.output}; rejected: "
        f"{reasons}"
    )
    stale = stale_labels(args.output, manifest)
    if stale is not None:
        show(stale)


def _sample_config(args):
    from .codec.saliency import SaliencyConfig
    from .shards.sample_builder import SampleConfig

    size, patch_size = picture_shape(args)
    return SampleConfig(
        size=size,
        patch_size=patch_size,
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


def picture_shape(args) -> tuple[int, int]:
    """(size, patch size) that --model, --size and --patch-size ask for.

    ValueError for a patch size that is not the model's. Its size is a default only: an encoder
    takes any whole number of patches.
    """
    from model_factory.registry import clip_shape

    size = DEFAULT_SIZE
    patch_size = DEFAULT_PATCH_SIZE
    if args.model is not None:
        size, patch_size = clip_shape(args.model)
        if args.patch_size not in (None, patch_size):
            raise ValueError(
                f"--patch-size {args.patch_size} is not {args.model}'s, which takes {patch_size}: "
                "leave one of the two flags out"
            )
    elif args.patch_size is not None:
        patch_size = args.patch_size
    return size if args.size is None else args.size, patch_size


def verify(args) -> int:
    """Check every byte of a folder; returns the exit code, 1 when one is wrong."""
    from .verify_folder import verify_folder

    findings = verify_folder(args.directory)
    show("\n".join(findings.lines(args.directory)))
    return 1 if findings.problems else 0


def stats(args) -> None:
    """Print what a packed folder holds."""
    from .shards.manifest import load_manifest
    from .shards.statistics import statistics, statistics_table

    stats = statistics(load_manifest(args.directory))
    show(json.dumps(stats) if args.json else statistics_table(stats))


def view(args) -> None:
    """Draw what the encoder sees."""
    from .shards.manifest import load_manifest
    from .shards.view import save_view

    manifest = load_manifest(args.directory)
    spread = [i * len(manifest) // 4 for i in range(4)]
    save_view(manifest, args.samples or sorted(set(spread)), args.output)
    show(args.output)


def export(args) -> None:
    """Write clips as mosaics with positions."""
    from .shards.interop import export_mosaics
    from .shards.manifest import load_manifest

    count = export_mosaics(load_manifest(args.directory), args.output, args.image_format)
    show(f"{count} clips in {args.output / 'samples.jsonl'}")


def _feature_config(args):
    from .clustering.feature_sources import FeatureConfig

    return FeatureConfig(args.encoder, args.num_frames, args.concat, args.keep_dims)


@watched_launcher()
def features(args) -> None:
    """Write one vector per sample, of this process's part of the shards."""
    from .clustering.features import extract
    from .shards.manifest import load_manifest

    parts = _part_of_launcher(args)
    done = extract(load_manifest(args.directory), _feature_config(args), args.output, *parts)
    if done and parts[0] == 0:
        show(f"all vectors are in {args.output}")


def _part_of_launcher(args) -> tuple[int, int]:
    """(task, tasks) as given, else as torchrun says; each process on a GPU of its own."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ and args.task_id is args.num_tasks is None
    if not launched:
        return args.task_id or 0, args.num_tasks or 1
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def cluster(args) -> None:
    """Write centroids of the vectors."""
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
    centroids = cluster(manifest, config, args.output, args.features, show)
    show(f"{len(centroids)} centroids of {len(manifest)} samples in {args.output}")


def label(args) -> None:
    """Write labels: nearest centroids, or a list from outside."""
    from .clustering.labels import import_labels, save_labels
    from .clustering.pipeline import label
    from .shards.manifest import load_manifest

    output, manifest = args.output or args.directory, load_manifest(args.directory)
    if args.given is not None:
        if args.num_classes is None:
            raise ValueError("--from needs --num-classes: how many classes there are")
        labels = import_labels(manifest, args.given, args.num_classes, args.num_labels)
        save_labels(output, labels, manifest, args.num_classes, {"imported": args.given.name})
        show(f"{labels.shape[1]} labels for {len(labels)} samples in {output / 'labels.npy'}")
        return
    labels = label(manifest, args.centroids, args.num_labels, output, args.features, show)
    show(f"{labels.shape[1]} labels for {len(labels)} samples in {output / 'labels.npy'}")


def browse(args) -> None:
    """Draw what clusters hold."""
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"--output {args.output}: a picture is written as FILE.png")
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
    show(f"{num_classes} clusters of {sizes[-1]} to {sizes[0]} samples, {empty} empty{known}")
    show(args.output)
