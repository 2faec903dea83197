"""The probe's command line: public flags, declared on the fields that they fill. Needs no torch.

A flag has the name of its field where no other is given.
"""

import argparse
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from eval_encoder.clip_input import (
    AUGMENTATIONS,
    CAMERAS,
    DECODERS,
    IMAGE_FAMILIES,
    RULES,
    SCORES,
    VIDEO_FAMILIES,
    InputConfig,
    seed_flag,
)
from model_factory.command_line.flags import add_flags, flag, flags_of, from_flags
from model_factory.command_line.local_output import local_output, output_path

HEADS = ("attentive", "linear", "knn")
CODEC_FRAMES = 64  # temporal positions of the codec's time base (data_pipeline/codec/decompose.py)

REPORT_DIR = Path("fewshot_video_report/ActionRecognition")

# accepted for old scripts, without effect: the value follows from the data or the weights
IDLE_FLAGS = (
    "short_side_size", "tubelet_size", "embedding_size", "frames_token_num", "num_tokens",
    "dali_num_threads", "probe_size", "patch_size", "mv_use_inconsistency", "mv_incon_ksize",
    "res_use_grad", "center_sigma", "static_fallback", "static_abs_thresh", "static_rel_thresh",
    "static_uniform_frames", "checkpoint_dir", "resume_checkpoint",
)  # fmt: skip


def _cache_dir(text: str) -> Path | None:
    """Type of --cache_dir; old scripts write None for no folder."""
    return None if text == "None" else Path(local_output(text))


@dataclass(frozen=True)
class HeadsConfig:
    """The bank: one head for every learning rate, weight decay and seed."""

    kind: str = flag(
        "--head",
        default="attentive",
        help=f"{', '.join(HEADS)}; the last two on pooled features",
    )
    lrs: tuple[float, ...] = flag(
        "--default_lr_list",
        default=(1e-4,),
        help="learning rates; heads are trained for all combinations",
    )
    weight_decays: tuple[float, ...] = flag(
        "--default_weight_decay", default=(0.0,), help="AdamW's weight decays"
    )
    seed: int = seed_flag()
    num_seeds: int = flag(
        default=1,
        help="heads per setting, seeds counted up: other initial weights, for linear heads also "
        "another order of the clips",
    )
    epochs: int = flag("--default_epoch", default=10, help="epochs of every head")
    batch_size: int = flag(default=32, help="clips per process")
    min_lr: float = flag(
        "--default_min_lr", default=1e-7, help="learning rate at the end of the linear schedule"
    )
    clip_grad: float = flag(default=5.0, help="gradient norm of each head")
    smoothing: float = flag(default=0.1, help="label smoothing")
    holdout: float = flag(
        default=0.1,
        help="share of the training list that chooses among settings and epochs",
    )
    eval_every: int = flag("--eval_freq", default=1, help="epochs between validations")
    log_every: int = flag("--print_freq", default=10, help="epochs between log lines")

    def __post_init__(self) -> None:
        settings = len(self.lrs) * len(self.weight_decays)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout {self.holdout} must lie in [0, 1)")
        if settings > 1 and self.holdout == 0:
            raise ValueError(
                f"--holdout 0 leaves nothing to choose among {settings} settings with: the "
                "validation list evaluates, and chooses nothing"
            )


@dataclass(frozen=True)
class ProbeConfig:
    """One probe: which heads, on features of which encoder, evaluated on which clips."""

    dataset: str = flag(
        default="ssv2",
        help="benchmark, see probe/benchmarks.py, or a folder of lists",
    )
    data_root: Path = flag(default=Path("data"), help="folder that holds one folder per benchmark")
    train_csv: str | None = flag(
        "--train_data_csv_path", default=None, help="training list inside the benchmark's folder"
    )
    val_csv: str | None = flag(
        "--val_data_csv_path", default=None, help="validation list inside the benchmark's folder"
    )
    num_classes: int = flag(
        default=0,
        help="0: the benchmark's own, or one more than the largest label",
    )
    protocol: str | None = flag(
        default=None,
        help="single_label or multi_label (mean average precision)",
    )
    model_name: str = flag(
        default="llava_vit_base_ln",
        help="registered encoder; only for weights without a configuration",
    )
    model_weight: str = flag(
        default="NULL",
        help="Hugging Face folder, backbone.pt, a training run or checkpoint, or `random`",
    )
    input: InputConfig = field(default_factory=InputConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    report_dir: Path = flag(
        "--save_report", default=REPORT_DIR, parse=output_path, help="folder of the reports"
    )
    cache_gb: float = flag(
        "--feature_cache_gb", default=4.0, help="fixed features kept in memory per process"
    )
    cache_dir: Path | None = flag(
        default=None,
        parse=_cache_dir,
        help="folder of stored features (fp16), read by every later probe",
    )
    allow_partial: bool = flag(
        "--allow-partial",
        default=False,
        help="report although videos are missing or unreadable",
    )


def build_parser() -> argparse.ArgumentParser:
    """All flags; abbreviations are off."""
    parser = argparse.ArgumentParser(
        prog="torchrun eval_encoder/attentive_probe.py",
        description="Attentive probe: small heads on the tokens of a frozen encoder.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_flags(parser, ProbeConfig)
    parser.add_argument("--output", type=output_path, help="the same as --save_report")
    for name in IDLE_FLAGS:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser


def build_config(args: argparse.Namespace) -> ProbeConfig:
    """ProbeConfig of parsed flags; ValueError names the flag that is wrong."""
    _check_choices(args)
    _check_counts(args)
    _check_numbers(args)
    # `none` is a word of the command line, of which records and stored features know nothing
    augmentations = [name for name in args.augment if name != "none"]
    args = argparse.Namespace(**{**vars(args), "augment": augmentations})
    return from_flags(ProbeConfig, args, report_dir=_report_dir(args))


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Given flags that have no effect."""
    idle = [f"--{name}" for name in IDLE_FLAGS if getattr(args, name) is not None]
    if args.head == "knn" and args.num_seeds > 1:
        idle.append("--num_seeds (nearest neighbours draw nothing)")
    return idle


def _report_dir(args: argparse.Namespace) -> Path:
    """The folder of --save_report or --output; ValueError where they name two."""
    if args.output is None:
        return args.save_report
    # the default stands for a flag that was not given
    if args.save_report not in (REPORT_DIR, args.output):
        raise ValueError(
            f"--save_report {args.save_report} and --output {args.output} are one flag under two "
            "names: give one of them"
        )
    return args.output


def _check_choices(args: argparse.Namespace) -> None:
    """Raise ValueError for an unknown name, with the nearest known one."""
    choices = {
        "model_family": (*VIDEO_FAMILIES, *IMAGE_FAMILIES),
        "head": HEADS,
        "decoder": DECODERS,
        "rule": RULES,
        "score": SCORES,
        "mv_compensate": CAMERAS,
    }
    for name, known in choices.items():
        _check_choice(name, getattr(args, name), known=known)
    for name in args.augment:
        _check_choice("augment", name, known=(*AUGMENTATIONS, "none"))
    if args.protocol is not None:
        _check_choice("protocol", args.protocol, known=("single_label", "multi_label"))


def _check_choice(flag_name: str, value: str, known: tuple[str, ...]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f", nearest: {near[0]}" if near else ""
    choices = ", ".join(known)
    raise ValueError(f"--{flag_name} {value!r}: choose one of {choices}{hint}")


def _check_counts(args: argparse.Namespace) -> None:
    """Raise ValueError for a whole number that is too small, or too large under codec input."""
    for declared in flags_of(ProbeConfig):
        name = declared.destination
        # any integer is a seed
        if declared.annotation is int and name != "seed":
            # for these three, 0 stands for a choice that is made later
            least = 0 if name in ("num_classes", "train_views", "gop") else 1
            value = getattr(args, name)
            if value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")
    if VIDEO_FAMILIES.get(args.model_family) == "codec":
        if args.num_temporal_crops > 1:
            raise ValueError("codec input sees the whole clip: --num_temporal_crops 1")
        if args.target_frames > CODEC_FRAMES:
            raise ValueError(
                f"--target_frames {args.target_frames}: codec input has at most {CODEC_FRAMES}"
            )


def _check_scale(args: argparse.Namespace) -> None:
    """Raise ValueError for a scale of frames that the input has not."""
    if not 0 < args.frame_scale <= 1:
        raise ValueError(f"--frame_scale {args.frame_scale} must be more than 0, and at most 1")
    if args.frame_scale != 1 and args.model_family in IMAGE_FAMILIES:
        raise ValueError(
            f"--frame_scale {args.frame_scale}: {args.model_family} sees frames at its own size"
        )


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for fractions, lists and colours out of their range."""
    # written so that NaN is refused too
    if not args.clip_grad > 0:
        raise ValueError(f"--clip_grad {args.clip_grad} must be positive")
    if not 0 <= args.smoothing < 1:
        raise ValueError(f"--smoothing {args.smoothing} must be from 0 to below 1")
    _check_scale(args)
    for name in ("feature_cache_gb", "center_prior", "default_min_lr"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be not negative")
    # Equal settings would be equal heads. A rate of 0 would train nothing.
    for name, least in (("default_lr_list", 1e-12), ("default_weight_decay", 0.0)):
        values = getattr(args, name)
        is_repeated = len(set(values)) < len(values)
        if min(values) < least or is_repeated:
            raise ValueError(f"--{name} {values}: different numbers, none below {least:g}")
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std belong together")
    for name, values in (("mean", args.mean), ("std", args.std)):
        # pixels are divided by std, so that it must be positive
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            raise ValueError(f"--{name} {values}: three numbers, one per channel")
