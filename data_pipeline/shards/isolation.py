"""Samples built in child processes (codec/guard.py), so that no input can hang or kill the packer.

parent   SamplePool.build_all(inputs)     members and metadata of every input, in order
child    python -m data_pipeline.shards.isolation    build_sample of one input at a time
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from ..codec.guard import Answer, GuardedPool, serve
from ..codec.open_video import InputLimits
from ..codec.saliency import SaliencyConfig
from ..errors import RejectedInput
from .inputs import Input, local_copy
from .sample_builder import SampleConfig, build_sample
from .schema import SampleInfo

MODULE = "data_pipeline.shards.isolation"
NICENESS = 5  # children decode all the time; the parent, which writes, goes first


class SamplePool:
    """Child processes that build samples; a context manager that ends them."""

    def __init__(self, config: SampleConfig, num_workers: int, wall_seconds: float):
        self._num_workers = num_workers
        self._pool = GuardedPool(MODULE, asdict(config), num_workers, wall_seconds)

    def build(self, item: Input) -> tuple[dict[str, bytes], SampleInfo]:
        """As build_sample, with the reasons of guard.GuardedProcess.ask besides."""
        request = {"place": item.place, "source": item.source}
        header, parts = self._pool.ask(request, item.place)
        members = dict(zip(header["members"], parts, strict=True))
        return members, SampleInfo.from_bytes(members["json"], item.source)

    def build_all(self, inputs: Iterable[Input]):
        """For each input, in order: (members, info), or a dict source, reason, detail when
        rejected.
        """
        return self._threads.map(self._build, inputs)

    def _build(self, item: Input):
        try:
            return self.build(item)
        except RejectedInput as rejection:
            # the record names inputs as the user did, not by this machine's folders
            return {
                "source": item.source,
                "reason": rejection.reason,
                "detail": rejection.detail.replace(item.place, item.source),
            }

    def __enter__(self) -> "SamplePool":
        self._threads = ThreadPoolExecutor(self._num_workers)
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:  # do not wait for inputs whose samples nobody will write
            self._pool.close()
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()


def _prepare(settings: dict):
    """Child: the function that builds samples by the parent's configuration."""
    saliency = SaliencyConfig(**settings.pop("saliency"))
    limits = InputLimits(**settings.pop("limits"))
    config = SampleConfig(saliency=saliency, limits=limits, **settings)
    os.nice(NICENESS)

    def answer(request: dict) -> Answer:
        place = request["place"]
        with local_copy(place, config.limits) as path:
            try:
                members, _ = build_sample(path, request["source"], config)
            except RejectedInput as rejection:
                detail = rejection.detail.replace(str(path), place)
                raise RejectedInput(rejection.reason, detail) from rejection
        return {"members": list(members)}, list(members.values())

    return answer


if __name__ == "__main__":
    serve(_prepare)
