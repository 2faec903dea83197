"""Packing on a Ray cluster: one task, one shard, one core.

Ray only carries out tasks: what is done, skipped and bound is decided as by every other driver, so
a cluster that dies loses at most the shards in work. Output and local inputs must lie on storage
that every node sees.
"""

from dataclasses import replace
from pathlib import Path

from .inputs import Input
from .isolation import SamplePool
from .manifest import Manifest
from .pack import PackConfig, bind, list_tasks, pack_task


def pack_ray(
    inputs: list[Input], output: Path, config: PackConfig, report=print
) -> Manifest | None:
    """Pack all tasks; joins the cluster of RAY_ADDRESS, or starts Ray on this machine.

    Raises ValueError that says what to install where Ray is absent.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--executor ray needs Ray: pip install -e .[ray]") from error

    output.mkdir(parents=True, exist_ok=True)
    ray.init(ignore_reinit_error=True, include_dashboard=False, num_cpus=None)
    single = replace(config, workers=1)

    @ray.remote(num_cpus=1, max_retries=3)
    def work(task):
        with SamplePool(single.sample, 1, single.wall_seconds) as pool:
            record = pack_task(task, output, single, pool)
        return len(record["samples"]), len(record["rejected"])

    tasks = list_tasks(inputs, config)
    waiting = [work.remote(task) for task in tasks]
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        samples, rejected = ray.get(done)
        left = len(waiting)
        report(f"packed a shard: {samples} samples, {rejected} rejected; {left} shards to go")
    return bind(tasks, output, config, report)
