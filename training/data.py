"""The trainer's side of the loader: streams, positions, and one decision for all ranks.

What goes wrong with data is seen by one rank: a sample too many that is bad, a read that hangs. All
ranks learn of it at the same step and stop together. Cost: one collective of a few integers per
micro step, on the CPU and beside the optimizer's work of the step before, and one more for steps in
which a sample was replaced.
"""

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass

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
from .record.step_clock import StepClock

SYNTHETIC_CLASSES = 16
DATA_ERRORS = {error.__name__: error for error in (BudgetExceeded, DataTimeout)}


@dataclass(frozen=True)
class DataCounts:
    """Of all heads and ranks in one micro step: samples that count, their tokens and the squares of
    their lengths, the token budgets; the bad samples of the running epochs so far; how many ranks
    wish to stop and to save."""

    samples: int = 0
    tokens: int = 0
    squares: int = 0
    room: int = 0
    stop: int = 0
    save: int = 0
    bad_samples: int = 0

    def __add__(self, other: "DataCounts") -> "DataCounts":
        names = ("samples", "tokens", "squares", "room", "stop", "save")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return DataCounts(**sums, bad_samples=other.bad_samples)


@dataclass(frozen=True)
class _Drawn:
    """Batches of this rank, or why there are none; the position after them; and the sums over all
    ranks, which are there when `work` is done."""

    batches: dict[str, PackedBatch]
    failure: Exception | None
    position: dict[str, dict]
    sums: torch.Tensor
    work: dist.Work


def _totals(batches: dict[str, PackedBatch]) -> list[int]:
    """[samples, tokens, squares, room] of one rank's batches."""
    samples = sum(int((batch.weights > 0).sum()) for batch in batches.values())
    tokens = sum(batch.num_tokens for batch in batches.values())
    squares = sum(
        int(batch.cu_seqlens[: batch.num_samples + 1].diff().long().square().sum())
        for batch in batches.values()
    )
    return [samples, tokens, squares, sum(len(batch.pixels) for batch in batches.values())]


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
        self._drawn: _Drawn | None = None
        self._bad = dict.fromkeys(self.streams, 0)
        # {head: (epoch, bad samples of it that all ranks have met)}
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
        for name, stream in self.streams.items():
            saved = state[name]
            place = {key: saved[key] for key in ("epoch", "next_batch")}
            stream.seek(**place)
            self._position[name] = place
            # checkpoints of earlier versions hold none
            bad = saved.get("bad", {"epoch": place["epoch"], "samples": []})
            self._met[name] = (bad["epoch"], bad["samples"])
            self._bad[name] = len(bad["samples"]) if bad["epoch"] == place["epoch"] else 0

    def start_next_epoch(self, state: dict[str, dict]) -> None:
        """Start the epoch after that of a saved state, whose plan was another."""
        for name, stream in self.streams.items():
            place = {"epoch": state.get(name, {"epoch": -1})["epoch"] + 1, "next_batch": 0}
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

    def draw(self, loader: MixtureLoader, clock: StepClock, wishes: Callable) -> None:
        """Take the next batches and tell the other ranks, without waiting for them.

        wishes() -> (stop, save): what this rank wishes, of which all learn in the counts.
        """
        batches, failure = {}, None
        with clock.section("data"):
            try:
                batches = next(loader)
            except Exception as error:
                failure = error
        replaced = sum(len(batch.replaced) for batch in batches.values())
        counts = [failure is not None, replaced, *_totals(batches), *wishes()]
        sums = torch.tensor(counts, dtype=torch.int64)
        work = dist.all_reduce(sums, async_op=True)
        self._drawn = _Drawn(batches, failure, loader.state_dict(), sums, work)

    def next_batches(
        self, loader: MixtureLoader, clock: StepClock, wishes: Callable
    ) -> tuple[dict[str, PackedBatch], DataCounts]:
        """({head: batch of this rank}, counts of all ranks) of what was drawn, or is now. Raises on
        all ranks alike what any of them met."""
        if self._drawn is None:
            self.draw(loader, clock, wishes)
        drawn, self._drawn = self._drawn, None
        with clock.section("agree"):
            drawn.work.wait()
        failed, replaced, *totals = drawn.sums.tolist()
        if failed:
            self._stop(drawn.failure)
        bad = self._count_bad(drawn.batches) if replaced else self._bad
        self._bad = bad
        self._position.update(drawn.position)
        return drawn.batches, DataCounts(*totals, bad_samples=sum(bad.values()))

    def _count_bad(self, batches: dict[str, PackedBatch]) -> dict[str, int]:
        """{head: bad samples of its epoch}, counted alike on all ranks."""
        mine = {
            name: [[bad, self.streams[name].reason(bad)] for bad, _ in batch.replaced]
            for name, batch in batches.items()
        }
        counts = dict(self._bad)
        for name in self.streams:
            met = {bad: text for part in all_gather_json(mine[name]) for bad, text in part}
            epoch = batches[name].epoch
            known_epoch, known = self._met.get(name, (epoch, []))
            bad = sorted({*met, *(known if known_epoch == epoch else [])})
            self._met[name] = (epoch, bad)
            counts[name] = self.streams[name].count_bad(epoch, bad, met)
        return counts

    def _stop(self, failure: Exception | None) -> None:
        """Raise this rank's failure, or in its absence what the first failing rank says."""
        mine = None if failure is None else [type(failure).__name__, str(failure)]
        reports = [report for report in all_gather_json(mine) if report]
        if failure is not None and type(failure).__name__ not in DATA_ERRORS:
            raise failure
        kind, text = reports[0]
        raise DATA_ERRORS.get(kind, DataPipelineError)(
            text if kind in DATA_ERRORS else f"another rank stopped: {kind}: {text}"
        )

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
                other_patch_size(
                    dataset=head.dataset,
                    packed=packed_size,
                    model=self._config.model.name,
                    wanted=self._patch_size,
                )
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
