"""Settings of a packing, and how its inputs are cut into tasks: one task is one shard."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..codec.decompose import DECOMPOSITION_VERSION
from ..codec.guard import WALL_SECONDS
from .inputs import Input
from .sample_builder import SampleConfig
from .schema import SCHEMA_VERSION

# A kill loses the shard in work, so a job writes some eight of them, none of which takes one worker
# longer than about five minutes (500 clips x 0.56 s). Smaller than 16, they are mostly overhead.
SHARDS_PER_JOB = 8
MOST_SAMPLES = 500
LEAST_SAMPLES = 16


@dataclass(frozen=True)
class PackConfig:
    """How a folder of shards is made. `samples_per_shard` is the number of inputs of one shard, by
    default that of default_samples_per_shard; `wall_seconds` is the limit of one input.
    """

    sample: SampleConfig = SampleConfig()
    samples_per_shard: int | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    wall_seconds: float = WALL_SECONDS
    name: str = "video"

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if not self.wall_seconds > 0:  # also for NaN
            raise ValueError(f"wall_seconds is {self.wall_seconds}, must be greater than 0")

    def settings(self, samples_per_shard: int) -> dict:
        """What decides the bytes of a shard, as its record's JSON holds it."""
        settings = {
            "schema_version": SCHEMA_VERSION,
            "decomposition_version": DECOMPOSITION_VERSION,
            **asdict(self.sample),
            "samples_per_shard": samples_per_shard,
        }
        # tuples become lists, so that the settings equal those that were read back
        return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class Task:
    """One shard to be: its name without suffix, its inputs and what its record states as settings.

    `superseded` holds rejected inputs, by source, that a later shard holds as samples: when this
    shard is written again, they stay as rejected as they were. With `distrusts_record`, a record
    without a digest that lies there is not the one that the manifest binds.
    """

    name: str
    inputs: tuple[Input, ...]
    settings: dict
    superseded: dict[str, dict] = field(default_factory=dict)
    distrusts_record: bool = False


def shard_number(name: str) -> int:
    """Number in a shard's name."""
    return int(name.rpartition("-")[2])


def default_samples_per_shard(num_inputs: int, num_jobs: int) -> int:
    """Inputs of one shard where the user names no number.

    A function of the work alone and not of processors or workers, so that all jobs of an array cut
    the inputs alike on whatever nodes they run, and a set is the same on every machine.
    """
    even = -(-num_inputs // (SHARDS_PER_JOB * num_jobs))
    return min(MOST_SAMPLES, max(LEAST_SAMPLES, even))


def list_tasks(
    inputs: Sequence[Input],
    config: PackConfig,
    samples_per_shard: int,
    first: int = 0,
) -> list[Task]:
    """Cut the inputs into tasks, in order; `first` is the number of the first shard."""
    settings = config.settings(samples_per_shard)
    return [
        Task(
            name=f"{config.name}-{number:06d}",
            inputs=tuple(inputs[start : start + samples_per_shard]),
            settings=settings,
        )
        for number, start in enumerate(range(0, len(inputs), samples_per_shard), first)
    ]
