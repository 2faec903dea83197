"""The command line of the trainer: the public trainer's flags, frozen, turned into a TrainConfig.

Classes of flags mirror the classes of training/config/schema.py, so that the path of a flag is the
path of the field that it sets: ComponentFlags.optimizer.lr is --lr and TrainConfig.optimizer.lr. A
flag that is not given leaves the preset's value. Nothing here imports torch, so `--help` is
instant.
"""

import argparse
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_factory.command_line.flags import add_flags, flag, flags_of, values_of

from .. import __doc__ as PACKAGE_SUMMARY

if TYPE_CHECKING:
    from .schema import TrainConfig


def _path(text: str) -> str | None:
    """A path; the public scripts write NULL for none."""
    return None if text in ("NULL", "None", "") else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _is_zero(text: str) -> bool:
    return int(text) == 0


def _is_one(text: str) -> bool:
    return int(text) != 0


@dataclass(frozen=True)
class ModelFlags:
    """Flags that set fields of ModelConfig."""

    name: str = flag("--model_name", help="registered encoder, e.g. llava_vit_base_ln")
    embedding_dim: int = flag(
        "--embedding_size", help="width of the encoder's output; checked, not chosen"
    )
    init_from: str | None = flag(
        "--init_backbone",
        help="Hugging Face folder or backbone.pt to start from; NULL: random",
        parse=_path,
    )
    frozen: bool = flag("--finetune_backbone", help="0 freezes the encoder", parse=_is_zero)


@dataclass(frozen=True)
class OptimizerFlags:
    """Flags that set fields of OptimizerConfig."""

    lr: float = flag("--lr", help="base learning rate of AdamW")
    weight_decay: float = flag("--weight_decay", help="of the encoder's matrices")
    weight_decay_centers: float = flag("--weight_decay_pfc", help="of the class centres")


@dataclass(frozen=True)
class ScheduleFlags:
    """Flags that set fields of ScheduleConfig."""

    total_samples: int = flag("--num_sampled_data", help="samples of the whole run over all heads")
    warmup_ratio: float = flag("--warmup_ratio", help="share of all steps")


@dataclass(frozen=True)
class CheckpointFlags:
    """Flags that set fields of CheckpointConfig."""

    every: int = flag("--ckpt_interval", help="steps between checkpoints")


@dataclass(frozen=True)
class ParallelFlags:
    """Flags that set fields of ParallelConfig."""

    compile_blocks: bool = flag("--compile", help="torch.compile every block")
    activation_checkpointing: bool = flag(
        "--gradient_checkpoint",
        help="1: blocks keep their input only and run again in backward",
        parse=_is_one,
    )


@dataclass(frozen=True)
class RunFlags:
    """Flags that set fields of TrainConfig itself."""

    output: str = flag("--output", help="folder of checkpoints, logs and exports (default: output)")
    resume: str = flag(
        "--resume",
        help="auto (newest checkpoint of --output, if any), never, or the path of a checkpoint",
    )
    resume_allow: tuple[str, ...] = flag(
        "--resume_allow",
        help="field that may differ from the checkpoint's, e.g. optimizer.lr",
        parse=_names,
        nargs=None,  # one word, whose names are parted by commas
    )
    rounds: int = flag(
        "--rounds",
        help="rounds of training, clustered again by the trained encoder in between",
    )
    seed: int = flag("--seed", help="seed of every random draw (default: 0)")
    grad_accum_steps: int = flag("--backward_passes_per_step", help="gradient accumulation")
    log_every: int = flag("--frequent", help="steps between log lines")
    max_skipped_steps: int = flag(
        "--max_skipped_steps", help="steps to leave out for non-finite gradients (default: 0)"
    )
    profile_steps: int = flag("--profile", help="steps that OUTPUT/trace.json shows")
    synthetic_data: bool = flag("--use_synthetic_data", help="random patches instead of files")


@dataclass(frozen=True)
class ComponentFlags:
    """Flags that set fields of the components' configurations."""

    model: ModelFlags
    optimizer: OptimizerFlags
    schedule: ScheduleFlags
    checkpoint: CheckpointFlags
    parallel: ParallelFlags


@dataclass(frozen=True)
class ViewFlags:
    """Flags that set fields of ViewConfig."""

    max_frames: int = flag("--num_frames", help="most whole frames of one clip")
    max_tokens: int = flag("--target_num", help="most tokens of one clip")
    codec_ratio: float = flag("--residual_ratio", help="share of clips seen through the codec view")
    frame_ratio: float = flag(
        "--frame_sampling_ratio", help="share of clips seen as whole frames; the rest is collage"
    )


@dataclass(frozen=True)
class StreamFlags:
    """Flags that set fields of StreamConfig."""

    view: ViewFlags
    batch_size: tuple[int, ...] = flag(
        "--list_batch_sizes", "--list_batch_size", help="samples per process and head"
    )
    label_width: int = flag("--random_diff", help="width of the label lists that are used")
    dali_num_threads: int = flag("--workers", help="decoding threads per head")


@dataclass(frozen=True)
class LossFlags:
    """Flags that set fields of PartialFCConfig."""

    sample_rate: tuple[float, ...] = flag(
        "--list_sample_rates", help="share of negative classes per step"
    )
    margin: tuple[float, ...] = flag("--list_margins", help="cosine margin")
    filter_threshold: tuple[float, ...] = flag(
        "--list_filters", help="inter-class filter threshold, 0: off"
    )


@dataclass(frozen=True)
class HeadFlags:
    """Flags that set fields of HeadConfig: a tuple has a value per head, or one for all of them;
    any other value is the same for every head."""

    stream: StreamFlags
    loss: LossFlags
    dataset: tuple[str, ...] = flag(
        "--list_datasets",
        help="registered names or packed folders, one per head (default: the embedded set)",
    )
    lr_scale: tuple[float, ...] = flag(
        "--list_lr_pfc_weights", help="learning-rate factor of the centres"
    )
    loss_weight: tuple[float, ...] = flag("--list_loss_weights", help="weight of the head's loss")
    init_from: tuple[str, ...] = flag(
        "--list_init_partial_fc_paths",
        help=".npy of starting centres [classes, width]; NULL: random",
        parse=_path,
    )


@dataclass(frozen=True)
class StartFlags:
    """Flags that stand for more than one field, or for none."""

    preset: str = flag(
        "--preset",
        help="complete configuration to start from, one of training/config/presets.py (baseline)",
    )
    opt: str = flag("--opt", help="optimizer; only adamw")
    fsdp: bool = flag(
        "--fsdp", help="shard the encoder over the ranks (FSDP2) instead of copying it (DDP)"
    )
    debug: int = flag("--debug", help="1: as --use_synthetic_data")
    print_config: bool = flag(
        "--print-config",
        "--print_config",
        help="print the configuration and exit",
    )
    dry_run: bool = flag(
        "--dry-run",
        "--dry_run",
        help="build everything, train one step, leave nothing but data, exit",
    )


# accepted for old scripts, without effect: flag -> why
IDLE_FLAGS = {
    "--image_size": "the picture size is a property of packed shards",
    "--image_size_video": "the picture size is a property of packed shards",
    "--num_tokens_per_frame": "tokens per frame follow from the packed shards",
    "--total_indices": "patches are chosen when packing",
    "--must_num": "I-frame patches always come first",
    "--enable_multi_frame": "clips of any length share a pack",
    "--multi_frame_list": "clips of any length share a pack",
    "--base_num_frames": "clips of any length share a pack",
    "--use_fastpfc": "there is one Partial FC",
    **dict.fromkeys(
        (
            "--dataloader-type", "--dali_is_training", "--input_gray", "--model_weight", "--mask",
            "--repeat_pfc", "--save_pfc", "--visualize", "--vis_samples", "--vis_interval",
        ),
        "it had no effect in the public trainer either",
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags; abbreviations are off, so a typing mistake is an error and not another flag."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m training.train_univit", description=PACKAGE_SUMMARY, allow_abbrev=False
    )
    run = parser.add_argument_group("run")
    add_flags(run, RunFlags, only_given=True)
    add_flags(run, ComponentFlags, only_given=True)
    add_flags(run, StartFlags, only_given=True)
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override any config field",
    )
    heads = parser.add_argument_group("heads, lists with one value for all or one per head")
    add_flags(heads, HeadFlags, only_given=True)
    idle = parser.add_argument_group("accepted without effect")
    for name in IDLE_FLAGS:
        idle.add_argument(name, nargs="*", help=argparse.SUPPRESS)
    return parser


def build_config(args: argparse.Namespace) -> "TrainConfig":
    """TrainConfig of parsed flags: the preset, over it flags, over these each --set.

    Values that are valid only together may come in any order: the whole is checked once, at its
    end. ValueError names the flag that is wrong.
    """
    from .override import Draft
    from .presets import preset

    if args.opt not in (None, "adamw"):
        raise ValueError(f"--opt {args.opt!r}: only adamw")
    synthetic = bool(args.use_synthetic_data or args.debug)
    embedded = args.list_datasets is None and args.preset is None and not synthetic
    config = preset(args.preset or ("demo" if embedded else "baseline"))

    changes = values_of(RunFlags, args) | values_of(ComponentFlags, args)
    if synthetic:
        changes["synthetic_data"] = True
    if args.fsdp:
        changes["parallel.strategy"] = "fsdp"

    draft = Draft(config)
    num_heads = _num_heads(args, [head.dataset for head in config.heads])
    if num_heads != len(config.heads):
        draft.repeat("heads", num_heads)
    for path, value in values_of(HeadFlags, args).items():
        for index in range(num_heads):
            # a single value stands for all heads
            position = index if isinstance(value, tuple) and len(value) > 1 else 0
            own = value[position] if isinstance(value, tuple) else value
            changes[f"heads.{index}.{path}"] = own
    for path, value in changes.items():
        # None: a flag that was not given, or a path that was given as NULL
        if value is not None:
            draft.put(path, value)
    for assignment in args.set:
        draft.assign(assignment)
    return draft.build()


def _num_heads(args: argparse.Namespace, templates: list[str]) -> int:
    """Number of heads of a run: one per dataset that is named, else those of the preset.

    `templates` are the datasets of the preset's heads. ValueError where lists do not fit.
    """
    num_heads = len(args.list_datasets or templates)
    if len(templates) > 1 and num_heads != len(templates):
        raise ValueError(
            f"--list_datasets names {num_heads} data sets, the preset has {len(templates)} heads "
            f"with settings of their own, in the order of {', '.join(templates)}: name as many"
        )
    for declared in flags_of(HeadFlags):
        values = getattr(args, declared.destination)
        if isinstance(values, list) and len(values) not in (1, num_heads):
            raise ValueError(
                f"{declared.names[0]} has {len(values)} values for {num_heads} heads: give one, "
                "or one per head"
            )
    return num_heads


def warn_idle(args: argparse.Namespace, logger: logging.Logger) -> None:
    """Log one warning per given flag that has no effect, with the reason."""
    for name, reason in IDLE_FLAGS.items():
        if getattr(args, name.lstrip("-").replace("-", "_")) is not None:
            logger.warning("%s has no effect: %s", name, reason)
