"""Inputs -> shards: `python -m data_pipeline pack INPUT... --output DIR`.

Inputs become a fixed list of tasks; one task is one shard of `samples_per_shard` inputs, and
`pack_task` is all there is to it. Drivers only decide who runs which task:

    pack       all of them here, or every n-th for `--task-id i --num-tasks n` (Slurm array,
               Kubernetes indexed job); `workers` child processes build samples
    pack_ray   a Ray cluster, one task per worker

A task whose record names the same inputs and settings, and whose bytes are as recorded, is done and
is skipped, so a killed run is simply started again and a damaged shard is repaired. What a folder
holds already, and when that is an error, is decided in pack_plan. The job that finds all records
there binds them into the manifest. Unusable inputs are rejected with a reason code, counted, and
listed in the record. Cost: 0.56 s per 224 px clip of 64 frames and core
(benchmarks/bench_decompose.py).
"""

from collections.abc import Iterator
from pathlib import Path

from model_factory.command_line.plain_text import show
from model_factory.files import DIGEST_KEY, file_sha256, writing_into

from ..errors import DataPipelineError
from .existing import known_inputs, read_shard_record, rejected_digest, remove_temporary
from .inputs import Input, Report, input_stamp, inputs_sha256
from .manifest import Manifest, load_manifest, write_manifest
from .pack_plan import PackPlan, plan_packing
from .pack_progress import PackProgress
from .sample_builder import SamplePool
from .tasks import PackConfig, Task, shard_number
from .writer import SHORT_DIGEST, Sample, index_text, only_here, write_shard

RAY_JOBS = 64  # a cluster may grow while we run: by default as many shards as keep 64 cores busy


def pack(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    report: Report = show,
    task_id: int = 0,
    num_tasks: int = 1,
    mode: str = "refuse",
) -> Manifest | None:
    """Pack the tasks task_id, task_id + num_tasks, ...; `report` takes one line at a time. `mode`
    says what to do with another packing in the folder: refuse, append or replace (see pack_plan).

    Returns the manifest once every task of the folder is done, by any job; None before. Raises
    ValueError for a task_id outside 0..num_tasks-1, DataPipelineError for another packing.
    """
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    plan = plan_packing(
        inputs,
        output,
        config=config,
        num_jobs=num_tasks,
        mode=mode,
        report=report,
        is_array=num_tasks > 1,
    )
    mine = plan.tasks[task_id::num_tasks]
    samples = 0
    rejected = 0
    with (
        writing_into(output),
        SamplePool(config.sample, config.workers, config.wall_seconds) as pool,
        PackProgress(sum(len(task.inputs) for task in mine), report) as progress,
    ):
        for done, task in enumerate(mine, 1):
            record = pack_task(task, output, pool=pool, progress=progress)
            samples += len(record["samples"])
            rejected += len(record["rejected"])
            progress.report(
                f"packed shard {done}/{len(mine)}: {samples} samples, {rejected} rejected"
            )
    # after all of ours: the job that finishes last finds all records and writes the manifest
    with writing_into(output):
        return bind(plan, output=output, report=report)


def pack_ray(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    report: Report = show,
    mode: str = "refuse",
) -> Manifest | None:
    """Pack all tasks on a Ray cluster: one task, one shard, one core. Joins the cluster of
    RAY_ADDRESS, or starts Ray on this machine. `mode` as of pack.

    Ray only carries out tasks: what is done, skipped and bound is decided as by every other driver,
    so a cluster that dies loses at most the shards in work. Output and local inputs must lie on
    storage that every node sees. Raises ValueError with what to install where Ray is absent,
    DataPipelineError for another packing in the folder.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install -e .[ray]") from error

    plan = plan_packing(inputs, output, config=config, num_jobs=RAY_JOBS, mode=mode, report=report)
    ray.init(ignore_reinit_error=True, include_dashboard=False, num_cpus=None)

    # a worker that dies is replaced three times; what it had finished is skipped then
    @ray.remote(num_cpus=1, max_retries=3)
    def work(task: Task) -> tuple[int, int, int]:
        silent = PackProgress(len(task.inputs))
        with SamplePool(config.sample, 1, config.wall_seconds) as pool:
            record = pack_task(task, output, pool=pool, progress=silent)
        return len(task.inputs), len(record["samples"]), len(record["rejected"])

    # all at once: Ray queues them, and starts one wherever a core is free
    waiting = [work.remote(task) for task in plan.tasks]
    with PackProgress(sum(len(task.inputs) for task in plan.tasks), report) as progress:
        while waiting:
            (done, *_), waiting = ray.wait(waiting)
            count, samples, rejected = ray.get(done)
            progress.packed(count, rejected)
            left = len(waiting)
            progress.report(
                f"packed a shard: {samples} samples, {rejected} rejected; {left} shards to go"
            )
    return bind(plan, output=output, report=report)


def bind(plan: PackPlan, output: Path, report: Report = show) -> Manifest | None:
    """Write the manifest when all tasks have their record; else report which are missing."""
    records = list(plan.kept)
    missing = []
    for task in plan.tasks:
        record = finished_record(task, output, thorough=False)
        if record is None:
            missing.append(shard_number(task.name))
        else:
            records.append(record)
    if missing:
        report(
            f"{len(missing)} of {len(plan.tasks)} shards are still to be packed by other tasks, "
            f"number {missing[0]} first; the last task to finish writes the manifest"
        )
        return None
    write_manifest(output, records, settings=records[0]["settings"])
    return load_manifest(output)


def pack_task(task: Task, output: Path, pool: SamplePool, progress: PackProgress) -> dict:
    """Write the shard of one task, unless it is done; returns its record."""
    with only_here(output / f".{task.name}.lock"):  # a second job of the same number waits
        record = finished_record(task, output, thorough=True)
        if record is not None:
            progress.skipped(len(task.inputs))
            return record
        # of a run that was killed here: under this lock nothing else writes them
        remove_temporary(output, task.name)
        # before the files are read: one that changes from here on differs from its record
        statement = {
            "settings": task.settings,
            "inputs_sha256": inputs_sha256(task.inputs),
            "inputs": [],
            "rejected": [],
        }
        samples = _samples(task, pool=pool, progress=progress, statement=statement)
        return write_shard(output, task.name, samples=samples, statement=statement)


def _samples(
    task: Task,
    pool: SamplePool,
    progress: PackProgress,
    statement: dict,
) -> Iterator[Sample]:
    """The samples of a task, in order; entries of all its inputs, and of rejected ones, go into
    `statement` by the way."""
    stamps = [input_stamp(item) for item in task.inputs]
    number = shard_number(task.name)
    results = zip(task.inputs, stamps, pool.build_all(task.inputs), strict=True)
    for index, (item, stamp, built) in enumerate(results):
        # a later shard holds it as a sample: here it stays rejected
        built = task.superseded.get(item.source, built)
        if isinstance(built, dict):
            digest = rejected_digest(item, max_bytes=task.settings["limits"]["max_bytes"])
            statement["rejected"].append(built)
            statement["inputs"].append([item.source, stamp, digest])
            progress.warn(f"rejected {built['source']}: {built['reason']}: {built['detail']}")
            progress.packed(1, rejected=1)
            continue
        members, info = built
        statement["inputs"].append([item.source, stamp, info.source_sha256[:SHORT_DIGEST]])
        progress.packed(1, rejected=0)
        yield f"{number:06d}_{index:06d}", members, info


def finished_record(task: Task, output: Path, thorough: bool) -> dict | None:
    """Record of a task that is done; None when it is not, or when its files are damaged.

    `thorough` also reads every byte of the shard, which the jobs of an array do for their own.
    Raises DataPipelineError for a record of other inputs or settings: the plan knew of none, so
    another command writes into this folder at the same time.
    """
    record = read_shard_record(output / f"{task.name}.json")
    # without a digest only the manifest can tell whether a record is as it was written
    if record is None or (task.distrusts_record and DIGEST_KEY not in record):
        return None
    sources = [known.source for known in known_inputs(record)]
    asked = [item.source for item in task.inputs]
    if record["settings"] != task.settings or sources != asked:
        raise DataPipelineError(
            f"{output / task.name}.json holds other inputs or settings than this command's: "
            "another one packs into the same folder; wait for it, or name another --output"
        )
    tar = output / f"{task.name}.tar"
    if not tar.is_file() or tar.stat().st_size != record["size"]:
        return None
    if thorough:
        index = output / f"{task.name}.tar.idx"
        if not index.is_file() or index.read_bytes() != index_text(record).encode():
            return None
        if file_sha256(tar) != record["sha256"]:
            return None
    return record
