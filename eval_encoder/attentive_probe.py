"""Entry point of the attentive probe: `torchrun
eval_encoder/attentive_probe.py --dataset NAME ...`.

The encoder is frozen and runs once per clip; a bank of small heads learns on its tokens. Run by
path, so this file holds no definition that another module needs.
"""

import sys

from eval_encoder.probe_config import build_config, build_parser, idle_flags
from eval_encoder.probe_datasets import find_benchmark, read_lists


def main(argv: list[str] | None = None) -> int:
    """Run one probe; returns the exit code (1 for a user's mistake)."""
    args = build_parser().parse_args(argv)
    try:
        config = build_config(args)
        lists = read_lists(config.dataset, config.data_root, config.train_csv, config.val_csv)
        return _probe(config, lists, idle_flags(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _probe(config, lists, ignored: list[str]) -> int:
    import torch.distributed as dist

    from eval_encoder.probe_encoders import build_encoder
    from eval_encoder.probe_loader import ClipTokens
    from eval_encoder.probe_results import write_results
    from eval_encoder.probe_trainer import train_heads
    from training.distributed import all_gather_json, process_group
    from training.log import setup_logging

    with process_group() as ranks:
        log = setup_logging(ranks.rank)
        if ignored:
            log.info("without effect here: %s", ", ".join(ignored))
        encoder = build_encoder(config.model_name, config.model_weight, config.seed).to(
            ranks.device
        )
        train, val = (
            ClipTokens(clips, config, encoder, ranks.device, ranks.rank, ranks.world_size)
            for clips in lists
        )
        for clips in (train, val):
            clips.warm_up(config.batch_size)
        unreadable = {}
        for part in all_gather_json({**train.unreadable, **val.unreadable}):
            unreadable.update(part)
        if unreadable and not config.allow_partial:
            listing = "\n  ".join(
                f"{name}: {reason}" for name, reason in sorted(unreadable.items())[:50]
            )
            raise ValueError(
                f"{len(unreadable)} clips cannot be judged, so there is no accuracy:\n  {listing}\n"
                "repair or remove them, or accept the rest with --allow-partial"
            )
        num_classes = find_benchmark(config.dataset).num_classes
        history = train_heads(
            config, num_classes, encoder.config.hidden_size, train, val, ranks, log
        )
        if ranks.is_main:
            counts = {clips.split: len(clips.names) for clips in lists}
            record = write_results(config, history, counts, unreadable)
            last, best = record["last_epoch"], record["best_epoch"]
            partial = f" without {len(unreadable)} unreadable clips" if unreadable else ""
            print(
                f"{config.dataset} {config.family}: top-1 {last['top1']:.2f} at the last epoch "
                f"(best {best['top1']:.2f} at epoch {best['epoch']}), lr {last['lr']:g}{partial}"
            )
        dist.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
