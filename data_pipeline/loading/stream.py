"""One head's endless stream of packed batches.

    plan.batch(epoch, index).share(rank, world)    which samples
    choices                                        seen how, how many tokens
    samples.read(sample, view)                     bytes, crc checked; bad ones give way to reserves
    dali_pipeline                                  pictures, decoded ahead
    pack_views([samples.view(picture) ...])        batch

A stream is a pure function of (dataset, config, position); its position is the epoch and the number
of the next global batch in it.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..datasets import Dataset
from ..errors import CorruptShard, DataPipelineError
from .buffers import PackBuffers
from .choices import (
    ViewConfig,
    choose_labels,
    choose_views,
    draws,
    longest_item,
    num_tokens,
    shortest_item,
)
from .dali_pipeline import DecodeFailed, PictureDecoder, undecodable
from .packing import PackedBatch, pack_views
from .plan import LOOK_AHEAD, RESERVES, EpochPlan, PlannedBatch, SampleOrder, batches_from
from .quarantine import Quarantine
from .samples import Request, SampleReader, wrong_size
from .stream_config import StreamConfig
from .table import SampleTable

PLAN_VERSION = 1  # raised when the same arguments would give other batches
MAX_REBUILDS = 3  # of a decoding pipeline that dies without a picture to blame


@dataclass(frozen=True)
class _Slot:
    """What a batch under way holds: the plan's share, what was read, who stands in for whom, and
    the token budget.
    """

    share: PlannedBatch
    requests: list[Request]
    weights: np.ndarray
    replaced: tuple[tuple[int, int], ...]
    budget: int


class HeadStream:
    """Packed batches of one head for one rank, from any position on."""

    def __init__(
        self,
        dataset: Dataset,
        config: StreamConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        total_samples: int = 1,
        pack_tokens: int | None = None,
        logger: logging.Logger | None = None,
    ):
        """total_samples: of this head in the whole run, what stages are shares of. pack_tokens:
        size of a pack, None: batches count samples.

        Raises DataPipelineError for an item that no pack can hold and for too small a dataset.
        """
        self._dataset, self._config, self._seed = dataset, config, seed
        self._rank, self._world_size, self._pack_tokens = rank, world_size, pack_tokens
        self._views = config.views()
        self._table = SampleTable.of(dataset.manifest)
        self._longest = [self._check_items(view) for view in self._views]
        sizes = np.diff(dataset.manifest.starts)
        order = SampleOrder(sizes, seed, config.shuffle_shards, dataset.manifest.absent)
        starts = config.stage_starts(total_samples)
        units = config.batch_size * world_size
        self.plan = EpochPlan(order, units, self._tokens, pack_tokens, starts)
        self.plan_sha256 = self._identity(units, starts)
        self._samples = SampleReader(dataset.manifest, self._table)
        problems = self._samples.first_and_last()
        if problems:
            raise CorruptShard("\n  ".join(["shards changed since they were packed:", *problems]))
        self._quarantine = Quarantine(dataset.manifest, config.error_budget, logger)
        on_gpu = config.decode_on_gpu and torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
        self._buffers = PackBuffers(self._device or torch.device("cpu"))
        self._planned: dict[int, PlannedBatch] = {}
        self._read: dict[int, _Slot] = {}
        self._next, self._rebuilds = 0, 0
        self._pictures: PictureDecoder | None = None
        self.seek(0, 0)

    def seek(self, epoch: int, next_batch: int) -> None:
        """Go on with this global batch of this epoch; one beyond its end is the next epoch's first.
        Only before the first batch is taken."""
        assert self._pictures is None
        self.plan.batch(epoch, next_batch)  # packs the epoch's past now, before anyone waits
        self._batches = batches_from(self.plan, epoch, next_batch)

    def __next__(self) -> PackedBatch:
        pictures = self._decoded()
        slot = self._read.pop(self._next)
        self._planned.pop(self._next)
        self._next += 1
        share, ids = slot.share, np.array([request.sample_id for request in slot.requests])
        rows = zip(slot.requests, pictures, draws(self._seed, share.epoch, ids), strict=True)
        views = [self._samples.view(request, picture, draw) for request, picture, draw in rows]
        labels = np.full((share.rows, self._label_count()), -1, np.int64)
        labels[: len(ids)] = self._labels(ids, share.epoch)
        weights = np.zeros(share.rows, np.float32)
        weights[: len(ids)] = slot.weights
        if self._world_size == 1:  # else who joins the ranks counts what all of them met
            self.count_bad(share.epoch, [bad for bad, _ in slot.replaced])
        return pack_views(
            views,
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(weights),
            slot.budget,
            self._buffers,
            epoch=share.epoch,
            index=share.index,
            replaced=slot.replaced,
        )

    @property
    def activity(self) -> str:
        """What the stream is doing, for whoever waits for it."""
        reading = self._samples.reading
        return f"reading {reading}" if reading else f"decoding {self._dataset.manifest.directory}"

    def count_bad(self, epoch: int, bad: list[int], reasons: dict[int, str] | None = None) -> int:
        """Count bad samples of all ranks, batch by batch, against the error budget; returns how
        many the epoch has so far. Raises BudgetExceeded."""
        return self._quarantine.count(epoch, bad, reasons)

    def reason(self, sample_id: int) -> str:
        """Why this rank replaced a sample."""
        return self._quarantine.reason(sample_id)

    def close(self) -> None:
        """Close the shards."""
        self._samples.close()

    def _identity(self, units: int, starts: list[int]) -> str:
        """Hash of all that decides the batches; decoding threads and the like do not."""
        config = asdict(self._config)
        for free in ("batch_size", "dali_num_threads", "error_budget"):
            config.pop(free)
        manifest = self._dataset.manifest
        facts = [PLAN_VERSION, LOOK_AHEAD, self._dataset.sha256, sorted(manifest.absent)]
        facts += [self._seed, units, starts, self._pack_tokens, config]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_items(self, view: ViewConfig) -> int:
        """Tokens of the longest item under a view; names the sample that no pack can hold."""
        table, manifest = self._table, self._dataset.manifest
        whole = table.scaled_tokens(view.scale)
        worst = int(whole.argmax())
        if whole[worst] > view.max_tokens:
            raise DataPipelineError(
                f"one frame of {manifest.locate(worst)[1]['source']} is {whole[worst]} tokens, "
                f"--target_num allows {view.max_tokens}: raise it or pack at a smaller size"
            )
        worst, tokens = longest_item(table, view)
        if self._pack_tokens is not None and tokens > self._pack_tokens:
            raise DataPipelineError(
                f"{manifest.locate(worst)[1]['source']} may take {tokens} tokens, a pack holds "
                f"{self._pack_tokens}: raise pack_tokens or the head's token_share, or lower "
                "--target_num"
            )
        return tokens

    def _choose(self, ids: np.ndarray, stages: np.ndarray, epoch: int):
        """(view, tokens) of each sample, int64 [n] each."""
        chosen, tokens = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        for stage in np.unique(stages):
            here = stages == stage
            view = self._views[stage]
            chosen[here] = choose_views(self._table, view, self._seed, epoch, ids[here])
            tokens[here] = num_tokens(self._table, view, chosen[here], ids[here])
        return chosen, tokens

    def _tokens(self, ids: np.ndarray, stages: np.ndarray, epoch: int) -> np.ndarray:
        return self._choose(ids, stages, epoch)[1]

    def _decoder(self) -> PictureDecoder:
        """Decodes from the next batch on."""
        config = self._config
        largest = config.batch_size
        if self._pack_tokens is not None:
            shortest = min(shortest_item(self._table, view) for view in self._views)
            largest *= self._pack_tokens // shortest
        threads, start = config.dali_num_threads, self._next
        return PictureDecoder(self._fetch, largest, threads, start=start, device=self._device)

    def _fetch(self, iteration: int) -> list[np.ndarray]:
        if iteration not in self._planned:
            self._planned[iteration] = next(self._batches)
        batch = self._planned[iteration]
        share = batch.share(self._rank, self._world_size)
        unit = self._pack_tokens or max(self._longest[stage] for stage in np.unique(batch.stages))
        chosen, tokens = self._choose(share.sample_ids, share.stages, share.epoch)
        room = tokens if self._pack_tokens else np.full(len(tokens), unit)
        requests, weights, replaced = [], [], []
        for i, planned in enumerate(share.sample_ids.tolist()):
            stage = int(share.stages[i])
            request = self._try(planned, int(chosen[i]), stage)
            if request is None:
                request = self._reserve(planned, stage, share.epoch, int(room[i]))
                if share.weights[i]:  # the tail's padding is no sample of the epoch
                    replaced.append((planned, -1 if request is None else request.sample_id))
            if request is not None:
                requests.append(request)
                weights.append(share.weights[i])
        if not requests:
            raise DataPipelineError(
                f"no sample of a whole batch can be read, nor any reserve: {share.sample_ids}; "
                f"the first: {self._quarantine.reason(int(share.sample_ids[0]))}"
            )
        budget = self._config.batch_size * unit
        self._read[iteration] = _Slot(share, requests, np.array(weights), tuple(replaced), budget)
        return [request.encoded for request in requests]

    def _reserve(self, planned: int, stage: int, epoch: int, room: int) -> Request | None:
        """The first good reserve of a bad sample that fits its room; None when none does."""
        for attempt in range(RESERVES):
            reserve = self.plan.reserve(epoch, planned, attempt)
            chosen, tokens = self._choose(np.array([reserve]), np.array([stage]), epoch)
            if tokens[0] > room:
                continue
            request = self._try(reserve, int(chosen[0]), stage)
            if request is not None:
                return request
        return None

    def _try(self, sample_id: int, view: int, stage: int) -> Request | None:
        if self._quarantine.is_undecodable(sample_id, view):
            return None
        try:
            return self._samples.read(sample_id, view, self._views[stage])
        except DataPipelineError as error:
            self._quarantine.note(sample_id, str(error))
        return None

    def _decoded(self) -> list[torch.Tensor]:
        """Pictures of the next batch; culprits are quarantined and the pipeline built again."""
        while True:
            if self._pictures is None:
                self._pictures = self._decoder()
            try:
                pictures = next(self._pictures)
            except DecodeFailed as error:
                self._blame(error)
            else:
                requests = self._read[self._next].requests
                reasons = [wrong_size(*pair) for pair in zip(requests, pictures, strict=True)]
                wrong = [pair for pair in zip(requests, reasons, strict=True) if pair[1]]
                if not wrong:
                    self._rebuilds = 0
                    return pictures
                self._exclude(wrong)
            self._read.clear()
            self._pictures = None

    def _blame(self, error: DecodeFailed) -> None:
        """Find what cannot be decoded among all that was read ahead."""
        requests = [request for slot in self._read.values() for request in slot.requests]
        device = self._device or torch.device("cpu")
        found = undecodable([request.encoded for request in requests], device)
        self._exclude([(requests[place], reason) for place, reason in found.items()])
        self._rebuilds += not found
        if self._rebuilds > MAX_REBUILDS:
            names = ", ".join(self._samples.name(request.sample_id) for request in requests[:8])
            raise DataPipelineError(
                f"decoding failed {self._rebuilds} times although every picture decodes alone: "
                f"{error}; first samples of the batches: {names}"
            ) from error

    def _exclude(self, bad: list[tuple[Request, str]]) -> None:
        for request, reason in bad:
            text = f"{self._samples.name(request.sample_id)}: {reason}"
            self._quarantine.add_undecodable(request.sample_id, request.view, text)

    def _label_count(self) -> int:
        config, stored = self._config, self._dataset.labels.shape[1]
        return min(config.labels_per_step, config.label_width, stored)

    def _labels(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        table = self._dataset.labels[ids, : self._config.label_width]
        return choose_labels(table, self._config.labels_per_step, self._seed, epoch, ids)
