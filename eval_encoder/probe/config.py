"""The probe's command line: the public flags, turned into a ProbeConfig once. Needs no torch."""

import argparse
import difflib
from dataclasses import asdict, dataclass
from pathlib import Path

from model_factory.command_line.local_output import local_output, output_path

VIDEO_FAMILIES = {  # public name -> view of the packed encoder
    "llava_vit_sampling": "frame",
    "chunk_wise_sampling": "frame",
    "llava_vit_codec": "codec",
    "ov_encoder_codec": "codec",
}
IMAGE_FAMILIES = ("clip", "metaclip", "siglip", "siglip2", "dinov2", "dinov3", "aimv2")
HEADS = ("attentive", "linear", "knn")
DECODERS = ("auto", "decord", "av", "torchcodec")
AUGMENTATIONS = ("jitter", "brightness", "saturation", "hue", "channels")
CAMERAS = ("none", "median", "similarity", "affine")

REPORT_DIR = Path("fewshot_video_report/ActionRecognition")

# flag -> (type, default, help)
FLAGS = {
    "dataset": (str, "ssv2", "benchmark, see probe_datasets.BENCHMARKS, or a folder of lists"),
    "data_root": (Path, Path("data"), "folder that holds one folder per benchmark"),
    "train_data_csv_path": (str, None, "training list inside the benchmark's folder"),
    "val_data_csv_path": (str, None, "validation list inside the benchmark's folder"),
    "num_classes": (int, 0, "0: the benchmark's own, or one more than the largest label"),
    "protocol": (str, None, "single_label or multi_label (mean average precision)"),
    "model_family": (
        str,
        "llava_vit_sampling",
        f"{', '.join(VIDEO_FAMILIES)} (ours, whole frames or codec patches), or frame by frame "
        f"{', '.join(IMAGE_FAMILIES)}",
    ),
    "model_name": (
        str,
        "llava_vit_base_ln",
        "registered encoder; only for weights without a configuration",
    ),
    "model_weight": (
        str,
        "NULL",
        "Hugging Face folder, backbone.pt, a training run or checkpoint, or `random`",
    ),
    "head": (str, "attentive", f"{', '.join(HEADS)}; the last two on pooled features"),
    "num_frames": (int, 8, "whole frames of a clip"),
    "target_frames": (int, 64, "time base of positions, and frames the codec selects from"),
    "K_keep": (int, 2048, "patches of a clip under codec input"),
    "gop": (int, 0, "frames between I-frames of raw codec input; 0: by the budget"),
    "mv_compensate": (str, "median", f"camera model of codec input: {', '.join(CAMERAS)}"),
    "center_prior": (float, 0.0, "preference of codec input for the middle of the picture"),
    "input_size": (int, 224, "side of raw videos' pictures; image encoders have their own"),
    "num_temporal_crops": (int, 1, "shifted samplings of a validation clip, scores averaged"),
    "num_spatial_crops": (int, 1, "squares along the long side of a validation clip, averaged"),
    "train_views": (int, 0, "drawn versions of a raw training clip; 0: one per epoch, 1: plain"),
    "batch_size": (int, 32, "clips per process"),
    "default_epoch": (int, 10, "epochs of every head"),
    "default_min_lr": (float, 1e-7, "learning rate at the end of the linear schedule"),
    "clip_grad": (float, 5.0, "gradient norm of each head"),
    "smoothing": (float, 0.1, "label smoothing"),
    "eval_freq": (int, 1, "epochs between validations"),
    "print_freq": (int, 10, "epochs between log lines"),
    "seed": (int, 1, "of the first head, the order and the drawn versions"),
    "num_seeds": (
        int,
        1,
        "heads per setting, seeds counted up: other initial weights, for linear heads also another "
        "order of the clips",
    ),
    "holdout": (float, 0.1, "share of the training list that chooses among settings and epochs"),
    "save_report": (output_path, REPORT_DIR, "folder of the reports"),
    "output": (output_path, None, "the same as --save_report"),
    "feature_cache_gb": (float, 4.0, "fixed features kept in memory per process"),
    "cache_dir": (
        local_output,
        None,
        "folder of stored features (fp16), read by every later probe",
    ),
    "decoder": (str, "auto", f"raw video reader: {', '.join(DECODERS)} (auto: av, the packer's)"),
    "wall_seconds": (float, 300.0, "limit of reading one raw clip; beyond it is unreadable"),
    "decord_num_threads": (int, 2, "threads of one decord reader"),
    "dali_py_num_workers": (int, 4, "raw videos decoded at a time"),
}  # fmt: skip
LISTS = {  # flag -> (type, default, help), several values
    "default_lr_list": (float, [1e-4], "learning rates; heads are trained for all combinations"),
    "default_weight_decay": (float, [0.0], "AdamW's weight decays"),
    "mean": (float, None, "of the normalisation; default: what the encoder was trained with"),
    "std": (float, None, "of the normalisation"),
    "augment": (str, list(AUGMENTATIONS), "of drawn versions; `none` for none"),
}
# accepted for old scripts, without effect: the value follows from the data or the weights
IDLE_FLAGS = (
    "short_side_size", "tubelet_size", "embedding_size", "frames_token_num", "num_tokens",
    "dali_num_threads", "probe_size", "patch_size", "mv_use_inconsistency", "mv_incon_ksize",
    "res_use_grad", "center_sigma", "static_fallback", "static_abs_thresh", "static_rel_thresh",
    "static_uniform_frames", "checkpoint_dir", "resume_checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class InputConfig:
    """How a clip becomes what the encoder sees."""

    family: str
    num_frames: int
    target_frames: int
    num_tokens: int
    gop: int
    camera: str
    centre_prior: float
    size: int
    temporal_crops: int
    spatial_crops: int
    train_views: int
    augmentations: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    decoder: str
    decoder_threads: int
    wall_seconds: float
    workers: int
    seed: int

    @property
    def view(self) -> str:
        """frame or codec."""
        return VIDEO_FAMILIES.get(self.family, "frame")

    def identity(self) -> dict:
        """What decides on the pixels of any look, for the key of stored features."""
        fields = asdict(self)
        others = {"frame": ("num_tokens", "gop", "camera", "centre_prior")}
        others["codec"] = ("num_frames", "decoder")
        unseen = ("workers", "decoder_threads", "wall_seconds", "train_views", "family")
        # of a look, not of all
        unseen += ("temporal_crops", "spatial_crops", "seed", "augmentations")
        for name in (*unseen, *others[self.view]):
            fields.pop(name)
        return {"view": self.view, **fields}


@dataclass(frozen=True)
class HeadsConfig:
    """The bank: one head for every learning rate, weight decay and seed."""

    kind: str
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    seed: int
    num_seeds: int
    epochs: int
    batch_size: int
    min_lr: float
    clip_grad: float
    smoothing: float
    holdout: float
    eval_every: int
    log_every: int

    def __post_init__(self):
        settings = len(self.lrs) * len(self.weight_decays)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"--holdout {self.holdout} must lie in [0, 1)")
        if settings > 1 and self.holdout == 0:
            raise ValueError(
                f"--holdout 0 leaves nothing to choose among {settings} settings with: the "
                "validation list is for judging"
            )


@dataclass(frozen=True)
class ProbeConfig:
    """One probe: whose features, of which clips, judged by which heads."""

    dataset: str
    data_root: Path
    train_csv: str | None
    val_csv: str | None
    num_classes: int
    protocol: str | None
    model_name: str
    model_weight: str
    input: InputConfig
    heads: HeadsConfig
    report_dir: Path
    cache_gb: float
    cache_dir: Path | None
    allow_partial: bool


def build_parser() -> argparse.ArgumentParser:
    """All flags; abbreviations are off."""
    parser = argparse.ArgumentParser(
        prog="torchrun eval_encoder/attentive_probe.py",
        description="Attentive probe: small heads on the tokens of a frozen encoder.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (kind, default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name, (kind, default, text) in LISTS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=default, help=text)
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="report although videos are missing or unreadable",
    )
    for name in IDLE_FLAGS:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return parser


def build_config(args: argparse.Namespace) -> ProbeConfig:
    """ProbeConfig of parsed flags; ValueError names the flag that is wrong."""
    _check(args)
    return ProbeConfig(
        dataset=args.dataset,
        data_root=args.data_root,
        train_csv=args.train_data_csv_path,
        val_csv=args.val_data_csv_path,
        num_classes=args.num_classes,
        protocol=args.protocol,
        model_name=args.model_name,
        model_weight=args.model_weight,
        input=_input_config(args),
        heads=HeadsConfig(
            kind=args.head,
            lrs=tuple(args.default_lr_list),
            weight_decays=tuple(args.default_weight_decay),
            seed=args.seed,
            num_seeds=args.num_seeds,
            epochs=args.default_epoch,
            batch_size=args.batch_size,
            min_lr=args.default_min_lr,
            clip_grad=args.clip_grad,
            smoothing=args.smoothing,
            holdout=args.holdout,
            eval_every=args.eval_freq,
            log_every=args.print_freq,
        ),
        report_dir=_report_dir(args),
        cache_gb=args.feature_cache_gb,
        cache_dir=None if args.cache_dir in (None, "None") else Path(args.cache_dir),
        allow_partial=args.allow_partial,
    )


def _report_dir(args: argparse.Namespace) -> Path:
    """The folder of --save_report or --output; ValueError where they name two."""
    if args.output is None:
        return args.save_report
    if args.save_report not in (REPORT_DIR, args.output):
        raise ValueError(
            f"--save_report {args.save_report} and --output {args.output} are one flag under two "
            "names: give one of them"
        )
    return args.output


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Given flags that have no effect."""
    idle = [f"--{name}" for name in IDLE_FLAGS if getattr(args, name) is not None]
    if args.head == "knn" and args.num_seeds > 1:
        idle.append("--num_seeds (nearest neighbours draw nothing)")
    return idle


def _input_config(args: argparse.Namespace) -> InputConfig:
    return InputConfig(
        family=args.model_family,
        num_frames=args.num_frames,
        target_frames=args.target_frames,
        num_tokens=args.K_keep,
        gop=args.gop,
        camera=args.mv_compensate,
        centre_prior=args.center_prior,
        size=args.input_size,
        temporal_crops=args.num_temporal_crops,
        spatial_crops=args.num_spatial_crops,
        train_views=args.train_views,
        augmentations=tuple(name for name in args.augment if name != "none"),
        mean=tuple(args.mean) if args.mean else None,
        std=tuple(args.std) if args.std else None,
        decoder=args.decoder,
        decoder_threads=args.decord_num_threads,
        wall_seconds=args.wall_seconds,
        workers=args.dali_py_num_workers,
        seed=args.seed,
    )


def _check(args: argparse.Namespace) -> None:
    """Choices and ranges of single flags."""
    choices = {
        "model_family": (*VIDEO_FAMILIES, *IMAGE_FAMILIES),
        "head": HEADS,
        "decoder": DECODERS,
        "mv_compensate": CAMERAS,
        "protocol": (None, "single_label", "multi_label"),
    }
    given = [(name, getattr(args, name), known) for name, known in choices.items()]
    given += [("augment", name, (*AUGMENTATIONS, "none")) for name in args.augment]
    for name, value, known in given:
        if value not in known:
            near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
            hint = f", nearest: {near[0]}" if near else ""
            names = ", ".join(str(k) for k in known if k is not None)
            raise ValueError(f"--{name} {value!r}: choose one of {names}{hint}")
    least = {"num_classes": 0, "train_views": 0, "gop": 0}
    for name, (kind, _, _) in FLAGS.items():
        if kind is int and name != "seed" and getattr(args, name) < least.get(name, 1):
            value = getattr(args, name)
            raise ValueError(f"--{name} {value} must be at least {least.get(name, 1)}")
    codec = VIDEO_FAMILIES.get(args.model_family) == "codec"
    if codec and args.num_temporal_crops > 1:
        raise ValueError("codec input sees the whole clip: --num_temporal_crops 1")
    if codec and args.target_frames > 64:
        raise ValueError(f"--target_frames {args.target_frames}: codec input has at most 64")
    _check_numbers(args)
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std belong together")
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            raise ValueError(f"--{name} {values}: three numbers, one per channel")


def _check_numbers(args: argparse.Namespace) -> None:
    """Ranges of numbers that are not whole."""
    within = {
        "clip_grad": (args.clip_grad, lambda v: v > 0, "positive"),
        "smoothing": (args.smoothing, lambda v: 0 <= v < 1, "from 0 to below 1"),
        "feature_cache_gb": (args.feature_cache_gb, lambda v: v >= 0, "not negative"),
        "center_prior": (args.center_prior, lambda v: v >= 0, "not negative"),
        "default_min_lr": (args.default_min_lr, lambda v: v >= 0, "not negative"),
    }
    for name, (value, fits, text) in within.items():
        if not fits(value):
            raise ValueError(f"--{name} {value} must be {text}")
    for name, least in (("default_lr_list", 1e-12), ("default_weight_decay", 0.0)):
        values = getattr(args, name)
        if min(values) < least or len(set(values)) < len(values):
            raise ValueError(f"--{name} {values}: different numbers, none below {least:g}")
