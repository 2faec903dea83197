"""One head's endless stream of packed batches.

    plan.batch(epoch, index).share(rank, world)    which samples
    choices                                        under which view, how many tokens
    samples.read(sample, view)                     bytes, crc checked; bad ones give way to reserves
    dali_pipeline                                  images, decoded ahead
    pack_views([samples.make_view(image) ...])     batch

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
from .choices import (
    SampleTable,
    choose_labels,
    choose_views,
    draws,
    num_tokens,
    possible_lengths,
)
from .config import StreamConfig, ViewConfig
from .dali_pipeline import DecodeFailed, PictureDecoder, undecodable
from .packing import PackBuffers, PackedBatch, pack_views
from .plan import LOOK_AHEAD, RESERVES, EpochPlan, PlannedBatch, SampleOrder, batches_from
from .quarantine import Quarantine
from .samples import Request, SampleReader, wrong_sizes

PLAN_VERSION = 1  # raised when the same arguments would give other batches
# of a decoding pipeline that dies although every image alone decodes; a choice
MAX_REBUILDS = 3


@dataclass(frozen=True)
class _Slot:
    """A batch under way: the plan's share, what was read for it, pairs of (bad sample, its
    reserve), and the token budget.
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
        manifest = dataset.manifest
        self._dataset = dataset
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._pack_tokens = pack_tokens
        self._views = config.views()
        self._table = SampleTable.of(manifest)
        self._longest = [self._check_items(view) for view in self._views]
        starts = config.stage_starts(total_samples)
        units = config.batch_size * world_size
        order = SampleOrder(
            np.diff(manifest.starts),
            seed=seed,
            shuffle_shards=config.shuffle_shards,
            absent=manifest.absent,
        )
        self.plan = EpochPlan(
            order,
            units=units,
            tokens_of=lambda ids, stages, epoch: self._choose(ids, stages=stages, epoch=epoch)[1],
            pack_tokens=pack_tokens,
            stages=starts,
        )
        self.plan_sha256 = self._identity(units, starts)
        self._samples = SampleReader(manifest, self._table)
        problems = self._samples.shards.first_and_last()
        if problems:
            raise CorruptShard("\n  ".join(["shards changed since they were packed:", *problems]))
        self._quarantine = Quarantine(manifest, config.error_budget, logger)
        self._device = torch.device("cpu")
        if config.decode_on_gpu and torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._buffers = PackBuffers(self._device)
        # Both by number of the batch. Plans outlive a decoder that dies: the next one reads the
        # same batches again, where the plan itself only goes on.
        self._planned: dict[int, PlannedBatch] = {}
        self._read: dict[int, _Slot] = {}
        self._next = 0
        self._rebuilds = 0
        self._decoder: PictureDecoder | None = None
        self.seek(0, 0)

    def seek(self, epoch: int, next_batch: int) -> None:
        """Go on with this global batch of this epoch; one beyond its end is the next epoch's first.
        Only before the first batch is taken."""
        assert self._decoder is None
        self.plan.batch(epoch, next_batch)  # packs the epoch's past now, before anyone waits
        self._batches = batches_from(self.plan, epoch=epoch, index=next_batch)

    def __next__(self) -> PackedBatch:
        images = self._decoded()
        slot = self._read.pop(self._next)
        self._planned.pop(self._next)
        self._next += 1
        share = slot.share
        ids = np.array([request.sample_id for request in slot.requests])
        random_numbers = draws(self._seed, epoch=share.epoch, ids=ids)
        views = [
            self._samples.make_view(request, picture=image, draw=draw)
            for request, image, draw in zip(slot.requests, images, random_numbers, strict=True)
        ]
        # rows beyond this rank's samples: absent labels at weight 0
        drawn = self._labels(ids, share.epoch)
        shape = (share.rows, drawn.shape[1])
        labels = np.full(shape, -1, np.int64)
        labels[: len(ids)] = drawn
        weights = np.zeros(share.rows, np.float32)
        weights[: len(ids)] = slot.weights
        # with several ranks, TrainingData counts the bad samples of all of them
        if self._world_size == 1:
            self.count_bad(share.epoch, [bad for bad, _ in slot.replaced])
        return pack_views(
            views,
            sample_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            token_budget=slot.budget,
            buffers=self._buffers,
            epoch=share.epoch,
            index=share.index,
            replaced=slot.replaced,
        )

    @property
    def activity(self) -> str:
        """What the stream is doing, for whoever waits for it."""
        reading = self._samples.shards.reading
        if reading:
            return f"reading {reading}"
        return f"decoding {self._dataset.manifest.directory}"

    def count_bad(self, epoch: int, bad: list[int], reasons: dict[int, str] | None = None) -> int:
        """Count bad samples of all ranks, batch by batch, against the error budget; returns how
        many the epoch has so far. Raises BudgetExceeded."""
        return self._quarantine.count(epoch, bad=bad, reasons=reasons)

    def reason(self, sample_id: int) -> str:
        """Why this rank replaced a sample."""
        return self._quarantine.reason(sample_id)

    def close(self) -> None:
        """Close the shards."""
        self._samples.close()

    def _identity(self, units: int, starts: list[int]) -> str:
        """Hash of all that decides the batches; decoding threads and the like do not."""
        config = asdict(self._config)
        # the batch size enters through units, so that world sizes may differ; the others change no
        # batch
        for free in ("batch_size", "dali_num_threads", "error_budget"):
            config.pop(free)
        if config["view"]["frames_per_token"] == 1:
            # plans of before there were tubes have none on record
            config["view"].pop("frames_per_token")
        manifest = self._dataset.manifest
        facts = [PLAN_VERSION, LOOK_AHEAD, self._dataset.sha256, sorted(manifest.absent)]
        facts += [self._seed, units, starts, self._pack_tokens, config]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_items(self, view: ViewConfig) -> int:
        """Tokens of the longest item under a view; names the sample that no pack can hold."""
        manifest = self._dataset.manifest
        per_frame = self._table.frame_tokens(slice(None), view.scale)
        largest = int(per_frame.argmax())
        if per_frame[largest] > view.max_tokens:
            raise DataPipelineError(
                f"one frame of {manifest.locate(largest)[1]['source']} is {per_frame[largest]} "
                f"tokens, --target_num allows {view.max_tokens}: raise it or pack at a smaller size"
            )
        lengths = possible_lengths(self._table, view).max(axis=0)
        longest = int(lengths.argmax())
        tokens = int(lengths[longest])
        if self._pack_tokens is not None and tokens > self._pack_tokens:
            raise DataPipelineError(
                f"{manifest.locate(longest)[1]['source']} may take {tokens} tokens, a pack holds "
                f"{self._pack_tokens}: raise pack_tokens or the head's token_share, or lower "
                "--target_num"
            )
        return tokens

    def _choose(
        self, ids: np.ndarray, stages: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(view, tokens) of each sample, int64 [n] each."""
        chosen = np.zeros(len(ids), np.int64)
        tokens = np.zeros(len(ids), np.int64)
        for stage in np.unique(stages):
            here = stages == stage
            view = self._views[stage]
            chosen[here] = choose_views(
                self._table, view=view, seed=self._seed, epoch=epoch, ids=ids[here]
            )
            tokens[here] = num_tokens(self._table, view=view, views=chosen[here], ids=ids[here])
        return chosen, tokens

    def _make_decoder(self) -> PictureDecoder:
        """A decoder that starts at the next batch; `max_batch` is the most images that one rank's
        share can hold."""
        max_batch = self._config.batch_size
        if self._pack_tokens is not None:
            lengths = [possible_lengths(self._table, view).min() for view in self._views]
            shortest = int(min(lengths))
            max_batch *= self._pack_tokens // shortest
        return PictureDecoder(
            self._fetch,
            max_batch=max_batch,
            num_threads=self._config.dali_num_threads,
            start=self._next,
            device=self._device,
        )

    def _fetch(self, iteration: int) -> list[np.ndarray]:
        """Encoded images of a batch; what else belongs to it waits in `self._read`."""
        if iteration not in self._planned:
            self._planned[iteration] = next(self._batches)
        batch = self._planned[iteration]
        share = batch.share(self._rank, self._world_size)
        # token budget of a unit, over the whole global batch, so that all ranks have the same one
        longest = max(self._longest[stage] for stage in np.unique(batch.stages))
        unit = self._pack_tokens or longest
        chosen, tokens = self._choose(share.sample_ids, stages=share.stages, epoch=share.epoch)
        requests = []
        weights = []
        replaced = []
        for i, planned in enumerate(share.sample_ids.tolist()):
            stage = int(share.stages[i])
            request = self._try(planned, view=int(chosen[i]), stage=stage)
            if request is None:
                # in a pack a reserve may take the tokens of the bad sample, else a unit of its own
                room = int(tokens[i]) if self._pack_tokens else unit
                request = self._reserve(planned, stage=stage, epoch=share.epoch, room=room)
                if share.weights[i]:  # the tail's padding is no sample of the epoch
                    reserve = -1 if request is None else request.sample_id
                    replaced.append((planned, reserve))
            if request is not None:
                requests.append(request)
                weights.append(share.weights[i])
        if not requests:
            raise DataPipelineError(
                f"no sample of a whole batch can be read, nor any reserve: {share.sample_ids}; "
                f"the first: {self._quarantine.reason(int(share.sample_ids[0]))}"
            )
        self._read[iteration] = _Slot(
            share=share,
            requests=requests,
            weights=np.array(weights),
            replaced=tuple(replaced),
            budget=self._config.batch_size * unit,
        )
        return [request.encoded for request in requests]

    def _reserve(self, planned: int, stage: int, epoch: int, room: int) -> Request | None:
        """The first good reserve of a bad sample that fits its room; None when none does."""
        for attempt in range(RESERVES):
            reserve = self.plan.reserve(epoch, sample_id=planned, attempt=attempt)
            # under a view of its own, in the stage of the sample that it stands in for
            chosen, tokens = self._choose(
                np.array([reserve]), stages=np.array([stage]), epoch=epoch
            )
            if tokens[0] <= room:
                request = self._try(reserve, view=int(chosen[0]), stage=stage)
                if request is not None:
                    return request
        return None

    def _try(self, sample_id: int, view: int, stage: int) -> Request | None:
        """A sample as read, None for a bad one, which is noted."""
        if self._quarantine.is_undecodable(sample_id, view):
            return None
        try:
            return self._samples.read(sample_id, view_index=view, config=self._views[stage])
        except DataPipelineError as error:
            self._quarantine.note(sample_id, str(error))
        return None

    def _decoded(self) -> list[torch.Tensor]:
        """Images of the next batch. Culprits are quarantined, and a new decoder reads all batches
        ahead again, with their reserves."""
        while True:
            if self._decoder is None:
                self._decoder = self._make_decoder()
            try:
                images = next(self._decoder)
            except DecodeFailed as error:
                self._quarantine_culprits(error)
            else:
                requests = self._read[self._next].requests
                wrong = wrong_sizes(requests, images)
                if not wrong:
                    self._rebuilds = 0
                    return images
                self._exclude(requests, wrong)
            self._read.clear()
            self._decoder = None

    def _quarantine_culprits(self, error: DecodeFailed) -> None:
        """Find what cannot be decoded among all that was read ahead: DALI does not report it."""
        requests = [request for slot in self._read.values() for request in slot.requests]
        culprits = undecodable([request.encoded for request in requests], self._device)
        self._exclude(requests, culprits)
        if culprits:
            return
        self._rebuilds += 1
        if self._rebuilds > MAX_REBUILDS:
            first = [self._samples.name(request.sample_id) for request in requests[:8]]
            names = ", ".join(first)
            raise DataPipelineError(
                f"decoding failed {self._rebuilds} times although every picture decodes alone: "
                f"{error}; first samples of the batches: {names}"
            ) from error

    def _exclude(self, requests: list[Request], reasons: dict[int, str]) -> None:
        for i, reason in reasons.items():
            request = requests[i]
            text = f"{self._samples.name(request.sample_id)}: {reason}"
            self._quarantine.add_undecodable(
                request.sample_id, view=request.view_index, reason=text
            )

    def _labels(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [n, at most labels_per_step] of samples."""
        table = self._dataset.labels[ids, : self._config.label_width]
        return choose_labels(
            table, count=self._config.labels_per_step, seed=self._seed, epoch=epoch, ids=ids
        )
