"""What each command of `python -m data_pipeline` does: parsed arguments -> one call, a last line.

Functions import what they need when they run, so `--help` is instant. For the same reason flags are
declared in __main__.py and not at the fields of the configurations, whose modules import NumPy; a
flag has the name of the field that it fills.
"""

import dataclasses
import json
import os
from argparse import Namespace
from typing import TYPE_CHECKING, TypeVar

from model_factory.command_line.launcher_watch import watched_launcher
from model_factory.command_line.plain_text import show

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from .clustering.feature_sources import FeatureConfig
    from .shards.sample_builder import SampleConfig

    Config = TypeVar("Config", bound=DataclassInstance)

DEFAULT_SIZE = 224
DEFAULT_PATCH_SIZE = 16
VIEWED = 4  # samples that `view` draws by default


def config_of(kind: "type[Config]", args: Namespace, **others: object) -> "Config":
    """A configuration by the flags named as its fields; `others` are fields by other means."""
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(args, field.name)
    }
    return kind(**{**values, **others})


def motion_shapes(args: Namespace) -> None:
    """Write the labelled demonstration clips."""
    from .embedded.motion_shapes import CLASSES, write_motion_shapes

    write_motion_shapes(
        args.directory,
        num_train=args.num_train,
        num_val=args.num_val,
        difficulty=args.difficulty,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    show(f"{args.num_train} + {args.num_val} clips of {len(CLASSES)} classes in {args.directory}")


def brief_events(args: Namespace) -> None:
    """Write the labelled clips of short, small events."""
    from .embedded.brief_events import CLASSES, write_brief_events

    write_brief_events(
        args.directory,
        num_train=args.num_train,
        num_val=args.num_val,
        scene=args.scene,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    show(f"{args.num_train} + {args.num_val} clips of {len(CLASSES)} classes in {args.directory}")


def tempo(args: Namespace) -> None:
    """Write the labelled clips of real footage whose time axis is changed."""
    from .embedded.tempo import CLASSES, write_tempo
    from .shards.inputs import list_inputs

    write_tempo(
        args.directory,
        inputs=list_inputs(args.inputs),
        val_inputs=list_inputs(args.val) if args.val else None,
        num_train=args.num_train,
        num_val=args.num_val,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    show(f"{args.num_train} + {args.num_val} clips of {len(CLASSES)} classes in {args.directory}")


def pack(args: Namespace) -> None:
    """Turn videos and images into shards; exits when nothing could be finished."""
    from .clustering.labels import stale_labels
    from .shards.inputs import list_inputs
    from .shards.pack import PackConfig, pack, pack_ray

    sample = sample_config(args)
    config = config_of(PackConfig, args, sample=sample)
    inputs = list_inputs(args.inputs)
    mode = args.mode or "refuse"  # None without --append and --replace
    if args.executor == "ray":
        manifest = pack_ray(inputs, output=args.output, config=config, mode=mode)
    else:
        manifest = pack(
            inputs,
            output=args.output,
            config=config,
            task_id=args.task_id,
            num_tasks=args.num_tasks,
            mode=mode,
        )
    if manifest is None:
        return  # other tasks are still at work
    rejected = manifest.rejected_by_reason()
    counts = [f"{count} {reason}" for reason, count in rejected.most_common()]
    reasons = ", ".join(counts) or "none"
    show(
        f"{len(manifest)} samples in {len(manifest.shards)} shards under {args.output}; rejected: "
        f"{reasons}"
    )
    stale = stale_labels(args.output, manifest)
    if stale is not None:
        show(stale)


def sample_config(args: Namespace) -> "SampleConfig":
    """How a video is framed, and its patches selected, by the flags of pack."""
    from .codec.patches import SelectionConfig
    from .codec.saliency import SaliencyConfig
    from .codec.selection import Order
    from .shards.sample_builder import SampleConfig

    size, patch_size = picture_shape(args)
    selection = config_of(
        SelectionConfig,
        args,
        order=config_of(Order, args),
        saliency=config_of(SaliencyConfig, args),
    )
    return config_of(SampleConfig, args, size=size, patch_size=patch_size, selection=selection)


def picture_shape(args: Namespace) -> tuple[int, int]:
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
    if args.size is not None:
        size = args.size
    return size, patch_size


def verify(args: Namespace) -> int:
    """Check every byte of a folder; returns the exit code, 1 when one is wrong."""
    from .verify_folder import verify_folder

    findings = verify_folder(args.directory)
    show("\n".join(findings.lines(args.directory)))
    return 1 if findings.problems else 0


def stats(args: Namespace) -> None:
    """Print what a packed folder holds."""
    from .shards.manifest import load_manifest
    from .shards.statistics import statistics, statistics_table

    counts = statistics(load_manifest(args.directory))
    show(json.dumps(counts) if args.json else statistics_table(counts))


def view(args: Namespace) -> None:
    """Draw what the encoder sees, or why it sees these patches of a video."""
    # before the imports, and before anything is read
    if (args.directory is None) == (args.why is None):
        raise ValueError("view draws a packed folder, or --why VIDEO: give one of the two")
    if args.why is not None and args.samples is not None:
        raise ValueError("--samples are of a packed folder: leave them out with --why VIDEO")
    if args.why is not None:
        from .shards.why import save_why

        save_why(args.why, config=sample_config(args), output=args.output)
        show(args.output)
        return
    from .shards.manifest import load_manifest
    from .shards.sample_builder import SampleConfig
    from .shards.view import save_view

    if sample_config(args) != SampleConfig():
        raise ValueError(
            "the patches of a packed folder are selected already: flags of the selection are for "
            "--why VIDEO"
        )
    manifest = load_manifest(args.directory)
    # a set, since a folder of fewer samples gives the same id several times
    spread = sorted({i * len(manifest) // VIEWED for i in range(VIEWED)})
    save_view(manifest, sample_ids=args.samples or spread, path=args.output)
    show(args.output)


def export(args: Namespace) -> None:
    """Write clips as mosaics with positions."""
    from .shards.interop import export_mosaics
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    count = export_mosaics(manifest, output=args.output, image_format=args.image_format)
    show(f"{count} clips in {args.output / 'samples.jsonl'}")


def _feature_config(args: Namespace) -> "FeatureConfig":
    from .clustering.feature_sources import FeatureConfig

    return config_of(FeatureConfig, args)


@watched_launcher()
def features(args: Namespace) -> None:
    """Write one vector per sample, of this process's part of the shards."""
    from .clustering.features import extract
    from .shards.manifest import load_manifest

    task_id, num_tasks = _part_of_launcher(args)
    is_complete = extract(
        load_manifest(args.directory),
        config=_feature_config(args),
        folder=args.output,
        task_id=task_id,
        num_tasks=num_tasks,
    )
    if is_complete and task_id == 0:  # one line, not one from every process that finds it complete
        show(f"all vectors are in {args.output}")


def _part_of_launcher(args: Namespace) -> tuple[int, int]:
    """(task, tasks) as given, else as torchrun sets them; each process on a GPU of its own."""
    # flags go before what a launcher sets, also one of the two alone
    launched = "TORCHELASTIC_RUN_ID" in os.environ and args.task_id is args.num_tasks is None
    if not launched:
        return args.task_id or 0, args.num_tasks or 1
    import torch

    if torch.cuda.is_available():
        # the remainder: more processes than GPUs share them
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def cluster(args: Namespace) -> None:
    """Write centroids of the vectors."""
    from .clustering.pipeline import ClusterConfig, cluster
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    centroids = cluster(
        manifest,
        # --features is a folder; the field of that name is where its vectors come from
        config=config_of(ClusterConfig, args, features=_feature_config(args)),
        output=args.output,
        features_folder=args.features,
        report=show,
    )
    show(f"{len(centroids)} centroids of {len(manifest)} samples in {args.output}")


def label(args: Namespace) -> None:
    """Write labels: nearest centroids, or a list from outside."""
    from .clustering.labels import import_labels, save_labels
    from .clustering.pipeline import label
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    output = args.output or args.directory
    if args.given is None:
        labels = label(
            manifest,
            centroids_folder=args.centroids,
            num_labels=args.num_labels,
            output=output,
            features_folder=args.features,
            report=show,
        )
    elif args.num_classes is None:
        raise ValueError("--from needs --num-classes: how many classes there are")
    else:
        labels = import_labels(
            manifest, path=args.given, num_classes=args.num_classes, width=args.num_labels
        )
        save_labels(
            output,
            labels=labels,
            manifest=manifest,
            num_classes=args.num_classes,
            details={"imported": args.given.name},
        )
    show(f"{labels.shape[1]} labels for {len(labels)} samples in {output / 'labels.npy'}")


def browse(args: Namespace) -> None:
    """Draw what clusters hold."""
    # before the imports, and before anything is read
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"--output {args.output}: a picture is written as FILE.png")
    from .clustering.browse import overall_purity, read_truth, save_page, summarise
    from .clustering.labels import load_labels
    from .shards.manifest import load_manifest

    manifest = load_manifest(args.directory)
    labels, num_classes = load_labels(args.labels or args.directory, manifest)
    truth = None if args.truth is None else read_truth(manifest, args.truth)
    summaries = summarise(labels, num_classes=num_classes, truth=truth)
    save_page(manifest, summaries=summaries, output=args.output, count=args.count)
    sizes = [len(summary.members) for summary in summaries]
    share = overall_purity(summaries)
    purity = "" if share is None else f", purity {share:.1%}"
    show(
        f"{num_classes} clusters of {sizes[-1]} to {sizes[0]} samples, {sizes.count(0)} empty"
        f"{purity}"
    )
    show(args.output)
