"""Settings of one head's data: which views, at which sizes, in which stages, how many errors."""

from dataclasses import dataclass, field, replace

from ..shards.schema import TIME_BASE

MAX_FRAMES = TIME_BASE  # no clip stores more


@dataclass(frozen=True)
class ViewConfig:
    """How samples are viewed.

    The rest of the two ratios is collage. `max_tokens` bounds every item, `max_frames` the whole
    frames of a clip; `scale` shrinks frames and images (0.5: a quarter of the tokens; the codec
    view, whose patches are stored, follows `max_tokens` alone). `flip` is the probability of a
    mirrored item, `colour_jitter` the strength of views.jitter_colours. `frames_per_token` joins
    successive whole frames (views.tube_view); the encoder is built for it.
    """

    codec_ratio: float = 0.4
    frame_ratio: float = 0.4
    max_tokens: int = 2048
    max_frames: int = 8
    scale: float = 1.0
    flip: float = 0.0
    colour_jitter: float = 0.0
    frames_per_token: int = 1

    def __post_init__(self) -> None:
        self._check_tubes()
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"colour_jitter {self.colour_jitter} must lie in [0, 1)")
        if not 0 <= self.flip <= 1 or not 0 < self.scale <= 1:
            raise ValueError(f"flip {self.flip} must lie in [0, 1], scale {self.scale} in (0, 1]")
        # 1e-9: 0.7 + 0.3 and the like may exceed 1 by rounding
        sum_of_ratios = self.codec_ratio + self.frame_ratio
        smallest = min(self.codec_ratio, self.frame_ratio)
        if smallest < 0 or sum_of_ratios > 1 + 1e-9:
            raise ValueError(
                f"--residual_ratio {self.codec_ratio} and --frame_sampling_ratio "
                f"{self.frame_ratio} must not be "
                "negative nor exceed 1 together (the rest is collage)"
            )
        if self.max_tokens < 1 or not 1 <= self.max_frames <= MAX_FRAMES:
            raise ValueError(
                f"--target_num {self.max_tokens} must be positive, --num_frames {self.max_frames} "
                f"in 1..{MAX_FRAMES}"
            )

    def _check_tubes(self) -> None:
        """Raise ValueError unless all clips are whole tubes of whole frames."""
        size = self.frames_per_token
        if size < 1:
            raise ValueError(f"frames_per_token {size} must be positive")
        # 1e-9: a ratio may be 1 by a sum of floats
        if size > 1 and (self.codec_ratio > 0 or self.frame_ratio < 1 - 1e-9):
            raise ValueError(
                f"frames_per_token {size} joins whole frames alone: set --residual_ratio 0 and "
                f"--frame_sampling_ratio 1, not {self.codec_ratio} and {self.frame_ratio}"
            )
        if self.max_frames % size:
            raise ValueError(
                f"--num_frames {self.max_frames} is no multiple of frames_per_token {size}"
            )


@dataclass(frozen=True)
class Stage:
    """Part of a progressive schedule: from the share `start` of the run on, these bounds replace
    the view's."""

    start: float
    max_tokens: int
    max_frames: int
    scale: float = 1.0

    def of(self, view: ViewConfig) -> ViewConfig:
        """The view in this stage."""
        return replace(
            view, max_tokens=self.max_tokens, max_frames=self.max_frames, scale=self.scale
        )


@dataclass(frozen=True)
class ErrorBudget:
    """Shares of an epoch's and of one shard's samples that may be bad; one sample always may,
    unless the share is 0."""

    share: float = 0.001
    shard_share: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.shard_share <= 1):
            raise ValueError(f"error budget {self.share}, {self.shard_share}: shares lie in [0, 1]")


@dataclass(frozen=True)
class StreamConfig:
    """One head's data.

    `batch_size` is samples per rank and batch or, with a `token_share`, packs of that share of
    TrainConfig.pack_tokens. `stages` let the view's bounds change with the share of the run's
    samples that is done. Of the first `label_width` labels `labels_per_step` are drawn.
    `shuffle_shards` is the window of the shuffle.
    """

    batch_size: int = 32
    token_share: float = 0.0
    view: ViewConfig = field(default_factory=ViewConfig)
    stages: tuple[Stage, ...] = ()
    label_width: int = 10
    labels_per_step: int = 8
    shuffle_shards: int = 16
    error_budget: ErrorBudget = field(default_factory=ErrorBudget)
    dali_num_threads: int = 2
    decode_on_gpu: bool = False

    def __post_init__(self) -> None:
        try:
            # `--set` gives lists of numbers
            stages = tuple(
                stage if isinstance(stage, Stage) else Stage(*stage) for stage in self.stages
            )
            starts = [stage.start for stage in stages]
            rising = sorted(set(starts))
        except TypeError as error:
            raise ValueError(
                f"stages {self.stages}: give (share of the run, tokens, frames, scale) of each"
            ) from error
        object.__setattr__(self, "stages", stages)
        if starts and (starts[0] != 0 or starts != rising or starts[-1] >= 1):
            raise ValueError(f"stages start at {starts}: the first at 0, then rising, below 1")
        self.views()  # checks the bounds of every stage
        if self.batch_size < 1 or not 1 <= self.labels_per_step <= self.label_width:
            raise ValueError(
                f"batch_size {self.batch_size} must be positive and labels_per_step "
                f"{self.labels_per_step} "
                f"between 1 and label_width {self.label_width}"
            )
        if not 0 <= self.token_share <= 1 or self.shuffle_shards < 1:
            raise ValueError(
                f"token_share {self.token_share} must lie in [0, 1], shuffle_shards "
                f"{self.shuffle_shards} be positive"
            )

    def views(self) -> list[ViewConfig]:
        """The view of each stage."""
        return [stage.of(self.view) for stage in self.stages] or [self.view]

    def stage_starts(self, total_samples: int) -> list[int]:
        """Number of samples after which each stage starts in a run of `total_samples`."""
        return [int(stage.start * total_samples) for stage in self.stages] or [0]
