"""Packing on a Ray cluster: one task, one shard, one core.

Ray only carries out tasks: what is done, skipped and bound is decided as by every other driver, so
a cluster that dies loses at most the shards in work. Output and local inputs must lie on storage
that every node sees.
"""

from pathlib import Path

from model_factory.command_line.plain_text import show

from .inputs import Input
from .isolation import SamplePool
from .manifest import Manifest
from .pack import bind, locked_plan, pack_task
from .pack_progress import PackProgress
from .tasks import PackConfig

JOBS = 64  # a cluster may grow while we run: by default as many shards as keep 64 cores busy


def pack_ray(
    inputs: list[Input],
    output: Path,
    config: PackConfig,
    report=show,
    mode: str = "refuse",
) -> Manifest | None:
    """Pack all tasks; joins the cluster of RAY_ADDRESS, or starts Ray on this machine. `mode` as of
    pack.

    Raises ValueError that says what to install where Ray is absent, DataPipelineError for another
    packing in the folder.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install -e .[ray]") from error

    plan = locked_plan(
        inputs=inputs,
        output=output,
        config=config,
        num_jobs=JOBS,
        mode=mode,
        report=report,
    )
    ray.init(ignore_reinit_error=True, include_dashboard=False, num_cpus=None)

    @ray.remote(num_cpus=1, max_retries=3)
    def work(task):
        silent = PackProgress(len(task.inputs))
        with SamplePool(config.sample, 1, config.wall_seconds) as pool:
            record = pack_task(task, output, pool, silent)
        return len(task.inputs), len(record["samples"]), len(record["rejected"])

    waiting = [work.remote(task) for task in plan.tasks]
    with PackProgress(sum(len(task.inputs) for task in plan.tasks), report) as progress:
        while waiting:
            (done, *_), waiting = ray.wait(waiting)
            count, samples, rejected = ray.get(done)
            progress.packed(count, rejected)
            left = len(waiting)
            progress.say(
                f"packed a shard: {samples} samples, {rejected} rejected; {left} shards to go"
            )
    return bind(plan, output, report)
