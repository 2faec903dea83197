"""One probe from its lists to its record; every rank runs this.

    lists -> frozen encoder -> features, once per look -> bank of heads -> evaluation -> record

The encoder is frozen; small heads learn on its tokens, all settings in one pass. Nearest neighbours
take the place of the heads with `--head knn`.
"""

import contextlib
import logging
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from model_factory.command_line.plain_text import show
from training.distributed import Ranks, naming_peers, process_group
from training.log import setup_logging

from ..intervals import half_interval
from .benchmarks import LabelledList, read_lists, shared_files, unseen_classes
from .config import ProbeConfig
from .encoders import build_encoder
from .features import ClipFeatures, refuse_unreadable
from .metrics import Evaluation
from .neighbors import evaluate_neighbours
from .record import (
    Costs,
    chosen_heads,
    summarise,
    summarise_neighbours,
    write_results,
)
from .trainer import ProbeTrainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PATIENCE_S = 6 * 3600.0  # ranks meet after reading their shares, which takes them unequal times


def run_probe(config: ProbeConfig, ignored: list[str]) -> None:
    """Probe and report. ignored: flags that were given and have no effect."""
    notes: list[str] = []  # what was left out or chosen: logged and recorded once ranks are known
    # Every rank reads the lists: a mistake in them ends all ranks alike, before any of them waits.
    lists = read_lists(
        name=config.dataset,
        data_root=config.data_root,
        train_csv=config.train_csv,
        val_csv=config.val_csv,
        num_classes=config.num_classes,
        protocol=config.protocol,
        report=notes.append,
    )
    with naming_peers(), process_group(PATIENCE_S) as ranks:
        log = setup_logging(ranks.rank)
        if ignored:
            log.info("without effect here: %s", ", ".join(ignored))
        for note in notes:
            log.info("%s", note)
        _probe(config, lists, notes=notes, ranks=ranks, log=log)
        # no rank leaves the group while rank 0 still writes the report
        dist.barrier()


def _probe(
    config: ProbeConfig,
    lists: tuple[LabelledList, LabelledList],
    notes: list[str],
    ranks: Ranks,
    log: logging.Logger,
) -> None:
    started = time.perf_counter()
    encoder = build_encoder(
        config.input,
        model_name=config.model_name,
        model_weight=config.model_weight,
        seed=config.heads.seed,
    ).to(ranks.device)
    train_list, val_list = lists
    train = ClipFeatures(train_list, config=config, encoder=encoder, device=ranks.device)
    val = ClipFeatures(val_list, config=config, encoder=encoder, device=ranks.device)
    _check_lists(train, val, log=log)
    # Missing files are reported before anything is decoded, damaged ones after the first pass.
    for features in (train, val):
        features.find_missing(ranks.rank, ranks.world_size)
    refuse_unreadable(train, val, allow_partial=config.allow_partial)

    if config.heads.kind == "knn":
        record, evaluation = _probe_neighbours(config, train=train, val=val, ranks=ranks)
    else:
        record, evaluation = _probe_bank(
            config, width=encoder.width, train=train, val=val, ranks=ranks, log=log
        )
    # a collective, so that it comes before the part of rank 0 alone
    tokens_per_clip = val.tokens_per_clip()
    if ranks.is_main:
        costs = Costs(
            wall_s=round(time.perf_counter() - started, 2),
            encoder_s=round(train.encode_s + val.encode_s, 2),
            tokens_per_clip=round(tokens_per_clip, 1),
            encoder_passes=train.passes + val.passes,
            world_size=ranks.world_size,
            device=ranks.device.type,
        )
        facts = {
            "notes": notes,
            "unreadable": {"train": train.unreadable, "val": val.unreadable},
            "encoder_sha256": encoder.sha256,
            "read_from": train.read_from,
            "clips_in_both_lists": len(shared_files(train.clips, val.clips)),
        }
        write_results(
            config,
            record,
            evaluation=evaluation,
            clips=val.clips,
            costs=costs,
            facts=facts,
        )
        _show_result(config, record)


def _check_lists(train: ClipFeatures, val: ClipFeatures, log: logging.Logger) -> None:
    """Log where clips come from, and what makes figures doubtful. Raises ValueError for two lists
    that would be read in two ways."""
    if train.read_from != val.read_from:
        raise ValueError(
            f"the training list is read from {train.read_from}, the validation list from "
            f"{val.read_from}: pack both alike or neither"
        )
    log.info("clips from %s", train.read_from)
    unseen = unseen_classes(train.clips, val.clips)
    if unseen:
        log.warning("classes %s have validation clips but no training clip", unseen)
    shared = shared_files(train.clips, val.clips)
    if shared:
        log.warning("%d clips are in both lists, for example %s", len(shared), shared[0])


def _probe_bank(
    config: ProbeConfig,
    width: int,
    train: ClipFeatures,
    val: ClipFeatures,
    ranks: Ranks,
    log: logging.Logger,
) -> tuple[dict, Evaluation]:
    """(record, results of the heads that it reports) of heads that are trained."""
    with _board(config, ranks) as board:
        trainer = ProbeTrainer(
            config,
            width=width,
            train=train,
            val=val,
            ranks=ranks,
            log=log,
            board=board,
        )
        history = trainer.run()
    record = summarise(config, history, num_clips=_num_clips(train, val))
    return record, chosen_heads(history, record)


def _probe_neighbours(
    config: ProbeConfig, train: ClipFeatures, val: ClipFeatures, ranks: Ranks
) -> tuple[dict, Evaluation]:
    """(record, results) of nearest neighbours."""
    k, held_out, evaluation = evaluate_neighbours(
        train,
        val,
        share=config.heads.holdout,
        batch_size=config.heads.batch_size,
        ranks=ranks,
    )
    # damaged files are known only now that both lists have been read
    refuse_unreadable(train, val, allow_partial=config.allow_partial)
    record = summarise_neighbours(
        config,
        k=k,
        held_out=held_out,
        evaluation=evaluation,
        num_clips=_num_clips(train, val),
    )
    return record, evaluation


def _num_clips(train: ClipFeatures, val: ClipFeatures) -> dict[str, int]:
    return {"train": len(train.clips), "val": len(val.clips)}


def _board(
    config: ProbeConfig, ranks: Ranks
) -> "contextlib.AbstractContextManager[SummaryWriter | None]":
    """TensorBoard writer of rank 0, closed at the end; None on the others."""
    if not ranks.is_main:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    folder = config.report_dir / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")
    return SummaryWriter(str(folder))


def _show_result(config: ProbeConfig, record: dict) -> None:
    """Print the public one-line result."""
    metric = record["metric"]
    last = record["last_epoch"]
    unreadable = record["unreadable"]
    missed = len(unreadable["train"] | unreadable["val"])
    partial = f" without {missed} unreadable clips" if missed else ""
    settings = {name: value for name, value in record["chosen"].items() if name != "held_out"}
    # learning rate and weight decay of a bank, or k of nearest neighbours
    chosen = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    show(
        f"{record['dataset']} {config.input.family}: {metric.replace('top1', 'top-1')} "
        f"{last[metric]:.2f} ± {half_interval(last):.2f} at the last epoch, {chosen}{partial}"
    )
