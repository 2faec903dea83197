"""The command line: the public trainer's flags, frozen, turned into a TrainConfig once.

`build_parser` needs no torch, so `--help` is instant. Lists take one value for all heads or one per
head. Flags that have no effect here are accepted and say so once.
"""

import argparse
import logging

from .. import __doc__ as PACKAGE_SUMMARY

# flag names -> (type, help). Every one is laid over the preset only when it is given.
RUN_FLAGS = {
    ("--output",): (str, "folder of checkpoints, logs and exports (default: output)"),
    ("--preset",): (
        str,
        "complete configuration to start from, one of training/config/presets.py (baseline)",
    ),
    ("--resume",): (
        str,
        "auto (newest checkpoint of --output, if any), never, or the path of a checkpoint",
    ),
    ("--resume_allow",): (str, "field that may differ from the checkpoint's, e.g. optimizer.lr"),
    ("--rounds",): (int, "rounds of training, clustered again by the trained encoder in between"),
    ("--seed",): (int, "seed of every random draw (default: 0)"),
    ("--model_name",): (str, "registered encoder, e.g. llava_vit_base_ln"),
    ("--embedding_size",): (int, "width of the encoder's output; checked, not chosen"),
    ("--init_backbone",): (str, "Hugging Face folder or backbone.pt to start from; NULL: random"),
    ("--finetune_backbone",): (int, "0 freezes the encoder"),
    ("--lr",): (float, "base learning rate of AdamW"),
    ("--opt",): (str, "optimizer; only adamw"),
    ("--weight_decay",): (float, "of the encoder's matrices"),
    ("--weight_decay_pfc",): (float, "of the class centres"),
    ("--warmup_ratio",): (float, "share of all steps"),
    ("--backward_passes_per_step",): (int, "gradient accumulation"),
    ("--num_sampled_data",): (int, "samples of the whole run over all heads"),
    ("--num_frames",): (int, "most whole frames of one clip"),
    ("--target_num",): (int, "most tokens of one clip"),
    ("--residual_ratio",): (float, "share of clips seen through the codec view"),
    ("--frame_sampling_ratio",): (
        float,
        "share of clips seen as whole frames; the rest is collage",
    ),
    ("--frequent",): (int, "steps between log lines"),
    ("--ckpt_interval",): (int, "steps between checkpoints"),
    ("--workers",): (int, "decoding threads per head"),
    ("--random_diff",): (int, "width of the label lists that are used"),
    ("--gradient_checkpoint",): (int, "1: blocks keep their input only and run again in backward"),
    ("--fsdp",): (bool, "shard the encoder over the ranks (FSDP2) instead of copying it (DDP)"),
    ("--compile",): (bool, "torch.compile every block"),
    ("--max_skipped_steps",): (int, "steps to leave out for non-finite gradients (default: 0)"),
    ("--profile",): (int, "steps that OUTPUT/trace.json shows"),
    ("--use_synthetic_data",): (bool, "random patches instead of files"),
    ("--debug",): (int, "1: as --use_synthetic_data"),
}
LIST_FLAGS = {
    ("--list_datasets",): (
        str,
        "registered names or packed folders, one per head (default: the embedded set)",
    ),
    ("--list_batch_sizes", "--list_batch_size"): (int, "samples per process and head"),
    ("--list_sample_rates",): (float, "share of negative classes per step"),
    ("--list_margins",): (float, "cosine margin"),
    ("--list_filters",): (float, "inter-class filter threshold, 0: off"),
    ("--list_lr_pfc_weights",): (float, "learning-rate factor of the centres"),
    ("--list_loss_weights",): (float, "weight of the head's loss"),
    ("--list_init_partial_fc_paths",): (
        str,
        ".npy of starting centres [classes, width]; NULL: random",
    ),
}
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
    **{
        flag: "it had no effect in the public trainer either"
        for flag in (
            "--dataloader-type", "--dali_is_training", "--input_gray", "--model_weight", "--mask",
            "--repeat_pfc",
            "--save_pfc", "--visualize", "--vis_samples", "--vis_interval",
        )
    },
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags; abbreviations are off, so a typing mistake is an error and not another flag."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m training.train_univit", description=PACKAGE_SUMMARY, allow_abbrev=False
    )
    run = parser.add_argument_group("run")
    for names, (kind, text) in RUN_FLAGS.items():
        extra = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        run.add_argument(*names, help=text, **extra)
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override any config field",
    )
    for name, text in {
        "print_config": "print the configuration and exit",
        "dry_run": "build everything, train one step, leave nothing but data, exit",
    }.items():
        dashed = name.replace("_", "-")
        run.add_argument(f"--{dashed}", f"--{name}", action="store_true", help=text)
    heads = parser.add_argument_group("heads, one value for all or one per head")
    for aliases, (kind, text) in LIST_FLAGS.items():
        heads.add_argument(*aliases, dest=aliases[0].lstrip("-"), type=kind, nargs="+", help=text)
    idle = parser.add_argument_group("accepted without effect")
    for name in IDLE_FLAGS:
        idle.add_argument(name, nargs="*", help=argparse.SUPPRESS)
    return parser


def build_config(args: argparse.Namespace):
    """TrainConfig of parsed flags: the preset, over it flags, over these each --set.

    What is valid only together may come in any order: the whole is checked once, at its end.
    ValueError names the flag that is wrong.
    """
    from .override import Draft
    from .presets import preset

    embedded = (
        args.list_datasets is None
        and args.preset is None
        and not (args.use_synthetic_data or args.debug)
    )
    config = preset(args.preset or ("demo" if embedded else "baseline"))
    if args.opt not in (None, "adamw"):
        raise ValueError(f"--opt {args.opt!r}: only adamw")
    rows = _head_rows(args, config.heads)
    draft = Draft(config)
    if len(rows) != len(config.heads):
        draft.repeat("heads", len(rows))
    changes = _run_changes(args)
    for index, row in enumerate(rows):
        given = _head_changes(args, row)
        changes |= {f"heads.{index}.{path}": value for path, value in given.items()}
    for path, value in changes.items():
        if value is not None:
            draft.put(path, value)
    for assignment in args.set:
        draft.assign(assignment)
    return draft.build()


def warn_idle(args: argparse.Namespace, logger: logging.Logger) -> None:
    """Say once for each given flag that does nothing that it does nothing, and why."""
    for name, reason in IDLE_FLAGS.items():
        if getattr(args, name.lstrip("-").replace("-", "_")) is not None:
            logger.warning("%s has no effect: %s", name, reason)


def _run_changes(args: argparse.Namespace) -> dict[str, object]:
    """{path of a field: value of its flag, None where it is not given}."""
    synthetic = args.use_synthetic_data or args.debug
    recompute = args.gradient_checkpoint
    tuned = args.finetune_backbone
    allow = args.resume_allow
    return {
        "output": args.output,
        "resume": args.resume,
        "resume_allow": None if allow is None else tuple(allow.split(",")),
        "seed": args.seed,
        "rounds": args.rounds,
        "grad_accum_steps": args.backward_passes_per_step,
        "log_every": args.frequent,
        "max_skipped_steps": args.max_skipped_steps,
        "profile_steps": args.profile,
        "synthetic_data": True if synthetic else None,
        "model.name": args.model_name,
        "model.init_from": _path(args.init_backbone),
        "model.embedding_dim": args.embedding_size,
        "model.frozen": None if tuned is None else not tuned,
        "optimizer.lr": args.lr,
        "optimizer.weight_decay": args.weight_decay,
        "optimizer.weight_decay_centers": args.weight_decay_pfc,
        "checkpoint.every": args.ckpt_interval,
        "parallel.strategy": "fsdp" if args.fsdp else None,
        "parallel.compile_blocks": args.compile,
        "parallel.activation_checkpointing": None if recompute is None else bool(recompute),
        "schedule.total_samples": args.num_sampled_data,
        "schedule.warmup_ratio": args.warmup_ratio,
    }


def _head_rows(args: argparse.Namespace, templates: tuple) -> list[dict]:
    """Values of the list flags for each head, the preset's heads or as many as data sets are named;
    the only place where lists become heads."""
    lists = {names[0].lstrip("-"): getattr(args, names[0].lstrip("-")) for names in LIST_FLAGS}
    given = {name: values for name, values in lists.items() if values is not None}
    num_heads = len(lists["list_datasets"]) if lists["list_datasets"] else len(templates)
    if len(templates) > 1 and num_heads != len(templates):
        names = ", ".join(template.dataset for template in templates)
        raise ValueError(
            f"--list_datasets names {num_heads} data sets, the preset has {len(templates)} heads "
            f"with settings of their own, in the order of {names}: name as many"
        )
    for name, values in given.items():
        if len(values) not in (1, num_heads):
            raise ValueError(
                f"--{name} has {len(values)} values for {num_heads} heads: give one, or one per "
                "head"
            )
    return [
        {name: values[i if len(values) > 1 else 0] for name, values in given.items()}
        for i in range(num_heads)
    ]


def _head_changes(args: argparse.Namespace, row: dict) -> dict[str, object]:
    """The same as _run_changes of one head, paths from the head on."""
    return {
        "dataset": row.get("list_datasets"),
        "lr_scale": row.get("list_lr_pfc_weights"),
        "loss_weight": row.get("list_loss_weights"),
        "init_from": _path(row.get("list_init_partial_fc_paths")),
        "stream.batch_size": row.get("list_batch_sizes"),
        "stream.label_width": args.random_diff,
        "stream.dali_num_threads": args.workers,
        "stream.view.codec_ratio": args.residual_ratio,
        "stream.view.frame_ratio": args.frame_sampling_ratio,
        "stream.view.max_tokens": args.target_num,
        "stream.view.max_frames": args.num_frames,
        "loss.sample_rate": row.get("list_sample_rates"),
        "loss.margin": row.get("list_margins"),
        "loss.filter_threshold": row.get("list_filters"),
    }


def _path(text: str | None) -> str | None:
    """The public scripts' "NULL" is nothing."""
    return None if text in (None, "NULL", "None", "") else text
