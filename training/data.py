"""The trainer's side of the loader: streams, positions, and one decision for all ranks.

A fault of data is met by one rank: one bad sample too many, a read that hangs. All ranks learn of
it at the same step and stop together. Cost: one collective of a few integers per micro step, on the
CPU and beside the optimizer's work of the step before, and one more for steps in which a sample was
replaced.
"""

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.datasets import Dataset
from data_pipeline.errors import BudgetExceeded, DataPipelineError, DataTimeout
from data_pipeline.loading.choices import samples_per_batch
from data_pipeline.loading.loader import MixtureLoader, SyntheticStream
from data_pipeline.loading.packing import PackedBatch
from data_pipeline.loading.stream import HeadStream

from .config.schema import HeadConfig, TrainConfig
from .distributed import Ranks, all_gather_json
from .record.speed import StepClock

SYNTHETIC_CLASSES = 16
# Errors that every rank raises with the same type; any other one keeps its type on the rank that
# met it, and ends the others as a lost peer does.
DATA_ERRORS = {error.__name__: error for error in (BudgetExceeded, DataTimeout)}
Wishes = Callable[[], tuple[bool, bool]]  # () -> (stop, save)


@dataclass(frozen=True)
class DataCounts:
    """Of all heads and ranks in one micro step: samples that count, their tokens and the sum of
    their squared lengths, which attention costs; the token budgets, filling included (`room`); how
    many ranks wish to stop and to save; the bad samples of the running epochs so far."""

    samples: int = 0
    tokens: int = 0
    squares: int = 0
    room: int = 0
    stop: int = 0
    save: int = 0
    bad_samples: int = 0

    def __add__(self, other: "DataCounts") -> "DataCounts":
        return DataCounts(
            samples=self.samples + other.samples,
            tokens=self.tokens + other.tokens,
            squares=self.squares + other.squares,
            room=self.room + other.room,
            stop=self.stop + other.stop,
            save=self.save + other.save,
            bad_samples=other.bad_samples,  # a running total already
        )


@dataclass(frozen=True)
class _Drawn:
    """Batches of this rank, or the error that came instead; the position after them; and the sums
    over all ranks, which are there when `work` is done."""

    batches: dict[str, PackedBatch]
    failure: Exception | None
    position: dict[str, dict]
    sums: torch.Tensor
    work: dist.Work


def _totals(batches: dict[str, PackedBatch]) -> list[int]:
    """[samples, tokens, squares, room] of one rank's batches."""
    samples = sum(int((batch.weights > 0).sum()) for batch in batches.values())
    tokens = sum(batch.num_tokens for batch in batches.values())
    # without the filling: it is computed, but MFU counts the work that the training needs
    squares = sum(
        int(batch.cu_seqlens[: batch.num_samples + 1].diff().long().square().sum())
        for batch in batches.values()
    )
    room = sum(len(batch.pixels) for batch in batches.values())
    return [samples, tokens, squares, room]


class TrainingData:
    """The streams of a run and their positions."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: dict[str, Dataset | None],
        patch_size: int,
        ranks: Ranks,
        logger: logging.Logger,
    ):
        self._config = config
        self._datasets = datasets
        self._patch_size = patch_size
        self._ranks = ranks
        self._logger = logger
        counts = {head.name: self._samples_per_batch(head) for head in config.heads}
        self.samples_per_step = sum(counts.values()) * config.grad_accum_steps
        # heads advance together, so each sees its share of the run's samples
        num_batches = config.schedule.total_samples / sum(counts.values())
        # HeadStream or SyntheticStream
        self.streams: dict[str, Any] = {
            head.name: self._build(head, max(1, int(num_batches * counts[head.name])))
            for head in config.heads
        }
        self._position = {name: {"epoch": 0, "next_batch": 0} for name in self.streams}
        self._drawn: _Drawn | None = None
        self._num_bad = dict.fromkeys(self.streams, 0)
        # {head: (epoch, ids of its bad samples that any rank has met)}
        self._met: dict[str, tuple[int, list[int]]] = {}
        self._compare_plans()

    def state_dict(self) -> dict[str, dict]:
        """{head: plan hash, epoch, next global batch, bad samples of the running epoch}: all that
        a resume needs to know."""
        state = {}
        for name, stream in self.streams.items():
            epoch, samples = self._met.get(name, (0, []))
            bad = {"epoch": epoch, "samples": samples}
            state[name] = {"plan": stream.plan_sha256, **self._position[name], "bad": bad}
        return state

    def difference(self, state: dict[str, dict]) -> list[str]:
        """Why a saved state does not fit these streams, one line per head."""
        folders = {head.name: head.dataset for head in self._config.heads}
        return [
            f"data of {name}, in {folders[name]}: shards or labels changed since the checkpoint "
            "was saved, or the way they are read"
            for name, stream in self.streams.items()
            if state.get(name, {}).get("plan") != stream.plan_sha256
        ]

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on where a state was saved. Bad samples that were met before count against the error
        budget."""
        for name in self.streams:
            saved = state[name]
            epoch = saved["epoch"]
            self._seek(name, epoch=epoch, next_batch=saved["next_batch"])
            # checkpoints of earlier versions hold none
            bad = saved.get("bad", {"epoch": epoch, "samples": []})
            self._met[name] = (bad["epoch"], bad["samples"])
            # the budget is one epoch's: what an earlier one met does not count
            is_running = bad["epoch"] == epoch
            self._num_bad[name] = len(bad["samples"]) if is_running else 0

    def start_next_epoch(self, state: dict[str, dict]) -> None:
        """Start the epoch after that of a saved state, whose plan was another."""
        for name in self.streams:
            last_epoch = state.get(name, {"epoch": -1})["epoch"]
            self._seek(name, epoch=last_epoch + 1, next_batch=0)

    def _seek(self, name: str, epoch: int, next_batch: int) -> None:
        self.streams[name].seek(epoch=epoch, next_batch=next_batch)
        self._position[name] = {"epoch": epoch, "next_batch": next_batch}

    def loader(self) -> MixtureLoader:
        """Start reading ahead; to be used as a context manager."""
        return MixtureLoader(
            streams=self.streams,
            prefetch_bytes=self._config.prefetch_bytes,
            warn_s=self._config.data_warning_s,
            timeout_s=self._config.data_timeout_s,
            logger=self._logger,
        )

    def prefetch(self, loader: MixtureLoader, clock: StepClock, wishes: Wishes) -> None:
        """Take the next batches and start to sum their counts over the ranks, without waiting.

        wishes() returns whether this rank wishes to stop and to save: all ranks learn of it in the
        counts.
        """
        self._drawn = self._draw(loader, clock=clock, wishes=wishes)

    def _draw(self, loader: MixtureLoader, clock: StepClock, wishes: Wishes) -> _Drawn:
        batches: dict[str, PackedBatch] = {}
        failure = None
        with clock.section("data"):
            try:
                batches = next(loader)
            except Exception as error:  # raised by `next_batches`, on all ranks at the same step
                failure = error
        replaced = sum(len(batch.replaced) for batch in batches.values())
        # in the order in which next_batches takes the sums apart
        counts = [failure is not None, replaced, *_totals(batches), *wishes()]
        # on the CPU, so that gloo sums them beside the kernels of the device
        sums = torch.tensor(counts, dtype=torch.int64)
        return _Drawn(
            batches=batches,
            failure=failure,
            position=loader.state_dict(),
            sums=sums,
            work=dist.all_reduce(sums, async_op=True),
        )

    def next_batches(
        self, loader: MixtureLoader, clock: StepClock, wishes: Wishes
    ) -> tuple[dict[str, PackedBatch], DataCounts]:
        """({head: batch of this rank}, counts of all ranks) of what was drawn, or is now. An error
        that any rank met is raised on all of them."""
        # at a start's first step nothing was prefetched
        drawn = self._drawn or self._draw(loader, clock=clock, wishes=wishes)
        self._drawn = None
        with clock.section("agree"):
            drawn.work.wait()
        failed, replaced, samples, tokens, squares, room, stop, save = drawn.sums.tolist()
        if failed:
            self._stop(drawn.failure)
        if replaced:
            self._num_bad = self._count_bad(drawn.batches)
        for name, batch in drawn.batches.items():
            # an epoch in which nothing was replaced yet has no bad samples
            if name in self._met and self._met[name][0] != batch.epoch:
                self._num_bad[name] = 0
        self._position.update(drawn.position)
        counts = DataCounts(
            samples=samples,
            tokens=tokens,
            squares=squares,
            room=room,
            stop=stop,
            save=save,
            bad_samples=sum(self._num_bad.values()),
        )
        return drawn.batches, counts

    def _count_bad(self, batches: dict[str, PackedBatch]) -> dict[str, int]:
        """{head: bad samples of its epoch}, counted alike on all ranks."""
        mine = {
            name: [[bad, self.streams[name].reason(bad)] for bad, _ in batch.replaced]
            for name, batch in batches.items()
        }
        counts = {}
        for name, stream in self.streams.items():
            epoch = batches[name].epoch
            pairs = [pair for of_rank in all_gather_json(mine[name]) for pair in of_rank]
            reasons = dict(pairs)
            last_epoch, earlier = self._met.get(name, (epoch, []))
            # those of a finished epoch no longer count
            counted = earlier if last_epoch == epoch else []
            bad = sorted({*reasons, *counted})
            self._met[name] = (epoch, bad)
            counts[name] = stream.count_bad(epoch, bad=bad, reasons=reasons)
        return counts

    def _stop(self, failure: Exception | None) -> None:
        """Raise this rank's failure, or in its absence that of the first rank that has one."""
        mine = None if failure is None else [type(failure).__name__, str(failure)]
        reports = [report for report in all_gather_json(mine) if report]
        # an error of this rank alone keeps its type and traceback
        if failure is not None and type(failure).__name__ not in DATA_ERRORS:
            raise failure
        kind, text = reports[0]
        if kind in DATA_ERRORS:
            raise DATA_ERRORS[kind](text)
        raise DataPipelineError(f"another rank stopped: {kind}: {text}")

    def _compare_plans(self) -> None:
        """All ranks must see the same shards, labels and settings."""
        plans = all_gather_json([stream.plan_sha256 for stream in self.streams.values()])
        odd = [rank for rank, plan in enumerate(plans) if plan != plans[0]]
        if odd:
            raise DataPipelineError(
                f"ranks {odd} plan other batches than rank 0: they see other shards or labels, or "
                "were started with other settings; compare the data folders of their machines"
            )

    def _samples_per_batch(self, head: HeadConfig) -> float:
        """Samples of a global batch of a head; of packs, their mean number."""
        dataset = self._datasets[head.name]
        units = head.stream.batch_size * self._ranks.world_size
        if dataset is None:
            return units * self._synthetic_per_unit(head)
        return samples_per_batch(
            dataset=dataset,
            config=head.stream,
            seed=self._config.seed,
            units=units,
            pack_tokens=self._config.pack_tokens_of(head),
        )

    def _synthetic_per_unit(self, head: HeadConfig) -> int:
        """Synthetic samples, all of `max_tokens` tokens, that a unit of the batch holds."""
        pack_tokens = self._config.pack_tokens_of(head)
        return pack_tokens // head.stream.view.max_tokens if pack_tokens else 1

    def _build(self, head: HeadConfig, total_samples: int) -> HeadStream | SyntheticStream:
        dataset = self._datasets[head.name]
        stream = head.stream
        if dataset is None:
            return SyntheticStream(
                batch_size=stream.batch_size * self._synthetic_per_unit(head),
                tokens=stream.view.max_tokens,
                patch_size=self._patch_size,
                num_classes=SYNTHETIC_CLASSES,
                num_labels=stream.labels_per_step,
                seed=self._config.seed,
                rank=self._ranks.rank,
                frames_per_token=stream.view.frames_per_token,
            )
        packed_size = dataset.manifest.settings["patch_size"]
        if packed_size != self._patch_size:
            raise ValueError(
                other_patch_size(
                    dataset=head.dataset,
                    packed=packed_size,
                    model=self._config.model.name,
                    wanted=self._patch_size,
                )
            )
        if dataset.manifest.absent and self._ranks.is_main:
            absent = sorted(dataset.manifest.absent)
            names = [dataset.manifest.shards[i]["name"] for i in absent]
            self._logger.warning("%s: training without missing shards %s", head.dataset, names)
        return HeadStream(
            dataset=dataset,
            config=stream,
            seed=self._config.seed,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            total_samples=total_samples,
            pack_tokens=self._config.pack_tokens_of(head),
            logger=self._logger,
        )


def other_patch_size(dataset: str, packed: int, model: str, wanted: int) -> str:
    """Message for shards whose patches the encoder cannot take, with the command that packs for it.
    Shards are packed into another folder, so that those there stay for other encoders.
    """
    output = shlex.quote(f"{dataset.rstrip('/')}_patch{wanted}")
    return (
        f"{dataset} was packed with patch size {packed}, {model} takes {wanted}: pack for it with "
        f"`python -m data_pipeline pack INPUT --output {output} --model {model}`, cluster and "
        "label that folder and name it in --list_datasets, or choose another --model_name"
    )
