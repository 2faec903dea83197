"""Inputs -> shards: `python -m data_pipeline pack INPUT... --output DIR`.

Inputs become a fixed list of tasks; one task is one shard of `samples_per_shard` inputs, and
`pack_task` is all there is to it. Drivers only decide who runs which task:

    pack                  all of them here, or every n-th for `--task-id i --num-tasks n` (Slurm
                          array, Kubernetes indexed job); `workers` child processes build samples
    ray_driver.pack_ray   a Ray cluster, one task per worker

A task whose record names the same inputs and settings, and whose bytes are as recorded, is done and
is skipped, so a killed run just runs again and a damaged shard is repaired. Whoever finds all
records there binds them into the manifest. Unusable inputs are rejected with a reason code,
counted, and listed in the record.
Cost: 0.56 s per 224 px clip of 64 frames and core (benchmarks/bench_decompose.py).
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..codec.decompose import DECOMPOSITION_VERSION
from .inputs import Input, inputs_sha256
from .isolation import SamplePool
from .manifest import Manifest, load_manifest, write_manifest
from .sample_builder import SampleConfig
from .schema import SCHEMA_VERSION
from .writer import file_sha256, index_text, only_here, write_shard


@dataclass(frozen=True)
class PackConfig:
    """How a folder of shards is made. `wall_seconds` is the limit of one input."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    samples_per_shard: int = 1000
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    wall_seconds: float = 300.0
    name: str = "video"

    def __post_init__(self):
        for name in ("samples_per_shard", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not self.wall_seconds > 0:
            raise ValueError(f"wall_seconds is {self.wall_seconds}, must be greater than 0")

    def settings(self) -> dict:
        """What decides the bytes of a shard; stored in its record."""
        return {
            "schema_version": SCHEMA_VERSION,
            "decomposition_version": DECOMPOSITION_VERSION,
            **asdict(self.sample),
            "samples_per_shard": self.samples_per_shard,
        }


@dataclass(frozen=True)
class Task:
    """One shard to be: its number and its inputs."""

    number: int
    inputs: tuple[Input, ...]


def list_tasks(inputs: list[Input], config: PackConfig) -> list[Task]:
    """Cut the inputs into tasks, in order."""
    size = config.samples_per_shard
    starts = range(0, len(inputs), size)
    return [Task(n, tuple(inputs[start : start + size])) for n, start in enumerate(starts)]


def pack(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    report=print,
    task_id: int = 0,
    num_tasks: int = 1,
) -> Manifest | None:
    """Pack the tasks task_id, task_id + num_tasks, ...; `report` takes one line at a time.

    Returns the manifest once every task of the folder is done, by whomever; None before. Raises
    ValueError for a task_id outside 0..num_tasks-1.
    """
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    output.mkdir(parents=True, exist_ok=True)
    tasks = list_tasks(inputs, config)
    mine, records = tasks[task_id::num_tasks], []
    with SamplePool(config.sample, config.workers, config.wall_seconds) as pool:
        for task in mine:
            records.append(pack_task(task, output, config, pool))
            report(_progress_line(records, len(mine)))
    return bind(tasks, output, config, report)


def bind(tasks: list[Task], output: Path, config: PackConfig, report=print) -> Manifest | None:
    """Write the manifest when all tasks have their record; else say which are missing."""
    records = [finished_record(task, output, config, thorough=False) for task in tasks]
    missing = [task.number for task, record in zip(tasks, records, strict=True) if record is None]
    if missing:
        report(
            f"{len(missing)} of {len(tasks)} shards are still to be packed by other tasks, number "
            f"{missing[0]} first; the last task to finish writes the manifest"
        )
        return None
    write_manifest(output, records, config.settings())
    return load_manifest(output)


def pack_task(task: Task, output: Path, config: PackConfig, pool: SamplePool) -> dict:
    """Write the shard of one task, unless it is done; returns its record."""
    name = shard_name(task, config)
    with only_here(output / f".{name}.lock"):  # a second job of the same number waits, then skips
        return finished_record(task, output, config, thorough=True) or _write_task(
            task, name, output, config, pool
        )


def _write_task(task: Task, name: str, output: Path, config: PackConfig, pool) -> dict:
    for stale in output.glob(f".{name}.*tmp"):  # of a run that was killed in this very task
        stale.unlink(missing_ok=True)
    rejected: list[dict] = []

    def samples():
        for number, result in enumerate(progress_bar(pool.build_all(task.inputs), task)):
            if isinstance(result, dict):
                rejected.append(result)
                print(
                    f"rejected {result['source']}: {result['reason']}: {result['detail']}",
                    file=sys.stderr,
                )
            else:
                yield f"{task.number:06d}_{number:06d}", *result

    identity = inputs_sha256(task.inputs)
    return write_shard(output, name, samples(), rejected, config.settings(), identity)


def shard_name(task: Task, config: PackConfig) -> str:
    """File name of a task's shard, without suffix."""
    return f"{config.name}-{task.number:06d}"


def progress_bar(results, task: Task):
    """Iterate with a bar on a terminal, silently elsewhere."""
    from tqdm import tqdm

    return tqdm(
        results,
        total=len(task.inputs),
        desc=f"shard {task.number}",
        unit="input",
        disable=not sys.stderr.isatty(),
        leave=False,
    )


def finished_record(task: Task, output: Path, config: PackConfig, thorough: bool) -> dict | None:
    """Record of a task that is done with these inputs and settings; None when it is not.

    `thorough` also reads every byte of the shard, which the jobs of an array do for their own.
    """
    name = shard_name(task, config)
    record_path, tar_path = output / f"{name}.json", output / f"{name}.tar"
    if not record_path.is_file() or not tar_path.is_file():
        return None
    try:
        record = json.loads(record_path.read_bytes())
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("size") != tar_path.stat().st_size:
        return None
    if record.get("settings") != json.loads(json.dumps(config.settings())):
        return None
    if record.get("inputs_sha256") != inputs_sha256(task.inputs):
        return None
    index = output / f"{name}.tar.idx"
    whole = not thorough or (
        index.is_file()
        and index.read_bytes() == index_text(record).encode()
        and file_sha256(tar_path) == record["sha256"]
    )
    return record if whole else None


def _progress_line(records: list[dict], num_tasks: int) -> str:
    samples = sum(len(record["samples"]) for record in records)
    rejected = sum(len(record["rejected"]) for record in records)
    return f"packed shard {len(records)}/{num_tasks}: {samples} samples, {rejected} rejected"
