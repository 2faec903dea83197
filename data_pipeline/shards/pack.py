"""Inputs -> shards: `python -m data_pipeline pack INPUT... --output DIR`.

Inputs become a fixed list of tasks; one task is one shard of `samples_per_shard` inputs, and
`pack_task` is all there is to it. Drivers only decide who runs which task:

    pack                  all of them here, or every n-th for `--task-id i --num-tasks n` (Slurm
                          array, Kubernetes indexed job); `workers` child processes build samples
    ray_driver.pack_ray   a Ray cluster, one task per worker

A task whose record names the same inputs and settings, and whose bytes are as recorded, is done and
is skipped, so a killed run just runs again and a damaged shard is repaired. What a folder holds
already, and when that is an error, is decided in pack_plan. Whoever finds all records there binds
them into the manifest. Unusable inputs are rejected with a reason code, counted, and listed in the
record. Cost: 0.56 s per 224 px clip of 64 frames and core (benchmarks/bench_decompose.py).
"""

from pathlib import Path

from model_factory.command_line.plain_text import show
from model_factory.files import DIGEST_KEY, file_sha256, writing_into

from ..errors import DataPipelineError
from .existing import read_shard_record, remove_temporary
from .inputs import Input, input_stamp, inputs_sha256
from .isolation import SamplePool
from .known_inputs import input_entry, known_inputs, rejected_digest
from .manifest import Manifest, load_manifest, write_manifest
from .pack_plan import PackPlan, plan_packing
from .pack_progress import PackProgress
from .tasks import PackConfig, Task
from .writer import SHORT_DIGEST, index_text, only_here, write_shard

PLAN_LOCK = ".pack.lock"


def pack(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    report=show,
    task_id: int = 0,
    num_tasks: int = 1,
    mode: str = "refuse",
) -> Manifest | None:
    """Pack the tasks task_id, task_id + num_tasks, ...; `report` takes one line at a time. `mode`
    says what to do with another packing in the folder: refuse, append or replace (see pack_plan).

    Returns the manifest once every task of the folder is done, by whomever; None before. Raises
    ValueError for a task_id outside 0..num_tasks-1, DataPipelineError for another packing.
    """
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    plan = locked_plan(
        inputs=inputs,
        output=output,
        config=config,
        num_jobs=num_tasks,
        mode=mode,
        report=report,
        is_array=num_tasks > 1,
    )
    mine = plan.tasks[task_id::num_tasks]
    total = sum(len(task.inputs) for task in mine)
    samples = rejected = 0
    with (
        writing_into(output),
        SamplePool(config.sample, config.workers, config.wall_seconds) as pool,
        PackProgress(total, report) as progress,
    ):
        for done, task in enumerate(mine, 1):
            record = pack_task(task, output, pool, progress)
            samples += len(record["samples"])
            rejected += len(record["rejected"])
            progress.say(f"packed shard {done}/{len(mine)}: {samples} samples, {rejected} rejected")
    with writing_into(output):
        return bind(plan, output, report)


def locked_plan(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    num_jobs: int,
    mode: str,
    report=show,
    is_array: bool = False,
) -> PackPlan:
    """Make the folder and the plan; jobs that start at the same time wait for each other, so that
    one that replaces shards never removes what another has just written.
    """
    output.mkdir(parents=True, exist_ok=True)
    with only_here(output / PLAN_LOCK):
        return plan_packing(
            inputs=inputs,
            output=output,
            config=config,
            num_jobs=num_jobs,
            mode=mode,
            report=report,
            is_array=is_array,
        )


def bind(plan: PackPlan, output: Path, report=show) -> Manifest | None:
    """Write the manifest when all tasks have their record; else say which are missing."""
    records = [finished_record(task, output, thorough=False) for task in plan.tasks]
    missing = [
        task.number for task, record in zip(plan.tasks, records, strict=True) if record is None
    ]
    if missing:
        report(
            f"{len(missing)} of {len(plan.tasks)} shards are still to be packed by other tasks, "
            f"number {missing[0]} first; the last task to finish writes the manifest"
        )
        return None
    whole = [*plan.kept, *records]
    write_manifest(output, whole, whole[0]["settings"])
    return load_manifest(output)


def pack_task(task: Task, output: Path, pool: SamplePool, progress: PackProgress) -> dict:
    """Write the shard of one task, unless it is done; returns its record."""
    with only_here(output / f".{task.name}.lock"):  # a second job of the same number waits
        record = finished_record(task, output, thorough=True)
        if record is not None:
            progress.kept(len(task.inputs))
            return record
        return _write_task(task, output, pool, progress)


def _write_task(task: Task, output: Path, pool: SamplePool, progress: PackProgress) -> dict:
    remove_temporary(output, task.name)
    rejected: list[dict] = []
    entries: list[list] = []
    # before the files are read: one that changes from here on differs from its record
    identity = inputs_sha256(list(task.inputs))
    stamps = [input_stamp(item) for item in task.inputs]

    def samples():
        results = zip(task.inputs, stamps, pool.build_all(task.inputs), strict=True)
        for number, (item, stamp, result) in enumerate(results):
            result = task.superseded.get(item.source, result)
            if isinstance(result, dict):
                digest = rejected_digest(item, task.settings["limits"]["max_bytes"])
                rejected.append(result)
                progress.warn(
                    f"rejected {result['source']}: {result['reason']}: {result['detail']}"
                )
            else:
                digest = result[1].source_sha256[:SHORT_DIGEST]
            entries.append(input_entry(item.source, stamp, digest))
            progress.packed(1, int(isinstance(result, dict)))
            if not isinstance(result, dict):
                yield f"{task.number:06d}_{number:06d}", *result

    statement = {
        "settings": task.settings,
        "inputs_sha256": identity,
        "inputs": entries,
        "rejected": rejected,
    }
    return write_shard(output, task.name, samples(), statement)


def finished_record(task: Task, output: Path, thorough: bool) -> dict | None:
    """Record of a task that is done; None when it is not, or when its files are damaged.

    `thorough` also reads every byte of the shard, which the jobs of an array do for their own.
    Raises DataPipelineError for a record of other inputs or settings: the plan knew of none, so
    another command writes into this folder at the same time.
    """
    record = read_shard_record(output / f"{task.name}.json")
    if record is None or (task.distrusts_record and DIGEST_KEY not in record):
        return None
    sources = [known.source for known in known_inputs(record)]
    if record["settings"] != task.settings or sources != [item.source for item in task.inputs]:
        raise DataPipelineError(
            f"{output / task.name}.json holds other inputs or settings than this command's: "
            "another one packs into the same folder; wait for it, or name another --output"
        )
    tar_path = output / f"{task.name}.tar"
    if not tar_path.is_file() or tar_path.stat().st_size != record["size"]:
        return None
    index = output / f"{task.name}.tar.idx"
    whole = not thorough or (
        index.is_file()
        and index.read_bytes() == index_text(record).encode()
        and file_sha256(tar_path) == record["sha256"]
    )
    return record if whole else None
