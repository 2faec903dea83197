"""One input file -> the members of one sample: decompose, score, select, cut, encode.

This is the readable path from mp4 to shard; `pack` runs it in child processes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256

from ..codec.decompose import TIME_BASE, CodecClip, decompose_video
from ..codec.framing import Framing, crop_of
from ..codec.native import decompose_native
from ..codec.open_video import InputLimits, check_file, is_image, open_image
from ..codec.saliency import SaliencyConfig, motion_summary
from ..codec.selection import choose_patches, cut_patches
from ..errors import RejectedInput
from .schema import SampleInfo, encode_clip, encode_image, strip_rows

MOTION_GRID = 8
MAX_JPEG_SIDE = 65500
VECTORS = ("canonical", "native")
RULES = ("i_frames_first", "published")


@dataclass(frozen=True)
class SampleConfig:
    """How inputs become samples. `budget` is the number of kept patches of a full clip,
    by default an eighth.
    """

    size: int = 224
    patch_size: int = 16
    num_frames: int = 64
    gop: int = 16
    budget: int | None = None
    num_full_frames: int = 16
    fit: str = "crop"
    salvage: bool = False
    vectors: str = "canonical"
    rule: str = "i_frames_first"
    time_buckets: int = 1
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)
    limits: InputLimits = field(default_factory=InputLimits)

    def __post_init__(self):
        counts = ("size", "patch_size", "num_frames", "gop", "num_full_frames", "time_buckets")
        for name in counts if self.budget is None else (*counts, "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.size % self.patch_size or self.size % 2:
            raise ValueError(
                f"--size {self.size} must be even and a multiple of --patch-size {self.patch_size}"
            )
        if self.num_frames > TIME_BASE:
            raise ValueError(
                f"num_frames is {self.num_frames}: temporal positions run over 0..{TIME_BASE - 1}, "
                f"more than {TIME_BASE} frames would share them"
            )
        if self.num_full_frames * strip_rows(self.size) > MAX_JPEG_SIDE:
            raise ValueError(
                f"{self.num_full_frames} full frames of {self.size} px make a strip higher than "
                f"the {MAX_JPEG_SIDE} px of a JPEG: lower --full-frames or --size"
            )
        for name, known in (("rule", RULES), ("vectors", VECTORS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        intra = -(-self.num_frames // self.gop) * (self.size // self.patch_size) ** 2
        if self.keeps_i_frames and self.tokens < intra:
            raise ValueError(
                f"a budget of {self.tokens} patches cannot hold the {intra} of all I-frames: raise "
                f"--budget or --gop {self.gop}, or lower --size {self.size}"
            )

    @property
    def keeps_i_frames(self) -> bool:
        """Whether every I-frame patch is kept; the published rule keeps none."""
        return self.rule != "published"

    @property
    def framing(self) -> Framing:
        """What is read of an input."""
        return Framing(
            num_frames=self.num_frames,
            size=self.size,
            patch_size=self.patch_size,
            fit=self.fit,
            limits=self.limits,
            salvage=self.salvage,
        )

    @property
    def tokens(self) -> int:
        """Patches kept of a clip."""
        return self.budget or self.num_frames * (self.size // self.patch_size) ** 2 // 8


def build_sample(
    path: Path, source: str, config: SampleConfig
) -> tuple[dict[str, bytes], SampleInfo]:
    """Members and metadata of one input; `source` is the name stored in the shard.
    Raises RejectedInput.
    """
    check_file(path, config.limits)
    before = _fingerprint(path)
    if is_image(path):
        members, info = _image_sample(open_image(path, config.limits), source, before[0], config)
    else:
        if config.vectors == "native":
            clip = decompose_native(path, config.framing)
        else:
            clip = decompose_video(path, config.framing, gop=config.gop)
        if len(clip.frames) == 1:
            members, info = _image_sample(clip.frames[0], source, before[0], config)
        else:
            members, info = _clip_sample(clip, source, before[0], config)
    if _fingerprint(path) != before:
        raise RejectedInput("changed", f"{path} changed while it was packed")
    return members, info


def _fingerprint(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
        digest = file_sha256(path)
    except OSError as error:
        raise RejectedInput("missing", f"{path}: {error.strerror}") from error
    return digest, status.st_size, status.st_mtime_ns


def _image_sample(picture: np.ndarray, source: str, sha256: str, config: SampleConfig):
    crop = crop_of(picture.shape[0], picture.shape[1], framing=config.framing)
    picture = crop.scale(picture)
    height, width = picture.shape[:2]
    patches = (height // config.patch_size) * (width // config.patch_size)
    info = SampleInfo(
        "image", source, sha256, height, width, config.patch_size, num_patches=patches
    )
    return encode_image(info, picture), info


def _clip_sample(clip: CodecClip, source: str, sha256: str, config: SampleConfig):
    import av

    intra = clip.frames[clip.is_i_frame, :, :, 0].size // config.patch_size**2
    if config.keeps_i_frames and intra > config.tokens:
        raise RejectedInput(
            "budget", f"{source}: its I-frames are {intra} patches, the budget is {config.tokens}"
        )
    selection = choose_patches(
        clip,
        patch_size=config.patch_size,
        budget=config.tokens,
        saliency=config.saliency,
        keep_i_frames=config.keeps_i_frames,
        time_buckets=config.time_buckets,
    )
    patches = cut_patches(clip.frames, selection.positions, config.patch_size)
    stored = np.unique(
        np.rint(np.linspace(0, len(clip.frames) - 1, config.num_full_frames)).astype(int)
    )
    info = SampleInfo(
        kind="video",
        source=source,
        source_sha256=sha256,
        height=clip.frames.shape[1],
        width=clip.frames.shape[2],
        patch_size=config.patch_size,
        num_patches=len(patches),
        num_frames=len(clip.frames),
        gop=config.gop,
        frame_times=tuple(int(t) for t in clip.times[stored]),
        i_frame_times=tuple(int(t) for t in clip.times[clip.is_i_frame]),
        seconds=tuple(round(float(s), 6) for s in clip.seconds),
        is_static=selection.is_static,
        mean_motion=_p_frame_mean(np.linalg.norm(clip.motion, axis=-1), clip),
        mean_residual=_p_frame_mean(clip.residual, clip),
        num_source_frames=clip.num_source_frames,
        notes=clip.notes,
        codec=clip.codec,
        decoder=f"av {av.__version__}",
    )
    positions = selection.positions.astype(np.int64)
    positions[:, 0] = clip.times[positions[:, 0]]
    motion = motion_summary(clip, MOTION_GRID)
    return encode_clip(
        info, patches, positions, selection.scores, motion, clip.frames[stored]
    ), info


def _p_frame_mean(field: np.ndarray, clip: CodecClip) -> float:
    p_frames = ~clip.is_i_frame
    return round(float(field[p_frames].mean()), 3) if p_frames.any() else 0.0
