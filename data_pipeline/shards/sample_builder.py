"""One input file -> the members of one sample: decompose, score, select, cut, encode.

Samples are built in child processes (codec/guard.py), so that no input can hang or kill the packer:

    parent   SamplePool.build_all(inputs)                   members and metadata of every input
    child    python -m data_pipeline.shards.sample_builder  build_sample of one input at a time
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256

from ..codec.decompose import CodecClip
from ..codec.framing import Framing, crop_of
from ..codec.guard import Answer, GuardedPool, serve
from ..codec.open_video import InputLimits, check_file, is_image, open_image
from ..codec.patches import SelectionConfig, choose_patches, decompose
from ..codec.saliency import motion_summary
from ..codec.selection import Selection, cut_patches
from ..errors import RejectedInput
from .inputs import Input, local_copy
from .schema import TIME_BASE, SampleInfo, encode_clip, encode_image, strip_rows

MODULE = "data_pipeline.shards.sample_builder"
NICENESS = 5  # children decode all the time; the parent, which writes, goes first
MOTION_GRID = 8  # cells of KEY.motion.npy per side: 24.7 KB for 64 frames
MAX_JPEG_SIDE = 65500  # of libjpeg; the format itself ends at 65535

Built = tuple[dict[str, bytes], SampleInfo]  # members by extension, metadata


@dataclass(frozen=True)
class SampleConfig:
    """How inputs become samples. `budget` is the number of selected patches of a full clip, by
    default an eighth of all: half of it for the four I-frames of GOP 16, half for P-frames.
    """

    size: int = 224
    patch_size: int = 16
    num_frames: int = 64
    gop: int = 16
    budget: int | None = None
    num_full_frames: int = 16
    fit: str = "crop"
    salvage: bool = False
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    limits: InputLimits = InputLimits()

    def __post_init__(self) -> None:
        counts = ("size", "patch_size", "num_frames", "gop", "num_full_frames")
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
        num_i_frames = -(-self.num_frames // self.gop)
        side = self.size // self.patch_size
        whole = self.selection.whole_tokens(num_i_frames, rows=side, columns=side)
        if self.tokens < whole:
            raise ValueError(
                f"a budget of {self.tokens} patches cannot hold the {whole} of all I-frames: raise "
                f"--budget or --gop {self.gop}, or lower --size {self.size} or --i-frame-share"
            )

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
    def frame_tokens(self) -> int:
        """Patches of one square frame."""
        return (self.size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Patches selected of a clip."""
        return self.budget or self.num_frames * self.frame_tokens // 8


class SamplePool:
    """Child processes that build samples; a context manager that ends them."""

    def __init__(self, config: SampleConfig, num_workers: int, wall_seconds: float):
        self._num_workers = num_workers
        self._pool = GuardedPool(
            MODULE,
            settings=asdict(config),
            num_workers=num_workers,
            wall_seconds=wall_seconds,
        )

    def build(self, item: Input) -> Built:
        """Members and metadata of one input, built in a child. Raises RejectedInput as build_sample
        does, and for a child that hangs, crashes or runs out of memory."""
        header, parts = self._pool.ask(asdict(item), name=item.location)
        members = dict(zip(header["members"], parts, strict=True))
        return members, SampleInfo.from_bytes(members["json"], name=item.source)

    def build_all(self, inputs: Iterable[Input]) -> Iterator[Built | dict]:
        """For each input, in order: (members, info), or a dict source, reason, detail when
        rejected.
        """
        return self._threads.map(self._build, inputs)

    def _build(self, item: Input) -> Built | dict:
        try:
            return self.build(item)
        except RejectedInput as rejection:
            # the record names inputs as the user did, not by this machine's folders
            detail = rejection.detail.replace(item.location, item.source)
            return {"source": item.source, "reason": rejection.reason, "detail": detail}

    def __enter__(self) -> "SamplePool":
        # threads only wait for their children, which do the work
        self._threads = ThreadPoolExecutor(self._num_workers)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # do not wait for inputs whose samples will not be written
            self._pool.close()
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()


def _prepare(settings: dict) -> Callable[[dict], Answer]:
    """Child: the function that builds samples by the parent's configuration."""
    selection = SelectionConfig.from_dict(settings.pop("selection"))
    limits = InputLimits(**settings.pop("limits"))
    config = SampleConfig(selection=selection, limits=limits, **settings)
    os.nice(NICENESS)

    def answer(request: dict) -> Answer:
        location = request["location"]
        with local_copy(location, limits) as path:
            try:
                members, _ = build_sample(path, source=request["source"], config=config)
            except RejectedInput as rejection:
                detail = rejection.detail.replace(str(path), location)
                raise RejectedInput(rejection.reason, detail) from rejection
        return {"members": list(members)}, list(members.values())

    return answer


def build_sample(path: Path, source: str, config: SampleConfig) -> Built:
    """Members and metadata of one input; `source` is the name stored in the shard. Raises
    RejectedInput.
    """
    # before it is hashed: a file may be larger than the limit, or a pipe that never ends
    check_file(path, config.limits)
    before = _fingerprint(path)
    image = None
    if is_image(path):
        image = open_image(path, config.limits)
    else:
        scored = decompose(path, config.framing, gop=config.gop, config=config.selection)
        # a video of one frame has no motion, so it becomes an image sample
        if len(scored.clip.frames) == 1:
            image = scored.clip.frames[0]
    if image is not None:
        built = _image_sample(image, source=source, sha256=before[0], config=config)
    else:
        selection = choose_patches(
            scored, name=source, budget=config.tokens, config=config.selection
        )
        built = _clip_sample(scored.clip, selection, source=source, sha256=before[0], config=config)
    if _fingerprint(path) != before:
        raise RejectedInput("changed", f"{path} changed while it was packed")
    return built


def _fingerprint(path: Path) -> tuple[str, int, int]:
    """What changes when a file is written while it is read: sha256, size, modification time."""
    try:
        status = path.stat()
        return file_sha256(path), status.st_size, status.st_mtime_ns
    except OSError as error:
        raise RejectedInput("missing", f"{path}: {error.strerror}") from error


def _image_sample(image: np.ndarray, source: str, sha256: str, config: SampleConfig) -> Built:
    crop = crop_of(image.shape[0], image.shape[1], framing=config.framing)
    image = crop.scale(image)
    height, width = image.shape[:2]
    info = SampleInfo(
        kind="image",
        source=source,
        source_sha256=sha256,
        height=height,
        width=width,
        patch_size=config.patch_size,
        num_patches=(height // config.patch_size) * (width // config.patch_size),
        content=crop.content.stored(height=height, width=width),
    )
    return encode_image(info, image), info


def _clip_sample(
    clip: CodecClip, selection: Selection, source: str, sha256: str, config: SampleConfig
) -> Built:
    import av

    count, height, width, _ = clip.frames.shape
    patches = cut_patches(clip.frames, selection.positions, patch_size=config.patch_size)
    # a short clip has fewer frames than are to be stored
    even = np.rint(np.linspace(0, count - 1, config.num_full_frames))
    stored = np.unique(even.astype(int))
    info = SampleInfo(
        kind="video",
        source=source,
        source_sha256=sha256,
        height=height,
        width=width,
        patch_size=config.patch_size,
        num_patches=len(patches),
        num_frames=count,
        gop=config.gop,
        content=() if clip.content is None else clip.content.stored(height=height, width=width),
        frame_times=tuple(clip.times[stored].tolist()),
        i_frame_times=tuple(clip.times[clip.is_i_frame].tolist()),
        seconds=tuple(round(second, 6) for second in clip.seconds.tolist()),
        is_static=selection.is_static,
        mean_motion=_p_frame_mean(np.linalg.norm(clip.motion, axis=-1), clip),
        mean_residual=_p_frame_mean(np.abs(clip.residual), clip),
        num_source_frames=clip.num_source_frames,
        notes=clip.notes,
        codec=clip.codec,
        decoder=f"av {av.__version__}",
    )
    # a shard stores times on the 0..63 base, which every clip length shares, not frame indices
    positions = selection.positions.astype(np.int64)
    positions[:, 0] = clip.times[positions[:, 0]]
    members = encode_clip(
        info,
        patches=patches,
        positions=positions,
        scores=selection.scores,
        motion=motion_summary(clip, MOTION_GRID),
        frames=clip.frames[stored],
    )
    return members, info


def _p_frame_mean(field: np.ndarray, clip: CodecClip) -> float:
    p_frames = ~clip.is_i_frame
    if not p_frames.any():
        return 0.0
    return round(float(field[p_frames].mean()), 3)


if __name__ == "__main__":
    serve(_prepare)
