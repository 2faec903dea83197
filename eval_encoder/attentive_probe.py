"""Entry point of the probe: `torchrun eval_encoder/attentive_probe.py --dataset NAME ...`.

    lists -> frozen encoder -> features, once per look -> bank of heads -> judgement -> results

The encoder is frozen; small heads learn on its tokens, all settings in one pass. Run by path, so
this file holds no definition that another module needs.
"""

import argparse
import contextlib
import sys
import time

from eval_encoder.probe.config import build_config, build_parser, idle_flags
from model_factory.command_line.command import run_command
from model_factory.command_line.plain_text import show
from model_factory.command_line.quiet import quiet_libraries
from training.log import is_first_to_say, setup_logging

PATIENCE_S = 6 * 3600.0  # ranks meet after reading their shares, which may take them unlike times


def main(argv: list[str] | None = None) -> int:
    """Run one probe; returns the exit code."""
    return run_command(
        parse=build_parser().parse_args, work=_start, argv=argv, is_heard=is_first_to_say
    )


def _start(args: argparse.Namespace) -> None:
    quiet_libraries()
    from eval_encoder.probe.benchmarks import read_lists

    notes: list[str] = []  # what was left out or chosen: logged and recorded once ranks are known
    config = build_config(args)
    lists = read_lists(
        name=config.dataset,
        data_root=config.data_root,
        train_csv=config.train_csv,
        val_csv=config.val_csv,
        num_classes=config.num_classes,
        protocol=config.protocol,
        report=notes.append,
    )
    _probe(config, lists, notes=notes, ignored=idle_flags(args))


def _probe(config, lists, notes: list[str], ignored: list[str]) -> None:
    import torch.distributed as dist

    from eval_encoder.probe.encoders import build_encoder
    from eval_encoder.probe.features import ClipFeatures, refuse_unreadable
    from eval_encoder.probe.record import Costs
    from training.distributed import naming_peers, process_group

    started = time.perf_counter()
    with naming_peers(), process_group(PATIENCE_S) as ranks:
        log = setup_logging(ranks.rank)
        if ignored:
            log.info("without effect here: %s", ", ".join(ignored))
        for note in notes:
            log.info("%s", note)
        encoder = build_encoder(
            config.input, config.model_name, config.model_weight, config.heads.seed
        ).to(ranks.device)
        train, val = (ClipFeatures(clips, config, encoder, ranks.device) for clips in lists)
        _tell(train, val, log)
        for features in (train, val):
            features.find_missing(ranks.rank, ranks.world_size)
        refuse_unreadable(train, val, config.allow_partial)
        judge = _neighbours if config.heads.kind == "knn" else _bank
        record, confusion = judge(config, encoder.width, train, val, ranks, log)
        tokens = val.tokens_per_clip()
        if ranks.is_main:
            costs = Costs(
                wall_s=round(time.perf_counter() - started, 2),
                encoder_s=round(train.encode_s + val.encode_s, 2),
                tokens_per_clip=round(tokens, 1),
                encoder_passes=train.passes + val.passes,
                world_size=ranks.world_size,
                device=ranks.device.type,
            )
            record["notes"] = notes
            _report(config, record, confusion, costs, encoder.sha256, train, val)
        dist.barrier()


def _bank(config, width, train, val, ranks, log):
    """(record, confusion) of heads that are trained."""
    from eval_encoder.probe.record import heads_of, summarise
    from eval_encoder.probe.trainer import ProbeTrainer

    with _board(config, ranks) as board:
        history = ProbeTrainer(config, width, train, val, ranks, log, board).run()
    record = summarise(config, history, {"train": len(train.clips), "val": len(val.clips)})
    heads = heads_of(history, (record["chosen"]["lr"], record["chosen"]["weight_decay"]))
    return record, history.last.confusion(heads)


def _neighbours(config, width, train, val, ranks, log):
    """(record, confusion) of nearest neighbours."""
    from eval_encoder.probe.features import refuse_unreadable
    from eval_encoder.probe.neighbors import judge_neighbours
    from eval_encoder.probe.record import summarise_neighbours

    share, batch_size = config.heads.holdout, config.heads.batch_size
    k, held, judged = judge_neighbours(train, val, share, batch_size, ranks)
    refuse_unreadable(train, val, config.allow_partial)
    counts = {"train": len(train.clips), "val": len(val.clips)}
    record = summarise_neighbours(config, k, held, judged, counts)
    return record, judged.confusion([0])


@contextlib.contextmanager
def _board(config, ranks):
    if not ranks.is_main:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(config.report_dir / "tensorboard" / time.strftime("%Y%m%d-%H%M%S")))
    yield board
    board.close()


def _tell(train, val, log) -> None:
    """Where clips come from; a probe that would read its two lists in two ways is refused."""
    from eval_encoder.probe.benchmarks import shared_files, unseen_classes

    if train.about != val.about:
        raise ValueError(
            f"the training list is read from {train.about}, the validation list from {val.about}: "
            "pack both alike or neither"
        )
    log.info("clips from %s", train.about)
    unseen = unseen_classes(train.clips, val.clips)
    if unseen:
        log.warning("classes %s have validation clips but no training clip", unseen)
    shared = shared_files(train.clips, val.clips)
    if shared:
        log.warning("%d clips are in both lists, for example %s", len(shared), shared[0])


def _report(config, record, confusion, costs, encoder_sha256: str, train, val) -> None:
    from eval_encoder.probe.benchmarks import shared_files
    from eval_encoder.probe.compare import half_interval
    from eval_encoder.probe.record import write_results

    unreadable = {"train": train.unreadable, "val": val.unreadable}
    facts = {"unreadable": unreadable, "encoder_sha256": encoder_sha256, "read_from": train.about}
    facts["clips_in_both_lists"] = len(shared_files(train.clips, val.clips))
    record = write_results(config, record, confusion, costs, facts, classes=val.clips.classes)
    metric, last = record["metric"], record["last_epoch"]
    missed = len(train.unreadable | val.unreadable)
    partial = f" without {missed} unreadable clips" if missed else ""
    chosen = ", ".join(f"{k} {v:g}" for k, v in record["chosen"].items() if k != "held_out")
    show(
        f"{record['dataset']} {config.input.family}: {metric.replace('top1', 'top-1')} "
        f"{last[metric]:.2f} ± {half_interval(last):.2f} at the last epoch, {chosen}{partial}"
    )


if __name__ == "__main__":
    sys.exit(main())
