"""The trainer's side of the loader: streams, positions, and one decision for all ranks.

What goes wrong with data is seen by one rank: a sample too many that is bad, a read that hangs. All
ranks learn of it at the same step and stop together with the same message. Cost: one collective of
a few integers per micro step, on the CPU.
"""

import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist

from data_pipeline.datasets import Dataset
from data_pipeline.errors import BudgetExceeded, DataPipelineError, DataTimeout
from data_pipeline.loading.loader import MixtureLoader
from data_pipeline.loading.packing import PackedBatch
from data_pipeline.loading.stream import HeadStream
from data_pipeline.loading.stream_config import samples_per_batch
from data_pipeline.loading.synthetic import SyntheticStream

from .config import HeadConfig, TrainConfig
from .distributed import Ranks, all_gather_json

SYNTHETIC_CLASSES = 16
DATA_ERRORS = {error.__name__: error for error in (BudgetExceeded, DataTimeout)}


class TrainingData:
    """The streams of a run and where they are."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: dict[str, Dataset | None],
        patch_size: int,
        ranks: Ranks,
        logger: logging.Logger,
    ):
        self._config, self._ranks, self._logger = config, ranks, logger
        self._datasets, self._patch_size = datasets, patch_size
        counts = {head.name: self._samples_per_batch(head) for head in config.heads}
        self.samples_per_step = sum(counts.values()) * config.grad_accum_steps
        total = config.schedule.total_samples / sum(counts.values())
        self.streams = {
            head.name: self._build(head, max(1, int(total * counts[head.name])))
            for head in config.heads
        }
        self._position = {name: {"epoch": 0, "next_batch": 0} for name in self.streams}

    def state_dict(self) -> dict[str, dict]:
        """{head: plan hash, epoch, next global batch}: all that a resume needs to know."""
        return {
            name: {"plan": stream.plan_sha256, **self._position[name]}
            for name, stream in self.streams.items()
        }

    def difference(self, state: dict[str, dict]) -> list[str]:
        """Why a saved state does not fit these streams, one line per head."""
        return [
            f"data of {name}: shards or labels changed since the checkpoint was saved, or the way "
            "they are read"
            for name, stream in self.streams.items()
            if state.get(name, {}).get("plan") != stream.plan_sha256
        ]

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on where a state was saved."""
        for name, stream in self.streams.items():
            place = {key: state[name][key] for key in ("epoch", "next_batch")}
            stream.seek(**place)
            self._position[name] = place

    def loader(self) -> MixtureLoader:
        """Start reading ahead; to be used as a context manager."""
        config = self._config
        return MixtureLoader(
            self.streams,
            config.prefetch_bytes,
            config.data_warning_s,
            config.data_timeout_s,
            self._logger,
        )

    def next_batches(self, loader: Iterator) -> dict[str, PackedBatch]:
        """{head: batch}. Raises on all ranks alike what any of them met."""
        batches, failure = {}, None
        try:
            batches = next(loader)
        except DataPipelineError as error:
            failure = error
        bad = [batches[name].bad_samples if batches else 0 for name in self.streams]
        counts = torch.tensor([int(failure is not None), *bad])
        dist.all_reduce(counts)
        failed, *bad = counts.tolist()
        for (name, stream), count in zip(self.streams.items(), bad, strict=True):
            if batches and (message := stream.over_budget(batches[name].epoch, count)):
                failed, failure = True, BudgetExceeded(message)
        if failed:
            self._stop(failure)
        self._position.update(loader.state_dict())
        return batches

    def _stop(self, failure: Exception | None) -> None:
        mine = None if failure is None else [type(failure).__name__, str(failure)]
        reports = [report for report in all_gather_json(mine) if report]
        lines = dict.fromkeys(line for _, text in reports for line in text.splitlines())
        raise DATA_ERRORS.get(reports[0][0], DataPipelineError)("\n".join(lines))

    def _samples_per_batch(self, head: HeadConfig) -> float:
        dataset, units = self._datasets[head.name], head.stream.batch_size * self._ranks.world_size
        pack = self._config.pack_tokens_of(head)
        if dataset is None:
            return units * self._noise_per_unit(head)
        return samples_per_batch(dataset, head.stream, self._config.seed, units, pack)

    def _noise_per_unit(self, head: HeadConfig) -> int:
        pack = self._config.pack_tokens_of(head)
        return pack // head.stream.view.max_tokens if pack else 1

    def _build(self, head: HeadConfig, total_samples: int):
        dataset, stream, ranks = self._datasets[head.name], head.stream, self._ranks
        if dataset is None:
            batch = stream.batch_size * self._noise_per_unit(head)
            shape = (batch, stream.view.max_tokens, self._patch_size)
            targets = (SYNTHETIC_CLASSES, stream.labels_per_step)
            return SyntheticStream(*shape, *targets, self._config.seed, ranks.rank)
        packed_size = dataset.manifest.settings["patch_size"]
        if packed_size != self._patch_size:
            raise ValueError(
                f"{head.dataset} was packed with patch size {packed_size}, "
                f"{self._config.model.name} takes {self._patch_size}: "
                f"pack again with --patch-size {self._patch_size}, or choose another --model_name"
            )
        if dataset.manifest.absent and ranks.is_main:
            names = [dataset.manifest.shards[i]["name"] for i in sorted(dataset.manifest.absent)]
            self._logger.warning("%s: training without missing shards %s", head.dataset, names)
        return HeadStream(
            dataset,
            stream,
            self._config.seed,
            ranks.rank,
            ranks.world_size,
            total_samples,
            self._config.pack_tokens_of(head),
            self._logger,
        )
