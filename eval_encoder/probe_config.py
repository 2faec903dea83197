"""The probe's command line: the public flags, turned into a ProbeConfig once. Needs no torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("llava_vit_sampling", "llava_vit_codec")

# flag -> (type, default, help)
FLAGS = {
    "dataset": (str, "ssv2", "benchmark, see probe_datasets.BENCHMARKS"),
    "data_root": (Path, Path("data"), "folder that holds one folder per benchmark"),
    "train_data_csv_path": (str, None, "training list inside the benchmark's folder"),
    "val_data_csv_path": (str, None, "validation list inside the benchmark's folder"),
    "model_family": (
        str,
        "llava_vit_sampling",
        f"input of the encoder: {' (whole frames) or '.join(FAMILIES)} (patches)",
    ),
    "model_name": (
        str,
        "llava_vit_base_ln",
        "registered encoder; only for weights without a configuration",
    ),
    "model_weight": (
        str,
        "NULL",
        "Hugging Face folder, backbone.pt, a training output folder, or `random`",
    ),
    "num_frames": (int, 8, "whole frames of a clip"),
    "target_frames": (int, 64, "time base of positions, and frames the codec selects from"),
    "K_keep": (int, 2048, "patches of a clip under llava_vit_codec"),
    "gop": (
        int,
        16,
        "frames from one I-frame to the next, when raw videos are read under llava_vit_codec",
    ),
    "input_size": (int, 224, "side of the picture when raw videos are read"),
    "batch_size": (int, 32, "clips per process"),
    "default_epoch": (int, 10, "epochs of every head"),
    "default_weight_decay": (float, 0.0, "AdamW"),
    "default_min_lr": (float, 1e-7, "learning rate at the end of the linear schedule"),
    "clip_grad": (float, 5.0, "gradient norm of each head"),
    "smoothing": (float, 0.1, "label smoothing"),
    "eval_freq": (int, 1, "epochs between validations"),
    "print_freq": (int, 10, "epochs between log lines"),
    "seed": (int, 1, "of head initialisation and order"),
    "save_report": (Path, Path("fewshot_video_report/ActionRecognition"), "folder of the reports"),
    "feature_cache_gb": (
        float,
        4.0,
        "encoder outputs kept in memory per process; beyond it every epoch encodes again",
    ),
    "decoder": (str, "auto", "raw video reader: decord, av, or auto (decord where installed)"),
}
# accepted for old scripts, without effect: the value follows from the data or the weights
IDLE_FLAGS = (
    "short_side_size", "tubelet_size", "embedding_size", "frames_token_num", "num_tokens",
    "num_classes",
    "dali_num_threads", "dali_py_num_workers", "decord_num_threads", "mean", "std",
    "num_temporal_crops",
    "num_spatial_crops", "probe_size", "patch_size",
)  # fmt: skip


@dataclass(frozen=True)
class ProbeConfig:
    """One probe. `lrs`: one head is trained for each, all on the same tokens."""

    dataset: str
    data_root: Path
    train_csv: str | None
    val_csv: str | None
    family: str
    model_name: str
    model_weight: str
    num_frames: int
    target_frames: int
    num_tokens: int
    gop: int
    input_size: int
    batch_size: int
    epochs: int
    lrs: tuple[float, ...]
    weight_decay: float
    min_lr: float
    clip_grad: float
    smoothing: float
    eval_every: int
    log_every: int
    seed: int
    report_dir: Path
    cache_gb: float
    decoder: str
    allow_partial: bool

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"--model_family {self.family!r}: choose one of {', '.join(FAMILIES)}")
        if self.decoder not in ("auto", "decord", "av"):
            raise ValueError(f"--decoder {self.decoder!r}: choose decord, av or auto")
        for name in (
            "num_frames",
            "target_frames",
            "num_tokens",
            "gop",
            "batch_size",
            "epochs",
            "eval_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


def build_parser() -> argparse.ArgumentParser:
    """All flags; abbreviations are off."""
    parser = argparse.ArgumentParser(
        prog="torchrun eval_encoder/attentive_probe.py",
        description="Attentive probe: a small head on the tokens of a frozen encoder.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, (kind, default, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--default_lr_list",
        type=float,
        nargs="+",
        default=[1e-4],
        help="one head per learning rate",
    )
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
    return ProbeConfig(
        dataset=args.dataset,
        data_root=args.data_root,
        train_csv=args.train_data_csv_path,
        val_csv=args.val_data_csv_path,
        family=args.model_family,
        model_name=args.model_name,
        model_weight=args.model_weight,
        num_frames=args.num_frames,
        target_frames=args.target_frames,
        num_tokens=args.K_keep,
        gop=args.gop,
        input_size=args.input_size,
        batch_size=args.batch_size,
        epochs=args.default_epoch,
        lrs=tuple(args.default_lr_list),
        weight_decay=args.default_weight_decay,
        min_lr=args.default_min_lr,
        clip_grad=args.clip_grad,
        smoothing=args.smoothing,
        eval_every=args.eval_freq,
        log_every=args.print_freq,
        seed=args.seed,
        report_dir=args.save_report,
        cache_gb=args.feature_cache_gb,
        decoder=args.decoder,
        allow_partial=args.allow_partial,
    )


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Given flags that have no effect."""
    return [f"--{name}" for name in IDLE_FLAGS if getattr(args, name) is not None]
