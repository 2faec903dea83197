"""What a head reads and how: the settings of one stream."""

from dataclasses import dataclass, field

import numpy as np

from ..datasets import Dataset
from .choices import Stage, ViewConfig, choose_views, num_tokens
from .quarantine import ErrorBudget
from .table import SampleTable


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

    def __post_init__(self):
        try:
            stages = tuple(s if isinstance(s, Stage) else Stage(*s) for s in self.stages)
            sorted(stage.start for stage in stages)
        except TypeError as error:
            raise ValueError(
                f"stages {self.stages}: give (share of the run, tokens, frames, scale) of each"
            ) from error
        object.__setattr__(self, "stages", stages)
        starts = [stage.start for stage in stages]
        if starts and (starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1):
            raise ValueError(f"stages start at {starts}: the first at 0, then rising, below 1")
        for stage in stages:
            stage.of(self.view)  # checks its bounds
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


def samples_per_batch(
    dataset: Dataset, config: StreamConfig, seed: int, units: int, pack_tokens: int | None
) -> float:
    """Samples of the mean global batch of a run: the units, or for packs what their tokens hold of
    the mean item, judged by up to 10,000 samples in every stage.
    """
    if pack_tokens is None:
        return units
    table = SampleTable.of(dataset.manifest)
    ids = np.unique(np.linspace(0, len(table.rows) - 1, 10_000).astype(np.int64))
    ends = [stage.start for stage in config.stages[1:]] + [1.0]
    batches = 0.0  # per sample of the run: stages are shares of its samples
    for start, end, view in zip([0.0, *ends], ends, config.views(), strict=False):
        views = choose_views(table, view, seed, 0, ids)
        tokens = float(num_tokens(table, view, views, ids).mean())
        batches += (end - start) * tokens / (units * pack_tokens)
    return 1 / batches
