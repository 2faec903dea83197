"""TrainConfig: the union of the components' configs, frozen, checked when made, stored as JSON.

Each component's config lies beside the component. This file adds the fields that belong to no
single one, and the comparison that guards a resume.
"""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.datasets import EMBEDDED
from data_pipeline.loading.config import StreamConfig
from model_factory.command_line.local_output import local_output
from model_factory.files import stays_below

from ..checkpoint.checkpointer import CheckpointConfig
from ..losses.partial_fc import PartialFCConfig
from ..optimizer import OptimizerConfig, ScheduleConfig
from ..parallel import ParallelConfig


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: a registered name, the rotary rule, the folder or file that its weights start
    from (None: random), and the width that it must have (None: any)."""

    name: str = "llava_vit_small_ln"
    rope_pairing: str = "rotary"
    init_from: str | None = None
    frozen: bool = False
    embedding_dim: int | None = None


@dataclass(frozen=True)
class HeadConfig:
    """One dataset with its loss.

    `init_from` is a .npy of starting centres [num_classes, D]. `head_name` (None: the folder's) is
    set where a checkpoint has a name that the folder has no longer.
    """

    dataset: str = EMBEDDED
    stream: StreamConfig = field(default_factory=StreamConfig)
    loss: PartialFCConfig = field(default_factory=PartialFCConfig)
    lr_scale: float = 1.0
    loss_weight: float = 1.0
    init_from: str | None = None
    head_name: str | None = None

    def __post_init__(self) -> None:
        # names are parts of paths: clusters/NAME, centers/NAME.npy
        name = self.head_name
        if name is not None and ("/" in name or not stays_below(name)):
            raise ValueError(f"head_name {name!r}: give a plain name without a slash")
        if self.lr_scale < 0 or self.loss_weight < 0:
            raise ValueError(
                f"--list_lr_pfc_weights {self.lr_scale} and --list_loss_weights "
                f"{self.loss_weight} must not be negative"
            )

    @property
    def name(self) -> str:
        """Short name for logs and checkpoints: the folder's, with its parent's for a mere split. A
        link has its own name, not that of its target."""
        if self.head_name is not None:
            return self.head_name
        # abspath and not resolve(), which would follow the link
        folder = Path(os.path.abspath(self.dataset))
        if folder.name in SPLITS:
            return f"{folder.parent.name}-{folder.name}"
        return folder.name


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. `every` fields count optimizer steps."""

    output: str = "output"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    heads: tuple[HeadConfig, ...] = (HeadConfig(),)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    grad_accum_steps: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 10
    max_skipped_steps: int = 0  # for gradients that are not finite; 0: the first one stops the run
    profile_steps: int = 0  # steps that trace.json shows
    wandb_project: str | None = None  # None: no copy of the metrics for Weights & Biases
    embedded_clips: tuple[int, int] = (1200, 240)  # training and validation clips that are made
    synthetic_data: bool = False
    resume: str = "auto"  # or never, or the path of a checkpoint
    resume_allow: tuple[str, ...] = ()  # fields that may differ from the checkpoint's
    resume_data: str = "same"  # or new-epoch: go on although shards or labels changed
    rounds: int = 1  # of training, with a new clustering by the trained encoder between two
    pack_tokens: int = 0  # tokens of one pack of all heads that have a token_share
    allow_missing_shards: bool = False
    prefetch_bytes: int = 1 << 30  # memory of the batches that wait for the trainer
    data_warning_s: float = 30.0
    data_timeout_s: float = 120.0
    collective_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        local_output(self.output)
        names = [head.name for head in self.heads]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"--list_datasets {names}: give at least one dataset, each name once (a folder's "
                "name is its last part; rename or link one to tell two apart)"
            )
        self._check_tubes()
        shares = [head.stream.token_share for head in self.heads]
        # shares such as 0.1 + 0.2 + 0.7 sum to a little more than 1 in floats
        exceeds = sum(shares) > 1 + 1e-9
        if exceeds or (any(shares) and self.pack_tokens < 1):
            raise ValueError(
                f"token_share {shares} of pack_tokens {self.pack_tokens}: they may not exceed "
                "1 together, and pack_tokens must be set for them"
            )
        for name in ("grad_accum_steps", "log_every", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("max_skipped_steps", "profile_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0")
        for name in ("prefetch_bytes", "data_warning_s", "data_timeout_s", "collective_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive")
        if self.resume_data not in RESUME_DATA:
            raise ValueError(
                f"resume_data {self.resume_data!r}: choose one of {', '.join(RESUME_DATA)}"
            )

    def _check_tubes(self) -> None:
        """Raise ValueError where heads would need encoders of different rows."""
        tubes = {head.name: head.stream.view.frames_per_token for head in self.heads}
        if len(set(tubes.values())) > 1:
            raise ValueError(
                f"frames_per_token of the heads {tubes}: one encoder serves all heads, so they "
                "must agree"
            )

    @property
    def frames_per_token(self) -> int:
        """Of all heads, which agree; the encoder takes three channels of each frame."""
        return self.heads[0].stream.view.frames_per_token

    def pack_tokens_of(self, head: HeadConfig) -> int | None:
        """Tokens of one pack of a head; None for a head whose batches count samples."""
        share = head.stream.token_share
        return int(share * self.pack_tokens) if share else None

    def to_json(self) -> str:
        """Indented JSON of all fields."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def flat(self) -> dict:
        """{path of a field: its value}, e.g. heads.0.loss.margin."""
        return _flatten(json.loads(self.to_json()))


SPLITS = ("train", "val", "test", "shards")  # folder names that name no dataset by themselves

RESUME_DATA = ("same", "new-epoch")

# Fields that may differ between a checkpoint and the run that resumes it: they change no result, or
# are compared through the data itself (embedded_clips).
FREE_FIELDS = (
    "output",
    "parallel",
    "checkpoint",
    "log_every",
    "max_skipped_steps",
    "profile_steps",
    "wandb_project",
    "resume",
    "resume_allow",
    "resume_data",
    "embedded_clips",
    "allow_missing_shards",
    "prefetch_bytes",
    "data_warning_s",
    "data_timeout_s",
    "collective_timeout_s",
)
FRAMES_PER_TOKEN = ".stream.view.frames_per_token"
FREE_STREAM_FIELDS = ("dali_num_threads", "error_budget")


def fingerprint(config: TrainConfig, world_size: int) -> dict:
    """{path of a field that must be equal on resume: value}, with global instead of per-rank batch
    sizes. Data are compared by their bytes (checkpoint/resume.py), not by their folders."""
    flat = config.flat()
    # the global batch is what decides a step, so a run may go on with other numbers of ranks
    for index, head in enumerate(config.heads):
        flat[f"heads.{index}.stream.batch_size"] = head.stream.batch_size * world_size
    return compared(flat)


def compared(flat: dict) -> dict:
    """The fields of a fingerprint that are compared; one of an earlier version may hold more."""
    names = [key for key in flat if not _is_free(key.split("."))]
    return {name: flat[name] for name in names if not _is_single_frames(name, flat[name])}


def _is_single_frames(name: str, value: Any) -> bool:
    """Whether a field is that there are no tubes, which checkpoints of before have none on record
    of."""
    return name.endswith(FRAMES_PER_TOKEN) and value == 1


def _is_free(path: list[str]) -> bool:
    return (
        path[0] in FREE_FIELDS
        or path[-1] == "init_from"  # a checkpoint has weights and centres of its own
        or (path[0] == "heads" and path[2] in ("dataset", "head_name"))
        or (path[0] == "heads" and path[2] == "stream" and path[3] in FREE_STREAM_FIELDS)
    )


def fingerprint_difference(saved: dict, current: dict) -> list[str]:
    """One line per field that differs."""
    keys = sorted(saved.keys() | current.keys())
    return [
        f"{key}: checkpoint {saved.get(key)!r}, now {current.get(key)!r}"
        for key in keys
        if saved.get(key) != current.get(key)
    ]


def is_allowed(difference: str, fields: tuple[str, ...]) -> bool:
    """Whether a line of fingerprint_difference is about one of `fields`, or a part of one."""
    name = difference.partition(":")[0]
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def check_allowed(fields: tuple[str, ...], known: dict) -> None:
    """ValueError for a name of --resume_allow that is no field of the fingerprint, nor a part of
    one's path."""
    for name in fields:
        inside = f"{name}."  # with its dot: heads.1 is no part of heads.10
        if not any(key == name or key.startswith(inside) for key in known):
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(
                f"--resume_allow {name}: no field that a checkpoint is compared by; nearest: "
                f"{', '.join(near) or 'none'}"
            )


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix[:-1]: node}  # without the last dot
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat
